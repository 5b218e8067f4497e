"""Apple GPUs as machines, and their calls: see `protocols.Backend`."""

from __future__ import annotations

from dataclasses import replace

from tilefold.backends.metal import dispatch, runtime
from tilefold.backends.metal.plan import plan
from tilefold.backends.metal.runtime import missing
from tilefold.backends.protocols import PASSES, Pass, Placement
from tilefold.problems.attention import Problem

__all__ = ["admit", "machine", "missing", "prepare"]


def machine(index: int = 0) -> runtime.Mps:
    """The GPU of this Mac; there is one, whatever the number."""
    return runtime.gpu()


def admit(problem: Problem) -> Problem:
    """The problem with all products in float32, whatever the precision. Refuses float64."""
    if problem.dtype == "float64":
        raise NotImplementedError(
            "q is of float64, which Apple GPUs do not have: pass float32, or NumPy arrays or"
            " tensors on the CPU to tilefold.attention"
        )
    return replace(problem, precision="highest")


def prepare(
    machine: dispatch.Machine, problem: Problem, wanted: Pass, placement: Placement
) -> dispatch.Call:
    """Plan a problem and compile its kernels."""
    usual = PASSES[wanted.operation].operands
    given = ("sinks", "seed", "input")
    extra = [name for name in wanted.operands if name not in usual and not name.startswith(given)]
    made = plan(problem, machine.family, wanted.operation, extra=tuple(extra))
    return dispatch.prepare(made, machine, placement.strides, placement.alignment)
