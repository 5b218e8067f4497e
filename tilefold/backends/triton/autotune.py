"""Tuning on this GPU: the fastest blocks are measured on request and kept for the planner.

Tuning is never a part of a call: a first call takes the table's blocks and only waits for the
compiler. For each kernel of an operation, `tune` tries blocks around the table's: half and twice
each size, and other numbers of warps and stages. It uses Triton's own timer and random data. The
best candidates and the blocks of the present plan are then timed once more, turn by turn.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tilefold.backends.triton import tuned
from tilefold.backends.triton.architectures import architecture
from tilefold.backends.triton.choice import choose
from tilefold.backends.triton.dispatch import execute, prepare
from tilefold.backends.triton.launch import Launch
from tilefold.backends.triton.machine import Machine, ResourceError, is_aligned16
from tilefold.backends.triton.plan import key_of, plan
from tilefold.backends.triton.spec import LEAST, WIDEST_STREAMED, Blocks
from tilefold.problems.attention import STATISTICS, Problem

if TYPE_CHECKING:
    from torch import Tensor

Timer = Callable[[Callable[[], None]], float]
"""A function that returns the time of a call, in seconds."""

FINALISTS = 4
"""The number of candidates that are timed again beside the usual blocks."""

ROUNDS = 5
"""The number of these turns; they alternate, so that a changing clock slows all alike."""

LEAST_GAIN = 0.01
"""The least gain in time over the usual blocks; a smaller gain is noise."""


@dataclass(frozen=True)
class Trial:
    """Blocks of a kernel with their time in seconds, or the reason why they cannot run.

    `usual` is True for the blocks of the present plan, and `winner` for the blocks that later plans
    should take.
    """

    operation: str
    blocks: Blocks
    seconds: float | None
    reason: str = ""
    usual: bool = False
    winner: bool = False


def tune(
    problem: Problem,
    operation: str,
    machine: Machine | None = None,
    *,
    form: str = "auto",
    timer: Timer | None = None,
    seconds: float | None = None,
    note: Callable[[str], None] | None = None,
    keep: bool = True,
) -> list[Trial]:
    """Measure blocks for each kernel of an operation, and keep the fastest for later plans.

    Arguments:
        problem: the problem to tune for, such as `Problem.of((4, 16, 4096, 128), dtype="bfloat16")`
        operation: "forward" or "backward"
        machine: the GPU; None means `tilefold.triton.gpu(0)`
        form: the variant of the operation, as for `tilefold.triton.plan`
        timer: a function that returns the time of a call in seconds; None means the median of
            `triton.testing.do_bench`
        seconds: the time limit for each kernel, including compiling; after it no further candidate
            is tried. Candidates nearest to the usual blocks come first. None means no limit
        note: a function that is called with a line of text before each candidate
        keep: if True, write the winners to the file that plans read

    Returns:
        All trials, kernel by kernel. For each kernel the trials that were timed again come first,
        then the others, each from fast to slow, then the blocks that do not fit. There are no
        trials for the Hopper kernel in Gluon, whose table has only one row, and none for a problem
        in which no query meets a key.

    Raises:
        NotImplementedError: there is no GPU here that Triton serves
        ValueError: operation or form is not allowed
        OSError: the file cannot be written
    """
    if machine is None:
        from tilefold.backends.triton import runtime

        machine = runtime.gpu()
    made = plan(problem, machine.architecture, operation, form=form)
    if problem.empty:
        return []
    search = _Search(problem, machine, operation, form, timer or _seconds, seconds, note)
    found: list[Trial] = []
    winners: dict[tuned.Key, Blocks] = {}
    for launch in [launch.plain or launch for launch in made.launches]:
        if launch.spec.gluon or not launch.pairs:
            continue  # shared memory determines its blocks, and no query meets a key
        if not launch.spec.row.visits:
            continue  # such kernels read and write memory once, so their blocks hardly matter
        trials = search.kernel(launch)
        found += trials
        for trial in trials:
            if trial.winner and not trial.usual:
                winners[key_of(launch.spec, machine.architecture)] = trial.blocks
    if keep and winners:
        tuned.STORE.keep(winners)
    return found


def candidates(launch: Launch, name: str) -> Iterator[Blocks]:
    """The blocks of a launch, then near blocks that the architecture can hold."""
    spec, usual = launch.spec, launch.spec.blocks
    steps = ({max(LEAST, size // 2), size, size * 2} for size in (usual.parallel, usual.traverse))
    parallel, traverse = map(sorted, steps)
    if spec.kernel == "decode":
        parallel = [usual.parallel]  # the number of queries
    streamed = (False, True) if max(spec.dim, spec.dim_v) > WIDEST_STREAMED else (False,)
    every = [
        Blocks(*sizes)
        for sizes in itertools.product(parallel, traverse, (4, 8, 16), (1, 2, 3, 4), streamed)
    ]
    yield usual
    for blocks in sorted(every, key=lambda blocks: _distance(blocks, usual)):
        if blocks == usual:
            continue
        try:
            choose(
                architecture(name), spec.kernel, spec.dtype, spec.dim, spec.dim_v,
                float32_mode=spec.float32_mode, blocks=blocks,
            )  # fmt: skip
        except ValueError:
            continue
        yield blocks


def _distance(a: Blocks, b: Blocks) -> float:
    """The distance between two choices of blocks, in factors of two and in stages."""
    pairs = (a.parallel, b.parallel), (a.traverse, b.traverse), (a.warps, b.warps)
    steps = sum(abs(math.log2(one / other)) for one, other in pairs)
    return steps + abs(a.stages - b.stages) + 2 * (a.streamed != b.streamed)


class _Search:
    """The search for the fastest blocks of one problem's kernels."""

    def __init__(
        self,
        problem: Problem,
        machine: Machine,
        operation: str,
        form: str,
        timer: Timer,
        seconds: float | None,
        note: Callable[[str], None] | None,
    ) -> None:
        self._problem, self._machine, self._timer = problem, machine, timer
        self._operation, self._form = operation, form
        self._limit = math.inf if seconds is None else seconds
        self._note = note or (lambda line: None)
        self._operands = _operands(problem, machine, operation)

    def kernel(self, launch: Launch) -> list[Trial]:
        """The trials of one launch of the plan."""
        name, usual = launch.spec.kernel, launch.spec.blocks
        begun = time.perf_counter()
        calls: dict[Blocks, Callable[[], None]] = {}
        times: dict[Blocks, float] = {}
        failures: dict[Blocks, str] = {}
        for blocks in candidates(launch, self._machine.architecture):
            if times and time.perf_counter() - begun > self._limit:
                break
            self._note(f"{name}: {blocks}")
            try:
                with self._machine.active():
                    call = self._call(name, blocks)
                    times[blocks] = self._timer(call)
            except ResourceError as error:
                failures[blocks] = str(error)
            else:
                calls[blocks] = call
        again = sorted(times, key=lambda blocks: times[blocks])[:FINALISTS]
        if usual in times and usual not in again:
            again.append(usual)
        times |= self._turn_by_turn(name, {blocks: calls[blocks] for blocks in again})
        best = min(again, key=lambda blocks: times[blocks], default=None)
        if best and usual in times and times[best] > times[usual] * (1 - LEAST_GAIN):
            best = usual
        found = [
            Trial(name, blocks, taken, "", blocks == usual, blocks == best)
            for blocks, taken in times.items()
        ]
        found.sort(key=lambda trial: (trial.blocks not in again, trial.seconds))
        return found + [
            Trial(name, blocks, None, why, blocks == usual) for blocks, why in failures.items()
        ]

    def _turn_by_turn(
        self, name: str, calls: Mapping[Blocks, Callable[[], None]]
    ) -> dict[Blocks, float]:
        """The median time of each call in seconds, measured turn by turn."""
        rounds: dict[Blocks, list[float]] = {blocks: [] for blocks in calls}
        for turn in range(ROUNDS):
            self._note(f"{name}: turn {turn + 1} of {ROUNDS}")
            for blocks, call in calls.items():
                with self._machine.active():
                    rounds[blocks].append(self._timer(call))
        return {blocks: statistics.median(taken) for blocks, taken in rounds.items()}

    def _call(self, name: str, blocks: Blocks) -> Callable[[], None]:
        """A call of one launch with these blocks; the whole plan has run before."""
        made = plan(
            self._problem,
            self._machine.architecture,
            self._operation,
            form=self._form,
            blocks={name: blocks},
        )
        strides = {key: tuple(tensor.stride()) for key, tensor in self._operands.items()}
        call = prepare(made, self._machine, strides, is_aligned16(self._operands))
        given = call.scratch(self._operands)
        call.launch_on(given)
        step = next(step for step in call.steps if step.spec.kernel == name)
        return lambda: step.launch(given)


def _operands(problem: Problem, machine: Machine, operation: str) -> dict[str, Tensor]:
    """Random contiguous arrays with canonical axes, and the forward results for a backward pass."""
    p = problem
    q, k = (p.batch, p.heads_q, p.len_q), (p.batch, p.heads_kv, p.len_k)
    shapes = {"q": (*q, p.dim), "k": (*k, p.dim), "v": (*k, p.dim_v), "o": (*q, p.dim_v)}
    if operation == "backward":
        shapes |= {"do": shapes["o"], "dq": shapes["q"], "dk": shapes["k"], "dv": shapes["v"]}
    made = {name: machine.empty(shape, p.dtype).normal_() for name, shape in shapes.items()}
    made["lse"] = machine.empty(q, STATISTICS[p.dtype])
    if operation == "backward":
        forward = {name: made[name] for name in ("q", "k", "v", "o", "lse")}
        with machine.active():
            execute(plan(problem, machine.architecture, "forward"), machine, forward)
    return made


def _seconds(call: Callable[[], None]) -> float:
    from triton.testing import do_bench

    milliseconds: Any = do_bench(call, return_mode="median")
    return float(milliseconds) / 1e3
