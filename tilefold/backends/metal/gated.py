"""The forward pass by Metal 4's tensor operations: whether this Mac may run it, and its plan.

The gate is closed unless macOS, the GPU and a test compile all say yes: see `tensorops.gate`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from tilefold.backends.metal import plan as planning
from tilefold.backends.metal import runtime
from tilefold.backends.metal.kernels import tensorops
from tilefold.backends.metal.plan import MetalPlan
from tilefold.problems.attention import Problem

GENERATIONS = {"apple7": 13, "apple8": 14, "apple9": 15, "apple10": 17}
"""Apple's number of the oldest GPUs of each family: M1's, M2's, M3's and M5's."""

FAMILIES = tuple(
    name for name, number in GENERATIONS.items() if number >= tensorops.OLDEST_GENERATION
)
"""Families with units for tensor operations, oldest first."""


@functools.lru_cache(maxsize=1)
def missing() -> str | None:
    """Why tensor operations cannot run on this machine; None where they can."""
    if reason := runtime.missing():
        return reason
    machine = runtime.gpu()
    major, minor, *_ = (*map(int, (runtime.macos() or "0").split(".")), 0)
    return tensorops.gate((major, minor), GENERATIONS[machine.family], machine.compile)


def plan(problem: Problem, family: str, extra: tuple[str, ...] = ()) -> MetalPlan:
    """The plan of a forward pass whose kernel multiplies by `tensorops`.

    `extra` are as for the other plan: see `planning.EXTRA`.
    Raises NotImplementedError for what tensor operations do not serve.
    """
    blocks = tensorops.blocks(problem.dtype, problem.dim_v)
    asked: dict[str, Any] = {"form": "tiled", "blocks": blocks, "cached": (), "extra": extra}
    made = planning.plan(problem, family, "forward", **asked)
    (launch,) = made.launches
    spec = tensorops.variant(launch.spec)
    choice = replace(
        launch.choice,
        start="blocks for tensor operations, which nobody tuned",
        cached=spec.cached,
        registers=tensorops.registers(spec),
        threadgroup_bytes=tensorops.threadgroup_bytes(spec),
    )
    return replace(made, launches=(replace(launch, spec=spec, choice=choice),), buffers={})
