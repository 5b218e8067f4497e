"""From arrays to launches, the one way of all backends and frameworks.

A call is looked up by the machine, the request, and how its arrays lie. What is found runs at once:
results are made and kernels launched. Else the arrays are checked, the problem is planned and its
kernels are compiled, once, for all later calls that differ in data alone.

    accept -> look up -> (describe -> check -> prepare -> keep) -> make results -> launch
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tilefold.backends.protocols import (
    PASSES,
    Array,
    Arrays,
    Axes,
    Machine,
    Pass,
    Placement,
    Prepared,
    Strides,
    is_extra,
    spoken,
)
from tilefold.backends.registry import backend
from tilefold.common import generation
from tilefold.common.copies import changed
from tilefold.common.lru import LruCache
from tilefold.masks.given import given_of
from tilefold.masks.tables import Given, Input
from tilefold.problems.attention import (
    LIMIT,
    STATISTICS,
    Problem,
    Shape,
    check_lse,
    check_seeds,
    check_shape,
    check_sinks,
    contiguous,
    describe,
    shape_lse,
    shape_mass,
    shape_o,
    shapes_qkv,
)
from tilefold.problems.request import LAYOUTS, Request

EMPTY = {"lse": float("-inf"), "max": float("-inf")}
"""The results where no query meets a key; the others are 0, and lse that of sinks."""


@dataclass(frozen=True, eq=False)
class Call:
    """The consequences of a request and of how arrays lie: results to make, kernels to launch.

    `results` are the shapes and native types of the arrays that the call writes. Without a
    `prepared` plan no query meets a key, and nothing is computed.
    """

    problem: Problem
    made_for: Pass
    arrays: Arrays
    results: tuple[tuple[Shape, Any], ...]
    prepared: Prepared | None


calls: LruCache[Call] = LruCache(most=128, most_bytes=256 * 2**20)
"""The newest calls of all backends, within 256 MiB of their plans' data. Nothing else keeps any."""

_newest: LruCache[Call] = LruCache(most=64, most_bytes=2**24)
"""The newest forward call of each problem, whatever its keys: a call with more keys begins here."""

_STATISTICS = ("lse", "lse_low", "dlse", "max")
"""Arrays with a number for each query, in the type of the sums."""


def run(
    machine: Machine, arrays: Arrays, wanted: Pass, given: tuple[Array, ...], request: Request
) -> tuple[Array, ...]:
    """The results of a pass of arrays in the order that it names."""
    call, given = _look_up(machine, arrays, wanted, given, request)
    results = arrays.empty(given[0], call.results)
    if call.prepared is None:
        fill(call, given, results)
    else:
        call.prepared.launch(arrays, given + results)
    return results


@dataclass(frozen=True, eq=False)
class Bound:
    """A call with its operands, to be run later."""

    call: Call
    given: tuple[Array, ...]
    results: tuple[Array, ...]

    def run(self) -> tuple[Array, ...]:
        """Write the results and return them."""
        call = self.call
        if call.prepared is None:
            fill(call, self.given, self.results)
        else:
            call.prepared.launch(call.arrays, self.given + self.results)
        return self.results


def bind(
    machine: Machine,
    arrays: Arrays,
    wanted: Pass,
    given: tuple[Array, ...],
    request: Request,
    into: Sequence[Array | None],
) -> Bound:
    """The call of `run`, which writes into the arrays of `into`, or into new ones where None."""
    call, given = _look_up(machine, arrays, wanted, given, request)
    results = []
    for name, array, (shape, dtype) in zip(wanted.results, into, call.results, strict=True):
        if array is None:
            (array,) = arrays.empty(given[0], ((shape, dtype),))
        else:
            _check_result(machine, arrays, name, array, shape, call.problem)
        results.append(array)
    if call.prepared and any(array is not None for array in into):
        every = dict(zip(wanted.operands, (*given, *results), strict=True))
        strides = {name: arrays.strides(name, array) for name, array in every.items()}
        placement = _placement(strides, machine.alignment(every), LAYOUTS[request.layout])
        prepared = backend(machine.backend).prepare(machine, call.problem, wanted, placement)
        call = Call(call.problem, wanted, arrays, call.results, prepared)
    return Bound(call, given, tuple(results))


def fill(call: Call, given: tuple[Array, ...], results: tuple[Array, ...]) -> None:
    """Write the results where no query meets a key."""
    named = dict(zip(call.made_for.given, given, strict=True))
    for name, array in zip(call.made_for.results, results, strict=True):
        array[...] = EMPTY.get(name, 0.0)
        if name == "lse" and call.problem.sinks:
            for head, sinks in enumerate(named["sinks"].tolist()):
                array[:, head] = _log_sum(sinks)
        if name == "dsinks" and "dlse" in named:
            for head, sinks in enumerate(named["sinks"].tolist()):
                lse, dlse = (named[it][:, head].reshape(-1).tolist() for it in ("lse", "dlse"))
                for number, sink in enumerate(sinks):
                    array[head, number] = _sink_gradient(sink, lse, dlse)


def _log_sum(numbers: list[float]) -> float:
    """The logarithm of the sum of their exponentials."""
    top = max(numbers)
    if not math.isfinite(top):
        return top
    return top + math.log(sum(math.exp(number - top) for number in numbers))


def _sink_gradient(sink: float, lse: list[float], dlse: list[float]) -> float:
    """The gradient of a sink, through the lse of queries that see nothing else."""
    if sink == -math.inf:
        return 0.0
    return sum(math.exp(sink - total) * change for total, change in zip(lse, dlse, strict=True))


def compile_ahead(machine: Machine, problem: Problem, operation: str, layout: str) -> None:
    """Plan a problem of contiguous arrays and compile its kernels: see `tilefold.compile_async`."""
    if problem.empty:
        return
    shapes = dict(zip(("q", "k", "v"), shapes_qkv(problem, layout), strict=True))
    shapes |= {"o": shape_o(problem, layout), "lse": shape_lse(problem)}
    shapes |= {"do": shapes["o"], "dq": shapes["q"], "dk": shapes["k"], "dv": shapes["v"]}
    more = {given.name: given.shape for given in problem.score.inputs} if problem.score else {}
    if problem.sinks:
        more["sinks"] = (problem.heads_q, problem.sinks)
    shapes |= more | {f"d{name}": shape for name, shape in more.items()} | {"seed": (1,)}
    gradients = tuple([f"d{name}" for name in more]) if operation == "backward" else ()
    wanted = PASSES[operation].plus((*more, *["seed"] * bool(problem.dropout)), gradients)
    strides = {name: contiguous(shapes[name]) for name in wanted.operands}
    placement = _placement(strides, machine.aligned, LAYOUTS[layout])
    found = backend(machine.backend)
    found.prepare(machine, found.admit(problem), wanted, placement).compile()


def _look_up(
    machine: Machine, arrays: Arrays, wanted: Pass, given: tuple[Array, ...], request: Request
) -> tuple[Call, tuple[Array, ...]]:
    """The call, made and kept if it is new, and its arrays as the machine accepts them."""
    given, alignment = machine.accept(arrays, wanted, given)
    key = (
        machine,
        wanted,
        request,
        generation.number,
        arrays,
        alignment,
        arrays.layout_key(given),
    )
    call = calls.get(key)
    if call is None:
        call = _new(key, given)
    return call, given


def _new(key: tuple[Any, ...], given: tuple[Array, ...]) -> Call:
    """A call that was not made before, or so long ago that it is kept no more, by its key."""
    machine, wanted, request, _, arrays, alignment, layouts = key
    # The number of keys often grows from call to call.
    grows, but_keys = wanted.operation == "forward", (*key[:-1], layouts[0], *layouts[3:])
    before = _newest.get(but_keys) if grows else None
    call = before and _with_keys(before, arrays, given, request.layout)
    if call is None:
        call = _call(machine, wanted, request, arrays, alignment, given)
    size = call.prepared.data_bytes if call.prepared else 0
    if grows:
        _newest.put(but_keys, call, size)
    return calls.put(key, call, size)


def _with_keys(before: Call, arrays: Arrays, given: tuple[Array, ...], layout: str) -> Call | None:
    """The call of these arrays, made from one whose keys and values differ in their number alone.

    None if they differ in more, or if the backend plans it from the beginning.
    """
    if before.prepared is None:
        return None
    named: dict[str, Array] = dict(zip(before.made_for.given, given, strict=True))
    axes, problem = LAYOUTS[layout], before.problem
    sizes = named["k"].shape
    length = sizes[axes[2]] if len(sizes) == len(axes) else 0
    if length >= LIMIT:
        return None
    rows = (problem.batch, problem.heads_kv, length)
    for name, dim in (("k", problem.dim), ("v", problem.dim_v)):
        canonical = (*rows, dim)
        if tuple(named[name].shape) != tuple([canonical[axis] for axis in axes]):
            return None
    if arrays.common_dtype({name: named[name] for name in ("q", "k", "v")}) != problem.dtype:
        return None
    for name, array in named.items():
        arrays.check_held(name, array)
    check_extra(arrays, named, before.problem)
    problem = changed(problem, len_k=length)
    problem.mask.check(problem.batch, problem.heads_q, problem.len_q, length)
    strides = {name: arrays.strides(name, named[name]) for name in ("k", "v")}
    prepared = before.prepared.with_keys(problem, _canonical(strides, axes))
    if prepared is None:
        return None
    return Call(problem, before.made_for, arrays, before.results, prepared)


def _call(
    machine: Machine,
    wanted: Pass,
    request: Request,
    arrays: Arrays,
    alignment: int,
    given: tuple[Array, ...],
) -> Call:
    """Checks the arrays, and prepares the call unless it is empty."""
    problem, shapes, results = described(machine, wanted, request, arrays, given)
    if problem.empty:
        return Call(problem, wanted, arrays, results, None)
    strides = {
        name: arrays.strides(name, array) for name, array in zip(wanted.given, given, strict=True)
    }
    strides |= {name: contiguous(shapes[name]) for name in wanted.results}
    placement = _placement(strides, alignment, LAYOUTS[request.layout])
    prepared = backend(machine.backend).prepare(machine, problem, wanted, placement)
    return Call(problem, wanted, arrays, results, prepared)


class Described(NamedTuple):
    """The problem of arrays that fit together, the shapes of all operands, and the results."""

    problem: Problem
    shapes: Mapping[str, Shape]
    results: tuple[tuple[Shape, Any], ...]


def described(
    machine: Machine, wanted: Pass, request: Request, arrays: Arrays, given: tuple[Array, ...]
) -> Described:
    """Checks the arrays of a pass; nothing is planned."""
    if "lse_low" in wanted.operands and not machine.keeps_low:
        raise NotImplementedError(f"kernels of {machine.backend} neither write nor read lse_low")
    if "dlse" in wanted.given and not machine.reads_dlse:
        raise NotImplementedError(
            f"the gradient of lse is not implemented on {machine.backend}: pass lse.detach() where"
            " none is wanted, or choose impl='composed'"
        )
    named: dict[str, Array] = dict(zip(wanted.given, given, strict=True))
    read: dict[str, Array] = {
        name: named[name] for name in ("q", "k", "v", "do", "o") if name in named
    }
    dtype = arrays.common_dtype(read)
    for name, array in named.items():
        arrays.check_held(spoken(name), array)
    statistics = [name for name in named if name in _STATISTICS]
    for name in statistics:
        check_lse(arrays.dtype_of(named[name]), dtype, name)
    q, k, v = (tuple(named[name].shape) for name in ("q", "k", "v" if "v" in named else "k"))
    on, layout = backend(machine.backend), request.layout
    problem = on.admit(describe(q, k, v, dtype, request))
    shapes = dict.fromkeys(("o", "do"), shape_o(problem, layout))
    shapes |= {**dict.fromkeys(_STATISTICS, shape_lse(problem)), "mass": shape_mass(problem)}
    check_extra(arrays, named, problem)
    for name in ("do", "o", *statistics):
        if name in named:
            check_shape(name, tuple(named[name].shape), shapes[name])
    shapes |= dict(zip(("dq", "dk", "dv"), shapes_qkv(problem, layout), strict=True))
    shapes |= {f"d{name}": tuple(named[name].shape) for name in named if is_extra(name)}
    dtypes = {f"d{name}": arrays.dtype_of(named[name]) for name in named if is_extra(name)}
    results = tuple(
        (shapes[name], arrays.native_dtype(named["q"], dtypes.get(name) or _dtype(name, dtype)))
        for name in wanted.results
    )
    return Described(problem, shapes, results)


def find(
    machine: Machine, arrays: Arrays, wanted: Pass, given: tuple[Array, ...], request: Request
) -> Call:
    """The call of arrays that lie like these, kept as that of `run` is."""
    return _look_up(machine, arrays, wanted, given, request)[0]


def check_extra(arrays: Arrays, named: Mapping[str, Array], problem: Problem) -> None:
    """Raises ValueError or TypeError for extra arrays that the problem cannot read.

    An array of a score or a mask must still be what it was when that was made.
    """
    for given in problem.score.inputs if problem.score else ():
        _check_unchanged(arrays, named, given, "score")
    for table in given_of(problem.mask):
        _check_unchanged(arrays, named, table, "mask")
    if "sinks" in named:
        check_sinks(tuple(named["sinks"].shape), arrays.dtype_of(named["sinks"]), problem)
    if "seed" in named:
        check_seeds(tuple(named["seed"].shape), arrays.dtype_of(named["seed"]))


def _check_unchanged(
    arrays: Arrays, named: Mapping[str, Array], given: Given | Input, what: str
) -> None:
    if given.name not in named:
        raise ValueError(f"the array {given.number} of {what} is missing: give one for each number")
    array = named[given.name]
    now = arrays.dtype_of(array), tuple(array.shape)
    if now != (given.dtype, given.shape):
        maker = "score" if what == "score" else "rule"
        raise ValueError(
            f"the array {given.number} of {what} was {given.dtype} of shape {given.shape} when the"
            f" {maker} was made, and is {now[0]} of shape {now[1]}: make the {maker} again"
        )


def _dtype(name: str, dtype: str) -> str:
    """The type of a result of arrays of a type."""
    return STATISTICS[dtype] if name in (*_STATISTICS, "mass") else dtype


def _placement(strides: Mapping[str, Strides], alignment: int, axes: Axes) -> Placement:
    """The placement of operands whose strides are in the order of a layout with these axes."""
    return Placement(_canonical(strides, axes), alignment, axes)


def _canonical(strides: Mapping[str, Strides], axes: Axes) -> dict[str, Strides]:
    """The strides in the order of the canonical axes.

    Those of lse, which has three, of extra arrays and of their gradients (`dinput0`) stay.
    """
    return {
        name: tuple([found[axis] for axis in axes])
        if len(found) == len(axes) and not (is_extra(name) or is_extra(name[1:]))
        else found
        for name, found in strides.items()
    }


def _check_result(
    machine: Machine, arrays: Arrays, name: str, array: Array, shape: Shape, problem: Problem
) -> None:
    """Raises for an array that is to hold a result and cannot."""
    called = "out" if name == "o" else name
    machine.check(**{called: array})
    check_shape(called, tuple(array.shape), shape)
    dtype = _dtype(name, problem.dtype)
    if arrays.dtype_of(array) != dtype:
        raise TypeError(f"{called} must be of {dtype}, got {arrays.dtype_of(array)}")
    strides = arrays.strides(called, array)
    if any(step == 0 < length - 1 for length, step in zip(shape, strides, strict=True)):
        raise ValueError(f"{called} is written, so no axis of it may be broadcast")
    if not arrays.is_writable(array):
        raise ValueError(f"{called} is written, but it is read-only")
    if name == "lse" and not arrays.is_packed(array):
        raise ValueError(f"{called} must be contiguous, got strides {strides}")
