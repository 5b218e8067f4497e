"""The fastest block sizes of this machine: candidates are measured turn by turn, the best kept.

For each pass of a case, on random data:

    every tile that fits the registers, with as many traversed rows as the table's scratch
    the best three of these tiles, with other numbers of traversed rows
    the best four of all

The table's blocks run in every round. A candidate's figure is its time divided by theirs in the
same round, as the median over the rounds, since a drifting clock slows both. Noise can make a
candidate the first of many, but hardly again the first of few, so only the last stage decides.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from tilefold.backends.cpu import dispatch, tuned
from tilefold.backends.cpu.choice import Chooser
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.plan import CpuPlan, plan
from tilefold.backends.cpu.spec import KERNELS
from tilefold.backends.cpu.tables import Blocks, RegisterTile
from tilefold.backends.cpu.tuned import Key, Processor, Timed, TunedBlocks
from tilefold.measuring.environment import environment
from tilefold.measuring.timing import operands, turn_by_turn, using_threads
from tilefold.measuring.workload import Arrays, Call, Case, arrays

TRAVERSE = (32, 64, 96, 128, 160, 192, 256, 512)
"""The numbers of traversed rows per block that are tried, cut to whole register tiles."""
STAGES = 3
KEPT_TILES, KEPT_BLOCKS = 3, 4
"""The numbers of candidates in the second and in the third stage."""
LEAST_GAIN, LEAST_SHARE = 0.01, 0.75
"""The gain in time, and the share of rounds, by which others must beat the table's blocks; less is
noise on a shared machine.
"""
LEAST_ROUNDS, LEAST_LAST_ROUNDS = 3, 9
"""The least numbers of rounds of a stage, and of the last stage."""
TURN_SECONDS = 1e-3
"""The least time of a turn, in seconds: shorter calls are repeated within it, so that the clock and
the loop hardly count.
"""

Note = Callable[[str], None]
Turns = Callable[..., dict[str, list[float]]]
"""The type of a function that times calls turn by turn, such as `timing.turn_by_turn`."""


B = TypeVar("B")


@dataclass(frozen=True)
class Trial(Generic[B]):
    """Blocks, and the median of their time divided by the time of the table's blocks.

    `rounds` is the number of rounds, and `share` the share of rounds in which they were faster.
    `last` is True if these are the rounds of the last stage.
    """

    blocks: B
    ratio: float
    share: float
    rounds: int
    last: bool


@dataclass(frozen=True)
class Measured(Generic[B]):
    """The measurements of one kernel; `trials` are sorted by speed, the last stage first."""

    table: B
    table_seconds: float
    trials: tuple[Trial[B], ...]

    @property
    def best(self) -> Trial[B]:
        """The fastest trial of the last stage, or the table's if nothing is clearly faster."""
        fastest = self.trials[0]
        if fastest.ratio < 1 - LEAST_GAIN and fastest.share >= LEAST_SHARE:
            return fastest
        return next(trial for trial in self.trials if trial.blocks == self.table)

    def timed(self, trial: Trial[B]) -> Timed[B]:
        """The blocks of a trial and their time in seconds."""
        return Timed(trial.blocks, trial.ratio * self.table_seconds)

    def tuned_blocks(
        self, shape: str, threads: int, date: str, versions: Mapping[str, str]
    ) -> TunedBlocks[B]:
        """The record that the planner reads."""
        return TunedBlocks(
            best=self.timed(self.best),
            table=Timed(self.table, self.table_seconds),
            worst=self.timed(max(self.trials, key=lambda trial: trial.ratio)),
            candidates=len(self.trials),
            shape=shape,
            threads=threads,
            date=date,
            versions=versions,
        )


@dataclass(frozen=True)
class Tuned:
    """A kernel of a case, and its measurements."""

    case: Case
    key: Key
    measured: Measured[Blocks]


class Stages(Generic[B]):
    """The measurements of candidates beside the table's blocks, stage by stage.

    `call` makes the call of blocks. `turns` times calls.
    """

    def __init__(
        self, table: B, call: Callable[[B], Call], threads: int, turns: Turns | None = None
    ) -> None:
        self._table, self._call, self._threads = table, call, threads
        self._turns = turns or turn_by_turn
        self.trials: dict[B, Trial[B]] = {}
        self._table_seconds = 0.0

    def run(self, candidates: Iterable[B], seconds: float, last: bool = False) -> None:
        """Measure candidates beside the table's blocks, in rounds of one turn each."""
        entered = dict.fromkeys([self._table, *candidates])
        calls = {str(blocks): self._call(blocks) for blocks in entered}
        self._turns(calls, seconds=0, least=1, most=1)  # compiles
        first = self._turns(calls, seconds=0, least=1, most=1)
        repeats = max(1, round(TURN_SECONDS / min(first[str(self._table)])))
        turns = {name: _repeated(call, repeats) for name, call in calls.items()}
        least = LEAST_LAST_ROUNDS if last else LEAST_ROUNDS
        times = self._turns(turns, seconds=seconds, least=least, clock=clock(self._threads))
        beside = times[str(self._table)]
        self._table_seconds = statistics.median(beside) / repeats
        for blocks in entered:
            ratios = [mine / own for mine, own in zip(times[str(blocks)], beside, strict=True)]
            faster = sum(ratio < 1 for ratio in ratios) / len(ratios)
            median = statistics.median(ratios)
            self.trials[blocks] = Trial(blocks, median, faster, len(ratios), last)

    def fastest(self) -> list[B]:
        """All blocks that were measured, the fastest first."""
        return sorted(self.trials, key=lambda blocks: self.trials[blocks].ratio)

    def measured(self) -> Measured[B]:
        """All measurements."""
        trials = sorted(self.trials.values(), key=lambda trial: (not trial.last, trial.ratio))
        return Measured(self._table, self._table_seconds, tuple(trials))


def tune(
    case: Case,
    *,
    seconds: float,
    form: str = "auto",
    note: Note = lambda _: None,
    turns: Turns | None = None,
) -> list[Tuned]:
    """Measure the candidates for each pass of a case, for about `seconds` per pass.

    Compiling takes additional time, and every stage has at least `LEAST_ROUNDS` rounds. `note` is
    called with a description of each step, `STAGES` times for each kernel. `turns` times the calls.
    Raises ValueError for a problem without pairs.
    """
    if case.problem.empty:
        raise ValueError(f"there is nothing to measure in shape {case.shape}")
    with using_threads(case.threads):
        inputs = arrays(case)
        return [
            _Race(case, form, kernel, inputs, note, turns).run(seconds)
            for kernel in passes(case, form)
        ]


def passes(case: Case, form: str = "auto") -> list[str]:
    """The kernels of a case that have blocks to choose. Raises ValueError if none has."""
    launches = plan(case.problem, host(), case.operation, form).launches
    kernels = list(dict.fromkeys(launch.spec.kernel for launch in launches))
    if all(KERNELS[kernel].by_query for kernel in kernels):
        raise ValueError(
            f"shape {case.shape} has few queries: the decode kernel serves it, and has no blocks"
            " to choose"
        )
    return [kernel for kernel in kernels if KERNELS[kernel].visits]


def keep(found: Iterable[Tuned]) -> None:
    """Store the tuned blocks for the planner, also of this process. Raises OSError."""
    now, machine = environment(), Processor.of(host())
    made = now["date"], now["versions"]
    new = {
        (machine, one.key): one.measured.tuned_blocks(one.case.shape, one.case.threads, *made)
        for one in found
    }
    tuned.STORE.keep(new)


class _Race:
    """The measurement of one kernel's candidates."""

    def __init__(
        self, case: Case, form: str, kernel: str, inputs: Arrays, note: Note, turns: Turns | None
    ) -> None:
        self._case, self._form, self._kernel, self._note = case, form, kernel, note
        self._operands = operands(case, inputs)
        self._chooser = Chooser(case.problem, host())
        self._family = self._chooser.family(kernel)
        self._table = self._chooser.table_blocks(kernel)
        self._stages: Stages[Blocks] = Stages(self._table, self._call, case.threads, turns)

    def run(self, seconds: float) -> Tuned:
        share, stages = seconds / STAGES, self._stages
        self._say("tiles")
        stages.run([self._usual(tile) for tile in self._family.candidates()], share)
        best = dict.fromkeys(blocks.tile for blocks in stages.fastest())
        heights = self._heights()
        others = [self._cut(tile, rows) for tile in list(best)[:KEPT_TILES] for rows in heights]
        self._say("blocks")
        stages.run([blocks for blocks in others if blocks not in stages.trials], share)
        self._say("the best")
        stages.run(stages.fastest()[:KEPT_BLOCKS], share, last=True)
        return Tuned(self._case, self._chooser.key(self._kernel), stages.measured())

    def _say(self, what: str) -> None:
        self._note(f"{self._kernel} {self._case.shape} {self._case.problem.mask}: {what}")

    def _heights(self) -> list[int]:
        """The numbers of traversed rows to try, at most one of which holds the whole axis."""
        problem = self._case.problem
        length = problem.len_k if KERNELS[self._kernel].parallel == "q" else problem.len_q
        return [rows for rows in TRAVERSE if rows < 2 * length or rows == TRAVERSE[0]]

    def _usual(self, tile: RegisterTile) -> Blocks:
        if tile == self._table.tile:
            return self._table
        return self._chooser.usual_blocks(self._kernel, tile)

    def _cut(self, tile: RegisterTile, rows: int) -> Blocks:
        return Blocks(tile, self._family.cut(tile, rows))

    def _call(self, blocks: Blocks) -> Call:
        """A call with these blocks; it compiles when it first runs."""
        strides = {name: buffer.strides for name, buffer in self._operands.items()}
        pointers = [buffer.pointer for buffer in self._operands.values()]

        @functools.cache
        def prepared() -> dispatch.Call:
            return dispatch.prepare(self._plan(blocks), strides)

        return lambda: prepared().run(*pointers)

    def _plan(self, blocks: Blocks) -> CpuPlan:
        """A plan of this kernel only, and of the kernels that prepare its operands."""
        made = plan(
            self._case.problem,
            host(),
            self._case.operation,
            self._form,
            tile=blocks.tile,
            block_traverse=blocks.block_traverse,
        )
        launches = [
            launch
            for launch in made.launches
            if launch.spec.kernel == self._kernel or not launch.spec.row.visits
        ]
        return replace(made, launches=tuple(launches))


def clock(workers: int) -> Callable[[], float]:
    """This thread's CPU time if it works alone, so that neighbours do not count; else the time.

    Windows counts the time of a thread in steps of 16 ms, too coarse for this purpose.
    """
    alone = workers == 1 and time.get_clock_info("thread_time").resolution < 1e-6
    return time.thread_time if alone else time.perf_counter


def _repeated(call: Call, repeats: int) -> Call:
    if repeats == 1:
        return call

    def several() -> None:
        for _ in range(repeats):
            call()

    return several
