"""Products of matrices: what the emitted kernels of every GPU backend compute."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from product_cases import BATCHES, SHAPES, VARIANTS, Array, Variant, padded
from products import ALL, SMALL, Products

from tilefold.problems.matmul import ACTIVATIONS

pytestmark = pytest.mark.slow

on_every_gpu = pytest.mark.parametrize("products", ALL, ids=str)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Triton's interpreter computes what a kernel then does not choose."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


METAL_SHAPES = (*SHAPES, (48, 48, 24), (47, 49, 25))
"""The shared shapes, whole blocks, and one that is not."""

TRITON_SHAPES = (*SHAPES, (32, 32, 16), (31, 33, 17), (0, 5, 3), (5, 0, 3), (5, 3, 0))
"""The shared shapes, whole blocks, one that is not, and axes of length 0."""

DOUBLE = Variant("float64", "float64", "float64", False, True, "column", "gelu")


def trials() -> list[Any]:
    """Backend and variant; Triton multiplies float64, too."""
    return [
        pytest.param(
            *(products, variant),
            id=f"{products}-{variant}",
            marks=() if products.family else pytest.mark.feature("S10"),
        )
        for products in ALL
        for variant in (VARIANTS if products.family else (*VARIANTS, DOUBLE))
    ]


@pytest.mark.feature("M11")
@pytest.mark.parametrize(("products", "variant"), trials())
def test_gemm_takes_any_shape(products: Products, variant: Variant) -> None:
    for shape in METAL_SHAPES if products.family else TRITON_SHAPES:
        products.product(variant, shape)


@pytest.mark.feature("M11", "A05")
@on_every_gpu
def test_gemm_has_one_source_for_all_sizes_and_scalars(products: Products) -> None:
    on = products.listening()
    for shape in ((1, 2, 3), (50, 40, 30), (7, 100, 8)):
        products.product(VARIANTS[0], shape, on)
    assert len(set(on.sources)) == 1 and "50" not in on.sources[0]
    if products.family:
        assert len(on.sources) == 1, "compiled again"


PLACES = {
    "as they come": np.ascontiguousarray,
    "padded rows": padded,
    "padded columns": lambda array: padded(array.T).T,
    "apart": lambda array: np.repeat(array, 3, 1)[:, ::3],
    "backwards": lambda array: np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1],
}


@pytest.mark.feature("M11")
@on_every_gpu
def test_gemm_takes_arrays_wherever_they_lie(products: Products) -> None:
    """Padded rows, turned and reversed ones; nothing is written around C."""
    m, n, k = 37, 21, 19
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(m, k)).astype("float32"), rng.normal(size=(k, n)).astype("float32")
    for name, place in PLACES.items():
        if name == "backwards" and not products.family:
            continue  # tensors of PyTorch have no negative strides
        left, right = place(a), place(b)
        assert (left == a).all() and (right == b).all()
        c = place(np.full((m, n), np.nan, "float32"))
        products.check(products.gemm(left, right, c), a, b)
        around = np.full((m + 2, n + 5), 7, "float32")
        products.check(products.gemm(left, right, around[1:-1, 2:-3]), a, b)
        assert (around[[0, -1]] == 7).all() and (around[:, [0, 1, -3, -2, -1]] == 7).all()


@pytest.mark.feature("M11")
@on_every_gpu
def test_gemm_broadcasts_a_batch_as_numpy(products: Products) -> None:
    rng = np.random.default_rng(6)
    empty = () if products.family else (((0, 9, 5), (1, 5, 11)),)
    for shape_a, shape_b in (*BATCHES, *empty):
        a, b = (rng.normal(size=shape).astype("float32") for shape in (shape_a, shape_b))
        got = products.gemm(a, b)
        assert got.shape == np.matmul(a, b).shape
        products.check(got, a, b)


@pytest.mark.feature("M11")
@on_every_gpu
def test_gemm_takes_a_bias_for_each_of_a_batch_or_for_all(products: Products) -> None:
    rng = np.random.default_rng(7)
    a = rng.normal(size=(2, 3, 9, 5)).astype("float32")
    b = rng.normal(size=(5, 11)).astype("float32")
    for axis, length in (("column", 11), ("row", 9)):
        for batch in ((), (3,), (2, 1), (2, 3)):
            bias = rng.normal(size=(*batch, length)).astype("float32")
            got = products.gemm(a, b, bias=bias, bias_axis=axis)
            added = bias[..., None, :] if axis == "column" else bias[..., None]
            products.check(got, a, b, bias=added)


@on_every_gpu
def test_gemm_reads_c_only_where_beta_asks(products: Products) -> None:
    ones = np.ones((3, 3), "float32")
    for old in (np.nan, np.inf):
        assert (products.gemm(ones, ones, np.full((3, 3), old, "float32"), alpha=2.0) == 6).all()
    assert np.isnan(products.gemm(ones, ones, np.full((3, 3), np.nan, "f4"), beta=1.0)).all()


@on_every_gpu
def test_gemm_adds_the_bias_after_alpha_and_before_the_activation(products: Products) -> None:
    ones, bias = np.ones((2, 2), "float32"), np.array([-3, 1], "float32")
    options: dict[str, Any] = {"alpha": 0.5, "bias": bias, "activation": "relu"}
    assert (products.gemm(ones, ones, **options) == [[0, 2], [0, 2]]).all()
    c = np.full((2, 2), 10, "float32")
    assert (products.gemm(ones, ones, c, beta=0.25, **options) == [[0.5, 4.5]] * 2).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@on_every_gpu
def test_gemm_adds_half_types_in_float32(products: Products, dtype: str) -> None:
    """4097 ones are no float16, and 257 no bfloat16: a sum in them would stop before."""
    a = np.ones((1, 4098), dtype)
    got = products.gemm(a, a.T, dtype="float32")
    assert got.dtype == np.float32 and got == 4098


@on_every_gpu
def test_gemm_keeps_what_is_not_finite_where_it_is(products: Products) -> None:
    """NaN and infinity in one row and one column reach no other, at edges neither."""
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(35, 9)).astype("float32"), rng.normal(size=(9, 37)).astype("float32")
    a[3, 8], a[34, 0], b[8, 36] = np.nan, np.inf, np.nan
    got = products.gemm(a, b)
    clean = np.ones(got.shape, bool)
    clean[[3, 34]] = clean[:, 36] = False
    assert np.isfinite(got[clean]).all() and not np.isfinite(got[~clean]).any()


def numbers_of_any_size(dtype: str) -> Array:
    """Many around 0, and the ends of the range, as one column."""
    ends = [-1e30, 1e30, 1e-30, -88.8, 0, -0.5, 0.5]
    x = np.concatenate([np.linspace(-20, 20, 4001), np.linspace(-0.6, 0.6, 601), ends])
    return x.astype(dtype)[:, None]


@pytest.mark.parametrize("name", ACTIVATIONS[1:])
@pytest.mark.parametrize(
    ("products", "dtype"),
    [(ALL[1], "float32"), (ALL[2], "float32"), (ALL[2], "float64")],
    ids=str,
)
def test_gemm_activates_numbers_of_any_size(products: Products, dtype: str, name: str) -> None:
    options = {} if products.family else {"blocks": replace(SMALL, m=256)}
    a, one = numbers_of_any_size(dtype), np.ones((1, 1), dtype)
    got = products.gemm(a, one, activation=name, **options)
    products.check(got, a, one, activation=name)
    few = a if products.family else a[:40]
    assert np.isnan(products.gemm(few * np.nan, one, activation=name)).all()
