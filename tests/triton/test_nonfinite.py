"""NaN and infinities in Triton's kernels: what no query may see changes nothing, the rest follows.

The dense definition decides. In the interpreter `careful` is what runs on a GPU too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from compare import assert_near, assert_same, dense
from interpreted import backward, forward, machine
from operands import inputs

from tilefold import Rule, causal, documents, full
from tilefold.backends.triton.spec import Blocks
from tilefold.problems.attention import Problem

LEN_Q, LEN_K = 45, 90
RULES = {
    "causal": causal(),
    "documents": documents(np.repeat([0, 1, 2], 15), np.repeat([0, 1, 4], 30)),
}
"""The first leaves padding at the end of tiles, the second also rows that see no key."""

RTOL = {"float32": 1e-5, "bfloat16": 3e-2}
STREAMED = Blocks(32, 16, 2, 1, streamed=True)
PLACES = {"k": slice(60, 90), "v": slice(60, 90), "q": slice(20, 25), "do": slice(20, 25)}


@pytest.mark.slow
@pytest.mark.feature("M01", "T09")
@pytest.mark.parametrize(
    ("rule", "bad"),
    [("causal", math.nan), ("documents", math.nan), ("causal", -math.inf), ("documents", math.inf)],
)
@pytest.mark.parametrize(
    ("architecture", "dtype", "form", "blocks"),
    [
        ("sm_90", "float32", "split", None),
        ("sm_80", "float32", "fused", None),
        ("sm_80", "bfloat16", "split", None),
        ("sm_80", "float32", "split", STREAMED),
        ("sm_80", "bfloat16", "fused", STREAMED),
    ],
)
def test_results_are_as_defined(
    architecture: str, dtype: str, form: str, blocks: Blocks | None, rule: str, bad: float
) -> None:
    on, problem = machine(architecture), _problem(RULES[rule], dtype)
    for names in (("k", "v"), ("q",), ("do",)):
        operands = {name: array.copy() for name, array in inputs(problem, "bhnd", "packed").items()}
        for name in names:
            operands[name][:, :, PLACES[name]] = bad
        with np.errstate(all="ignore"):
            want = dense(operands, problem.mask, problem.scale)
        got = forward(problem, operands, on, blocks=blocks)
        got |= backward(problem, {**operands, **got}, on, form=form, blocks=blocks)
        for name, array in got.items():
            largest = abs(want[name][np.isfinite(want[name])]).max(initial=1)
            assert_near(f"{name}, {names}", array, want[name], RTOL[dtype] * largest)


@pytest.mark.slow
@pytest.mark.feature("T15")
@pytest.mark.parametrize("options", [{"form": "split"}, {"form": "fused"}], ids=str)
def test_what_nobody_sees_changes_no_bit(options: dict[str, Any]) -> None:
    """Keys and values past the rule's reach, which tiles at an edge hold beside those within."""
    problem = _problem(causal("start"), "float32")
    operands = inputs(problem, "bhnd", "packed")
    clean = forward(problem, operands)
    clean |= backward(problem, {**operands, **clean}, **options)
    for name in ("k", "v"):
        operands[name] = operands[name].copy()
        operands[name][:, :, LEN_Q:] = math.nan
    got = forward(problem, operands)
    got |= backward(problem, {**operands, **got}, **options)
    for name, array in got.items():
        if name in ("o", "lse"):  # one value is added at a time where there is NaN: other roundings
            assert_near(name, array, clean[name], 1e-5)
        else:
            assert_near(name, array[:, :, :LEN_Q], clean[name][:, :, :LEN_Q], 1e-4)
    assert (got["dk"][:, :, LEN_Q:] == 0).all() and (got["dv"][:, :, LEN_Q:] == 0).all()


@pytest.mark.parametrize("form", ["split", "fused"])
def test_a_query_that_sees_nothing(form: str) -> None:
    problem = _problem(~full(), "float32")
    operands = inputs(problem, "bhnd", "packed")
    got = forward(problem, operands)
    assert (got["o"] == 0).all() and np.isneginf(got["lse"]).all()
    for name, array in backward(problem, {**operands, **got}, form=form).items():
        assert_same(name, array, np.zeros_like(array))


def _problem(rule: Rule, dtype: str) -> Problem:
    shapes = (1, 2, LEN_Q, 5), (1, 1, LEN_K, 5), (1, 1, LEN_K, 7)
    return Problem.of(*shapes, dtype=dtype, mask=rule, scale=0.5)
