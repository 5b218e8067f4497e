"""The backends as shared suites run them: attention on canonical arrays, on one machine, in a type.

A suite of a behaviour has its settings as a parameter, and says nothing of a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import interpreted
import metal
import numpy as np
import operands as cpu
import pytest
from operands import FORMS, SENTINEL, Array

from tilefold.backends.cpu import plan as cpu_plan
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.metal import dispatch as metal_dispatch
from tilefold.backends.metal import plan as metal_plan
from tilefold.backends.protocols import PASSES
from tilefold.backends.triton import plan as triton_plan
from tilefold.problems.attention import Problem, Shape

Arrays = Mapping[str, Array]

TOLERANCES = {
    "cpu": {"float32": 1e-5, "float64": 1e-12, "float16": 3e-3, "bfloat16": 2e-2},
    "metal": {"float32": 1e-5, "float16": 4e-3},
    "triton": {"float32": 1e-5, "float64": 1e-12, "float16": 5e-3, "bfloat16": 3e-2},
}
"""The largest error of a result that need not be exact, relative to its largest element or to 1."""


@dataclass(frozen=True)
class Setting:
    """A backend, what it runs on, a type, and the forms of the backward pass that are tried.

    `on` is a family of Apple GPUs, a GPU architecture, or a level of instructions of this
    processor, which is "" for all that it has. `forms` of a
    backend that has no choice are ("",). `blocks` are the caller's instead of the table's: on
    this processor a register tile.
    """

    backend: str
    dtype: str
    on: str = ""
    forms: tuple[str, ...] = ("",)
    blocks: Any = None

    def __str__(self) -> str:
        forms = () if self.backend == "cpu" else self.forms
        words = (self.backend, self.on, self.dtype, *forms, self.blocks or "")
        return "-".join(str(word) for word in words if word)

    @property
    def tolerance(self) -> float:
        """The largest error, relative to the largest element of a result, or to 1."""
        return TOLERANCES[self.backend][self.dtype]

    @property
    def exact(self) -> bool:
        """Whether what changes no result changes none of its bits.

        CPUs compute tiles of half types that hold NaN with weights that are not rounded to pairs,
        and GPUs add one value at a time in a tile that holds NaN.
        """
        return self.backend == "cpu" and self.dtype in ("float32", "float64")

    @property
    def places(self) -> tuple[str, ...]:
        """The kinds of memory that results can be written to."""
        return interpreted.PLACES if self.backend == "triton" else metal.PLACES

    def forward(self, problem: Problem, given: Arrays, **options: Any) -> dict[str, Array]:
        """Both results of the forward pass: o and lse.

        `options` are those of the plan, and on a GPU `into`: an array for o.
        """
        if self.backend == "cpu":
            return cpu.forward(problem, given, **options)
        if self.backend == "metal":
            return metal.forward(problem, given, metal.machine(self.on), **options)
        on = interpreted.machine(self.on)
        return interpreted.forward(problem, given, on, blocks=self.blocks, **options)

    def run(
        self,
        problem: Problem,
        operation: str,
        given: Arrays,
        results: Mapping[str, tuple[Shape, str]],
        form: str = "auto",
    ) -> dict[str, Array]:
        """The results of a pass with any operands; `results` has their shapes and types."""
        usual = PASSES[operation].operands
        further = [name for name in (*given, *results) if name not in usual]
        made = {name: np.full(shape, SENTINEL, dtype) for name, (shape, dtype) in results.items()}
        if self.backend == "cpu":
            options = {
                "device": _level(self.on),
                "extra": tuple([x for x in further if x in ("max", "dlse", "dsinks")]),
                "inputs": tuple([int(x[6:]) for x in further if x.startswith("dinput")]),
            }
            options |= {"tile": self.blocks} if self.blocks else {}
            cpu.run(problem, operation, {**given, **made}, form=form, **options)
            return made
        named = ("sinks", "seed", "input")
        extra = tuple([name for name in further if not name.startswith(named)])
        if self.backend == "metal":
            blocks = None if form == "decode" else self.blocks
            plan = self.plan(problem, operation, extra=extra, form=form, blocks=blocks)
            metal_dispatch.execute(plan, metal.machine(self.on), {**given, **made})
            return made
        plan = self.plan(problem, operation, extra=extra, form=form, blocks=self.blocks)
        tensors = {name: interpreted.tensor(array) for name, array in given.items()}
        return interpreted.run(plan, interpreted.machine(self.on), tensors, made)

    def plan(self, problem: Problem, operation: str, **options: Any) -> Any:
        """The plan of a pass; `options` go to the backend's `plan`."""
        if self.backend == "cpu":
            on = options.pop("device", None) or host()
            return cpu_plan.plan(problem, on, operation, **options)
        planner = metal_plan if self.backend == "metal" else triton_plan
        return planner.plan(problem, self.on, operation, **options)

    def launches(self, problem: Problem, **options: Any) -> Sequence[Any]:
        """The launches of the forward pass; `options` go to `plan`."""
        launches: Sequence[Any] = self.plan(problem, "forward", **options).launches
        return launches

    def backward(
        self, problem: Problem, given: Arrays, form: str, **options: Any
    ) -> dict[str, Array]:
        """All gradients in a form: dq, dk and dv; `given` holds do, q, k, v, o and lse.

        `options` are those of the plan, and on a GPU `into`: arrays for the results.
        """
        if self.backend == "cpu":
            return cpu.backward(problem, given, form, **options)
        if self.backend == "metal":
            return metal.backward(problem, given, metal.machine(self.on), **options)
        on, options = interpreted.machine(self.on), {"form": form, "blocks": self.blocks, **options}
        return interpreted.backward(problem, given, on, **options)

    def gradients(self, problem: Problem, given: Arrays) -> dict[str, Array]:
        """Gradients in every form of the setting: "dq split", "dq fused", ..."""
        return {
            f"{name} {form}".strip(): array
            for form in self.forms
            for name, array in self.backward(problem, given, form).items()
        }

    def results(self, problem: Problem, given: Arrays) -> dict[str, Array]:
        """The results of both passes; gradients have the names of `gradients`."""
        made = self.forward(problem, given)
        return {**made, **self.gradients(problem, {**given, **made})}


def _level(isa: str) -> Device:
    """This processor at a level of instructions; skips the test where it has none."""
    try:
        return host().lowered(isa) if isa else host()
    except ValueError as error:
        pytest.skip(f"this machine has no {isa}: {error}")


def quantity(name: str) -> str:
    """The quantity that a result is: "dq" of "dq split".

    >>> quantity("dq split"), quantity("lse")
    ('dq', 'lse')
    """
    return name.partition(" ")[0]


def on_cpu(dtype: str) -> Setting:
    """This processor, in every form of the backward pass."""
    return Setting("cpu", dtype, forms=tuple(FORMS))
