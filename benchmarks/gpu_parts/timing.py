"""Times of launches on a GPU, turn by turn, by events on its stream.

Before each turn the L2 cache is filled with something else, and the GPU spins for a while: by then
the processor has queued the turn, so that what is timed is the GPU's work and no launch overhead.
Implementations run once per round in rotating order, as in `tilefold.bench`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu_parts.section import Row, Stage
from tilefold.measuring import timing

Call = Callable[[], Any]

FLUSHED_BYTES = 256 * 2**20
"""More than the L2 cache of any GPU that there are tables for."""

SPUN_CYCLES = 1_000_000
"""About half a millisecond: eager PyTorch queues a backward pass within it."""

CONDITIONS = (
    "GPU time by events, medians over rounds that take turns; before each turn"
    f" {FLUSHED_BYTES >> 20} MiB are written (the L2 cache is flushed) and the GPU spins for"
    f" {SPUN_CYCLES} cycles; random normal data; clocks are left alone"
)
"""What is to be said beside the figures."""


def turn_by_turn(
    stage: Stage, calls: Mapping[str, Call], seconds: float, *, least: int = 5, most: int = 60
) -> dict[str, list[float]]:
    """Seconds of each call, in rounds of one turn each, for about `seconds` in all."""
    if not stage.on_gpu:
        return timing.turn_by_turn(calls, seconds=seconds, least=1, most=least)
    import torch

    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    with torch.cuda.device(stage.device):
        filler = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=stage.device)
        torch.cuda.synchronize()
        end = time.perf_counter() + seconds
        for number in range(most):
            if number >= least and time.perf_counter() > end:
                break
            first = number % len(names)
            marks = []
            for name in names[first:] + names[:first]:
                filler.zero_()
                torch.cuda._sleep(SPUN_CYCLES)
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                calls[name]()
                stop.record()
                marks.append((name, start, stop))
            torch.cuda.synchronize()
            for name, start, stop in marks:
                times[name].append(start.elapsed_time(stop) / 1e3)
    return times


def summary(seconds: Sequence[float]) -> Row:
    """Median, quartiles, and over how many rounds."""
    low, median, high = (
        statistics.quantiles(seconds, n=4, method="inclusive")
        if len(seconds) > 1
        else [seconds[0]] * 3
    )
    return {
        "median_seconds": median,
        "low_seconds": low,
        "high_seconds": high,
        "rounds": len(seconds),
    }


def quickest(stage: Stage, calls: Mapping[str, Call]) -> str:
    """The name of the fastest call, by a few turns: for a choice, not for a table."""
    times = turn_by_turn(stage, calls, 0.0, least=4)
    return min(times, key=lambda name: statistics.median(times[name][1:] or times[name]))


def wall(stage: Stage, call: Call) -> float:
    """Seconds of one call until the GPU is done, by the clock on the wall."""
    finish(stage)
    start = time.perf_counter()
    call()
    finish(stage)
    return time.perf_counter() - start


def finish(stage: Stage) -> None:
    """Wait for the GPU."""
    if stage.on_gpu:
        import torch

        torch.cuda.synchronize()


def clock(stage: Stage) -> int | None:
    """The clock of the multiprocessors in MHz right now, where torch can read it."""
    if not stage.on_gpu:
        return None
    import torch

    try:
        return int(torch.cuda.clock_rate())
    except Exception:  # without NVML's module, or where the driver does not say
        return None
