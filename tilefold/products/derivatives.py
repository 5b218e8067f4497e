"""Gradients and tangents of a product of tensors, made of products.

With z = alpha op(a) op(b) + beta c + bias and y = activation(z), gradients are products again:

    dz = dy activation'(z)    da = alpha dz op(b)^T    db = alpha op(a)^T dz    dc = beta dz

and that of the bias is a sum of dz. With a gate, y = activation(z) g and g = alpha op(a) op(gate):
then dz = dy g activation'(z) and dg = dy activation(z). z and g are computed again, not saved. All
of it is made of differentiable operations, so there are derivatives of any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tilefold.backends.arrays.torch import dtype_of
from tilefold.frontends.torch.batched import mapped
from tilefold.problems.matmul import sums
from tilefold.products.plans import GIVEN, RESULTS, Options

Given = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""a, b, c, bias and gate."""

Multiply = Callable[[dict[str, Tensor], Options], Tensor]
"""What makes a product of tensors by their names."""

OF_RESULT = ("relu", "sigmoid", "tanh")
"""Activations whose slope is a function of their value."""


def named(a: Tensor, b: Tensor, *rest: Tensor | None) -> dict[str, Tensor]:
    """The operands by name, without those that are not given."""
    pairs = zip(GIVEN, (a, b, *rest), strict=False)
    return {name: x for name, x in pairs if x is not None}


def name_of(kind: torch.dtype) -> str:
    """The name of a type."""
    return str(kind).removeprefix("torch.")


def sums_of(a: Tensor, b: Tensor) -> torch.dtype:
    """The type of the sums of a product; of integers float32, as slopes are no integers."""
    kind: torch.dtype = getattr(torch, sums(dtype_of(a), dtype_of(b)))
    return kind if kind.is_floating_point else torch.float32


def anew(options: Options, gate: Tensor | None) -> bool:
    """True if derivatives need z, and compute it."""
    return gate is not None or options.activation not in (None, *OF_RESULT)


_aten = torch.ops.aten

VALUES: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""The activations as torch has them."""


def _through_silu(d: Tensor, z: Tensor) -> Tensor:
    """A slope times the derivative of silu, by differentiable operations."""
    s = torch.sigmoid(z)
    return d * (s * (1 + z * (1 - s)))


_SLOPES: dict[str | None, Callable[[Tensor, Tensor], Tensor]] = {
    None: lambda d, z: d,
    "relu": lambda d, y: _aten.threshold_backward(d, y, 0),
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda d, z: _aten.gelu_backward(d, z, approximate="tanh"),
    "silu": _through_silu,
    "sigmoid": _aten.sigmoid_backward,
    "tanh": _aten.tanh_backward,
}
"""A slope times the derivative of an activation, at z, or at y for those of `OF_RESULT`."""


@mapped
def gradients(
    multiply: Multiply,
    dy: Tensor,
    saved: tuple[Any, ...],
    options: Options,
    like: tuple[Any, ...],
    wants: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of a, b, c, bias and gate that are wanted.

    `saved` are these and y, or None for what is not needed. `like` are the shapes and types of c
    and bias.
    """
    a, b, _, _, gate, y = saved
    kind, name, dg = sums_of(a, b), options.activation, None
    if not anew(options, gate):
        dz = _SLOPES[name](dy, y)
    else:
        at, y, g = _again(multiply, saved, options)
        dz = dy.to(kind)
        if g is not None:
            dz, dg = dz * g, (dz * y).to(dy.dtype)
        dz = _SLOPES[name](dz, at).to(dy.dtype)
    of_a = of_b = of_c = of_bias = of_gate = None
    if wants[0]:
        of_a = _of_a(multiply, dz, b, options, a.dtype if dg is None else kind, None)
        if dg is not None:
            of_a = _of_a(multiply, dg, gate, options, a.dtype, of_a)
        of_a = _summed(of_a, tuple(a.shape), a.dtype, kind)
    if wants[1]:
        of_b = _of_b(multiply, dz, a, b, options, kind)
    if wants[2] and options.beta:
        of_c = _summed(dz, like[0][0], like[0][1], kind) * options.beta
    if wants[3]:
        of_bias = _summed(dz, like[1][0], like[1][1], kind)
    if wants[4]:
        of_gate = _of_b(multiply, dg, a, gate, options, kind)
    return of_a, of_b, of_c, of_bias, of_gate


@mapped
def tangent(
    multiply: Multiply,
    slopes: tuple[Tensor | None, ...],
    saved: tuple[Any, ...],
    options: Options,
    result: tuple[tuple[int, ...], torch.dtype],
) -> Tensor:
    """The tangent of y, of those of a, b, c, bias and gate; None is 0. `result` is like y."""
    a, b, _, _, gate, y = saved
    of_a, of_b, of_c, of_bias, of_gate = slopes
    (shape, dtype), kind = result, sums_of(a, b)
    last = options._replace(activation=None, beta=0.0, dtype=None)

    def of_product(right: Tensor, slope: Tensor | None) -> Tensor:
        found: Tensor = a.new_zeros(shape, dtype=kind)
        for one, two in ((of_a, right), (a, slope)):
            if one is not None and two is not None:
                found = found + multiply(named(one, two), last)
        return found

    dz = of_product(b, of_b)
    if of_c is not None and options.beta:
        dz = dz + options.beta * of_c
    if of_bias is not None:
        dz = dz + of_bias
    if not anew(options, gate):
        return _SLOPES[options.activation](dz.to(dtype), y)
    at, y, g = _again(multiply, saved, options)
    made: Tensor = _SLOPES[options.activation](dz.to(kind), at)
    if g is not None:
        made = made * g + y * of_product(gate, of_gate)
    return made.to(dtype)


def _again(
    multiply: Multiply, saved: tuple[Any, ...], options: Options
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where the slope of the activation is taken, its value, and the sums of the gate."""
    a, b, c, bias, gate, _ = saved
    name, last = options.activation, options._replace(activation=None, dtype=name_of(sums_of(a, b)))
    z = multiply(named(a, b, c, bias), last)
    g = None if gate is None else multiply(named(a, gate), last._replace(beta=0.0))
    y = VALUES[name](z)
    return y if name in OF_RESULT else z, y, g


def _product(
    multiply: Multiply, a: Tensor, b: Tensor, kind: torch.dtype, c: Any = None, **options: Any
) -> Tensor:
    """A product of the type `kind`."""
    kinds, wanted = RESULTS[sums(dtype_of(a), dtype_of(b))], name_of(kind)
    dtype = wanted if wanted in kinds else kinds[0]
    return multiply(named(a, b, c), Options(dtype=dtype, **options)).to(kind)


def _of_a(
    multiply: Multiply, dz: Tensor, b: Tensor, options: Options, kind: torch.dtype, add: Any
) -> Tensor:
    """The gradient of a for each matrix of the batch, and `add`."""
    more: dict[str, Any] = {"c": add, "alpha": options.alpha, "beta": float(add is not None)}
    if options.transpose_a:
        more |= {"transpose_a": options.transpose_b, "transpose_b": True}
        return _product(multiply, b, dz, kind, **more)
    return _product(multiply, dz, b, kind, transpose_b=not options.transpose_b, **more)


def _of_b(
    multiply: Multiply, dz: Any, a: Tensor, b: Tensor, options: Options, kind: torch.dtype
) -> Tensor:
    """The gradient of b: one product, of all rows of a batch, where b is a matrix."""
    turned = options.transpose_a
    if b.dim() == 2 < a.dim():
        a = (a.mT if turned else a).flatten(0, -2)
        dz, turned = dz.flatten(0, -2), False
    if options.transpose_b:
        flips = {"transpose_a": True, "transpose_b": turned}
        found = _product(multiply, dz, a, b.dtype, alpha=options.alpha, **flips)
    else:
        found = _product(multiply, a, dz, b.dtype, alpha=options.alpha, transpose_a=not turned)
    return _summed(found, tuple(b.shape), b.dtype, kind)


def _summed(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, kind: torch.dtype) -> Tensor:
    """The gradient of an operand that broadcasts to x; sums are of the type `kind`."""
    front = x.dim() - len(shape)
    axes = [front + i for i, n in enumerate(shape) if n == 1 != x.shape[front + i]]
    axes = [*range(front), *axes]
    return (x.sum(axes, keepdim=True, dtype=kind).reshape(shape) if axes else x).to(dtype)
