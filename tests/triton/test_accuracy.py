"""Weights and lse of large scores, and of scales at the ends of their range."""

from __future__ import annotations

import functools
from typing import Any

import interpreted
import numpy as np
import pytest
from compare import UNITS, dense, errors
from operands import Array, inputs

from tilefold import Rule, causal, full
from tilefold.backends.triton.spec import Blocks
from tilefold.problems.attention import Problem

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


def assert_as_near(got: dict[str, Array], exact: dict[str, Array], rounded: dict[str, Array]) -> None:
    """At most three times the largest error of the dense computation, and some roundings."""
    for name, array in got.items():
        largest = abs(exact[name]).max()
        allowed = 3 * errors(rounded[name], exact[name]).max() + 8 * UNITS["float32"] * largest
        found = errors(array, exact[name]).max()
        print(name, found / largest / UNITS["float32"], errors(rounded[name], exact[name]).max() / largest / UNITS["float32"])
        assert found <= allowed, f"{name}: error {found:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("form", "len_q", "len_k"), [("tiled", 24, 60), ("decode", 2, 600)])
def test_large_scores_forward(form: str, len_q: int, len_k: int, scale: float) -> None:
    problem, given = large(len_q, len_k, scale)
    exact, rounded = defined(len_q, len_k, scale)
    assert abs(exact["lse"]).max() > 9e3
    got = interpreted.forward(problem, given, **PLANS[form])
    assert_as_near(got, exact, rounded)
    assert errors(got["lse"], exact["lse"]).max() <= 1.5 * UNITS["float32"] * abs(exact["lse"]).max()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("form", ["split", "fused"])
def test_large_scores_backward(form: str, scale: float) -> None:
    problem, given = large(24, 60, scale)
    exact, rounded = defined(24, 60, scale)
    forward = {name: exact[name].astype(np.float32) for name in ("o", "lse")}
    got = interpreted.backward(problem, {**given, **forward}, **PLANS[form])
    assert_as_near(got, exact, rounded)
