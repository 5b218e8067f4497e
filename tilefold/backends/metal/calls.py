"""Attention and its gradients on a machine: arrays are checked, and bound to the kernels of a plan.

The one way from arrays to launches, for tensors on an Apple GPU, for lists of commands and for the
emulator, on tensors and NumPy arrays alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tilefold.backends.metal.dispatch import (
    WIDEST_MOVE,
    Array,
    Call,
    Machine,
    Strides,
    alignment_of,
    check_written,
    prepare,
    strides_of,
)
from tilefold.backends.metal.plan import plan
from tilefold.masks.position_rules import Rule
from tilefold.problems.attention import (
    LAYOUTS,
    Problem,
    Shape,
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

RESULTS = {"forward": ("o", "lse"), "backward": ("dq", "dk", "dv")}
"""What an operation writes."""

_EMPTY = {"o": 0.0, "lse": -np.inf, "dq": 0.0, "dk": 0.0, "dv": 0.0}
"""The results where no query meets a key."""


@dataclass(frozen=True, eq=False)
class Bound:
    """A call with its operands; without a `call` no query meets a key, and nothing is computed."""

    call: Call | None
    operands: Mapping[str, Array]
    results: Mapping[str, Array]

    def run(self) -> tuple[Array, ...]:
        """Launch the kernels and return the arrays that they write."""
        if self.call is None:
            for name, array in self.results.items():
                array[...] = _EMPTY[name]
        else:
            self.call.run({**self.operands, **self.results})
        return tuple(self.results.values())


@dataclass(frozen=True, eq=False)
class Known:
    """What follows from the shapes, strides and types of a call's inputs, found once.

    `call` is for results that are contiguous in the layout.
    """

    problem: Problem
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    call: Call | None


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
    given = {"q": q, "k": k, "v": v}
    return _bind(machine, "forward", given, mask, scale, layout, results)


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
    given = {"q": q, "k": k, "v": v, "do": do, "o": o, "lse": lse}
    return _bind(machine, "backward", given, mask, scale, layout, results)


def ready(machine: Machine, problem: Problem, operation: str, layout: str) -> None:
    """Plan a problem of contiguous arrays and compile its kernels; see `tilefold.compile_async`."""
    q, k, v = shapes_qkv(problem, layout)
    o, lse = shape_o(problem, layout), shape_lse(problem)
    shapes = {"q": q, "k": k, "v": v, "o": o, "lse": lse}
    if operation == "backward":
        shapes |= {"do": o, "dq": q, "dk": k, "dv": v}
    if not problem.empty:
        strides = {name: contiguous(shape) for name, shape in shapes.items()}
        _prepare(machine, problem, operation, layout, strides, WIDEST_MOVE)


def dtype_of(array: Array) -> str:
    """The name of an array's type."""
    return str(getattr(array.dtype, "name", array.dtype)).removeprefix("torch.")


def _bind(
    machine: Machine,
    operation: str,
    given: dict[str, Array],
    mask: Rule,
    scale: float | None,
    layout: str,
    results: Sequence[Array | None],
) -> Bound:
    machine.check(**given)
    if "lse" in given:
        given["lse"] = _packed(given["lse"])
    forms = [(x.shape, strides_of(name, x), x.dtype) for name, x in given.items()]
    alignment = alignment_of(given)
    key = (operation, mask, scale, layout, alignment, *forms)
    known = machine.kept.calls.get(key)
    if known is None:
        known = _know(machine, operation, given, mask, scale, layout, alignment)
        size = known.call.plan.data_bytes if known.call else 0
        known = machine.kept.calls.put(key, known, size)
    made: dict[str, Array] = {}
    call = known.call
    for name, shape, dtype, array in zip(
        RESULTS[operation], known.shapes, known.dtypes, results, strict=True
    ):
        if array is None:
            made[name] = _empty(given["q"], shape, dtype)
            continue
        _check_result(machine, name, array, shape, dtype)
        made[name] = array
    if call and any(array is not None for array in results):
        every = {**given, **made}
        strides = {name: strides_of(name, array) for name, array in every.items()}
        call = _prepare(machine, known.problem, operation, layout, strides, alignment_of(every))
    return Bound(call, given, made)


def _know(
    machine: Machine,
    operation: str,
    given: Mapping[str, Array],
    mask: Rule,
    scale: float | None,
    layout: str,
    alignment: int,
) -> Known:
    """Checks the inputs, and prepares the call unless it is empty."""
    problem = _problem(given, mask, scale, layout)
    shapes: tuple[Shape, ...] = shape_o(problem, layout), shape_lse(problem)
    dtypes: tuple[str, ...] = problem.dtype, LSE
    if operation == "backward":
        check_lse(dtype_of(given["lse"]), problem.dtype)
        for name, shape in zip(("do", "o", "lse"), (shapes[0], *shapes), strict=True):
            check_shape(name, tuple(given[name].shape), shape)
        shapes, dtypes = shapes_qkv(problem, layout), (problem.dtype,) * 3
    if problem.empty:
        return Known(problem, shapes, dtypes, None)
    strides = {name: strides_of(name, array) for name, array in given.items()}
    strides |= {
        name: contiguous(shape) for name, shape in zip(RESULTS[operation], shapes, strict=True)
    }
    call = _prepare(machine, problem, operation, layout, strides, alignment)
    return Known(problem, shapes, dtypes, call)


def _problem(given: Mapping[str, Array], mask: Rule, scale: float | None, layout: str) -> Problem:
    """What is asked. Products of float32 are in float32 whatever the precision."""
    check_layout(layout)
    dtype = common_dtype({name: dtype_of(x) for name, x in given.items() if name != "lse"})
    if dtype == "float64":
        raise NotImplementedError(
            "q is of float64, which Apple GPUs do not have: pass float32, or NumPy arrays or"
            " tensors on the CPU to tilefold.attention"
        )
    q, k, v = (tuple(given[name].shape) for name in ("q", "k", "v"))
    return describe(q, k, v, dtype, scale, mask, layout, "highest")


def _check_result(machine: Machine, name: str, array: Array, shape: Shape, dtype: str) -> None:
    """Raises for an array that is to hold a result and cannot."""
    called = "out" if name == "o" else name
    machine.check(**{called: array})
    check_shape(called, tuple(array.shape), shape)
    if dtype_of(array) != dtype:
        raise TypeError(f"{called} must be of {dtype}, got {dtype_of(array)}")
    check_written(called, array)
    if name == "lse" and not _is_packed(array):
        raise ValueError(f"{called} must be contiguous, got strides {strides_of(called, array)}")


def _empty(like: Array, shape: Shape, dtype: str) -> Array:
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    import torch

    return like.new_empty(shape, dtype=getattr(torch, dtype))


def _is_packed(array: Array) -> bool:
    if isinstance(array, np.ndarray):
        return array.flags.c_contiguous
    return bool(array.is_contiguous())


def _packed(array: Array) -> Array:
    """The array, or a contiguous copy."""
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array)
    return array.contiguous()


def _prepare(
    machine: Machine,
    problem: Problem,
    operation: str,
    layout: str,
    strides: Mapping[str, Strides],
    alignment: int,
) -> Call:
    axes = LAYOUTS[layout]
    canonical = {
        name: found if name == "lse" else tuple([found[axis] for axis in axes])
        for name, found in strides.items()
    }
    return prepare(plan(problem, machine.family, operation), machine, canonical, alignment)
