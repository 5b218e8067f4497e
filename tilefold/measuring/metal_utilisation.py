"""The arithmetic utilisation of an Apple GPU by the Metal kernels, by the count of `roofline`.

A multiply-add is one instruction of a thread, and each core starts 128 of them in a clock. So the
peak of a chip is 128 x cores x clock. Many launches are measured in a row with one wait at the end,
as Metal FlashAttention (Turner, 2024) does. PyTorch's fused attention takes turns with them.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tilefold.backends.metal.dispatch import Machine, alignment_of, prepare, strides_of
from tilefold.backends.metal.plan import plan
from tilefold.measuring import timing
from tilefold.planning.kernels import WORK
from tilefold.planning.roofline import instruction_count
from tilefold.problems.attention import Problem

GINSTRS_PER_CORE = {"Apple M1 Max": 5308 / 32, "Apple M4": 1790 / 10}
"""Billions of instructions per second and core, for the chips whose peak was published with Metal
FlashAttention: 10616 GFLOP/s for M1 Max with 32 cores, 3580 GFLOP/s for M4 with 10 cores."""

TURN_SECONDS = 0.05
"""The launches of a turn take about this long, so that the one wait at its end hardly counts."""

MOST_LAUNCHES = 1000


@dataclass(frozen=True)
class Measured:
    """One pass of a problem: the seconds of a launch in each round, and its instruction count."""

    name: str
    problem: Problem
    seconds: tuple[float, ...]
    instructions: int

    @property
    def median(self) -> float:
        """The median time of a launch, in seconds."""
        return statistics.median(self.seconds)

    @property
    def ginstrs(self) -> float:
        """Billions of instructions per second, by the median."""
        return self.instructions / self.median / 1e9

    def record(self, peak: float | None) -> dict[str, Any]:
        """The measurement as plain values for JSON."""
        p = self.problem
        return {
            "name": self.name,
            "shape": [p.batch, p.heads_q, p.len_q, p.dim],
            "dtype": p.dtype,
            "rounds": len(self.seconds),
            "median_seconds": self.median,
            "best_seconds": min(self.seconds),
            "instructions": self.instructions,
            "ginstrs": self.ginstrs,
            "utilisation": self.ginstrs / peak if peak else None,
        }


def peak(chip: str, cores: int) -> float | None:
    """The peak of a chip in billions of instructions per second; None for unknown chips.

    >>> peak("Apple M4", 8), peak("Apple M9", 8)
    (1432.0, None)
    """
    each = GINSTRS_PER_CORE.get(chip)
    return None if each is None or cores < 1 else each * cores


def measure(
    machine: Machine,
    problem: Problem,
    operands: Mapping[str, Any],
    finish: Callable[[], None],
    native: Mapping[str, Callable[[], object]],
    seconds: float,
) -> list[Measured]:
    """Measure each kernel of both passes, turn by turn with PyTorch's calls in `native`.

    `native` has the calls "forward" and "backward". `operands` are q, k, v, do and all results in
    the memory of the machine. `finish` waits until the machine has finished.
    """
    calls: dict[str, Callable[[], object]] = {}
    counts: dict[str, int] = {}
    given = dict(operands)
    pairs = problem.pairs
    for operation in ("forward", "backward"):
        made = plan(problem, machine.family, operation)
        if "delta" in made.buffers:  # dq writes it and dk, dv read it: they are timed apart
            scratch = made.buffers["delta"]
            given["delta"] = machine.empty(scratch.shape, scratch.dtype)
        kept = {name: each for name, each in made.buffers.items() if name not in given}
        strides = {name: strides_of(name, x) for name, x in given.items() if name != "delta"}
        for launch in made.launches:
            name = launch.spec.kernel
            one = replace(made, launches=(launch,), buffers=kept)
            call = prepare(one, machine, strides, alignment_of(operands))
            calls[name] = functools.partial(call.run, given)
            counts[name] = instruction_count(launch.spec.row, pairs, problem.dim, problem.dim_v)
    for name, run in native.items():
        calls[f"native {name}"] = run
        counts[f"native {name}"] = instruction_count(WORK[name], pairs, problem.dim, problem.dim_v)
    turns, launches = {}, {}
    for name, run in calls.items():
        turns[name], launches[name] = _turn(run, finish)
    timed = timing.turn_by_turn(turns, seconds=seconds)
    return [
        Measured(name, problem, tuple(s / launches[name] for s in timed[name]), counts[name])
        for name in calls
    ]


def _turn(run: Callable[[], object], finish: Callable[[], None]) -> tuple[Callable[[], float], int]:
    """A turn with enough launches to make the wait at its end small, and the number of launches."""

    def turn(launches: int) -> float:
        start = time.perf_counter()
        for _ in range(launches):
            run()
        finish()
        return time.perf_counter() - start

    turn(1)  # compiles
    launches = min(MOST_LAUNCHES, max(1, math.ceil(TURN_SECONDS / turn(1))))
    return functools.partial(turn, launches), launches
