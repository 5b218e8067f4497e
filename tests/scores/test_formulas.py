"""Ready-made scores are the formulas of their papers, which are written out here once more."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tilefold
from tilefold.masks.evaluate import exact_real
from tilefold.scores.score import Score, Sizes, as_score

Array = NDArray[Any]
RNG = np.random.default_rng(0)


def scored(score: Any, s: Array) -> Array:
    """The exact scores of all pairs: s is (batch, heads, len_q, len_k)."""
    made = as_score(score)
    assert isinstance(made, Score)
    b, h, q, k = np.ogrid[tuple(map(slice, s.shape))]
    return exact_real(made.expression(Sizes(*s.shape)), s, b=b, h=h, q=q, k=k)


def drawn(*shape: int) -> Array:
    return RNG.normal(size=shape)


def slopes_of_the_paper(heads: int) -> list[float]:
    """Press et al.: a geometric sequence; for other numbers every second one of the next power."""
    if math.log2(heads).is_integer():
        start = 2.0 ** -(2.0 ** -(math.log2(heads) - 3))
        return [start * start**i for i in range(heads)]
    closest = 2 ** math.floor(math.log2(heads))
    more = slopes_of_the_paper(2 * closest)[0::2][: heads - closest]
    return slopes_of_the_paper(closest) + more


@pytest.mark.parametrize("heads", range(1, 21))
def test_default_slopes_are_those_of_the_paper(heads: int) -> None:
    s = drawn(1, heads, 3, 5)
    q, k = np.ogrid[:3, :5]
    slopes = np.array(slopes_of_the_paper(heads))[:, None, None]
    np.testing.assert_allclose(scored(tilefold.alibi(), s)[0], s[0] - slopes * abs(k - q - 2))


def bucket(distance: Array, bidirectional: bool, buckets: int, farthest: int) -> Array:
    """Of T5 in Hugging Face's transformers: the logarithm is of float32, and is cut to integers."""
    number = np.zeros(distance.shape, np.int64)
    if bidirectional:
        buckets //= 2
        number += (distance > 0) * buckets
        distance = np.abs(distance)
    else:
        distance = -np.minimum(distance, 0)
    exact = buckets // 2
    with np.errstate(divide="ignore"):
        ratio = np.log(distance.astype(np.float32) / np.float32(exact))
    scaled = ratio / np.float32(math.log(farthest / exact)) * np.float32(buckets - exact)
    large = exact + np.where(distance < exact, 0, scaled).astype(np.int64)
    return number + np.where(distance < exact, distance, np.minimum(large, buckets - 1))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (64, 1000)])
def test_buckets_are_those_of_t5(bidirectional: bool, buckets: int, farthest: int) -> None:
    """Each bucket's bias is its number, so the scores show the buckets."""
    table = np.arange(buckets, dtype=np.float64)[None]
    made = tilefold.relative_bias(table, bidirectional, farthest)
    got = scored(made, np.zeros((1, 2, 1300, 3)))[0, 1]
    q, k = np.ogrid[:1300, :3]
    distance = k - (q - 1297)
    np.testing.assert_array_equal(got, bucket(distance, bidirectional, buckets, farthest))


def test_distances_are_clipped() -> None:
    table, s = drawn(2, 7), drawn(2, 2, 4, 11)
    q, k = np.ogrid[:4, :11]
    place = np.clip(k - q - 7, -3, 3) + 3
    np.testing.assert_array_equal(scored(tilefold.distance_bias(table), s), s + table[:, place])


def test_places_in_a_window_are_those_of_swin() -> None:
    height, width = 3, 2
    table = drawn(4, 2 * height - 1, 2 * width - 1)
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij")).reshape(2, -1)
    relative = grid[:, :, None] - grid[:, None, :]
    row, column = relative[0] + height - 1, relative[1] + width - 1
    flat = table.reshape(4, -1)[:, row * (2 * width - 1) + column]
    s = drawn(2, 4, 6, 6)
    np.testing.assert_array_equal(scored(tilefold.window_bias(table), s), s + flat)


BROADCAST = [(5,), (3, 1), (4, 1, 1), (4, 3, 5), (2, 1, 1, 5), (2, 4, 3, 5), ()]


@pytest.mark.parametrize("shape", BROADCAST, ids=str)
def test_biases_and_temperatures_broadcast_as_numpy_does(shape: tuple[int, ...]) -> None:
    array, s = np.asarray(drawn(*shape)), drawn(2, 4, 3, 5)
    np.testing.assert_array_equal(scored(tilefold.bias(array), s), s + array)
    np.testing.assert_allclose(scored(tilefold.temperature(array), s), s / array, rtol=1e-15)


def test_scores_in_order_take_what_the_one_before_has_made() -> None:
    array, s = drawn(4, 1, 1), 9 * drawn(2, 4, 3, 5)

    def own(s: Any, q: Any, k: Any) -> Any:
        return tilefold.where(q >= k, tilefold.exp(s) - s, -math.inf)

    made = [tilefold.softcap(4.0), tilefold.bias(array), tilefold.score(own)]
    q, k = np.ogrid[:3, :5]
    want = 4 * np.tanh(s / 4) + array
    got = scored(made, s)
    np.testing.assert_allclose(got, np.where(q >= k, np.exp(want) - want, -np.inf), rtol=1e-14)
