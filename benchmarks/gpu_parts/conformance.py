"""The cases of the tests on the GPU, in every form, against float64 with the tests' own tolerances.

Arrays lie on the GPU as they lie in the tests' memory, what is around them included; two kinds
cannot: torch has no negative strides, so reversed arrays are copied, and no tensor that begins
between two numbers, so those arrays begin one number late, where no tile can be moved whole.
Beside the cases stand promises that only a GPU can break: bits, graphs, streams and torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from cases import CASES, Case
from compare import assert_near, dense, tolerances
from operands import SENTINEL, Array, Placed, inputs, place

from gpu_parts import attend, checks
from gpu_parts.section import Here, Row, Section, Settings, Stage, processes
from tilefold.backends.triton.dispatch import execute
from tilefold.backends.triton.heuristics import DEFAULT
from tilefold.problems.attention import STATISTICS, Problem

if TYPE_CHECKING:
    from torch import Tensor

TYPES = ("bfloat16", "float32", "float16", "float64")

FEW = (
    Case((1, 799), 128, "causal", heads="gqa"),
    Case((1, 799), 64, "lengths-of-batch", heads="mqa"),
    Case((3, 3), 40, "dense-all", heads="gqa"),
    Case((5, 600), 64, "causal", heads="gqa"),
    Case((16, 530), 80, "dense-queries", heads="mqa"),
    Case((2, 900), 256, "local", heads="mha"),
)
"""Cases for the decode kernel, beside those of the table that have few queries."""


@dataclass
class There:
    """An array's memory on a device, as it lies here."""

    tensor: Tensor
    flat: Tensor
    memory: Array


def cases(settings: Settings) -> dict[str, tuple[Case, str]]:
    """Case and type by name: every case in one type after another, the types taking turns."""
    found: dict[str, tuple[Case, str]] = {}
    table = [*FEW, *CASES]
    for turn in range(1 if settings.quick else 2):
        for number, case in enumerate(table[:: 6 if settings.quick else 1]):
            dtype = TYPES[(number + turn) % len(TYPES)]
            found[f"{dtype} {case}"] = case, dtype
    return found


def jobs(settings: Settings) -> list[str]:
    """The promises first, then the cases."""
    return [*checks.PROMISES, *cases(settings)]


def measure(name: str, here: Here) -> Row:
    """A case or a promise: what was run, and what failed."""
    if name in checks.PROMISES:
        return checks.measure(name, here)
    case, dtype = cases(here.settings)[name]
    with quiet():
        return {"dtype": dtype, "case": str(case), **checks.tried(trials(case, dtype, here), here)}


def trials(case: Case, dtype: str, here: Here) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is run of a case: forward in its forms, then backward in its own."""
    problem = case.problem(dtype)
    operands = inputs(problem, case.layout, case.memory)
    want = dense(operands, problem.mask, problem.scale)
    allowed = tolerances(problem, operands, want)
    memory = case.memory if case.memory in ("packed", "padded", "step2") else "packed"
    placing = case.layout, memory

    def trial(operation: str, form: str) -> None:
        given = operands if operation == "forward" else {**operands, **kept}
        found, placed = run(here.stage, problem, given, operation, form, *placing)
        for name, each in placed.items():
            assert each.untouched(), f"memory around {name} was written to"
        for name, array in found.items():
            assert_near(name, array, want[name], allowed[name])
        if operation == "forward" and not kept:
            kept.update(found)

    kept: dict[str, Array] = {}
    forward = [*attend.forms("forward")]
    if problem.len_q <= DEFAULT.packed_queries and not problem.empty:
        forward.append("decode")
    for form in forward:
        yield f"forward {form}", functools.partial(trial, "forward", form)
    kept = kept or {name: _like(problem, name, want[name]) for name in ("o", "lse")}
    for form in attend.forms("backward"):
        yield f"backward {form}", functools.partial(trial, "backward", form)


def _like(problem: Problem, name: str, array: Array) -> Array:
    """What is exact in the type that a kernel would have left it in."""
    return array.astype(problem.dtype if name == "o" else STATISTICS[problem.dtype])


def run(
    stage: Stage,
    problem: Problem,
    operands: Mapping[str, Array],
    operation: str,
    form: str,
    layout: str = "bhnd",
    memory: str = "packed",
) -> tuple[dict[str, Array], dict[str, Placed]]:
    """Results of a plan by their names, as arrays, and the memory that they were written into."""
    p = problem
    names: tuple[str, ...] = ("q", "k", "v")
    shapes: dict[str, tuple[int, ...]] = {"o": (p.batch, p.heads_q, p.len_q, p.dim_v)}
    results: dict[str, Array] = {}
    if operation == "backward":
        names = ("q", "k", "v", "o", "do", "lse")
        shapes = {f"d{name}": operands[name].shape for name in "qkv"}
    else:
        results["lse"] = np.full((p.batch, p.heads_q, p.len_q), SENTINEL, STATISTICS[p.dtype])
    placed = {name: place(shape, p.dtype, layout, memory) for name, shape in shapes.items()}
    given = {name: there(operands[name], stage.device).tensor for name in names}
    into = {name: there(each.array, stage.device, each.base) for name, each in placed.items()}
    into |= {name: there(array, stage.device) for name, array in results.items()}
    results |= {name: each.array for name, each in placed.items()}
    made = attend.planned(stage, p, operation, form)
    with stage.machine.active():
        execute(made, stage.machine, given | {name: each.tensor for name, each in into.items()})
    for each in into.values():
        each.memory[...] = each.flat.cpu().numpy()
    return results, placed


def there(array: Array, device: str, around: Array | None = None) -> There:
    """An array on a device with the strides that it has here, and what is around it."""
    import torch

    if any(step < 0 for step in array.strides):
        array = array.copy()
    memory, first = _bytes(array if around is None else around)
    item = array.itemsize
    late = item if first % item else 0
    shared = torch.empty(memory.size + late, dtype=torch.uint8, device=device)
    flat = shared[late:]
    flat.copy_(torch.from_numpy(memory.copy()))
    begin = (_bytes(array)[1] - first + late) // item
    dtype = getattr(torch, array.dtype.name)
    whole = shared[: shared.numel() // item * item].view(dtype)
    strides = [step // item for step in array.strides]
    return There(whole.as_strided(array.shape, strides, begin), flat, memory)


def _bytes(array: Array) -> tuple[Array, int]:
    """The memory from the first byte of an array to its last, and its address."""
    first = array.__array_interface__["data"][0]
    reach = sum((n - 1) * step for n, step in zip(array.shape, array.strides, strict=True))
    count = max(0, reach + array.itemsize) if array.size else 0
    if not count:
        return np.zeros(0, np.uint8), first
    held = (ctypes.c_uint8 * count).from_address(first)  # the caller holds the array
    return np.frombuffer(held, np.uint8), first


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the interpreter's warnings: it computes what a kernel then does not choose."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


SECTION = Section(
    "conformance",
    0.25,
    jobs,
    measure,
    workers=processes(),
    patience=6,
    stall_seconds=90.0,
    first=18,
)
