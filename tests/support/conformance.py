"""The conformance test of every backend: a case, both passes, against dense float64 attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from cases import Case
from compare import assert_near, dense, tolerances
from operands import Array, inputs, place

from tilefold.problems.attention import Problem

Results = Mapping[str, Array]


class Backend(Protocol):
    """A module of `tests/support` that runs attention on a backend: `metal` or `interpreted`."""

    PLACES: tuple[str, ...]
    """The kinds of memory that its kernels can write to."""

    def forward(
        self, problem: Problem, operands: Results, on: Any, into: Array | None
    ) -> dict[str, Array]:
        """Return o, in `into` if it is given, and lse."""
        ...

    def backward(
        self, problem: Problem, operands: Results, on: Any, into: Results, **options: Any
    ) -> dict[str, Array]:
        """Return dq, dk and dv in `into`; `operands` holds do, q, k, v, o and lse."""
        ...


def assert_conforms(
    backend: Backend, on: Any, problem: Problem, case: Case, **options: Any
) -> None:
    """Raise AssertionError if a result is wrong, or memory around a result was written.

    Results have the same memory layout as the operands. `options` go to the backward plan.
    """
    operands = inputs(problem, case.layout, case.memory)
    want = dense(operands, problem.mask, problem.scale)
    tolerance = tolerances(problem, operands, want, host_pairs=False)
    memory = case.memory if case.memory in backend.PLACES else "packed"
    shapes = {
        "o": (problem.batch, problem.heads_q, problem.len_q, problem.dim_v),
        **{f"d{name}": operands[name].shape for name in ("q", "k", "v")},
    }
    into = {
        name: place(shape, problem.dtype, case.layout, memory) for name, shape in shapes.items()
    }
    got = backend.forward(problem, operands, on, into["o"].array)
    for name, array in got.items():
        assert_near(name, array, want[name], tolerance[name])
    gradients = {name: placed.array for name, placed in into.items() if name != "o"}
    backend.backward(problem, {**operands, **got}, on, gradients, **options)
    for name, placed in into.items():
        assert placed.untouched(), f"the kernel wrote around {name}"
        assert_near(name, placed.array, want[name], tolerance[name])
