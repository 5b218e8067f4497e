"""Products by Triton in its interpreter: what they touch, and what no other backend does."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from bounds import Fault, Watched
from compare import assert_near
from interpreted import needs, tensor
from numpy.lib.stride_tricks import as_strided
from product_cases import assert_product
from products import SMALL, ListeningInterpreter, multiply

from tilefold.backends.triton.interpreter import Interpreted
from tilefold.backends.triton.matmul import calls
from tilefold.backends.triton.matmul.gemm import GemmBlocks

# Tracing Python's operations doubles the time of these tests.
pytestmark = [pytest.mark.slow, pytest.mark.no_cover]

LARGE = GemmBlocks(128, 256, 64, warps=8, stages=3)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The interpreter computes what a kernel then does not choose."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


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


@pytest.mark.feature("M11")
@pytest.mark.parametrize("band", [1, 2, 3, 8])
def test_every_block_of_c_has_one_program_whatever_the_bands(band: int) -> None:
    a, b = np.ones((5 * 32 - 3, 2), "float32"), np.ones((2, 3 * 32 - 1), "float32")
    c = np.zeros((len(a), b.shape[1]), "float32")
    got = multiply(a, b, c, beta=1.0, blocks=replace(SMALL, band=band))
    assert (got == 2).all()


@pytest.mark.feature("M11")
def test_offsets_beyond_31_bits() -> None:
    """Rows that lie 2^28 numbers apart, 20 of them; the pages between are never touched."""
    needs()
    rows, apart, on = 20, 2**28, ListeningInterpreter()
    memory = np.zeros(rows * apart, "float16")
    a = as_strided(memory, (rows, 3), (2 * apart, 2))
    a[...] = np.random.default_rng(4).normal(size=a.shape)
    b = np.random.default_rng(5).normal(size=(3, 4)).astype("float16")
    assert_product(multiply(a, b, on=on, dtype="float32"), a, b)
    assert_product(multiply(b.T.copy(), a.T, on=on, dtype="float32"), b.T, a.T)
    batch = as_strided(memory, (rows, 1, 3), (2 * apart, 2, 2))
    assert_product(multiply(batch, b, on=on, dtype="float32"), batch, b)
    assert ["tl.arange(0, M).to(tl.int64)" in text for text in on.sources] == [True, True, False]


@pytest.mark.feature("M11", "S10")
@pytest.mark.parametrize("kept", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_tiles_are_moved_whole_where_they_lie_so(kept: str) -> None:
    """By tensor descriptors, transposed or not, of matrices that a batch shares or not."""
    needs()
    rng, on, plain = (
        np.random.default_rng(10),
        ListeningInterpreter(),
        ListeningInterpreter("sm_80"),
    )
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
    assert [".load([" in text for text in on.sources[:8]] == [True] * 8
    assert not any(".load([" in text for text in plain.sources)


@pytest.mark.feature("M11")
def test_what_no_unit_can_move_is_loaded_as_it_lies() -> None:
    """Rows that do not begin at multiples of 16 bytes, numbers that lie apart, float32, nothing."""
    needs()
    on = ListeningInterpreter()
    wide = np.random.default_rng(11).normal(size=(32, 48)).astype("float16")
    odd = np.random.default_rng(12).normal(size=(32, 33)).astype("float16")
    for a in (wide[:, 1:33], wide[:, ::2], odd[:, :32], wide[:, :32].astype("float32"), wide[:0]):
        b = np.ones((a.shape[1], 8), a.dtype)
        assert_product(multiply(a, b, on=on, dtype="float32"), a, b)
    shared = tensor(wide).expand(2, 32, 48)  # of two batches that are one
    calls.gemm(shared, shared, transpose_b=True, blocks=SMALL, machine=on)
    assert not any(".load([" in text for text in on.sources)


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
