"""Metal's kernels, as emitted, against the dense definition in float64: the cases of the CPU.

Lengths are smaller: on the executor a lane is a fiber. Types and families take turns.
"""

from __future__ import annotations

from typing import Any

import pytest
from cases import AXES, Case, cover
from compare import HALVES, assert_near, dense, tolerances
from metal import FAMILIES, forward, machine
from operands import inputs, place

from tilefold.backends.metal import dispatch
from tilefold.backends.metal.plan import plan

SHAPES = [(1, 1), (3, 3), (64, 32), (47, 61), (31, 1), (1, 99), (40, 72), (96, 96)]
LARGE = [(47, 61), (40, 72), (60, 90)]
DIMS = [1, 2, 3, 8, 16, 40, 64, 77, 80, 95, 128, 199, 256, 384]
PAIRS = [("dim", "layout"), ("layout", "memory"), ("dim", "dim_v")]
CASES = list(cover({**AXES, "shape": SHAPES, "dim": DIMS}, PAIRS, LARGE))

QUICK = {
    ("apple7", "bfloat16", Case((47, 61), 16, "window-and-prefix", "bhnd", "gqa", "padded")),
    ("apple9", "float32", Case((40, 72), 13, "causal", "bhdn", "mqa", "packed", "narrower")),
}


def trials() -> list[Any]:
    """Family, type and case: float32 for every other case, half types for the rest."""
    found = [pytest.param(*trial, id="-".join(map(str, trial))) for trial in sorted(QUICK, key=str)]
    for number, case in enumerate(CASES):
        family = FAMILIES[number % 2]
        dtype = ("float32", HALVES[number // 4 % 2])[number // 2 % 2]
        trial = family, dtype, case
        mark = pytest.mark.slow
        found.append(pytest.param(*trial, id="-".join(map(str, trial)), marks=mark))
    return found


@pytest.mark.feature("M01", "M02", "M03", "M04", "M05", "M06", "M16", "J03")
@pytest.mark.parametrize(("family", "dtype", "case"), trials())
def test_attention_and_its_gradients(family: str, dtype: str, case: Case) -> None:
    """With outputs that lie as oddly as the inputs, and nothing written around them."""
    on = machine(family)
    problem = case.problem(dtype)
    operands = inputs(problem, case.layout, case.memory)
    want = dense(operands, problem.mask, problem.scale)
    tolerance = tolerances(problem, operands, want)
    got = forward(problem, operands, on)
    for name, array in got.items():
        assert_near(name, array, want[name], tolerance[name])
    memory = "packed" if case.memory in ("broadcast", "misaligned") else case.memory
    into = {
        f"d{name}": place(operands[name].shape, dtype, case.layout, memory)
        for name in ("q", "k", "v")
    }
    outputs = {name: placed.array for name, placed in into.items()}
    made = plan(problem, family, "backward")
    dispatch.execute(made, on, {**operands, **got, **outputs})
    for name, array in outputs.items():
        assert into[name].untouched(), f"the kernel wrote around {name}"
        assert_near(name, array, want[name], tolerance[name])
