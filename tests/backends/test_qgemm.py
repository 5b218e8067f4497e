"""Products with quantised matrices: what the emitted kernels of every GPU backend compute."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from products import ALL, SMALL, Products

import tilefold
from tilefold.backends.matmul import Codes
from tilefold.backends.metal.matmul.spec import GemmBlocks

pytestmark = pytest.mark.slow

on_every_gpu = pytest.mark.parametrize("products", ALL, ids=str)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Triton's interpreter computes what a kernel then does not choose."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


class Case(NamedTuple):
    """A quantised matrix k x n, and what is done with it beside m rows of x."""

    scheme: str
    group: int | None
    scales: str
    x: str
    kept: str
    activation: str | None
    sizes: tuple[tuple[int, int, int], ...]
    """(m, n, k): few rows and many, and columns and inputs that fill no panel and no word."""

    def __str__(self) -> str:
        return f"{self.scheme}-{self.group}-{self.x}-{self.kept}"


CASES = (
    Case("int8", None, "float32", "float32", "float16", "relu", ((1, 70, 45), (33, 5, 1))),
    Case("int8", 16, "float16", "bfloat16", "float32", None, ((3, 33, 48),)),
    Case("int4", 32, "float16", "float16", "float16", "silu", ((40, 65, 96),)),
    Case("int4", None, "float32", "bfloat16", "bfloat16", None, ((2, 31, 21), (1, 1, 1))),
    Case("int4_symmetric", 48, "float32", "float16", "float32", "gelu_tanh", ((17, 40, 96),)),
    Case("palette6", None, "float32", "float16", "bfloat16", None, ((1, 70, 50), (35, 3, 17))),
    Case("palette6", None, "float32", "bfloat16", "float32", "sigmoid", ((2, 33, 16),)),
    Case("float8_e4m3", None, "float16", "float16", "float32", None, ((5, 40, 37), (1, 3, 64))),
)
"""Every scheme and every type of x, of scales and of a result, some with an activation."""


@pytest.mark.feature("A02")
@pytest.mark.parametrize("case", CASES, ids=str)
@on_every_gpu
def test_qgemm_is_the_product_of_the_widened_weights(products: Products, case: Case) -> None:
    on = products.listening()
    for m, n, k in case.sizes:
        rng = np.random.default_rng((m, n, k))
        w = tilefold.quantize(
            rng.normal(size=(k, n)).astype("float32"),
            case.scheme,
            group_size=case.group if case.scheme != "int4" or case.group else k,
            scale_dtype=case.scales,
        )
        x = rng.normal(size=(m, k)).astype(case.x)
        bias = rng.normal(size=n).astype("float32")
        more: dict[str, Any] = {"bias": bias, "activation": case.activation}
        got = products.qgemm(x, w, on, dtype=case.kept, **more)
        assert str(got.dtype) == case.kept
        products.check(got, x, w.dequantize("float64"), **more)
    assert all(case.scheme in text for text in on.sources)


@pytest.mark.feature("A02")
@on_every_gpu
def test_qgemm_takes_any_batch_and_place_of_x(products: Products) -> None:
    rng = np.random.default_rng(3)
    w = tilefold.quantize(rng.normal(size=(40, 36)), "int8")
    wide = rng.normal(size=(2, 3, 2, 40, 7)).astype("float32")
    x, bias = wide.swapaxes(-1, -2)[:, ::2], rng.normal(size=(7, 1)).astype("float32")
    out = np.full((2, 2, 2, 7, 36), np.nan, "float16")
    got = products.qgemm(x, w, out=out, bias=bias)
    products.check(got, x, w.dequantize("float64"), bias=bias)
    assert products.qgemm(x[:0], w).shape == (0, 2, 2, 7, 36)


@pytest.mark.feature("A02")
@on_every_gpu
def test_every_code_of_8_bits_is_the_number_that_it_means(products: Products) -> None:
    """All 256 codes of float8 beside the definition, the two that are NaN too."""
    table = tilefold.quantize(np.ones((256, 32)), "float8_e4m3")
    codes = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 32, 2).copy()
    scales = np.ones((1, 1, 32), np.float32)
    w = replace(table, codes=codes, scales=scales)
    finite = np.arange(256) % 128 != 127
    x = np.eye(256, dtype="float16")[:, finite]
    w = replace(w, shape=(254, 32), group_size=254, codes=codes[:, finite].copy())
    got = products.qgemm(x, w, dtype="float32")
    assert (got[finite] == w.dequantize()).all() and abs(got).max() == 448
    odd = replace(w, codes=np.full_like(w.codes, 255))
    assert np.isnan(products.qgemm(x[:1] + 1, odd)).all()


@pytest.mark.feature("A05")
@on_every_gpu
def test_qgemm_has_one_source_for_all_sizes(products: Products) -> None:
    on, rng = products.listening(), np.random.default_rng(4)
    for m, n, k in ((1, 40, 64), (9, 33, 544)):
        w = tilefold.quantize(rng.normal(size=(k, n)), "int4", group_size=32)
        x = rng.normal(size=(m, k)).astype("float32")
        products.check(products.qgemm(x, w, on), x, w.dequantize("float64"))
    assert len(set(on.sources)) == 1 and "544" not in on.sources[0]


@pytest.mark.feature("T14")
def test_a_stage_of_weights_is_padded_or_swizzled() -> None:
    rng, blocks = np.random.default_rng(5), GemmBlocks(32, 32, 32, split=(2, 2))
    w = tilefold.quantize(rng.normal(size=(70, 50)), "palette6")
    x = rng.normal(size=(40, 70)).astype("float16")
    one, two = (
        ALL[0].qgemm(x, w, blocks=replace(blocks, banks=banks)) for banks in ("padding", "swizzle")
    )
    ALL[0].check(one, x, w.dequantize("float64"))
    assert (one == two).all()


W = tilefold.quantize(np.ones((32, 8)), "int4", group_size=16)
X = np.ones((2, 32), "float32")
REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((np.ones((2, 31), "float32"), W), {}, ValueError, "x must be (..., 32) for a w of 32 x 8"),
    ((X, X.T), {}, TypeError, "w must be made by tilefold.quantize, got ndarray"),
    ((X[0], W), {}, ValueError, "x must have 2 to 32 axes"),
    ((X, W), {"dtype": "int8"}, ValueError, "the type of c must be"),
    ((X, W), {"bias": X[0]}, ValueError, "bias must be (8,) or (2, 1), got (32,)"),
    ((X, W), {"activation": "sine"}, ValueError, "activation must be None"),
    (
        (X, W),
        {"out": np.ones((2, 9), "float32")},
        ValueError,
        "out must be float32 of shape (2, 8)",
    ),
]


@pytest.mark.feature("A03")
@pytest.mark.parametrize(("arguments", "options", "error", "message"), REFUSED)
@pytest.mark.parametrize("products", [ALL[1], ALL[2]], ids=str)
def test_qgemm_refuses_what_is_no_product(
    products: Products,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        products.qgemm(*arguments, **options)


def test_blocks_lie_in_one_group() -> None:
    with pytest.raises(ValueError, match="k of blocks must divide the groups of 16 inputs, got 32"):
        ALL[2].qgemm(X, W, blocks=replace(SMALL, k=32))
    for product, kind in ((ALL[1], TypeError), (ALL[2], ValueError)):
        with pytest.raises(kind, match=r"x must be .*float32.*, got '?float64"):
            product.qgemm(X.astype("float64"), W)


@pytest.mark.feature("A03")
@pytest.mark.parametrize(
    "given, message",
    [
        (("int5",), "scheme must be 'int8', 'int4'"),
        (("palette6", None, "float32"), "scales must be None, got 'float32'"),
        (("int8", 24, "float32"), "group must be a multiple of 16, got 24"),
        (("int8", None, "float64"), "scales must be 'float32' or 'float16', got 'float64'"),
    ],
)
def test_codes_that_no_kernel_reads_are_refused(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Codes(*given)
