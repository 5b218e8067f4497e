"""Scores far from zero on Metal: their size costs no accuracy, in any form, type and sign."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from compare import assert_near, dense
from metal import FAMILIES, backward, forward, machine, tensor_plan
from operands import Array

from tilefold import Rule, causal, full, local
from tilefold.backends.metal.plan import LARGEST_SCALE, plan
from tilefold.problems.attention import Problem

pytestmark = pytest.mark.slow  # each launch is a process, each kernel a run of a C++ compiler

FORMS = {
    "tiled": ("apple7", "float32"),
    "tiled-half": ("apple9", "float16"),
    "decode": ("apple9", "float32"),
    "tensorops": ("apple10", "float32"),
}
"""Form, and the family and the type that it is tried with."""

SEEN = causal()

OFFSET = 2500
"""A product that all pairs have in common."""


def problem(form: str, scale: float, mask: Rule = SEEN) -> Problem:
    """Two tiles of keys, or three splits."""
    dtype = FORMS[form][1]
    len_q, len_k = (3, 600) if form == "decode" else (20, 150)
    return Problem(1, 2, 1, len_q, len_k, 12, 8, dtype, scale, mask)


def operands(sizes: Problem) -> dict[str, Array]:
    """Small whole numbers, so that products are exact; their offset has the sign of the scale."""
    drawn = np.random.default_rng(0)
    shapes = {"q": (2, sizes.len_q, 12), "k": (1, sizes.len_k, 12)}
    shapes |= {"v": (1, sizes.len_k, 8), "do": (2, sizes.len_q, 8)}
    made = {name: drawn.integers(-1, 2, (1, *shape)) for name, shape in shapes.items()}
    made["q"][..., 0], made["k"][..., 0] = 100, np.sign(sizes.scale) * OFFSET / 100
    return {name: array.astype(sizes.dtype) for name, array in made.items()}


def attend(form: str, sizes: Problem, given: dict[str, Array]) -> dict[str, Array]:
    """o and lse of a form."""
    if form == "tensorops":
        return forward(sizes, given, machine("apple10"), made=tensor_plan(sizes))
    options: dict[str, Any] = {"form": form.partition("-")[0]}
    return forward(sizes, given, machine(FORMS[form][0]), **options)


def dense_in(sizes: Problem, given: dict[str, Array]) -> Array:
    """o by float32 alone, with weights of the type of the arrays."""
    q, k, v = (given[name].astype(np.float32) for name in "qkv")
    scores = np.float32(sizes.scale) * (q @ k.swapaxes(2, 3))
    scores[..., ~sizes.mask.to_dense(sizes.len_q, sizes.len_k)] = -np.inf
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    total = weights.sum(axis=3, keepdims=True)
    o: Array = (weights.astype(sizes.dtype).astype(np.float32) @ v) / total
    return o


@pytest.mark.feature("T10")
@pytest.mark.parametrize("scale", [4.0, -4.0])
@pytest.mark.parametrize("form", FORMS)
def test_scores_of_10_000_are_as_exact_as_dense_ones(form: str, scale: float) -> None:
    sizes = problem(form, scale)
    given = operands(sizes)
    want = dense(given, sizes.mask, scale)
    got = attend(form, sizes, given)
    assert want["lse"].min() > 9_900
    error = abs(dense_in(sizes, given).astype(sizes.dtype) - want["o"]).max()
    assert_near("o", got["o"], want["o"], 3 * error)
    assert_near("lse", got["lse"], want["lse"], abs(np.spacing(np.float32(10_000))))


@pytest.mark.feature("T10")
@pytest.mark.parametrize("scale", [4.0, -4.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_large_scores_lose_what_lse_has_lost(family: str, scale: float) -> None:
    """A weight has the relative error of half a unit in the last place of its lse, in all its
    rows; where lse is exact, so is the weight.
    """
    for mask, lost in ((SEEN, 2.0**-24), (local(1), 0.0)):
        sizes = replace(problem("tiled", scale, mask), len_k=20)
        given = operands(sizes)
        want = dense(given, mask, scale)
        given |= {name: want[name].astype(np.float32) for name in ("o", "lse")}
        allowed = 1.1 * lost * abs(want["lse"]).max() + 1e-6
        for name, array in backward(sizes, given, machine(family)).items():
            assert_near(name, array, want[name], allowed * abs(want[name]).max(initial=1))


@pytest.mark.feature("T10")
@pytest.mark.parametrize("size", [1e8, 1e30, 2e38, -2e38])
@pytest.mark.parametrize("form", ["tiled", "decode", "tensorops"])
def test_scores_up_to_the_largest_number_choose_a_key(form: str, size: float) -> None:
    sizes = problem(form, 1.0)
    given = operands(sizes)
    given["q"][...], given["k"][...] = 0, 0
    given["q"][..., 0] = np.sign(size)
    ramp = np.linspace(0.5, 1, sizes.len_k, dtype=np.float32)
    given["k"][..., 0] = abs(size) * (ramp if size > 0 else ramp[::-1])
    visible = causal().to_dense(sizes.len_q, sizes.len_k)
    last = sizes.len_k - 1 - visible[:, ::-1].argmax(axis=1)
    got = attend(form, sizes, given)
    assert_near("o", got["o"], np.tile(given["v"][:, :, last], (1, 2, 1, 1)), 1e-6)
    lse = np.float32(np.sign(size)) * given["k"][0, 0, last, 0]
    assert_near("lse", got["lse"], np.broadcast_to(lse, got["lse"].shape), 1e-7 * abs(size))


@pytest.mark.feature("T10")
@pytest.mark.parametrize("scale", [0.0, 1e-37, -1e-37])
@pytest.mark.parametrize("form", ["tiled", "decode", "tensorops"])
def test_hidden_keys_weigh_nothing_whatever_the_scale(form: str, scale: float) -> None:
    sizes = problem(form, scale)
    given = operands(replace(sizes, scale=1.0))
    want = dense(given, sizes.mask, scale)
    for name, array in attend(form, sizes, given).items():
        assert_near(name, array, want[name], 2e-6)


@pytest.mark.parametrize("scale", [1e40, -3e38])
def test_a_scale_beyond_float32_is_refused(scale: float) -> None:
    asked = Problem.of((1, 1, 8, 8), scale=scale)
    for operation in ("forward", "backward"):
        with pytest.raises(NotImplementedError, match=r"^scale is .*: multiply q or k by a part"):
            plan(asked, "apple9", operation)
    assert plan(replace(asked, scale=LARGEST_SCALE, mask=full()), "apple9", "forward").launches
