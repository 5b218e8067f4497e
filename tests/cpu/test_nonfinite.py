"""NaN, infinities and the ends of the number range: they go where IEEE arithmetic sends them.

A pair that the rule forbids passes nothing on, whatever it holds; a visible pair follows the dense
definition. "Unchanged" means bit for bit, in half types up to a few roundings: tiles that hold NaN
or infinities are computed with weights that are not rounded to pairs of bfloat16.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from compare import assert_near, assert_same, dense
from operands import FORMS, Array, backward, forward, inputs

import tilefold
from tilefold import Rule, causal, documents, full, lengths, local
from tilefold.problems.attention import ITEM_BYTES, STATISTICS, Problem

DTYPES = [
    "float32",
    *(pytest.param(d, marks=pytest.mark.slow) for d in ITEM_BYTES if d != "float32"),
]
BAD = (math.nan, math.inf, -math.inf)
RTOL = {"float32": 1e-5, "float64": 1e-12, "float16": 3e-3, "bfloat16": 2e-2}
LEN_Q, LEN_K = 45, 150
"""Several tiles of 32 keys and, in the lanes, whole vectors and a rest."""


def problem(
    mask: Rule, dtype: str, scale: float = 0.5, lens: tuple[int, int] = (LEN_Q, LEN_K)
) -> Problem:
    """Two sequences, grouped queries, and a dim that leaves a rest in every vector."""
    return Problem(
        batch=2, heads_q=4, heads_kv=2, len_q=lens[0], len_k=lens[1], dim=5, dim_v=7,
        dtype=dtype, scale=scale, mask=mask,
    )  # fmt: skip


def everything(sizes: Problem, operands: dict[str, Array]) -> dict[str, Array]:
    """o, lse and the gradients in both forms: "dq fused", "dq split", ..."""
    results = forward(sizes, operands)
    gradients = {
        f"{name} {form}": array
        for form in FORMS
        for name, array in backward(sizes, {**operands, **results}, form).items()
    }
    return {**results, **gradients}


def assert_as_defined(sizes: Problem, operands: dict[str, Array], dtype: str = "float64") -> None:
    """All results are NaN and infinite where the dense definition is, and near it elsewhere."""
    want = dense(operands, sizes.mask, sizes.scale, dtype)
    for name, got in everything(sizes, operands).items():
        expected = want[name.split()[0]]
        largest = abs(expected[np.isfinite(expected)]).max(initial=1)
        assert_near(name, got, expected, RTOL[sizes.dtype] * largest)


def assert_unchanged(name: str, got: Array, clean: Array) -> None:
    """The same bits, or near them where the arrays are of a half type."""
    if clean.dtype.itemsize == 2:
        assert_near(name, got, clean, RTOL[clean.dtype.name] * abs(clean).max(initial=1))
    else:
        assert_same(name, got, clean)


@pytest.mark.slow
@pytest.mark.feature("M01", "T09")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [full(), causal(), local(20)], ids=repr)
@pytest.mark.slow
def test_a_bad_query_reaches_no_other(mask: Rule, dtype: str) -> None:
    sizes = problem(mask, dtype)
    operands = inputs(sizes, "bhnd", "packed")
    clean = everything(sizes, operands)
    row = 17
    operands["q"][1, 2, row, 3] = math.nan
    got = everything(sizes, operands)
    others = np.ones((2, 4, LEN_Q), bool)
    others[1, 2, row] = False
    for name in ("o", "lse", "dq fused", "dq split"):
        assert_unchanged(name, got[name][others], clean[name][others])
        assert np.isnan(got[name][1, 2, row]).all(), name
    apart = np.ones((2, 2, LEN_K), bool)
    apart[1, 1] = ~mask.to_dense(LEN_Q, LEN_K)[row]
    for name in ("dk fused", "dk split", "dv fused", "dv split"):
        assert_unchanged(name, got[name][apart], clean[name][apart])
        assert np.isnan(got[name][~apart]).all(), name
    assert_as_defined(sizes, operands)


UNSEEN: dict[str, tuple[Rule, Array]] = {
    "padding": (lengths([100, 33]), np.arange(LEN_K) >= np.array([[100], [33]])),
    "orphan documents": (
        documents(np.arange(LEN_Q) // 20, np.arange(LEN_K) // 20),
        np.tile(np.arange(LEN_K) >= 60, (2, 1)),
    ),
    "the future": (causal("start"), np.tile(np.arange(LEN_K) >= LEN_Q, (2, 1))),
    "outside of all windows": (
        local(9, align="start") & lengths([LEN_K, 21]),
        np.arange(LEN_K) >= np.array([[LEN_Q + 8], [21]]),
    ),
    "everything": (~full(), np.ones((2, LEN_K), bool)),
}
"""Rules, and which keys of which batch entry no query sees."""


@pytest.mark.feature("M01", "M15", "T07", "T09")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name",
    ["padding", *(pytest.param(n, marks=pytest.mark.slow) for n in UNSEEN if n != "padding")],
)
@pytest.mark.slow
def test_what_no_query_sees_changes_nothing(name: str, dtype: str) -> None:
    mask, unseen = UNSEEN[name]
    sizes = problem(mask, dtype)
    visible = np.broadcast_to(mask.to_dense(LEN_Q, LEN_K, 2, 4), (2, 4, LEN_Q, LEN_K))
    np.testing.assert_array_equal(unseen, ~visible.any(axis=(1, 2)))
    operands = inputs(sizes, "bhnd", "packed")
    clean = everything(sizes, operands)
    for value in BAD:
        for held in ("k", "v"):
            operands[held].transpose(0, 2, 1, 3)[unseen] = value
        got = everything(sizes, operands)
        for result, array in got.items():
            assert_unchanged(f"{result} with {value}", array, clean[result])
    for result in ("dk fused", "dk split", "dv fused", "dv split"):
        assert not got[result].transpose(0, 2, 1, 3)[unseen].any(), result


@pytest.mark.slow
@pytest.mark.feature("M01", "T09")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("held", ["k", "v"])
@pytest.mark.parametrize("value", BAD)
def test_a_bad_key_reaches_exactly_those_who_see_it(value: float, held: str, dtype: str) -> None:
    mask = tilefold.dense(np.random.default_rng(3).random((LEN_Q, LEN_K)) < 0.4)
    sizes = problem(mask, dtype)
    operands = inputs(sizes, "bhnd", "packed")
    clean = everything(sizes, operands)
    operands[held][1, 0, 70, 2] = value
    got = everything(sizes, operands)
    apart = np.ones((2, 4, LEN_Q), bool)
    apart[1, :2, mask.to_dense(LEN_Q, LEN_K)[:, 70]] = False
    for name in ("o", "lse", "dq fused", "dq split"):
        assert_unchanged(name, got[name][apart], clean[name][apart])
    if held == "v" or math.isnan(value):
        assert not np.isfinite(got["o"][~apart]).all(axis=1).any()
    assert_as_defined(sizes, operands)


@pytest.mark.slow
@pytest.mark.feature("M01", "T09")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.slow
def test_rows_that_see_nothing_are_zero_whatever_they_hold(dtype: str) -> None:
    lens = (LEN_K, 40)
    sizes = problem(causal(), dtype, lens=lens)
    operands = inputs(sizes, "bhnd", "packed")
    clean = everything(sizes, operands)
    empty = LEN_K - 40
    for value in BAD:
        operands["q"][:, :, :empty] = operands["do"][:, :, :empty] = value
        got = everything(sizes, operands)
        for name, array in got.items():
            assert_unchanged(f"{name} with {value}", array, clean[name])
    assert not got["o"][:, :, :empty].any() and (got["lse"][:, :, :empty] == -math.inf).all()
    for form in FORMS:
        assert not got[f"dq {form}"][:, :, :empty].any()


@pytest.mark.slow
@pytest.mark.feature("T09", "T10")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [full(), causal(), lengths([20, 70])], ids=repr)
def test_scores_of_minus_infinity_alone_have_no_mean(mask: Rule, dtype: str) -> None:
    """A visible score of -inf is not a forbidden one: 0 / 0 is NaN, so lse = -inf says: empty."""
    sizes = problem(mask, dtype, scale=1.0)
    operands = inputs(sizes, "bhnd", "packed")
    operands["q"][...] = abs(operands["q"])
    operands["k"][0] = -math.inf
    operands["k"][1, :, :30] = -math.inf
    results = forward(sizes, operands)
    assert np.isnan(results["o"][0]).all() and np.isnan(results["lse"][0]).all()
    assert np.isfinite(results["o"][1, :, LEN_Q - 1]).all()
    assert_as_defined(sizes, operands)


@pytest.mark.slow
@pytest.mark.feature("T10")
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_past_the_largest_number_are_infinite(dtype: str) -> None:
    sizes = problem(causal(), dtype, scale=1.0)
    operands = inputs(sizes, "bhnd", "packed")
    big = math.sqrt(float(ml_dtypes.finfo(dtype).max)) * 2
    operands["q"][0, 1, 7] = operands["k"][0, 0, 90] = big
    operands["q"][1, 3, 9] = -big
    operands["k"][1, 1, 5] = big
    want = dense(operands, sizes.mask, 1.0, STATISTICS[dtype])
    assert (
        np.isnan(want["o"][0, 1, 7]).all() == (dtype != "float16")
        and np.isfinite(want["o"][1, 3, 9]).all()
    )
    got = everything(sizes, operands)
    for name in ("o", "lse"):
        assert_near(name, got[name], want[name], RTOL[dtype] * big)
    for form in FORMS:
        for name in ("dq", "dk", "dv"):
            np.testing.assert_array_equal(np.isnan(got[f"{name} {form}"]), np.isnan(want[name]))


@pytest.mark.slow
@pytest.mark.feature("T09", "T10")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e8, 1e30])
def test_huge_scores_choose_one_key(size: float, dtype: str) -> None:
    """Far apart, the largest score takes all: o is its v, whatever the size; nothing overflows."""
    size = min(size, float(ml_dtypes.finfo(dtype).max))
    sizes = problem(causal("start"), dtype, scale=1.0, lens=(40, 40))
    operands = inputs(sizes, "bhnd", "packed")
    operands["q"][...] = 0
    operands["k"][...] = 0
    operands["q"][..., 0] = size
    operands["k"][..., 0] = np.arange(1, 41)
    results = forward(sizes, operands)
    values = np.repeat(operands["v"], 2, axis=1)
    assert_near("o", results["o"], values, RTOL[dtype])
    want = np.broadcast_to(size * np.arange(1, 41), (2, 4, 40))
    assert_near("lse", results["lse"], want, RTOL[dtype] * want)
    for form in FORMS:
        dv = backward(sizes, {**operands, **results}, form)["dv"]
        bound = abs(operands["do"]).sum(axis=2).max()
        assert (abs(dv) <= 2 * bound).all(), "no weight is above 1"


@pytest.mark.slow
@pytest.mark.feature("T01")
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_too_small_to_be_normal(dtype: str) -> None:
    sizes = problem(causal(), dtype)
    operands = inputs(sizes, "bhnd", "packed")
    tiny, least = ml_dtypes.finfo(dtype).tiny, ml_dtypes.finfo(dtype).smallest_subnormal
    operands["v"] *= 8 * tiny
    operands["do"][...] = 0
    operands["k"][:, :, ::3] *= tiny
    operands["q"][:, :, ::4] = -0.0
    want = dense(operands, sizes.mask, sizes.scale)
    got = everything(sizes, operands)
    # Sums of bfloat16 products are 0 below the smallest normal number, on AMX each partial one.
    tolerance = RTOL[dtype] * tiny + LEN_K * least + (4 * tiny if dtype == "bfloat16" else 0)
    assert_near("o", got["o"], want["o"], tolerance)
    assert_near("lse", got["lse"], want["lse"], 10 * RTOL[dtype])
    for name in ("dq", "dk", "dv"):
        for form in FORMS:
            assert not got[f"{name} {form}"].any()


@pytest.mark.slow
@pytest.mark.feature("T10")
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_far_below_the_largest_vanish(dtype: str) -> None:
    """Gaps between scores from 0 to past the smallest exponent, the largest first or last."""
    sizes = problem(full(), dtype, scale=1.0)
    operands = inputs(sizes, "bhnd", "packed")
    operands["q"][...] = 0
    operands["q"][..., 0] = np.linspace(-12, 12, LEN_Q)
    operands["k"][..., 0] = np.linspace(-70, 70, LEN_K)
    want = dense(operands, sizes.mask, 1.0)
    results = forward(sizes, operands)
    assert np.isfinite(results["o"]).all()
    assert_near("o", results["o"], want["o"], 300 * RTOL[dtype])
    assert_near("lse", results["lse"], want["lse"], RTOL[dtype] * 900)
    assert_as_defined(sizes, {**operands, "do": np.zeros_like(operands["do"])})


@pytest.mark.slow
@pytest.mark.feature("T09")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", BAD)
def test_a_bad_gradient_reaches_its_query_and_its_keys(value: float, dtype: str) -> None:
    sizes = problem(causal(), dtype)
    operands = inputs(sizes, "bhnd", "packed")
    operands["do"][1, 0, 21, 4] = value
    assert_as_defined(sizes, operands)
