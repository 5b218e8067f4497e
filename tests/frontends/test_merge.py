"""`tilefold.merge`: results over parts of the keys make the result over all of them."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
from compare import assert_near, assert_same
from numpy.typing import NDArray

import tilefold
from tilefold import lengths
from tilefold.problems import reference
from tilefold.problems.request import LAYOUTS

Array = NDArray[Any]
TOLERANCE = {"float32": 2e-6, "float64": 1e-14}


def inputs(dtype: str = "float64", layout: str = "bhnd") -> tuple[Array, Array, Array]:
    random = np.random.default_rng(0)
    shapes = (2, 4, 9, 16), (2, 2, 50, 16), (2, 2, 50, 7)
    q, k, v = (random.normal(size=shape).astype(dtype) for shape in shapes)
    axes = LAYOUTS[layout]
    return q.transpose(axes), k.transpose(axes), v.transpose(axes)


def keys(array: Array, layout: str, part: slice) -> Array:
    return array[(slice(None),) * LAYOUTS[layout][2] + (part,)]


def parts(layout: str, dtype: str, *cuts: int) -> list[tuple[Array, Array]]:
    """Results over the keys up to each cut."""
    q, k, v = inputs(dtype, layout)
    edges = [0, *cuts, 50]
    return [
        tilefold.attention(
            q,
            *(keys(array, layout, slice(first, last)) for array in (k, v)),
            layout=layout,
            return_lse=True,
        )
        for first, last in itertools.pairwise(edges)
    ]


@pytest.mark.feature("T10")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_make_the_whole(layout: str, dtype: str) -> None:
    first, second, third = parts(layout, dtype, 13, 40)
    q, k, v = inputs(dtype, layout)
    want = tilefold.attention(q, k, v, layout=layout, return_lse=True)
    for merged in (
        tilefold.merge(*tilefold.merge(*first, *second, layout=layout), *third, layout=layout),
        tilefold.merge(*third, *tilefold.merge(*second, *first, layout=layout), layout=layout),
    ):
        for name, got, expected in zip(("o", "lse"), merged, want, strict=True):
            assert got.dtype == expected.dtype and got.flags.c_contiguous
            assert_near(name, got, expected, TOLERANCE[dtype] * 10)


@pytest.mark.slow
@pytest.mark.feature("T10")
def test_a_query_that_saw_nothing_in_a_part_has_the_result_of_the_other() -> None:
    q, k, v = inputs()
    seen, nothing = lengths([50, 0]), ~tilefold.full()
    first = tilefold.attention(q, k, v, mask=seen, return_lse=True)
    second = tilefold.attention(q, k, v, mask=nothing, return_lse=True)
    second[0][...] = np.nan  # what no query asks for
    for merged in (tilefold.merge(*first, *second), tilefold.merge(*second, *first)):
        assert_same("o", merged[0], first[0])
        assert_same("lse", merged[1], first[1])
    o, lse = tilefold.merge(*second, *second)
    assert not o.any() and (lse == -np.inf).all()


@pytest.mark.feature("T10")
def test_far_apart_the_larger_part_takes_all() -> None:
    (o1, lse1), (o2, lse2) = parts("bhnd", "float32", 20)
    for distance in (200.0, 1e30):
        o, lse = tilefold.merge(o1, lse1 + np.float32(distance), o2, lse2)
        assert_same("o", o, o1)
        assert_same("lse", lse, lse1 + np.float32(distance))


@pytest.mark.feature("T10")
def test_nan_stays_with_its_query() -> None:
    (o1, lse1), (o2, lse2) = parts("bhnd", "float32", 20)
    clean = tilefold.merge(o1, lse1, o2, lse2)
    o1[0, 1, 2] = lse1[0, 1, 2] = np.nan
    o, lse = tilefold.merge(o1, lse1, o2, lse2)
    assert np.isnan(o[0, 1, 2]).all() and np.isnan(lse[0, 1, 2])
    others = np.ones(lse.shape, bool)
    others[0, 1, 2] = False
    assert_same("o", o[others], clean[0][others])


@pytest.mark.feature("T01", "T10")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(dtype: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = np.dtype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    results = [(o.astype(kind), lse) for o, lse in parts("bhnd", "float32", 20)]
    o, lse = tilefold.merge(*results[0], *results[1])
    assert o.dtype == kind and lse.dtype == np.float32
    widened = [(o.astype(np.float32), lse) for o, lse in results]
    want = tilefold.merge(*widened[0], *widened[1])
    assert_same("o", o.astype(np.float32), want[0].astype(kind).astype(np.float32))
    assert_same("lse", lse, want[1])


@pytest.mark.slow
@pytest.mark.feature("T09", "T10")
def test_gradients_of_the_parts_follow_from_the_merged_result() -> None:
    q, k, v = inputs()
    do = np.random.default_rng(1).normal(size=(2, 4, 9, 7))
    first, second = parts("bhnd", "float64", 20)
    o, lse = tilefold.merge(*first, *second)
    halves = slice(None, 20), slice(20, None)
    found = [
        tilefold.attention_backward(do, q, k[:, :, part], v[:, :, part], o, lse) for part in halves
    ]
    want = reference.attention_backward(do, q, k, v, *reference.attention(q, k, v))
    assert_near("dq", found[0][0] + found[1][0], want[0], 1e-13)
    for number, name in ((1, "dk"), (2, "dv")):
        joined = np.concatenate([gradients[number] for gradients in found], axis=2)
        assert_near(name, joined, want[number], 1e-13)


@pytest.mark.feature("T10")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors(layout: str) -> None:
    torch = pytest.importorskip("torch")
    given = [array for result in parts(layout, "float64", 20) for array in result]
    tensors = [torch.from_numpy(array.copy()) for array in given]
    tensors[1][1, 2] = tensors[3][0] = given[1][1, 2] = given[3][0] = -np.inf
    tensors[1][0, 0, 0] = tensors[3][0, 0, 0] = given[1][0, 0, 0] = given[3][0, 0, 0] = -np.inf
    want = tilefold.merge(*given, layout=layout)
    for got, expected in zip(tilefold.merge(*tensors, layout=layout), want, strict=True):
        assert got.is_contiguous() and not got.requires_grad
        assert_near("merged", got.numpy(), expected, 1e-14)
    half = [tensors[0].bfloat16(), tensors[1].float(), tensors[2].bfloat16(), tensors[3].float()]
    o, lse = tilefold.merge(*half, layout=layout)
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert_near("o", o.double().numpy(), want[0], 0.02)


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"o1": np.zeros((2, 4, 9))}, ValueError, "o1 must have four axes"),
        ({"o2": np.zeros((2, 4, 8, 7))}, ValueError, "o2 must have shape (2, 4, 9, 7) to go with"),
        ({"lse1": np.zeros((2, 4, 7))}, ValueError, "lse1 must have shape (2, 4, 9) to go with o1"),
        ({"o2": np.zeros((2, 4, 9, 7), "f4")}, TypeError, "o2 must be of float64 as o1 is"),
        ({"lse2": np.zeros((2, 4, 9), "f4")}, TypeError, "lse2 must be of float64 where o1 is"),
        ({"lse2": None}, TypeError, "lse2 must be a NumPy array"),
        ({"layout": "hbnd"}, ValueError, "layout must be 'bhnd', 'bnhd' or"),
    ],
)
def test_errors_name_the_argument(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    first, second = parts("bhnd", "float64", 20)
    given: dict[str, Any] = dict(zip(("o1", "lse1", "o2", "lse2"), (*first, *second), strict=True))
    with pytest.raises(error, match=re.escape(words)):
        tilefold.merge(**{**given, **changes})
