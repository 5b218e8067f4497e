"""The kernels of GPUs, as emitted, against the dense definition in float64: the cases of the CPU.

Every layout, memory and head dimension, forward and backward, with the same tolerances. Rules
take turns: each is tested on Metal or on Triton here; `test_mask_source.py` has all on both.
Lengths are smaller than on the CPU: Metal's emulator runs each lane as a fiber, and Triton's
interpreter each operation in Python. Types, forms, families and architectures take turns.
`tests/cpu/test_conformance.py` has the CPU's, in every form and through the public functions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import metal_cases
import pytest
from backends import Setting
from cases import AXES, RULES, Case, cover
from compare import HALVES, dense, tolerances
from conformance import assert_conforms
from metal import FAMILIES
from operands import inputs

from tilefold.backends.cpu.device import host
from tilefold.backends.triton.spec import MOST_DIM

# Tracing Python's operations doubles the time of these tests.
pytestmark = pytest.mark.no_cover

SHAPES = [(1, 1), (3, 3), (64, 32), (47, 61), (31, 1), (1, 99), (40, 72), (96, 160)]
LARGE = [(47, 61), (40, 72), (60, 90)]
DIMS = [1, 2, 3, 16, 40, 64, 77, 80, 95, 128, 199, 256, 384, 512]
PAIRS = [("dim", "layout"), ("layout", "memory"), ("dim", "dim_v")]
TURNS = [*RULES][1::2]
WIDE, SMALLER = 199, (21, 35)
"""From this head dimension on, large shapes are smaller: their blocks have 16 rows or 32."""

TRITON_CASES = [
    replace(case, shape=SMALLER) if case.dim >= WIDE and case.shape in LARGE else case
    for case in cover({**AXES, "shape": SHAPES, "dim": DIMS, "rule": TURNS}, PAIRS, LARGE)
]

TYPES = ("float32", "bfloat16", "float16", "float64")
ARCHITECTURES = ("sm_90", "sm_80")
"""With tensor descriptors, where arrays lie so that tiles can be moved whole, and without."""

WINDOW = Case((47, 61), 16, "window-and-prefix", "bhnd", "gqa", "padded")
QUICK = [
    (
        Setting("metal", "float32", "apple9"),
        Case((40, 72), 13, "causal", "bhdn", "mqa", "packed", "narrower"),
    ),
    (
        Setting("triton", "float32", "sm_90", ("fused",)),
        Case((40, 72), 16, "causal", "bhnd", "mqa", "packed", "narrower"),
    ),
]
FIRST = [
    *QUICK,
    (Setting("metal", "bfloat16", "apple7"), WINDOW),
    (Setting("triton", "bfloat16", "sm_80", ("split",)), WINDOW),
]


def metal(number: int) -> Setting:
    """The setting of a case on Metal: float32 for every other pair, half types for the rest."""
    dtype = ("float32", HALVES[number // 4 % 2])[number // 2 % 2]
    return Setting("metal", dtype, FAMILIES[number % 2])


def triton(number: int) -> Setting:
    """The setting of a case in Triton's interpreter."""
    form = ("split", "fused")[number // 3 % 2]
    return Setting("triton", TYPES[number // 2 % 4], ARCHITECTURES[number % 2], (form,))


def trials() -> list[Any]:
    """Setting and case: the quick ones, then all."""
    slow = [
        *((metal(number), case) for number, case in enumerate(metal_cases.CASES)),
        *((triton(number), case) for number, case in enumerate(TRITON_CASES)),
    ]
    marks = {
        "metal": pytest.mark.feature("J03"),
        "triton": pytest.mark.feature("T01", "T08", "T09"),
    }
    return [
        pytest.param(
            *(setting, case),
            id=f"{setting}-{case}",
            marks=[marks[setting.backend], *([pytest.mark.slow] if number >= len(QUICK) else [])],
        )
        for number, (setting, case) in enumerate([*FIRST, *slow])
    ]


@pytest.mark.feature("M01", "M02", "M03", "M04", "M05", "M06", "M16")
@pytest.mark.parametrize(("setting", "case"), trials())
def test_attention_and_its_gradients_agree_with_reference(setting: Setting, case: Case) -> None:
    problem = case.problem(setting.dtype)
    if setting.backend == "triton" and problem.dim_v > MOST_DIM:
        with pytest.raises(NotImplementedError, match="heads of up to 512 numbers"):
            setting.plan(problem, "forward")
        return
    assert_conforms(setting, problem, case)


@pytest.mark.parametrize("dtype", HALVES)
def test_tolerances_do_not_follow_the_processor_of_the_tests(dtype: str) -> None:
    """One with AMX multiplies halves in pairs, and its kernels may be off by more than a GPU's."""
    problem = Case((47, 61), 16, "causal").problem(dtype)
    operands = inputs(problem, "bhnd", "packed")
    want = dense(operands, problem.mask, problem.scale)
    found = {True: [], False: []}
    for device in (host().lowered("avx2"), replace(host(), isa="amx")):
        for pairs, made in found.items():
            options = {"host_pairs": pairs, "device": device}
            made.append(tolerances(problem, operands, want, **options))
    plain, amx = found[True]
    assert plain["lse"] < amx["lse"]
    assert found[False] == [plain, plain]
