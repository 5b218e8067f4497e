"""The definition itself, against sums written out in Python's own numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from tilefold import Rule, causal, dense, documents, full, lengths, local
from tilefold.problems import reference

Array = NDArray[np.float64]
SEEN = [full(), causal(), causal("start"), local(2), ~local(3), documents([0, 1, 0, 1, 1])]


def normal(seed: int, *shapes: tuple[int, ...]) -> list[Array]:
    random = np.random.default_rng(seed)
    return [random.normal(size=shape) for shape in shapes]


def attend(q: Array, keys: Array, values: Array, scale: float) -> tuple[list[float], float]:
    """One query over the keys it sees, with exact sums."""
    if not len(keys):
        return [0.0] * values.shape[1], -math.inf
    scores = [scale * math.fsum(a * b for a, b in zip(q, key, strict=True)) for key in keys]
    weights = [math.exp(score) for score in scores]
    total = math.fsum(weights)
    columns = [
        math.fsum(weight * value for weight, value in zip(weights, column, strict=True)) / total
        for column in values.T
    ]
    return columns, math.log(total)


@pytest.mark.feature("S04", "S05")
@pytest.mark.parametrize("mask", SEEN, ids=repr)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_dense_is_the_formula(mask: Rule, scale: float | None) -> None:
    q, k, v = normal(0, (2, 4, 5, 3), (2, 2, 5, 3), (2, 2, 5, 4))
    o, lse = reference.attention(q, k, v, mask=mask, scale=scale)
    visible = mask.to_dense(5, 5)
    for b, h, i in np.ndindex(2, 4, 5):
        seen = visible[i]
        factor = 1 / math.sqrt(3) if scale is None else scale
        row, total = attend(q[b, h, i], k[b, h // 2][seen], v[b, h // 2][seen], factor)
        np.testing.assert_allclose(o[b, h, i], row, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(lse[b, h, i], total, rtol=1e-13)


@pytest.mark.feature("S05", "T09")
@pytest.mark.parametrize("mask", SEEN, ids=repr)
def test_gradients_are_finite_differences(mask: Rule) -> None:
    q, k, v, do = normal(1, (1, 2, 5, 3), (1, 1, 5, 3), (1, 1, 5, 2), (1, 2, 5, 2))
    inputs = {"q": q, "k": k, "v": v}
    o, lse = reference.attention(**inputs, mask=mask, scale=0.7)
    gradients = reference.attention_backward(do, **inputs, o=o, lse=lse, mask=mask, scale=0.7)
    step = 1e-5
    for (name, array), gradient in zip(inputs.items(), gradients, strict=True):
        for place in np.ndindex(array.shape):
            moved = []
            for sign in (1, -1):
                shifted = array.copy()
                shifted[place] += sign * step
                out, _ = reference.attention(**{**inputs, name: shifted}, mask=mask, scale=0.7)
                moved.append((out * do).sum())
            slope = (moved[0] - moved[1]) / (2 * step)
            assert math.isclose(gradient[place], slope, rel_tol=1e-6, abs_tol=1e-8), (name, place)


@pytest.mark.feature("S05")
@pytest.mark.parametrize(
    ("n", "d"),
    [(2, 2), (1, 1), (2, 20), (2, 99), (20, 2), (99, 20), (1024, 64), (1023, 63), (1025, 65)],
)
def test_tiled_in_float32_is_the_dense_result(n: int, d: int) -> None:
    q, k, v = normal(2, *[(1, 1, n, d)] * 3)
    o, _, _ = reference.tiled(q, k, v, scale=1, dtype=np.float32)
    expected, _ = reference.attention(q, k, v, scale=1)
    assert o.dtype == np.float32
    assert np.abs(o - expected).max() < 1e-4


@pytest.mark.feature("S05", "T10")
@pytest.mark.parametrize("mask", SEEN, ids=repr)
@pytest.mark.parametrize("memory", [12, 24, 1000])
def test_tiled_returns_the_normaliser_and_the_maximum(mask: Rule, memory: int) -> None:
    q, k, v = normal(3, (1, 2, 5, 6), (1, 1, 5, 6), (1, 1, 5, 4))
    o, normaliser, m = reference.tiled(q, k, v, mask=mask, memory=memory)
    expected, lse = reference.attention(q, k, v, mask=mask)
    np.testing.assert_allclose(o, expected, rtol=1e-12, atol=1e-15)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(m + np.log(normaliser), lse, rtol=1e-12)
    scores = q @ np.swapaxes(k, 2, 3) / math.sqrt(6)
    scores[:, :, ~mask.to_dense(5, 5)] = -np.inf
    np.testing.assert_allclose(m, scores.max(axis=3), rtol=1e-12)


@pytest.mark.feature("J01")
@pytest.mark.parametrize("n", [8, 64])
def test_dense_in_float16_is_near_by_norm(n: int) -> None:
    q, k, v = (array.astype(np.float16) for array in normal(4, *[(1, 1, n, n)] * 3))
    o, lse = reference.attention(q, k, v, dtype=np.float16)
    expected, _ = reference.attention(q, k, v)
    assert o.dtype == lse.dtype == np.float16
    assert np.linalg.norm(o - expected) <= 1e-2 * np.linalg.norm(expected)


@pytest.mark.feature("S04", "J01")
def test_dense_in_float32_is_near() -> None:
    q, k, v, do = normal(5, *[(1, 2, 200, 64)] * 4)
    o, lse = reference.attention(q, k, v, mask=causal(), dtype=np.float32)
    gradients = reference.attention_backward(do, q, k, v, o, lse, mask=causal(), dtype=np.float32)
    expected = reference.attention(q, k, v, mask=causal())
    slopes = reference.attention_backward(do, q, k, v, *expected, mask=causal())
    for got, want in zip((o, lse, *gradients), (*expected, *slopes), strict=True):
        assert got.dtype == np.float32
        assert 0 < np.abs(got - want).max() < 2e-5


@pytest.mark.feature("M01")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_key_reaches_only_the_queries_that_see_it(value: float) -> None:
    q, k, v, do = normal(6, *[(1, 1, 5, 3)] * 4)
    visible = np.ones((5, 5), bool)
    visible[:3, 2] = False
    mask = dense(visible)
    k[0, 0, 2, 1] = v[0, 0, 2, 0] = value
    o, lse = reference.attention(q, k, v, mask=mask)
    dq, _, dv = reference.attention_backward(do, q, k, v, o, lse, mask=mask)
    clean_k, clean_v = np.nan_to_num(k, posinf=0, neginf=0), np.nan_to_num(v, posinf=0, neginf=0)
    clean_o, clean_lse = reference.attention(q, clean_k, clean_v, mask=mask)
    clean = reference.attention_backward(do, q, clean_k, clean_v, clean_o, clean_lse, mask=mask)
    for got, want in ((o, clean_o), (lse, clean_lse), (dq, clean[0])):
        np.testing.assert_allclose(got[0, 0, :3], want[0, 0, :3], rtol=1e-12)
    if math.isnan(value):
        assert np.isnan(o[0, 0, 3:]).all() and np.isnan(lse[0, 0, 3:]).all()
        assert np.isnan(dv).all(), "every key is seen by a query whose weights are NaN"
    tiled_o, _, _ = reference.tiled(q, k, v, mask=mask, memory=20)
    np.testing.assert_allclose(tiled_o, o, rtol=1e-12)


@pytest.mark.feature("M01", "T09")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_nobody_sees_changes_nothing(value: float) -> None:
    q, k, v, do = normal(7, *[(2, 2, 4, 3)] * 4)
    mask = lengths([3, 2]) & causal()
    clean = reference.attention(q, k, v, mask=mask)
    slopes = reference.attention_backward(do, q, k, v, *clean, mask=mask)
    k[0, :, 3:] = v[0, :, 3:] = k[1, :, 2:] = v[1, :, 2:] = value
    o, lse = reference.attention(q, k, v, mask=mask)
    gradients = reference.attention_backward(do, q, k, v, o, lse, mask=mask)
    for got, want in zip((o, lse, *gradients), (*clean, *slopes), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)
    assert not gradients[1][1, :, 2:].any()


@pytest.mark.feature("M01", "T09")
def test_a_bad_query_stays_in_its_row() -> None:
    q, k, v, do = normal(8, *[(1, 1, 4, 3)] * 4)
    q[0, 0, 1, 0] = math.nan
    o, lse = reference.attention(q, k, v, mask=causal())
    dq, dk, dv = reference.attention_backward(do, q, k, v, o, lse, mask=causal())
    for array in (o, lse[..., None], dq):
        assert np.isnan(array[0, 0]).any(axis=1).tolist() == [False, True, False, False]
    for array in (dk, dv):
        assert np.isnan(array[0, 0]).any(axis=1).tolist() == [True, True, False, False]


@pytest.mark.feature("T09")
def test_a_row_that_sees_nothing_is_zero_whatever_it_holds() -> None:
    q, k, v, do = normal(9, (1, 1, 4, 3), (1, 1, 2, 3), (1, 1, 2, 3), (1, 1, 4, 3))
    q[0, 0, :2] = do[0, 0, :2] = math.nan
    o, lse = reference.attention(q, k, v, mask=causal())
    assert not o[0, 0, :2].any() and (lse[0, 0, :2] == -math.inf).all()
    dq, dk, dv = reference.attention_backward(do, q, k, v, o, lse, mask=causal())
    assert not dq[0, 0, :2].any()
    assert np.isfinite(dk).all() and np.isfinite(dv).all()
    tiled_o, normaliser, m = reference.tiled(q, k, v, mask=causal())
    assert not tiled_o[0, 0, :2].any() and not normaliser[0, 0, :2].any()
    assert (m[0, 0, :2] == -math.inf).all()


def test_scores_of_minus_infinity_alone_have_no_mean() -> None:
    q, k, v = np.ones((1, 1, 1, 1)), np.full((1, 1, 2, 1), -math.inf), np.ones((1, 1, 2, 1))
    o, lse = reference.attention(q, k, v)
    assert math.isnan(o.item()) and math.isnan(lse.item())
    o, normaliser, _ = reference.tiled(q, k, v)
    assert math.isnan(o.item()) and math.isnan(normaliser.item())


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0)])
def test_empty_axes_give_empty_or_zero_results(shape: tuple[int, int, int, int]) -> None:
    batch, heads, len_q, len_k = shape
    q, do = np.ones((2, batch, heads, len_q, 3))
    k, v = np.ones((2, batch, heads, len_k, 3))
    o, lse = reference.attention(q, k, v)
    assert o.shape == q.shape and not o.any() and (lse == -math.inf).all()
    gradients = reference.attention_backward(do, q, k, v, o, lse)
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]
    assert not any(gradient.any() for gradient in gradients)
