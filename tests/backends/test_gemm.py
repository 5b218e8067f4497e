"""Products of matrices: what the emitted kernels of every GPU backend compute."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from product_cases import BATCHES, SHAPES, VARIANTS, Array, Variant, assert_gated, padded
from products import ALL, SMALL, Products

from tilefold.backends.metal.matmul import spec as metal
from tilefold.problems.matmul import ACTIVATIONS

pytestmark = pytest.mark.slow

on_every_gpu = pytest.mark.parametrize("products", ALL, ids=str)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Triton's interpreter computes what a kernel then does not choose."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


EMPTY = ((0, 5, 3), (5, 0, 3), (5, 3, 0))

METAL_SHAPES = (*SHAPES, (48, 48, 24), (47, 49, 25), *EMPTY)
"""The shared shapes, whole blocks, one that is not, and axes of length 0."""

TRITON_SHAPES = (*SHAPES, (32, 32, 16), (31, 33, 17), *EMPTY)

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
    for shape_a, shape_b in (*BATCHES, ((0, 9, 5), (1, 5, 11))):
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


@pytest.mark.feature("M11")
@on_every_gpu
def test_gemm_finds_the_axis_of_a_bias_in_its_shape(products: Products) -> None:
    rng = np.random.default_rng(12)
    a, b = rng.normal(size=(2, 9, 5)).astype("float32"), rng.normal(size=(5, 11)).astype("float32")
    for shape in ((11,), (1, 11), (2, 1, 11), (9, 1), (2, 9, 1)):
        bias = rng.normal(size=shape).astype("float32")
        products.check(products.gemm(a, b, bias=bias), a, b, bias=bias)


@pytest.mark.feature("M11")
@on_every_gpu
def test_gemm_walks_more_axes_of_a_batch(products: Products) -> None:
    """Five axes: neighbours that lie as one are one, and the host walks what is left."""
    rng = np.random.default_rng(13)
    a = rng.normal(size=(2, 1, 3, 2, 5, 4)).astype("float32")
    b = rng.normal(size=(1, 2, 3, 1, 4, 6)).astype("float32")
    bias = rng.normal(size=(2, 1, 1, 2, 6)).astype("float32")
    options = {"bias": bias, "bias_axis": "column"}
    on = products.listening()
    got = products.gemm(a, b, on=on, **options)
    assert got.shape == (2, 2, 3, 2, 5, 6)
    products.check(got, a, b, bias=bias[..., None, :])
    whole = products.gemm(a, b[:, :1], np.zeros((2, 1, 3, 2, 5, 6), "float32"), on, beta=1.0)
    products.check(whole, a, b[:, :1])


@pytest.mark.feature("M11")
@on_every_gpu
def test_gemm_reads_c_beside_the_result(products: Products) -> None:
    """C and the bias in float32 beside a half result; C broadcasts, and is not written."""
    rng = np.random.default_rng(14)
    a, b = rng.normal(size=(2, 37, 19)).astype("float16"), rng.normal(size=(19, 21)).astype("f4")
    bias = rng.normal(size=(37, 1)).astype("float32")
    for kind, shape in (("float32", (1, 21)), ("bfloat16", (2, 37, 21)), ("float32", (2, 1, 1))):
        c = rng.normal(size=shape).astype(kind)
        kept, out = c.copy(), np.full((2, 37, 21), np.nan, "bfloat16")
        got = products.gemm(a, b, c, beta=0.5, bias=bias, activation="sigmoid", out=out)
        assert str(got.dtype) == "bfloat16" and (c == kept).all()
        products.check(got, a, b, c=c, beta=0.5, bias=bias, activation="sigmoid")
    c, out = np.full((2, 37, 21), np.nan, "float32"), np.empty((2, 37, 21), "float16")
    products.check(products.gemm(a, b, c, out=out), a, b)  # beta is 0


GATES = (
    ("float32", "float32", "silu", False, (37, 21, 19)),
    ("float16", "float16", "gelu_tanh", True, (33, 40, 24)),
    ("bfloat16", "float32", None, False, (1, 70, 8)),
)


@pytest.mark.feature("A11")
@on_every_gpu
def test_gemm_multiplies_by_a_gate_in_one_pass(products: Products) -> None:
    rng, on = np.random.default_rng(15), products.listening()
    for kind, kept, name, turned, (m, n, k) in GATES:
        a = rng.normal(size=(2, m, k)).astype(kind)
        b, gate = rng.normal(size=(2, k, n)).astype(kind)
        bias = rng.normal(size=n).astype(kept)
        options: dict[str, Any] = {"bias": bias, "activation": name, "dtype": kept, "alpha": 0.5}
        right = [np.ascontiguousarray(x.T) if turned else x for x in (b, gate)]
        got = products.gemm(a, right[0], on=on, gate=right[1], transpose_b=turned, **options)
        assert_gated(got, a, b, gate, alpha=0.5, bias=bias, name=name)
        other = products.gemm(a, b, on=on, gate=np.ascontiguousarray(gate.T).T, **options)
        assert_gated(other, a, b, gate, alpha=0.5, bias=bias, name=name)
    assert all("gate" in text for text in on.sources)


@pytest.mark.feature("T14")
def test_padded_and_swizzled_stages_give_equal_results() -> None:
    """To the bit, of Metal's blocks: whole ones and edges, each type, transposed or not."""
    products, rng = ALL[0], np.random.default_rng(16)
    for kind, turned in (("float32", False), ("float16", True), ("float16", False)):
        a, b = rng.normal(size=(70, 45)).astype(kind), rng.normal(size=(45, 50)).astype(kind)
        right = np.ascontiguousarray(b.T) if turned else b
        left = np.ascontiguousarray(a.T).T if turned else a
        blocks = metal.GemmBlocks(32, 48, 32, split=(2, 2))
        got = [
            products.gemm(
                left,
                right,
                transpose_b=turned,
                blocks=replace(blocks, banks=banks),
                dtype="float32",
            )
            for banks in ("padding", "swizzle")
        ]
        products.check(got[0], a, b)
        assert (got[0] == got[1]).all()


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
