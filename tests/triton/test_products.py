"""Products by Triton in its interpreter: what the emitted kernels compute, and what they touch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from bounds import Fault, Watched
from compare import assert_near
from interpreted import array, needs, tensor
from numpy.lib.stride_tricks import as_strided
from product_cases import (
    BATCHES,
    SHAPES,
    VARIANTS,
    Array,
    Variant,
    assert_product,
    given,
    padded,
)

from tilefold.backends.triton.interpreter import Interpreted
from tilefold.backends.triton.matmul import calls
from tilefold.backends.triton.matmul.gemm import GemmBlocks

pytestmark = pytest.mark.slow

SMALL = GemmBlocks(32, 32, 16, warps=4, stages=2, band=2)
LARGE = GemmBlocks(128, 256, 64, warps=8, stages=3)

TRITON_VARIANTS = (
    *VARIANTS,
    Variant("float64", "float64", "float64", False, True, "column", "gelu"),
)
TRITON_SHAPES = (*SHAPES, (32, 32, 16), (31, 33, 17), (0, 5, 3), (5, 0, 3), (5, 3, 0))
"""The shared shapes, whole blocks, one that is not, and axes of length 0."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The interpreter computes what a kernel then does not choose."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@dataclass(frozen=True, eq=False)
class Listening(Watched):
    """The interpreter, and the texts that it was given."""

    texts: list[str] = field(default_factory=list)
    written: tuple[str, ...] = ("c",)

    def function(self, text: str, entry: str) -> Any:
        self.texts.append(text)
        return super().function(text, entry)


def multiply(
    a: Array, b: Array, c: Array | None = None, on: Interpreted | None = None, **options: Any
) -> Array:
    """`gemm` on arrays; the kernel touches them alone, and writes all of C once."""
    needs()
    on, options = on or Watched(written=("c",)), {"blocks": SMALL, **options}
    if options.get("bias") is not None:
        options["bias"] = tensor(options["bias"])
    into = None if c is None else tensor(c)
    got = calls.gemm(tensor(a), tensor(b), into, machine=on, **options)
    assert into is None or got is into
    return array(got, str(got.dtype).removeprefix("torch."))


def product(
    variant: Variant, shape: tuple[int, int, int], on: Interpreted | None = None, **options: Any
) -> None:
    """Raises unless a product of random numbers is right."""
    x = given(variant, shape)
    got = multiply(
        x.a,
        x.b,
        x.c.copy(),
        on,
        transpose_a=variant.transpose_a,
        transpose_b=variant.transpose_b,
        bias=x.bias if variant.bias else None,
        bias_axis=variant.bias or "column",
        activation=variant.activation,
        **x.scalars,
        **options,
    )
    activation = variant.activation
    assert_product(got, x.left, x.right, c=x.c, bias=x.added, activation=activation, **x.scalars)


@pytest.mark.feature("M11", "S10")
@pytest.mark.parametrize("variant", TRITON_VARIANTS, ids=str)
def test_products_of_any_shape(variant: Variant) -> None:
    for shape in TRITON_SHAPES:
        product(variant, shape)


LADDER = (
    *((2, 2, 20), (20, 2, 2), (3, 7, 11), (1000, 10, 10), (10, 10, 1000)),
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1024,) * 3, (999,) * 3)),
)


@pytest.mark.feature("M11", "S01")
@pytest.mark.parametrize("shape", LADDER)
def test_the_shapes_of_the_learning_ladder(shape: tuple[int, int, int]) -> None:
    """Rows, contraction, columns, held to 1e-4 of numbers from -1 to 1."""
    rows, inner, columns = shape
    rng = np.random.default_rng(shape)
    a, b = rng.uniform(-1, 1, (rows, inner)), rng.uniform(-1, 1, (inner, columns))
    a, b = a.astype("float32"), b.astype("float32")
    got = multiply(a, b, blocks=LARGE)
    assert_near("c", got, a.astype("float64") @ b.astype("float64"), 1e-4)
    into = np.full((rows, columns), np.nan, "float32")
    assert (multiply(a, b, into, blocks=LARGE) == got).all()


@pytest.mark.feature("M11", "A05")
def test_one_text_serves_all_sizes_and_scalars() -> None:
    needs()
    on = Listening()
    for shape in ((1, 2, 3), (50, 40, 30), (7, 100, 8)):
        product(VARIANTS[0], shape, on)
    assert len(set(on.texts)) == 1 and "50" not in on.texts[0]


@pytest.mark.feature("M11")
@pytest.mark.parametrize("band", [1, 2, 3, 8])
def test_every_block_of_c_has_one_program_whatever_the_bands(band: int) -> None:
    a, b = np.ones((5 * 32 - 3, 2), "float32"), np.ones((2, 3 * 32 - 1), "float32")
    c = np.zeros((len(a), b.shape[1]), "float32")
    got = multiply(a, b, c, beta=1.0, blocks=replace(SMALL, band=band))
    assert (got == 2).all()


@pytest.mark.feature("M11")
def test_where_arrays_lie_does_not_matter() -> None:
    """Padded rows and turned ones; nothing is written around C."""
    m, n, k = 37, 21, 19
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(m, k)).astype("float32"), rng.normal(size=(k, n)).astype("float32")
    for place in (padded, lambda x: padded(x.T).T, lambda x: np.repeat(x, 3, 1)[:, ::3]):
        around = np.full((m + 2, n + 5), 7, "float32")
        c = around[1:-1, 2:-3]
        assert_product(multiply(place(a), place(b), c), a, b)
        assert (around[[0, -1]] == 7).all() and (around[:, [0, 1, -3, -2, -1]] == 7).all()
        assert_product(multiply(place(a), place(b), place(np.full((m, n), np.nan, "f4"))), a, b)


@pytest.mark.feature("M11")
def test_offsets_beyond_31_bits() -> None:
    """Rows that lie 2^28 numbers apart, 20 of them; the pages between are never touched."""
    needs()
    rows, apart, on = 20, 2**28, Listening()
    memory = np.zeros(rows * apart, "float16")
    a = as_strided(memory, (rows, 3), (2 * apart, 2))
    a[...] = np.random.default_rng(4).normal(size=a.shape)
    b = np.random.default_rng(5).normal(size=(3, 4)).astype("float16")
    assert_product(multiply(a, b, on=on, dtype="float32"), a, b)
    assert_product(multiply(b.T.copy(), a.T, on=on, dtype="float32"), b.T, a.T)
    batch = as_strided(memory, (rows, 1, 3), (2 * apart, 2, 2))
    assert_product(multiply(batch, b, on=on, dtype="float32"), batch, b)
    assert ["tl.arange(0, M).to(tl.int64)" in text for text in on.texts] == [True, True, False]


@pytest.mark.feature("M11", "S10")
@pytest.mark.parametrize("kept", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_tiles_are_moved_whole_where_they_lie_so(kept: str) -> None:
    """By tensor descriptors, transposed or not, of matrices that a batch shares or not."""
    needs()
    rng, on, plain = np.random.default_rng(10), Listening(), Listening("sm_80")
    for m, n, k in ((40, 24, 24), (8, 40, 8), (1, 8, 16)):
        for turned in range(4):
            a = rng.normal(size=(2, 1, m, k)).astype(kept)
            b = rng.normal(size=(2, k, n)).astype(kept)
            given = [
                np.ascontiguousarray(each.swapaxes(-1, -2)).swapaxes(-1, -2) if swap else each
                for each, swap in ((a, turned & 1), (b, turned & 2))
            ]
            for each in (on, plain):
                assert_product(multiply(*given, on=each, dtype="float32"), a, b)
    assert [".load([" in text for text in on.texts[:8]] == [True] * 8
    assert not any(".load([" in text for text in plain.texts)


@pytest.mark.feature("M11")
def test_what_no_unit_can_move_is_loaded_as_it_lies() -> None:
    """Rows that do not begin at multiples of 16 bytes, numbers that lie apart, float32, nothing."""
    needs()
    on = Listening()
    wide = np.random.default_rng(11).normal(size=(32, 48)).astype("float16")
    odd = np.random.default_rng(12).normal(size=(32, 33)).astype("float16")
    for a in (wide[:, 1:33], wide[:, ::2], odd[:, :32], wide[:, :32].astype("float32"), wide[:0]):
        b = np.ones((a.shape[1], 8), a.dtype)
        assert_product(multiply(a, b, on=on, dtype="float32"), a, b)
    shared = tensor(wide).expand(2, 32, 48)  # of two batches that are one
    calls.gemm(shared, shared, transpose_b=True, blocks=SMALL, machine=on)
    assert not any(".load([" in text for text in on.texts)


@pytest.mark.feature("M11")
def test_a_batch_broadcasts_as_in_numpy() -> None:
    rng = np.random.default_rng(6)
    for shape_a, shape_b in (*BATCHES, ((0, 9, 5), (1, 5, 11))):
        a, b = (rng.normal(size=shape).astype("float32") for shape in (shape_a, shape_b))
        got = multiply(a, b)
        assert got.shape == np.matmul(a, b).shape
        assert_product(got, a, b)


@pytest.mark.feature("M11")
def test_a_batch_has_a_bias_of_its_own_or_shares_one() -> None:
    rng = np.random.default_rng(7)
    a = rng.normal(size=(2, 3, 9, 5)).astype("float32")
    b = rng.normal(size=(5, 11)).astype("float32")
    for axis, length in (("column", 11), ("row", 9)):
        for batch in ((), (3,), (2, 1), (2, 3)):
            bias = rng.normal(size=(*batch, length)).astype("float32")
            got = multiply(a, b, bias=bias, bias_axis=axis)
            added = bias[..., None, :] if axis == "column" else bias[..., None]
            assert_product(got, a, b, bias=added)


def test_c_is_read_only_where_beta_asks() -> None:
    ones = np.ones((3, 3), "float32")
    for old in (np.nan, np.inf):
        assert (multiply(ones, ones, np.full((3, 3), old, "float32"), alpha=2.0) == 6).all()
    assert np.isnan(multiply(ones, ones, np.full((3, 3), np.nan, "float32"), beta=1.0)).all()


def test_the_bias_is_not_times_alpha_and_comes_before_the_activation() -> None:
    ones, bias = np.ones((2, 2), "float32"), np.array([-3, 1], "float32")
    options: dict[str, Any] = {"alpha": 0.5, "bias": bias, "activation": "relu"}
    assert (multiply(ones, ones, **options) == [[0, 2], [0, 2]]).all()
    c = np.full((2, 2), 10, "float32")
    assert (multiply(ones, ones, c, beta=0.25, **options) == [[0.5, 4.5]] * 2).all()


@pytest.mark.parametrize("text", ["first_m + row < m", "first_n + column < n", "inner < k - first"])
def test_a_forgotten_edge_is_found(text: str) -> None:
    """A kernel that leaves an array by one element: these tests can fail."""
    needs()
    from triton.runtime.errors import InterpreterError

    with pytest.raises(InterpreterError, match="elements outside of its operands"):
        multiply(
            np.ones((5, 5)),
            np.ones((5, 5)),
            on=Watched(written=("c",), replaced=(text, text.replace("<", "<="))),
        )


def test_a_block_too_few_is_found() -> None:
    needs()
    with pytest.raises(Fault, match="40 elements were not written"):
        multiply(
            np.ones((5, 40)),
            np.ones((40, 40)),
            on=Watched(written=("c",), replaced=("(n + N - 1) // N", "n // N")),
        )


def test_a_sum_over_nothing_is_0() -> None:
    a, b, bias = np.ones((2, 0), "float32"), np.ones((0, 3), "float32"), np.ones(3, "float32")
    assert (multiply(a, b) == np.zeros((2, 3))).all()
    c = np.full((2, 3), 4, "float32")
    assert (multiply(a, b, c, beta=0.5, bias=bias) == np.full((2, 3), 3)).all()


@pytest.mark.parametrize("kept", ["float16", "bfloat16"])
def test_half_types_add_up_in_float32(kept: str) -> None:
    """4097 ones are no float16, and 257 no bfloat16: a sum in them would stop before."""
    a = np.ones((1, 4098), kept)
    got = multiply(a, a.T, dtype="float32")
    assert got.dtype == np.float32 and got == 4098


def test_what_is_not_finite_stays_where_it_is() -> None:
    """NaN and infinity in one row and one column reach no other, at edges neither."""
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(35, 9)).astype("float32"), rng.normal(size=(9, 37)).astype("float32")
    a[3, 8], a[34, 0], b[8, 36] = np.nan, np.inf, np.nan
    got = multiply(a, b)
    clean = np.ones(got.shape, bool)
    clean[[3, 34]] = clean[:, 36] = False
    assert np.isfinite(got[clean]).all() and not np.isfinite(got[~clean]).any()


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_activations_of_numbers_of_any_size(name: str, dtype: str) -> None:
    ends = [-1e30, 1e30, 1e-30, -88.8, 0, -0.5, 0.5]
    x = np.concatenate([np.linspace(-20, 20, 4001), np.linspace(-0.6, 0.6, 601), ends])
    a, one = x.astype(dtype)[:, None], np.ones((1, 1), dtype)
    got = multiply(a, one, activation=name, blocks=replace(SMALL, m=256))
    assert_product(got, a, one, activation=name)
    assert np.isnan(multiply(a[:40] * np.nan, one, activation=name)).all()


@pytest.mark.feature("S10")
def test_a_layer_of_attention_from_products() -> None:
    """Tokens times the weights of every head, attention, and a product with bias and gelu."""
    needs()
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(9)
    tokens, heads, dim, width = 21, 3, 8, 20
    on = Interpreted()
    x = tensor(rng.normal(size=(tokens, width)).astype("float32"))
    weights = [tensor(rng.normal(size=(heads, width, dim)).astype("float32")) for _ in "qkv"]
    last = tensor(rng.normal(size=(heads * dim, width)).astype("float32"))
    bias = tensor(rng.normal(size=width).astype("float32"))
    q, k, v = (calls.gemm(x, weight, blocks=SMALL, machine=on) for weight in weights)
    p = calls.softmax(
        calls.gemm(q, k, transpose_b=True, alpha=dim**-0.5, blocks=SMALL, machine=on),
        machine=on,
    )
    o = torch.empty(tokens, heads, dim)
    calls.gemm(p, v, o.transpose(0, 1), blocks=SMALL, machine=on)  # as tokens want it
    y = calls.gemm(o.view(tokens, -1), last, bias=bias, activation="gelu", blocks=SMALL, machine=on)
    q, k, v = (x.double() @ weight.double() for weight in weights)
    o = ((q @ k.mT) * dim**-0.5).softmax(-1) @ v
    want = o.transpose(0, 1).reshape(tokens, -1) @ last.double() + bias.double()
    want = want * 0.5 * (1 + torch.erf(want / math.sqrt(2)))
    assert_near("y", y.numpy(), want.numpy(), 1e-5 * float(want.abs().max()))
