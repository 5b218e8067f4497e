"""The conformance test of every backend: a case, both passes, against dense float64 attention."""

from __future__ import annotations

from backends import Setting
from cases import Case
from compare import assert_near, dense, tolerances
from operands import inputs, place

from tilefold.problems.attention import Problem


def assert_conforms(setting: Setting, problem: Problem, case: Case) -> None:
    """Raise AssertionError if a result is wrong, or memory around a result was written.

    Results have the same memory layout as the operands.
    """
    operands = inputs(problem, case.layout, case.memory)
    want = dense(operands, problem.mask, problem.scale)
    tolerance = tolerances(problem, operands, want, host_pairs=setting.backend == "cpu")
    memory = case.memory if case.memory in setting.places else "packed"
    shapes = {
        "o": (problem.batch, problem.heads_q, problem.len_q, problem.dim_v),
        **{f"d{name}": operands[name].shape for name in ("q", "k", "v")},
    }
    into = {
        name: place(shape, problem.dtype, case.layout, memory) for name, shape in shapes.items()
    }
    got = setting.forward(problem, operands, into=into["o"].array)
    for name, array in got.items():
        assert_near(name, array, want[name], tolerance[name])
    gradients = {name: placed.array for name, placed in into.items() if name != "o"}
    (form,) = setting.forms
    setting.backward(problem, {**operands, **got}, form, into=gradients)
    for name, placed in into.items():
        assert placed.untouched(), f"the kernel wrote around {name}"
        assert_near(name, placed.array, want[name], tolerance[name])
