"""Where the time of a call goes: its stages, counted by kernels that read a clock between them.

The kernels are those of the plan with a few instructions more, so they take a little longer:
`Profile.cost` says how much. What the stages of all workers do not fill of the time of the call is
waiting: for the start of the threads, and for the last one.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tilefold.backends.cpu import dispatch, peak, runtime, threads
from tilefold.backends.cpu.choice import Chooser
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.kernels.ir import Module, Value
from tilefold.backends.cpu.kernels.stages import TICKS, read_clock
from tilefold.backends.cpu.plan import CpuPlan, plan
from tilefold.backends.cpu.spec import STAGES
from tilefold.measuring import timing, workload
from tilefold.measuring.timing import operands, turn_by_turn
from tilefold.measuring.workload import Case
from tilefold.planning.roofline import Rates, computed_pairs
from tilefold.problems.buffer import Buffer


@dataclass(frozen=True)
class Profile:
    """The stages of one call, in seconds of one worker: the sum over the workers, by their number.

    `seconds` is the time of the call that counts, `plain` that of the call that does not.
    `bounds` has what a stage takes at least, at the measured rates, where that is known.
    """

    case: Case
    seconds: float
    plain: float
    stages: Mapping[str, float]
    bounds: Mapping[str, float]

    @property
    def cost(self) -> float:
        """What counting adds to a call, as a part of its time."""
        return self.seconds / self.plain - 1

    @property
    def waiting(self) -> float:
        """The time of a call in which a worker does nothing."""
        return max(0.0, self.seconds - sum(self.stages.values()))


def profile(case: Case, device: Device, *, form: str = "auto", seconds: float = 1.0) -> Profile:
    """Count the stages of a case, of random arrays, warm.

    Raises NotImplementedError for scores, sinks and dropout, and where no kernel counts.
    """
    problem = case.problem
    if problem.score is not None or problem.sinks or problem.dropout:
        raise NotImplementedError("stages are counted without score, sinks and dropout so far")
    with timing.using_threads(case.threads):
        inputs = workload.arrays(case)
        buffers = operands(case, inputs)
        plain = plan(problem, device, case.operation, form)
        counting = plan(problem, device, case.operation, form, extra=(TICKS,))
        if not any(launch.spec.clock for launch in counting.launches):
            raise NotImplementedError(f"no kernel of {case.operation} counts its stages")
        ticks = np.zeros((case.threads, len(STAGES)), np.int64)
        lines = Buffer(ticks.ctypes.data, ticks.shape, (0,) * 4, "int64", ticks)
        calls = {
            "plain": lambda: dispatch.run(plain, buffers),
            "counting": lambda: dispatch.run(counting, buffers | {TICKS: lines}),
        }
        turn_by_turn(calls, seconds=0, least=2)
        ticks[:] = 0
        times = turn_by_turn(calls, seconds=seconds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    spent = ticks.sum(axis=0) / sum(times["counting"]) / case.threads / ticks_per_second(device)
    stages = {
        name: medians["counting"] * float(part) for name, part in zip(STAGES, spent, strict=True)
    }
    products = Chooser(problem, device).products
    rates = peak.rates(device, problem.dtype, case.threads, products)
    bounds = stage_bounds(counting, rates)
    return Profile(case, medians["counting"], medians["plain"], stages, bounds)


def stage_bounds(made: CpuPlan, rates: Rates) -> dict[str, float]:
    """The seconds that stages of a plan take at least: products, and exponentials of weights."""
    problem = made.problem
    flops, exponentials = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
    for launch in made.launches:
        row, runs = launch.spec.row, launch.runs
        if not launch.spec.clock or row.contractions is None:
            continue
        size = (launch.block_parallel, launch.splits)
        pairs = launch.share * computed_pairs(problem, row.parallel, runs, *size)
        lengths = runs.runs[:, 1] - runs.runs[:, 0]
        masked = lengths[runs.runs[:, 2] != 0].sum() / max(1, lengths.sum())
        every = row.contractions.dim * problem.dim + row.contractions.dim_v * problem.dim_v
        slopes = problem.dim_v if row.score_tiles == 2 else 0
        flops["scores"] += 2 * pairs * (1 - masked) * problem.dim
        flops["edges"] += 2 * pairs * masked * problem.dim
        flops["slopes"] += 2 * pairs * slopes
        flops["products"] += 2 * pairs * (every - problem.dim - slopes)
        exponentials["slopes" if slopes else "softmax"] += pairs
    found = {
        name: flops[name] / rates.flops_per_second
        + exponentials[name] / rates.exponentials_per_second
        for name in STAGES
    }
    return {name: seconds for name, seconds in found.items() if seconds}


def ticks_per_second(device: Device) -> float:
    """The rate of the clock that kernels read."""
    module = Module("The clock that kernels read", 64)
    place = Value("%place", "ptr")
    with module.function("clock", [place]) as body:
        body.store(read_clock(body, device.clock), place)
    loaded = runtime.kernel(module.text(), "clock", device)
    now = ctypes.c_int64()

    def read() -> tuple[int, float]:
        threads.run(loaded.address, ctypes.addressof(now), 1)
        return now.value, time.perf_counter()

    first, began = read()
    time.sleep(0.05)
    last, ended = read()
    return (last - first) / (ended - began)
