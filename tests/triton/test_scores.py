"""Scores at the ends of their range: large ones, -inf alone, scales that float32 cannot hold.

The interpreter rounds a fused multiply-add once, as GPUs do: see `interpreter`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import interpreted
import numpy as np
import pytest
from compare import UNITS, assert_near, dense, errors
from operands import Array, inputs

from tilefold import Rule, causal, full, lengths
from tilefold.backends.triton.plan import plan
from tilefold.backends.triton.spec import Blocks
from tilefold.problems.attention import Problem

# Tracing Python's operations doubles the time of these tests.
pytestmark = pytest.mark.no_cover

TILES = Blocks(16, 16, 4, 1)
PLANS: dict[str, dict[str, Any]] = {
    "tiled": {"form": "tiled", "blocks": TILES},
    "decode": {"form": "decode"},
    "split": {"form": "split", "blocks": TILES},
    "fused": {"form": "fused", "owners": 2, "blocks": TILES},
}
SCALES = (0.125, -0.1234)
"""With the first all scores are exact numbers of float32, so the dense computation errs little."""


@functools.cache
def large(len_q: int, len_k: int, scale: float) -> tuple[Problem, dict[str, Array]]:
    """Scores of about 1e4 that grow by 1 from tile to tile and differ by some units in a row."""
    problem = Problem.of(
        (1, 2, len_q, 64), (1, 1, len_k, 64), dtype="float32", mask=causal(), scale=scale
    )
    found = inputs(problem, "bhnd", "packed")
    random = np.random.default_rng(7)
    for name in "qk":
        found[name][...] = random.integers(-2, 3, found[name].shape)
    found["q"][..., :2] = 200, 1
    found["k"][..., 0] = 400 * np.sign(scale)
    found["k"][..., 1] = np.arange(len_k) // 2
    return problem, found


@functools.cache
def defined(len_q: int, len_k: int, scale: float) -> tuple[dict[str, Array], dict[str, Array]]:
    """All results of the definition, in float64 and in float32."""
    problem, given = large(len_q, len_k, scale)
    exact, rounded = (dense(given, problem.mask, scale, kind) for kind in ("float64", "float32"))
    return exact, rounded


def assert_as_near(
    got: dict[str, Array], exact: dict[str, Array], rounded: dict[str, Array]
) -> None:
    """At most three times the largest error of the dense computation, and some roundings."""
    for name, array in got.items():
        largest = abs(exact[name]).max()
        allowed = 3 * errors(rounded[name], exact[name]).max() + 8 * UNITS["float32"] * largest
        found = errors(array, exact[name]).max()
        assert found <= allowed, f"{name}: error {found:.3g}, allowed {allowed:.3g}"


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("form", "len_q", "len_k"), [("tiled", 24, 60), ("decode", 2, 600)])
def test_large_scores_forward(form: str, len_q: int, len_k: int, scale: float) -> None:
    problem, given = large(len_q, len_k, scale)
    exact, rounded = defined(len_q, len_k, scale)
    assert abs(exact["lse"]).max() > 9e3
    got = interpreted.forward(problem, given, **PLANS[form])
    assert_as_near(got, exact, rounded)
    unit = UNITS["float32"] * abs(exact["lse"]).max()
    assert errors(got["lse"], exact["lse"]).max() <= 1.5 * unit, "lse has one rounding"


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("form", ["split", "fused"])
def test_large_scores_backward(form: str, scale: float) -> None:
    problem, given = large(24, 60, scale)
    exact, rounded = defined(24, 60, scale)
    forward = {name: exact[name].astype(np.float32) for name in ("o", "lse")}
    got = interpreted.backward(problem, {**given, **forward}, **PLANS[form])
    assert_as_near(got, exact, rounded)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [full(), causal(), lengths([40])], ids=repr)
def test_scores_of_minus_infinity_alone_have_no_mean(mask: Rule) -> None:
    """Head 0 sees nothing else, head 1 in its first tile and a half; some queries see no key."""
    problem = Problem.of(
        (1, 2, 60, 16), (1, 2, 50, 16), (1, 2, 50, 16), dtype="float32", mask=mask, scale=1.0
    )
    given = inputs(problem, "bhnd", "packed")
    given["q"][...] = abs(given["q"])
    given["k"][:, 0] = -np.inf
    given["k"][:, 1, :24] = -np.inf
    got = interpreted.forward(problem, given, **PLANS["tiled"])
    want = dense(given, mask, 1.0)
    if mask == causal():
        assert not got["o"][:, :, :10].any() and np.isneginf(got["lse"][:, :, :10]).all()
    assert np.isnan(got["o"][:, 0, 10:]).all() and np.isfinite(got["o"][:, 1, 40:]).all()
    for name, array in got.items():
        assert_near(name, array, want[name], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e8, 1e30, 3e38 / 40])
def test_huge_scores_choose_one_key(size: float) -> None:
    """The product of a score and the factor is not rounded, and the maximum is: they may be apart
    by more than the largest exponent.
    """
    problem = Problem.of((1, 1, 40, 16), dtype="float32", mask=causal(), scale=1.0)
    given = {
        name: np.zeros_like(array) for name, array in inputs(problem, "bhnd", "packed").items()
    }
    given["q"][..., 0], given["k"][..., 0] = size, np.arange(1, 41)
    given["v"][...] = np.random.default_rng(0).normal(size=given["v"].shape)
    got = interpreted.forward(problem, given, **PLANS["tiled"])
    assert_near("o", got["o"], given["v"], 1e-6)
    want = np.float64(np.float32(size)) * np.arange(1, 41)
    assert_near("lse", got["lse"], want[None, None], 2 * UNITS["float32"] * want)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, 1e-37, 2.3e38])
def test_a_scale_may_be_as_small_or_large_as_float32(scale: float) -> None:
    problem = Problem.of((1, 1, 20, 16), dtype="float32", mask=causal(), scale=scale)
    given = inputs(problem, "bhnd", "packed")
    given["q"] /= np.float32(max(scale, 1.0))
    exact, rounded = (dense(given, problem.mask, scale, kind) for kind in ("float64", "float32"))
    got = interpreted.forward(problem, given, **PLANS["tiled"])
    assert_as_near(got, exact, rounded)
    forward = {name: exact[name].astype(np.float32) for name in ("o", "lse")}
    got = interpreted.backward(problem, {**given, **forward}, **PLANS["split"])
    assert_as_near({"dv": got["dv"], "dk": got["dk"]}, exact, rounded)


@pytest.mark.parametrize("scale", [1e40, -3e38, 1e-40])
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_a_scale_that_float32_cannot_hold_is_a_line(operation: str, scale: float) -> None:
    problem = Problem.of((1, 1, 20, 16), dtype="float16", scale=scale)
    with pytest.raises(
        ValueError, match=r"^scale must be 0 or from 1\.18e-38 to 2\.36e\+38 in size"
    ):
        plan(problem, "sm_90", operation)
    plan(replace(problem, dtype="float64"), "sm_90", operation)
