"""PyTorch tensors in the transforms of `torch.func` and in forward mode; and second derivatives.

Two functions of autograd say how the passes are differentiated, forward and backward, and how they
are vectorised: the axis of `vmap` joins the batch, and one call of a kernel serves all entries. The
passes themselves are the kernels. Their derivatives, beyond the first backward pass, are in
`derivatives`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilefold.frontends import tensors
from tilefold.frontends.derivatives.attention import move, pull, push
from tilefold.frontends.derivatives.sums import nested
from tilefold.masks.expression import names
from tilefold.masks.repeated import repeated
from tilefold.problems.request import LAYOUTS, Request
from tilefold.scores.score import Sizes

Three = tuple[Tensor, Tensor, Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, request: Request) -> Three:
    """The results of `operators.attention`, differentiable in every way."""
    apply: Any = _Attention.apply
    results: Three = apply(q, k, v, request)
    return results


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    request: Request,
    dlse: Tensor | None,
    lse_low: Tensor | None,
) -> Three:
    """The results of `operators.attention_backward`, differentiable in every way."""
    apply: Any = _Gradients.apply
    results: Three = apply(do, q, k, v, o, lse, request, dlse, lse_low)
    return results


class _Attention(torch.autograd.Function):
    """The forward pass. The last result is no function of the inputs to autograd."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, request: Request) -> Three:
        results: Three = _passes().attention(q, k, v, request)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
        *given, ctx.request = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, *output)
        ctx.save_for_forward(*given, *output)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> Any:
        q, k, v, o, lse, low = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        kept = low if low.numel() else None
        gradients = attention_backward(do, q, k, v, o, lse, ctx.request, dlse, kept)
        return (*gradients, None)

    @staticmethod
    @nested
    def jvp(ctx: Any, saved: Sequence[Any], *tangents: Tensor | None) -> Any:
        *given, _ = saved
        return (*move(given, ctx.request, tangents[:3]), None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return fold(attention, info, in_dims, *inputs)


class _Gradients(torch.autograd.Function):
    """The backward pass."""

    @staticmethod
    def forward(*inputs: Any) -> Three:
        results: Three = _passes().attention_backward(*inputs)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
        save_backward(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:6], inputs[7])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> Any:
        return second_gradients(ctx, *slopes)

    @staticmethod
    @nested
    def jvp(ctx: Any, saved: Sequence[Any], *tangents: Tensor | None) -> Any:
        *given, dlse = saved
        return push(given, dlse, ctx.request, tangents[:6], tangents[7])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return fold(attention_backward, info, in_dims, *inputs)


def save_backward(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    """Save what the derivative of the backward pass needs."""
    *given, ctx.request, dlse, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, dlse)


def second_gradients(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments of the backward pass."""
    if all(slope is None for slope in slopes):
        return (None,) * 9
    *given, dlse = ctx.saved_tensors
    of_do, of_dlse, *rest = pull(given, dlse, ctx.request, slopes)
    return (of_do, *rest, None, None if dlse is None else of_dlse, None)


def fold(call: Callable[..., Three], info: Any, in_dims: Any, *inputs: Any) -> Any:
    """The pass `call` of each entry of an axis, which joins the batch."""
    size = info.batch_size
    folded: list[Any] = [
        _fold(x, dim, size) if isinstance(x, Tensor) else x
        for x, dim in zip(inputs, in_dims, strict=True)
    ]
    place = next(n for n, x in enumerate(inputs) if isinstance(x, Request))
    queries = folded[1:3] if place == 6 else folded[:2]
    folded[place] = _repeated(inputs[place], queries, size)
    return tuple([_unfold(x, size) for x in call(*folded)]), (0, 0, 0)


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """An axis as a part of the batch, its slower part; a tensor without the axis is repeated."""
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _unfold(x: Tensor, size: int) -> Tensor:
    return x.reshape(size, x.shape[0] // size if size else 0, *x.shape[1:])


def _repeated(request: Request, given: list[Tensor], size: int) -> Request:
    """The request for `size` batches: a rule that asks for the batch counts within one."""
    if request.score is not None and "b" in names(request.score.expression(Sizes(1, 1, 1, 1))):
        raise NotImplementedError(
            "vmap of attention with a score that asks for b is not implemented: put the axis into"
            " the batch, and count b within it"
        )
    axis = LAYOUTS[request.layout][2]
    batch = given[0].shape[0] // max(1, size)
    mask = repeated(request.mask, batch, *[x.shape[axis] for x in given[:2]])
    make, options = request.__reduce__()
    same: Request = make(mask, *options[1:])
    return same


class _Direct:
    """The passes without operators, which PyTorch has from 2.12 on."""

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, request: Request) -> Three:
        o, lse, low = tensors.forward_low(q, k, v, request)
        return o, lse, lse.new_empty(0) if low is None else low

    @staticmethod
    def attention_backward(*inputs: Any) -> Three:
        do, q, k, v, o, lse, request, dlse, low = inputs
        dq, dk, dv = tensors.backward(do, q, k, v, o, lse, request, low, dlse)
        return dq, dk, dv


def _passes() -> Any:
    if torch.__version__ < "2.12":
        return _Direct
    from tilefold.frontends import operators

    return operators
