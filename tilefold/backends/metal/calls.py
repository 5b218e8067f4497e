"""Attention and its gradients on a machine: arrays are checked, and bound to the kernels of a plan.

The one way from arrays to launches, for tensors on an Apple GPU, for lists of commands and for the
executor, on tensors and NumPy arrays alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tilefold.backends.metal.dispatch import Array, Call, Machine, Strides, prepare, strides_of
from tilefold.backends.metal.plan import plan
from tilefold.mask import Rule
from tilefold.problem import (
    LAYOUTS,
    Problem,
    check_layout,
    check_lse,
    check_shape,
    common_dtype,
    contiguous,
    describe,
    shape_lse,
    shape_o,
    shapes_qkv,
)

LSE = "float32"
"""The type of lse, and of all that kernels compute: a GPU of Apple's has no float64."""


@dataclass(frozen=True, eq=False)
class Bound:
    """A call with its operands; without a `call` no query meets a key, and nothing is computed."""

    call: Call | None
    operands: Mapping[str, Array]
    results: tuple[Array, ...]
    empty: tuple[float, ...]

    def run(self) -> tuple[Array, ...]:
        """Launch the kernels and return the arrays that they write."""
        if self.call is None:
            for array, value in zip(self.results, self.empty, strict=True):
                array[...] = value
        else:
            self.call.run(self.operands)
        return self.results


def forward(
    machine: Machine,
    q: Array,
    k: Array,
    v: Array,
    mask: Rule,
    scale: float | None,
    layout: str,
    results: Sequence[Array | None] = (None, None),
) -> Bound:
    """The call that writes o and lse, into arrays that it makes unless `results` names them."""
    machine.check(q=q, k=k, v=v)
    problem = _problem(q, k, v, mask, scale, layout)
    shapes = shape_o(problem, layout), shape_lse(problem)
    dtypes = problem.dtype, LSE
    made = _results(machine, ("out", "lse"), q, shapes, dtypes, results)
    operands = dict(zip(("q", "k", "v", "o", "lse"), (q, k, v, *made), strict=True))
    return Bound(_call(machine, problem, "forward", layout, operands), operands, made, (0, -np.inf))


def backward(
    machine: Machine,
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    mask: Rule,
    scale: float | None,
    layout: str,
    results: Sequence[Array | None] = (None, None, None),
) -> Bound:
    """The call that writes dq, dk and dv; as `forward`."""
    machine.check(do=do, q=q, k=k, v=v, o=o, lse=lse)
    problem = _problem(q, k, v, mask, scale, layout, do=do, o=o)
    check_lse(dtype_of(lse), problem.dtype)
    for name, array in (("do", do), ("o", o)):
        check_shape(name, tuple(array.shape), shape_o(problem, layout))
    check_shape("lse", tuple(lse.shape), shape_lse(problem))
    shapes = shapes_qkv(problem, layout)
    made = _results(machine, ("dq", "dk", "dv"), q, shapes, (problem.dtype,) * 3, results)
    names = ("do", "q", "k", "v", "o", "lse", "dq", "dk", "dv")
    operands = dict(zip(names, (do, q, k, v, o, _packed(lse), *made), strict=True))
    return Bound(_call(machine, problem, "backward", layout, operands), operands, made, (0, 0, 0))


def ready(machine: Machine, problem: Problem, operation: str, layout: str) -> None:
    """Plan a problem of contiguous arrays and compile its kernels; see `tilefold.compile_async`."""
    q, k, v = shapes_qkv(problem, layout)
    o, lse = shape_o(problem, layout), shape_lse(problem)
    shapes = {"q": q, "k": k, "v": v, "o": o, "lse": lse}
    if operation == "backward":
        shapes |= {"do": o, "dq": q, "dk": k, "dv": v}
    if not problem.empty:
        strides = {name: contiguous(shape) for name, shape in shapes.items()}
        _prepare(machine, problem, operation, layout, strides)


def dtype_of(array: Array) -> str:
    """The name of an array's type."""
    return str(getattr(array.dtype, "name", array.dtype)).removeprefix("torch.")


def _problem(
    q: Array, k: Array, v: Array, mask: Rule, scale: float | None, layout: str, **others: Array
) -> Problem:
    """What is asked. Products of float32 are in float32 whatever the precision."""
    check_layout(layout)
    given = {"q": q, "k": k, "v": v, **others}
    dtype = common_dtype({name: dtype_of(array) for name, array in given.items()})
    if dtype == "float64":
        raise NotImplementedError(
            "q is of float64, which Apple GPUs do not have: pass float32, or NumPy arrays or"
            " tensors on the CPU to tilefold.attention"
        )
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    return describe(*shapes, dtype, scale, mask, layout, "highest")


def _results(
    machine: Machine,
    names: Sequence[str],
    like: Array,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[str],
    given: Sequence[Array | None],
) -> tuple[Array, ...]:
    """The arrays that are written: those given, checked, or new ones beside `like`."""
    made = []
    for name, shape, dtype, array in zip(names, shapes, dtypes, given, strict=True):
        if array is None:
            made.append(_empty(like, shape, dtype))
            continue
        machine.check(**{name: array})
        check_shape(name, tuple(array.shape), shape)
        if dtype_of(array) != dtype:
            raise TypeError(f"{name} must be of {dtype}, got {dtype_of(array)}")
        if name == "lse" and strides_of(array) != contiguous(shape):
            raise ValueError(f"{name} must be contiguous, got strides {strides_of(array)}")
        made.append(array)
    return tuple(made)


def _empty(like: Array, shape: tuple[int, ...], dtype: str) -> Array:
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    import torch

    return like.new_empty(shape, dtype=getattr(torch, dtype))


def _packed(array: Array) -> Array:
    """The array, or a contiguous copy."""
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array)
    return array.contiguous()


def _call(
    machine: Machine, problem: Problem, operation: str, layout: str, operands: Mapping[str, Array]
) -> Call | None:
    """The prepared call, kept for the next one of operands that lie alike."""
    if problem.empty:
        return None
    strides = {name: strides_of(array) for name, array in operands.items()}
    key = (problem, operation, layout, *strides.values())
    found = machine.kept.calls.get(key)
    if found is None:
        made = _prepare(machine, problem, operation, layout, strides)
        found = machine.kept.calls.put(key, made, made.plan.data_bytes)
    return found


def _prepare(
    machine: Machine,
    problem: Problem,
    operation: str,
    layout: str,
    strides: Mapping[str, Strides],
) -> Call:
    axes = LAYOUTS[layout]
    canonical = {
        name: found if name == "lse" else tuple([found[axis] for axis in axes])
        for name, found in strides.items()
    }
    return prepare(plan(problem, machine.family, operation), machine, canonical)
