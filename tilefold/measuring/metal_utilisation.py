"""How much of an Apple GPU's arithmetic its kernels use, by the count of `roofline`.

A multiply-add is one instruction of a thread, and each core starts 128 a clock, so the peak of a
chip is 128 x cores x clock. What is measured is many launches behind each other, then one wait, as
Metal FlashAttention (Turner, 2024) measures; PyTorch's fused attention takes its turns beside them.
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
"""Billions of instructions that a core starts in a second, of chips whose peak was published with
the figures of Metal FlashAttention: 10616 GFLOP/s of M1 Max with 32 cores, 3580 of M4 with 10."""

TURN_SECONDS = 0.05
"""Launches of a turn last about so long, so that one wait at its end does not count."""

MOST_LAUNCHES = 1000


@dataclass(frozen=True)
class Measured:
    """One pass of a problem: seconds of a launch in each round, and instructions by the count."""

    name: str
    problem: Problem
    seconds: tuple[float, ...]
    instructions: int

    @property
    def median(self) -> float:
        """Seconds of a launch."""
        return statistics.median(self.seconds)

    @property
    def ginstrs(self) -> float:
        """Billions of instructions per second."""
        return self.instructions / self.median / 1e9

    def record(self, peak: float | None) -> dict[str, Any]:
        """As plain values."""
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
    """Billions of instructions per second at most; None for chips whose peak is not known here.

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
    """Each kernel of both passes turn by turn with the calls of `native`, "forward" and "backward".

    `operands` are q, k, v, do and all results, where the machine's kernels find them. `finish`
    waits until the machine is done.
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
    """A turn of so many launches that the wait at its end is small, and how many they are."""

    def turn(launches: int) -> float:
        start = time.perf_counter()
        for _ in range(launches):
            run()
        finish()
        return time.perf_counter() - start

    turn(1)  # compiles
    launches = min(MOST_LAUNCHES, max(1, math.ceil(TURN_SECONDS / turn(1))))
    return functools.partial(turn, launches), launches
