"""Modified scores and sinks in every form of kernels: right, whatever the types and the memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from compare import assert_near, assert_same
from score_cases import short, trials
from trial import PASSES, Trial, numbers, run

import tilefold

pytestmark = pytest.mark.slow  # kernels are compiled


def attempt(trial: Trial) -> None:
    """All passes of a trial."""
    given = numbers(trial)
    for operation, form in PASSES:
        print(trial, operation, form, flush=True)
        run(trial, given, operation, form)


@pytest.mark.slow
@pytest.mark.parametrize("trial", trials(), ids=short)
def test_variants_in_every_form(trial: Trial) -> None:
    attempt(trial)


@pytest.mark.parametrize(("len_q", "len_k"), [(70, 40), (2, 40), (2, 9000)])
def test_minus_infinity_hides_a_pair_as_the_mask_does(len_q: int, len_k: int) -> None:
    q, k, v, do = arrays(len_q, len_k)
    k[:, :, 5], v[:, :, 5] = np.nan, np.inf
    q[:, :, 1], do[:, :, 1] = np.nan, np.nan

    def shown(q: Any, k: Any) -> Any:
        return (k != 5) & (q != 1)

    def hides(s: Any, q: Any, k: Any, b: Any, h: Any) -> Any:
        return tilefold.where(shown(q, k), s, float("-inf"))

    results = []
    for options in ({"score": tilefold.score(hides)}, {"mask": tilefold.rule(shown)}):
        o, lse, top = tilefold.attention(q, k, v, return_lse=True, return_max=True, **options)
        gradients = tilefold.attention_backward(do, q, k, v, o, lse, **options)
        assert not o[:, :, 1].any() and (lse[:, :, 1] == -np.inf).all()
        results.append((o, lse, top, *gradients))
    for got, want in zip(*results, strict=True):
        assert_near("result", got, want, 1e-5)


def test_minus_infinity_of_an_array_hides_also_before_a_product() -> None:
    q, k, v, do = arrays(7, 9)
    hidden = np.zeros((7, 1))
    hidden[3] = -np.inf
    heat = np.linspace(0.5, 2, 63).reshape(7, 9)
    score = [tilefold.bias(hidden), tilefold.temperature(heat)]
    o, lse = tilefold.attention(q, k, v, score=score, return_lse=True)
    assert (o[:, :, 3] == 0).all() and (lse[:, :, 3] == -np.inf).all()
    gradients = tilefold.attention_backward(do, q, k, v, o, lse, score=score)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert (gradients[0][:, :, 3] == 0).all() and (gradients[4][3] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "length"), [("float32", 3), ("float64", 67), ("float16", 67), ("bfloat16", 3)]
)
def test_lanes_past_the_last_key_add_nothing_whatever_the_derivative(
    dtype: str, length: int
) -> None:
    """Their products are 0, and so is what is read of an array for them."""
    rng = np.random.default_rng(length)
    q, k, v, do = rng.normal(size=(4, 1, 2, length, 8)).astype(dtype)
    heat = np.abs(rng.normal(size=(length, length))) + 0.5
    for score in (
        tilefold.temperature(heat),
        tilefold.score(lambda s: tilefold.sqrt(abs(s))),
    ):
        o, lse = tilefold.attention(q, k, v, score=score, return_lse=True)
        for gradient in tilefold.attention_backward(do, q, k, v, o, lse, score=score):
            assert np.isfinite(gradient.astype(np.float64)).all()


@pytest.mark.parametrize(("len_q", "len_k"), [(70, 40), (2, 40), (2, 9000)])
def test_nan_in_a_bias_reaches_its_row_alone(len_q: int, len_k: int) -> None:
    q, k, v, do = arrays(len_q, len_k)
    clean = np.zeros((len_q, len_k), np.float32)
    dirty = clean.copy()
    dirty[1, 3] = np.nan
    mask = tilefold.rule(lambda q, k: k != 7)
    dirty[0, 7] = np.nan  # hidden
    others = np.arange(len_q) != 1
    results = []
    for bias in (clean, dirty):
        options: dict[str, Any] = {"mask": mask, "score": tilefold.bias(bias)}
        o, lse, top = tilefold.attention(q, k, v, return_lse=True, return_max=True, **options)
        dq, *_ = tilefold.attention_backward(do, q, k, v, o, lse, **options)
        results.append((o, lse, top, dq))
    for name, want, got in zip(("o", "lse", "max", "dq"), *results, strict=True):
        assert_same(name, got[:, :, others], want[:, :, others])
        assert np.isnan(got[:, :, 1]).all(), name


def test_infinite_scores_follow_ieee_arithmetic() -> None:
    q, k, v, _ = arrays(4, 40)
    bias = np.zeros((4, 40), np.float32)
    bias[1], bias[2, 3] = -np.inf, np.inf
    for queries in (q, np.repeat(q, 20, axis=2)):
        rows = np.resize(np.arange(4), queries.shape[2]) if queries is q else np.arange(80) // 20
        options: dict[str, Any] = {"score": tilefold.bias(bias[rows])}
        o, lse, top = tilefold.attention(queries, k, v, return_lse=True, return_max=True, **options)
        assert not o[:, :, rows == 1].any() and (lse[:, :, rows == 1] == -np.inf).all()
        assert np.isnan(o[:, :, rows == 2]).all() and (top[:, :, rows == 2] == np.inf).all()
        assert np.isfinite(o[:, :, rows % 3 == 0]).all()


def arrays(len_q: int, len_k: int) -> list[Any]:
    """q, k, v and do of one batch entry, of standard normal numbers."""
    rng = np.random.default_rng([len_q, len_k])
    shapes = (1, 2, len_q, 16), (1, 2, len_k, 16), (1, 2, len_k, 16), (1, 2, len_q, 16)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("len_q", [1, 70])
def test_weights_below_the_normal_numbers_are_zero(len_q: int) -> None:
    """Processors compute with denormal numbers slowly: ALiBi took 1.35 times as long."""
    exponents = np.array([0, -20, -125, -125.4, -125.6, -126.2, -140])
    scores = tilefold.bias((exponents * np.log(2)).astype(np.float32)[None, :])
    q, k, v = (np.zeros((1, 1, n, 7), np.float32) for n in (len_q, 7, 7))
    v[0, 0] = 2.0**100 * np.eye(7, dtype=np.float32)  # o has the weight of each key
    (o,) = tilefold.attention(q, k, v, score=scores)[0]
    want = np.where(exponents < -125.5, 0, 2.0**exponents)
    np.testing.assert_allclose(o, np.broadcast_to(2.0**100 * want, o.shape), rtol=1e-4)
