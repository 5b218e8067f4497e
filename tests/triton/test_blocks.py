"""Blocks, streamed operands, repeated bits and wide offsets of Triton's kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import Case
from compare import assert_near, assert_same, dense, tolerances
from interpreted import backward, forward, machine
from operands import inputs

from tilefold.backends.triton import dispatch, source
from tilefold.backends.triton.plan import plan
from tilefold.backends.triton.spec import Blocks
from tilefold.problems.attention import Problem


@pytest.mark.slow
@pytest.mark.feature("M07")
@pytest.mark.parametrize(
    ("blocks", "form", "dim"),
    [
        (blocks, form, (40, 136)[(number + (form == "fused")) % 2])
        for number, blocks in enumerate(
            (
                *(Blocks(16, 16, 1, 1), Blocks(32, 64, 4, 1), Blocks(64, 16, 4, 1)),
                *(Blocks(16, 32, 2, 2, streamed=True), Blocks(32, 16, 4, 1, streamed=True)),
            )
        )
        for form in ("split", "fused")
    ],
    ids=str,
)
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


@pytest.mark.slow
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
