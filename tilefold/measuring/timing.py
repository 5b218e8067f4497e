"""Timing: implementations measured turn by turn in one process, on the same random arrays.

A machine's clock, its neighbours and its caches drift within seconds. So every implementation runs
once per round, in rotating order, and the ratio of medians over the same rounds is compared. The
first result of a baseline is compared with tilefold's result before the baseline is timed.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tilefold.backends.cpu import dispatch, threads
from tilefold.backends.cpu.choice import Chooser
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.plan import plan
from tilefold.common.check import one_line
from tilefold.measuring import baselines
from tilefold.measuring.workload import Array, Arrays, Call, Case, arrays, own
from tilefold.planning.roofline import visible_pairs
from tilefold.problems.buffer import Buffer

SWEEP_TRAVERSE = (32, 64, 128, 256)
"""The numbers of traversed rows per block that a sweep tries, cut to whole register tiles."""

PAUSE = 0.01
"""The pause before each turn, in seconds, if implementations have their own threads: GNU's OpenMP
spins for about 7 ms after its work (EPYC, 2 cores) and would slow down the next turn.
"""

_SIZES = ("batch", "heads_q", "heads_kv", "len_q", "len_k", "dim", "dim_v")


@dataclass(frozen=True)
class Row:
    """The times of one implementation in one case, or the reason why it has none.

    `prepare_seconds` is the time before its first call: transposing arrays, building graphs and
    masks. `cold` has the times of calls that find nothing in the caches, where `apart` took them.
    """

    case: Case
    name: str
    seconds: tuple[float, ...]
    pairs: int
    first_call_seconds: float
    reason: str | None = None
    prepare_seconds: float = 0
    cold: tuple[float, ...] = ()

    @property
    def flops(self) -> int:
        """The number of floating-point operations over visible pairs."""
        return self.case.flops(self.pairs)

    @property
    def median(self) -> float:
        """The median time of a call over the rounds, in seconds; NaN without rounds."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def cold_median(self) -> float:
        """The median time of a cold call, in seconds; NaN where none was timed."""
        return statistics.median(self.cold) if self.cold else math.nan

    @property
    def gflops(self) -> float:
        """Billions of operations per second, by the median."""
        return self.flops / self.median / 1e9

    def record(self, own: Row | None) -> dict[str, Any]:
        """The row as plain values for JSON, with its ratio to tilefold's row `own` if it exists."""
        problem = self.case.problem
        sizes = {name: getattr(problem, name) for name in _SIZES}
        timed = {
            "median_seconds": self.median,
            "best_seconds": min(self.seconds, default=None),
            "prepare_seconds": self.prepare_seconds,
            "first_call_seconds": self.first_call_seconds,
            **({"cold_median_seconds": self.cold_median} if self.cold else {}),
            "gflops": self.gflops,
            "tilefold_speedup": self.median / own.median if own and not own.reason else None,
        }
        return {
            **sizes,
            "shape": self.case.shape,
            "dtype": problem.dtype,
            "precision": problem.precision,
            "mask": str(problem.mask),
            **({} if self.case.score is None else {"score": str(self.case.score)}),
            "operation": self.case.operation,
            "threads": self.case.threads,
            "name": self.name,
            "rounds": len(self.seconds),
            **(timed if self.reason is None else dict.fromkeys(timed)),
            "reason": self.reason,
        }


def turn_by_turn(
    calls: Mapping[str, Call],
    *,
    seconds: float,
    least: int = 3,
    most: int = 1000,
    pause: float = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """The times of each call in rounds of one turn each, which take about `seconds` in all.

    `pause` seconds pass before each turn.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for number in range(most):
        if number >= least and time.perf_counter() > end:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if pause:
                time.sleep(pause)
            begin = clock()
            calls[name]()
            times[name].append(clock() - begin)
    return times


def measure(
    case: Case, names: Sequence[str] = (), *, seconds: float = 1.0, sweep: bool = False
) -> list[Row]:
    """Time tilefold and some of `baselines.BASELINES` on one case; tilefold's row comes first.

    With `sweep`, each block size of `block_sizes` follows as a row of its own. The first call of
    each implementation includes compiling and is reported separately. A baseline that cannot do
    the case, or whose result is wrong, has a row with the reason in place of times.
    """
    for name in names:
        # Before tilefold's first call, so that it shares the baseline's OpenMP runtime.
        baselines.BASELINES[name].load()
    with using_threads(case.threads):
        inputs = arrays(case)
        calls = {"tilefold": own(case, inputs)}
        first, expected = first_call(calls["tilefold"])
        firsts = {"tilefold": first}
        makers = {
            name: functools.partial(baselines.BASELINES[name].prepare, case, inputs)
            for name in names
        }
        started = start(case, makers, expected)
        calls |= started.calls
        if sweep:
            swept = block_sizes(case, inputs)
            firsts |= {label: first_call(call)[0] for label, call in swept.items()}
            calls |= swept
        pause = PAUSE if any(baselines.BASELINES[name].own_team for name in names) else 0
        timed = turn_by_turn(calls, seconds=seconds, pause=pause)
    started.firsts |= firsts
    return _rows(case, dict.fromkeys(["tilefold", *names, *calls]), started, timed)


def measure_implementations(
    case: Case, names: Sequence[str], device: str, *, seconds: float = 1.0
) -> list[Row]:
    """Time some of `implementations.NAMES` on one case, on tensors on a torch device.

    Each has a row, in the given order, and is checked against tilefold's result on the CPU. One
    that cannot do the case, or has too little memory for it, has the reason in place of times.
    """
    with using_threads(case.threads):
        inputs = arrays(case)
        expected = own(case, inputs)()
        makers = {
            name: functools.partial(baselines.implementation, name, device, case, inputs)
            for name in names
        }
        started = start(case, makers, expected)
        timed = turn_by_turn(started.calls, seconds=seconds) if started.calls else {}
    return _rows(case, names, started, timed)


@dataclass
class Started:
    """Prepared implementations by name: their calls, or the reasons why there are none."""

    calls: dict[str, Call] = field(default_factory=dict)
    prepared: dict[str, float] = field(default_factory=dict)
    firsts: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def start(case: Case, makers: Mapping[str, Callable[[], Call]], expected: object) -> Started:
    """Prepare each call, run it once, and keep the calls that return what is expected."""
    started = Started()
    for name, make in makers.items():
        begin = time.perf_counter()
        try:
            call = make()
            started.prepared[name] = time.perf_counter() - begin
            started.firsts[name], found = first_call(call)
            baselines.check(name, case, expected, found)
        except (RuntimeError, ArithmeticError, MemoryError) as error:
            started.reasons[name] = one_line(error)
        else:
            started.calls[name] = call
    return started


def _rows(
    case: Case, order: Iterable[str], started: Started, timed: Mapping[str, Sequence[float]]
) -> list[Row]:
    pairs = visible_pairs(case.problem)
    return [
        Row(
            case,
            name,
            tuple(timed.get(name, ())),
            pairs,
            started.firsts.get(name, math.nan),
            started.reasons.get(name),
            started.prepared.get(name, 0),
        )
        for name in order
    ]


def first_call(call: Call) -> tuple[float, object]:
    """The time of one call in seconds, and its result."""
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def block_sizes(case: Case, a: Arrays) -> dict[str, Call]:
    """The call of a case with other register tiles and block sizes, by name.

    `6x4 by 96` means a register tile of 6 rows of 4 vectors, and about 96 traversed rows per block.
    """
    buffers = operands(case, a)
    calls: dict[str, Call] = {}
    for tile in Chooser(case.problem, host()).family(case.operation).tiles:
        for wanted in SWEEP_TRAVERSE:
            block = max(1, wanted // tile.rows) * tile.rows
            made = plan(
                case.problem, host(), case.operation, "auto", tile=tile, block_traverse=block
            )
            calls[f"{tile} by {wanted}"] = functools.partial(dispatch.run, made, buffers)
    return calls


def operands(case: Case, a: Arrays) -> dict[str, Buffer]:
    """The arrays of a case by their names in the kernels, with new outputs."""
    outputs = [np.empty_like(x) for x in (a.q, a.k, a.v, a.o, a.lse)]
    named = {"q": a.q, "k": a.k, "v": a.v, "do": a.do, "o": a.o, "lse": a.lse}
    if case.operation == "forward":
        named |= {"o": outputs[3], "lse": outputs[4]}
    else:
        named |= {"dq": outputs[0], "dk": outputs[1], "dv": outputs[2]}
    return {name: _buffer(array) for name, array in named.items()}


def _buffer(array: Array) -> Buffer:
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Buffer(array.ctypes.data, array.shape, strides, str(array.dtype), array)


@contextmanager
def using_threads(number: int) -> Iterator[None]:
    """Use `number` threads inside the block, and the former number after it."""
    before = threads.get_num_threads()
    threads.set_num_threads(number)
    try:
        yield
    finally:
        threads.set_num_threads(before)
