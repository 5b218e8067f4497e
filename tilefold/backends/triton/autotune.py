"""Which blocks are the fastest on this GPU: measured on request, and kept for the planner.

Never part of a call: a first call takes the table's blocks and is as fast as a compiler. `tune`
tries, for each kernel of an operation, blocks around the table's, a step of two in each direction
and other numbers of warps and stages, by Triton's own timer, on random data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tilefold.backends.triton import tuned
from tilefold.backends.triton.architectures import architecture
from tilefold.backends.triton.choice import choose
from tilefold.backends.triton.dispatch import aligned, execute, prepare
from tilefold.backends.triton.machine import Machine, ResourceError
from tilefold.backends.triton.plan import Launch, key_of, plan
from tilefold.backends.triton.spec import LEAST, Blocks
from tilefold.problem import STATISTICS, Problem

if TYPE_CHECKING:
    from torch import Tensor

Timer = Callable[[Callable[[], None]], float]
"""Seconds of a call."""


@dataclass(frozen=True)
class Trial:
    """Blocks of a kernel and what they took: seconds, or the reason why they cannot run."""

    operation: str
    blocks: Blocks
    seconds: float | None
    reason: str = ""


def tune(
    problem: Problem,
    operation: str,
    machine: Machine | None = None,
    *,
    form: str = "auto",
    timer: Timer | None = None,
    keep: bool = True,
) -> list[Trial]:
    """Measure blocks for each kernel of an operation, and keep the fastest for later plans.

    Arguments:
        problem: what will be called, such as `Problem.of((4, 16, 4096, 128), dtype="bfloat16")`
        operation: "forward" or "backward"
        machine: the GPU, `tilefold.triton.gpu(0)` unless it is given
        form: see `tilefold.triton.plan`
        timer: returns the seconds of a call; the default is the median of `triton.testing.do_bench`
        keep: write what was found to the file that plans read

    Returns:
        All trials, kernel by kernel, the fastest first. A kernel whose table has one row only, that
        of Hopper in Gluon, and a problem in which no query meets a key, have none.

    Raises:
        NotImplementedError: there is no GPU that Triton serves here
        ValueError: operation or form is not allowed
        OSError: the file cannot be written
    """
    if machine is None:
        from tilefold.backends.triton import runtime

        machine = runtime.gpu()
    made = plan(problem, machine.architecture, operation, form=form)
    if problem.empty:
        return []
    operands = _operands(problem, machine, operation)
    found: list[Trial] = []
    winners = {}
    for launch in [launch.plain or launch for launch in made.launches]:
        if launch.spec.gluon:
            continue  # its blocks are what shared memory allows
        if launch.spec.operation in ("delta", "merge", "reduce_dq"):
            continue  # they read and write memory once; nobody waits for their blocks
        trials = [
            _trial(problem, machine, operation, form, launch, blocks, operands, timer or _seconds)
            for blocks in candidates(launch, machine.architecture)
        ]
        trials.sort(key=lambda trial: trial.seconds if trial.seconds is not None else float("inf"))
        found += trials
        if trials and trials[0].seconds is not None:
            winners[key_of(launch.spec, machine.architecture)] = trials[0].blocks
    if keep and winners:
        tuned.keep(winners)
    return found


def candidates(launch: Launch, name: str) -> Iterator[Blocks]:
    """The blocks of a launch first, then those near them that the architecture can hold."""
    spec, usual = launch.spec, launch.spec.blocks
    steps = ({max(LEAST, size // 2), size, size * 2} for size in (usual.parallel, usual.traverse))
    parallel, traverse = map(sorted, steps)
    if spec.operation == "decode":
        parallel = [usual.parallel]  # as many as there are queries
    every = itertools.product(parallel, traverse, (4, 8), (1, 2, 3, 4))
    yield usual
    for sizes in every:
        blocks = Blocks(*sizes)
        if blocks == usual:
            continue
        try:
            choose(
                architecture(name), spec.operation, spec.dtype, spec.dim, spec.dim_v,
                products=spec.products, blocks=blocks,
            )  # fmt: skip
        except ValueError:
            continue
        yield blocks


def _trial(
    problem: Problem,
    machine: Machine,
    operation: str,
    form: str,
    launch: Launch,
    blocks: Blocks,
    operands: dict[str, Tensor],
    timer: Timer,
) -> Trial:
    """One launch of the plan with these blocks, timed alone after the whole plan has run."""
    name = launch.spec.operation
    made = plan(problem, machine.architecture, operation, form=form, blocks={name: blocks})
    strides = {key: tuple(tensor.stride()) for key, tensor in operands.items()}
    try:
        with machine.active():
            call = prepare(made, machine, strides, aligned(operands))
            given = call.scratch(operands)
            call.launch(given)
            step = next(step for step in call.steps if step.spec.operation == name)
            return Trial(name, blocks, timer(lambda: step.launch(given)))
    except ResourceError as error:
        return Trial(name, blocks, None, str(error))


def _operands(problem: Problem, machine: Machine, operation: str) -> dict[str, Tensor]:
    """Random arrays with canonical axes, contiguous, and the results of what comes before."""
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
