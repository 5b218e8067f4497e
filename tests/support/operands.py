"""Arrays of a case as a caller might hold them: any layout, any strides; and as Buffers.

The memory around an array is filled with a sentinel, which must stay unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows the name "bfloat16" from it
import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu import dispatch
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.plan import plan
from tilefold.problems.attention import STATISTICS, Problem
from tilefold.problems.buffer import Buffer
from tilefold.problems.request import LAYOUTS

Array = NDArray[Any]
SENTINEL = 12288.0
"""A value that every type holds exactly."""

FORMS: dict[str, dict[str, Any]] = {
    "split": {"form": "split"},
    "fused": {"form": "fused", "owners": 1},
    "parts": {"form": "fused", "owners": 3, "in_place": False},
}
"""The forms of the backward pass, as options of `plan`; fused with one partition and with several.
"""

SHARED_AXES = {"q": (0,), "k": (1,), "v": (2,), "do": (3,)}


@dataclass(frozen=True)
class Placed:
    """An array (canonical axes), all the memory around it, and the array's part of it."""

    array: Array
    base: Array
    inside: Array

    def untouched(self) -> bool:
        """True if the memory around the array still holds the sentinel."""
        return bool((self.base[~self.inside] == SENTINEL).all())


def canonical(array: Array, layout: str) -> Array:
    """A view with canonical axes of an array in a layout, or the other way round."""
    return array.transpose(LAYOUTS[layout])


def place(shape: tuple[int, ...], dtype: str, layout: str, memory: str, name: str = "") -> Placed:
    """An array of a canonical shape in a layout and a kind of memory, filled with the sentinel."""
    order = LAYOUTS[layout] if len(shape) == 4 else (0, 1, 2)
    outer = tuple(shape[axis] for axis in order)
    shared = [axis in SHARED_AXES.get(name, ()) for axis in order]
    base = _base(_around(outer, memory, shared), dtype, misaligned=memory == "misaligned")
    inside = np.full(base.shape, memory == "broadcast")
    if memory != "broadcast":
        _view(inside, outer, memory)[...] = True
    return Placed(_view(base, outer, memory).transpose(order), base, inside)


def _around(outer: tuple[int, ...], memory: str, shared: list[bool]) -> tuple[int, ...]:
    """The shape of the memory that holds an array."""
    match memory:
        case "padded":
            return tuple(size + 1 + axis for axis, size in enumerate(outer))
        case "step2":
            return tuple(2 * size for size in outer)
        case "broadcast":
            return tuple(1 if one else size for one, size in zip(shared, outer, strict=True))
        case "transposed":
            return outer[::-1]
    return outer


def _view(base: Array, outer: tuple[int, ...], memory: str) -> Array:
    """The array in the memory around it."""
    match memory:
        case "padded":
            return base[tuple(slice(1, size + 1) for size in outer)]
        case "reversed":
            return base[(slice(None, None, -1),) * len(outer)]
        case "step2":
            return base[(slice(1, None, 2),) * len(outer)]
        case "broadcast":
            return np.broadcast_to(base, outer)
        case "transposed":
            return base.transpose()
    return base


def _base(shape: tuple[int, ...], dtype: str, *, misaligned: bool) -> Array:
    item = np.dtype(dtype).itemsize
    memory = np.empty(int(np.prod(shape)) * item + item, np.uint8)
    shift = 1 if misaligned else 0
    base = memory[shift : memory.size - item + shift].view(dtype).reshape(shape)
    base[...] = SENTINEL
    return base


def fill(placed: Placed, random: np.random.Generator) -> Array:
    """Fill an array with normal random elements; return it."""
    numbers = random.normal(size=placed.base.shape)
    placed.base[placed.inside] = numbers[placed.inside]
    return placed.array


def inputs(problem: Problem, layout: str, memory: str, seed: int = 0) -> dict[str, Array]:
    """Random q, k, v and do with canonical axes, normally distributed."""
    random = np.random.default_rng(seed)
    p = problem
    shapes = {
        "q": (p.batch, p.heads_q, p.len_q, p.dim),
        "k": (p.batch, p.heads_kv, p.len_k, p.dim),
        "v": (p.batch, p.heads_kv, p.len_k, p.dim_v),
        "do": (p.batch, p.heads_q, p.len_q, p.dim_v),
    }
    return {
        name: fill(place(shape, p.dtype, layout, memory, name), random)
        for name, shape in shapes.items()
    }


def buffer(array: Array) -> Buffer:
    """A canonical array as a Buffer; a copy of it if it is misaligned."""
    array = np.require(array, requirements="A")
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Buffer(array.ctypes.data, array.shape, strides, array.dtype.name, array)


def run(
    problem: Problem,
    operation: str,
    operands: Mapping[str, Array],
    *,
    device: Device | None = None,
    **options: Any,
) -> None:
    """Run one plan on canonical arrays; `options` go to `plan`. Outputs must be aligned.

    `form` may also be one of `FORMS`.
    """
    form = options.pop("form", "auto")
    options = {**FORMS.get(form, {"form": form}), **options}
    buffers = {name: buffer(array) for name, array in operands.items()}
    dispatch.run(plan(problem, device or host(), operation, **options), buffers)


def forward(
    problem: Problem, operands: Mapping[str, Array], *, low: bool = False, **options: Any
) -> dict[str, Array]:
    """Return o and lse, contiguous; with `low` also what rounding took from lse."""
    shape = (problem.batch, problem.heads_q, problem.len_q)
    results = {"o": np.full((*shape, problem.dim_v), SENTINEL, problem.dtype)}
    for name in ("lse", "lse_low") if low else ("lse",):
        results[name] = np.full(shape, SENTINEL, STATISTICS[problem.dtype])
    given = {name: operands[name] for name in ("q", "k", "v", "seed") if name in operands}
    run(problem, "forward", {**given, **results}, **options)
    return results


def backward(
    problem: Problem, operands: Mapping[str, Array], form: str, **options: Any
) -> dict[str, Array]:
    """Return dq, dk and dv, contiguous; `operands` holds do, q, k, v, o, lse, and maybe lse_low."""
    results = {f"d{name}": np.full(operands[name].shape, SENTINEL, problem.dtype) for name in "qkv"}
    names = ("do", "q", "k", "v", "o", "lse", "lse_low", "seed")
    given = {name: operands[name] for name in names if name in operands}
    run(problem, "backward", {**given, **results}, form=form, **options)
    return results
