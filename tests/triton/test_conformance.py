"""Triton's kernels, as emitted, in its interpreter: the cases of the CPU against float64.

Every rule, layout, memory and head dimension, forward and backward in both forms, with the same
tolerances. Lengths are smaller than on the CPU; types, forms and architectures take turns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import interpreted
import numpy as np
import pytest
from cases import AXES, Case, cover
from compare import assert_near, assert_same, dense, tolerances
from conformance import assert_conforms
from interpreted import backward, forward, machine
from operands import inputs

from tilefold.backends.triton import dispatch, source
from tilefold.backends.triton.plan import plan
from tilefold.backends.triton.spec import MOST_DIM, Blocks
from tilefold.problems.attention import Problem

SHAPES = [(1, 1), (3, 3), (64, 32), (47, 61), (31, 1), (1, 99), (40, 72), (96, 160)]
LARGE = [(47, 61), (40, 72), (60, 90)]
DIMS = [1, 2, 3, 16, 40, 64, 77, 80, 95, 128, 199, 256, 384, 512]
PAIRS = [("dim", "layout"), ("layout", "memory"), ("dim", "dim_v")]
CASES = list(cover({**AXES, "shape": SHAPES, "dim": DIMS}, PAIRS, LARGE))

TYPES = ("float32", "bfloat16", "float16", "float64")
ARCHITECTURES = ("sm_90", "sm_80")
"""With tensor descriptors, where arrays lie so that tiles can be moved whole, and without."""

QUICK = {
    (
        "sm_80",
        "bfloat16",
        "split",
        Case((47, 61), 16, "window-and-prefix", "bhnd", "gqa", "padded"),
    ),
    (
        "sm_90",
        "float32",
        "fused",
        Case((40, 72), 16, "causal", "bhnd", "mqa", "packed", "narrower"),
    ),
}


def trials() -> list[Any]:
    """Architecture, type, form of the backward pass and case."""
    found = [pytest.param(*trial, id="-".join(map(str, trial))) for trial in sorted(QUICK, key=str)]
    for number, case in enumerate(CASES):
        trial = (
            ARCHITECTURES[number % 2],
            TYPES[number // 2 % 4],
            ("split", "fused")[number // 3 % 2],
            case,
        )
        mark = pytest.mark.slow
        found.append(pytest.param(*trial, id="-".join(map(str, trial)), marks=mark))
    return found


@pytest.mark.feature("M01", "M02", "M03", "M04", "M05", "M06", "M16", "T01", "T08", "T09")
@pytest.mark.parametrize(("architecture", "dtype", "form", "case"), trials())
def test_attention_and_its_gradients(architecture: str, dtype: str, form: str, case: Case) -> None:
    on, problem = machine(architecture), case.problem(dtype)
    if problem.dim_v > MOST_DIM:
        with pytest.raises(NotImplementedError, match="heads of up to 512 numbers"):
            plan(problem, architecture, "forward")
        return
    assert_conforms(interpreted, on, problem, case, form=form)


@pytest.mark.slow
@pytest.mark.feature("M07")
@pytest.mark.parametrize(
    "blocks",
    [
        *(Blocks(16, 16, 1, 1), Blocks(32, 64, 4, 1), Blocks(64, 16, 4, 1)),
        *(Blocks(16, 32, 2, 2, streamed=True), Blocks(32, 16, 4, 1, streamed=True)),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["split", "fused"])
@pytest.mark.parametrize("dim", [40, 136])
def test_results_do_not_depend_on_the_blocks(blocks: Blocks, form: str, dim: int) -> None:
    """Streamed operands come in pieces of 32 or 64 columns, of which the last is not whole here."""
    case = Case((47, 61), dim, "window-and-prefix", "bhnd", "gqa", "packed")
    problem = case.problem("float32")
    operands = inputs(problem, "bhnd", "packed")
    want = dense(operands, problem.mask, problem.scale)
    tolerance = tolerances(problem, operands, want, host_pairs=False)
    got = forward(problem, operands, blocks=blocks)
    got |= backward(problem, {**operands, **got}, blocks=blocks, form=form)
    for name, array in got.items():
        assert_near(name, array, want[name], tolerance[name])


@pytest.mark.slow
@pytest.mark.feature("M06")
@pytest.mark.parametrize("form", ["split", "fused"])
def test_streamed_operands_of_a_negative_scale_in_odd_strides(form: str) -> None:
    """Queries, or keys, are negated as their pieces come."""
    case = Case((40, 72), 80, "causal", "bnhd", "gqa", "step2", "narrower")
    problem = replace(case.problem("float32"), scale=-0.3)
    operands = inputs(problem, case.layout, case.memory)
    want = dense(operands, problem.mask, problem.scale)
    tolerance = tolerances(problem, operands, want, host_pairs=False)
    blocks = Blocks(16, 16, 2, 2, streamed=True)
    got = forward(problem, operands, blocks=blocks)
    got |= backward(problem, {**operands, **got}, blocks=blocks, form=form)
    for name, array in got.items():
        assert_near(name, array, want[name], tolerance[name])


@pytest.mark.slow
@pytest.mark.feature("M04")
@pytest.mark.parametrize("options", [{"form": "split"}, {"form": "fused", "owners": 3}], ids=str)
def test_the_same_bits_every_time(options: dict[str, Any]) -> None:
    case = Case((96, 160), 16, "causal", "bhnd", "gqa", "packed")
    problem = case.problem("float32")
    operands = inputs(problem, "bhnd", "packed")
    got = forward(problem, operands)
    first = backward(problem, {**operands, **got}, **options)
    again = backward(problem, {**operands, **got}, **options)
    for name, array in first.items():
        assert_same(name, array, again[name])


def test_operands_in_memory_as_wide_as_64_bits_count() -> None:
    """Rows further apart than 2**31 elements: of a sequence, of a head, of the head dimension."""
    import torch

    on = machine("sm_90")
    problem = Problem.of((1, 2, 3, 2), dtype="float16")
    random = np.random.default_rng(0)
    operands = {
        name: random.normal(size=(1, 2, 3, 2)).astype(np.float16) for name in ("q", "k", "v", "do")
    }
    want = dense(operands, problem.mask, problem.scale)
    far = 2**31 + 16
    base = torch.empty(4 * far, dtype=torch.float16)  # touched at a few pages
    strides = {"q": (1, far, 1, 16), "k": (1, 16, far, 1), "v": (1, 16, 1, far)}
    given = {}
    for start, (name, steps) in enumerate(strides.items()):
        given[name] = base.as_strided((1, 2, 3, 2), steps, 100 * start)
        given[name].copy_(torch.from_numpy(operands[name]))
    given["o"] = base.as_strided((1, 2, 3, 2), (1, 16, far, 1), 300)
    given["lse"] = torch.empty(1, 2, 3)
    made = plan(problem, "sm_90", "forward", form="tiled")
    dispatch.execute(made, on, given)
    assert_near("o", given["o"].numpy(), want["o"], 2e-3)
    assert_near("lse", given["lse"].numpy(), want["lse"], 1e-5)
    found = {name: tuple(tensor.stride()) for name, tensor in given.items()}
    spec = dispatch.fitted(made.launches[0].spec, made, found, True)
    assert spec.wide
    assert "tl.int64) * k_n" in source.emit(spec)
    given["o"].zero_()
    streamed = plan(problem, "sm_90", "forward", blocks=Blocks(16, 16, 1, 1, streamed=True))
    dispatch.execute(streamed, on, given)
    assert_near("o, streamed", given["o"].numpy(), want["o"], 2e-3)
