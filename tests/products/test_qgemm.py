"""Products with quantised matrices, against float64 with the widened matrix."""

from __future__ import annotations

import doctest
from typing import Any

import ml_dtypes  # noqa: F401  # registers bfloat16 with NumPy
import numpy as np
import pytest
import torch
from compare import UNITS, assert_near, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import tilefold
from tilefold.products import quantized_calls
from tilefold.products.schemes import SCHEMES

Array = NDArray[Any]

FLOATS = ("float32", "float16", "bfloat16")

ACTIVATIONS = {
    None: lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def check(
    got: Array,
    x: Array,
    w: tilefold.QuantizedMatrix,
    bias: Array | None = None,
    activation: str | None = None,
) -> None:
    """Compare with float64: float32's error of such a sum, and one rounding of the result."""
    weights, rows = w.dequantize("float64"), x.astype(np.float64)
    want = rows @ weights
    most = abs(rows) @ abs(weights)
    if bias is not None:
        want, most = want + bias.astype(np.float64), most + abs(bias.astype(np.float64))
    want = ACTIVATIONS[activation](torch.from_numpy(want)).numpy()
    kind = got.dtype.name
    terms = 4 + np.sqrt(w.shape[0])
    tiny = {"float16": 2.0**-25}.get(kind, 0)
    error = terms * UNITS["float32"] * (most + 1) + UNITS[kind] * abs(want) + tiny
    assert_near("product", got.astype(np.float64), want, error)


QUICK = {(isa, "int8") for isa in ("avx2", "neon")}


@pytest.mark.feature("A02", "A14")
@pytest.mark.parametrize(
    ("isa", "scheme"),
    [
        pytest.param(isa, scheme, marks=[] if (isa, scheme) in QUICK else [pytest.mark.slow])
        for isa in ("avx512", "avx2", "sse2", "neon")
        for scheme in SCHEMES
    ],
)
def test_products_of_all_schemes_on_all_levels(
    isa: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        monkeypatch.setenv("TILEFOLD_CPU_ISA", isa)
        tilefold.attention(*np.zeros((3, 1, 1, 1, 1), np.float32))
    except ValueError:
        pytest.skip(f"no {isa} here")
    draw = np.random.default_rng(1)
    size = 32 if SCHEMES[scheme].grouped else None
    w = tilefold.quantize(draw.standard_normal((96, 70)), scheme, group_size=size)
    for m in (1, 3, 20):
        x = draw.standard_normal((m, 96), np.float32)
        check(tilefold.qgemm(x, w), x, w)


@pytest.mark.slow
@pytest.mark.feature("A02")
@given(
    scheme=st.sampled_from([*SCHEMES]),
    m=st.integers(0, 120) | st.integers(1, 20),
    k=st.integers(1, 40) | st.sampled_from([64, 128]),
    n=st.integers(1, 130),
    size=st.sampled_from([None, 16, 32]),
    scales=st.sampled_from(["float32", "float16"]),
    kind=st.sampled_from(FLOATS),
    result=st.sampled_from([None, *FLOATS]),
    biased=st.sampled_from([None, "float32", "own"]),
    activation=st.sampled_from([None, "gelu"]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_types(
    scheme: str,
    m: int,
    k: int,
    n: int,
    size: int | None,
    scales: str,
    kind: str,
    result: str | None,
    biased: str | None,
    activation: str | None,
) -> None:
    draw = np.random.default_rng(k * n + m)
    size = size if SCHEMES[scheme].grouped and k % (size or 1) == 0 else None
    w = tilefold.quantize(draw.standard_normal((k, n)), scheme, group_size=size, scale_dtype=scales)
    x = draw.standard_normal((m, k)).astype(kind)
    bias = None
    if biased:
        bias = draw.standard_normal(n).astype("float32" if biased == "float32" else result or kind)
    got = tilefold.qgemm(x, w, bias=bias, activation=activation, out_dtype=result)
    assert got.dtype.name == (result or kind) and got.shape == (m, n)
    check(got, x, w, bias, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_gradients_in_torch(activation: str | None) -> None:
    draw = torch.Generator().manual_seed(3)
    w = tilefold.quantize(torch.randn(48, 40, generator=draw), "int4", group_size=16)
    x = torch.randn(2, 3, 48, generator=draw, requires_grad=True)
    bias = torch.randn(40, generator=draw, requires_grad=True)
    y = tilefold.qgemm(x, w, bias=bias, activation=activation)
    with torch.no_grad():
        plain = tilefold.qgemm(x, w, bias=bias, activation=activation)
    torch.testing.assert_close(y.detach(), plain, rtol=1e-5, atol=1e-5)
    weights = torch.from_numpy(w.dequantize("float64"))
    double = [tensor.detach().double().requires_grad_() for tensor in (x, bias)]
    want = ACTIVATIONS[activation](double[0] @ weights + double[1])
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    dy = torch.randn(y.shape, generator=draw)
    got = torch.autograd.grad(y, (x, bias), dy, create_graph=True)
    expected = torch.autograd.grad(want, double, dy.double(), create_graph=True)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-4)
    if activation in ("gelu", "tanh"):  # the second derivative
        one = torch.autograd.grad(got[0].square().sum(), x)[0]
        two = torch.autograd.grad(expected[0].square().sum(), double[0])[0]
        torch.testing.assert_close(one.double(), two, rtol=1e-3, atol=1e-3)


def test_finite_differences_agree() -> None:
    torch.manual_seed(6)
    w = tilefold.quantize(torch.randn(32, 70), "int8")
    x = torch.randn(3, 32, requires_grad=True)
    dy = torch.randn(3, 70)
    (dx,) = torch.autograd.grad(tilefold.qgemm(x, w), x, dy)
    towards = torch.randn(3, 32)
    with torch.no_grad():
        ahead, behind = (tilefold.qgemm(x + step * towards, w) for step in (1, -1))
    # the product is linear, so any step will do
    got = ((ahead - behind) / 2 * dy).sum()
    torch.testing.assert_close(got, (dx * towards).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FLOATS)
def test_strides_axes_and_results_given(kind: str) -> None:
    draw = np.random.default_rng(4)
    w = tilefold.quantize(draw.standard_normal((40, 33)), "int8")
    x = draw.standard_normal((2, 3, 5, 40)).astype(kind)
    want = tilefold.qgemm(x, w)
    assert want.shape == (2, 3, 5, 33)
    check(want, x, w)
    odd = np.zeros((2, 3, 5, 80), kind)[..., ::-2]
    odd[:] = x
    assert_same("strides of x", tilefold.qgemm(odd, w), want)
    assert_same("one row", tilefold.qgemm(x[0, 0, 0], w), tilefold.qgemm(x[:1, 0, 0], w)[0])
    outs = {
        "whole": np.empty((2, 3, 5, 33), kind),
        "columns": np.empty((2, 3, 5, 70), kind)[..., 4:70:2],
        "axes": np.empty((3, 2, 5, 33), kind).swapaxes(0, 1),
        "backwards": np.empty((2, 3, 5, 33), kind)[::-1, :, :, ::-1],
    }
    for name, out in outs.items():
        assert tilefold.qgemm(x, w, out=out) is out
        assert_same(name, out, want)
    tensor = torch.from_numpy(x.astype(np.float32)).to(getattr(torch, kind))
    got = tilefold.qgemm(tensor, w)
    assert got.dtype == tensor.dtype
    assert_same("torch", got.float().numpy(), want.astype(np.float32))
    out = torch.empty(3, 2, 5, 66, dtype=tensor.dtype)[..., ::2].transpose(0, 1)
    assert tilefold.qgemm(tensor, w, out=out) is out
    assert_same("torch out", out.float().numpy(), want.astype(np.float32))
    assert tilefold.qgemm(x[:0], w).shape == (0, 3, 5, 33)


@pytest.mark.slow
@pytest.mark.feature("A02")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "sse2", "neon"])
def test_rounded_rows_are_summed_as_integers(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        monkeypatch.setenv("TILEFOLD_CPU_ISA", isa)
        tilefold.attention(*np.zeros((3, 1, 1, 1, 1), np.float32))
    except ValueError:
        pytest.skip(f"no {isa} here")
    draw = np.random.default_rng(7)
    for m, k, n in ((1, 16, 33), (3, 64, 32), (20, 1104, 70)):  # two blocks of inputs
        w = tilefold.quantize(draw.standard_normal((k, n)), "int8")
        x = draw.standard_normal((m, k)).astype(np.float32)
        x[0, :5] = 0, 9, -9, 4.5, 1e-40
        if m > 1:
            x[1] = 0
            x[2] = 1  # sums of two products beyond 16 bits
        largest = np.maximum(abs(x).max(1, keepdims=True), np.float32(1e-30))
        rounded = np.rint(x * (np.float32(127) / largest)).astype(np.int64)
        codes = np.rint(w.dequantize() / w.scales.reshape(-1)[:n]).astype(np.int64)
        scales = (largest / np.float32(127)).astype(np.float64) * w.scales.reshape(-1)[:n]
        bias = draw.standard_normal(n).astype(np.float32)
        want = rounded @ codes * scales + bias
        got = tilefold.qgemm(x, w, bias=bias, dynamic=True)
        assert_near("product", got, want, 1e-6 * (abs(want) + abs(want - bias) + abs(bias)))
        half = tilefold.qgemm(x[:, ::-1], w, dynamic=True, out_dtype="bfloat16")
        assert half.dtype.name == "bfloat16"
        tensor = torch.from_numpy(x)
        for _ in range(2):  # also where all but addresses is known
            with torch.no_grad():
                y = tilefold.qgemm(tensor, w, bias=torch.from_numpy(bias), dynamic=True)
            assert_same("tensors", y.numpy(), got)
    x[0, 3], x[1, 3] = np.nan, np.inf
    got = tilefold.qgemm(x, w, dynamic=True)
    assert np.isnan(got[0]).all() and not np.isfinite(got[1]).any() and np.isfinite(got[2:]).all()


def largest_terms(x: Array, w: tilefold.QuantizedMatrix) -> Array:
    """The sums of |x| times the largest code: zeros are subtracted after codes were summed."""
    assert w.scales is not None
    scales = np.repeat(w.scales.astype(np.float64), w.group_size, 1).swapaxes(0, 1)
    most: Array = abs(x.astype(np.float64)) @ (15 * scales.reshape(w.shape[0], -1)[:, : w.shape[1]])
    return most


@pytest.mark.feature("A02")
@pytest.mark.parametrize("scheme", ["int4", "int4_symmetric"])
def test_one_row_and_codes_of_4_bits(scheme: str) -> None:
    """Many columns, which AVX2 sums as integers: whole parts of 32 inputs, shorter ones, all x."""
    draw, n = np.random.default_rng(11), 1030
    for k, group in ((256, 128), (96, 48), (288, 144), (37, None)):
        w = tilefold.quantize(draw.standard_normal((k, n), np.float32), scheme, group_size=group)
        x = draw.standard_normal((1, k), np.float32)
        check(tilefold.qgemm(x, w), x, w)
        x[:, :33] = 0
        for scale in (1e-42, 2.0**-126, 1e-30, 1e28):
            rows = x * np.float32(scale)
            want, most = rows.astype(np.float64) @ w.dequantize("float64"), largest_terms(rows, w)
            error = (4 + np.sqrt(k)) * UNITS["float32"] * most + 2.0**-140
            assert_near("product", tilefold.qgemm(rows, w).astype(np.float64), want, error)
        for number in (np.nan, np.inf, -np.inf):
            x[0, -1] = number
            assert not np.isfinite(tilefold.qgemm(x, w)).any()


@pytest.mark.feature("A02")
def test_one_row_beside_a_large_number() -> None:
    """The error is a part of the large number's term, as where floats are summed."""
    draw = np.random.default_rng(12)
    w = tilefold.quantize(draw.standard_normal((256, 1024), np.float32), "int4")
    x = draw.standard_normal((1, 256), np.float32)
    x[0, 50] = 1e6
    want = x.astype(np.float64) @ w.dequantize("float64")
    error = 20 * UNITS["float32"] * largest_terms(x, w)
    assert_near("product", tilefold.qgemm(x, w).astype(np.float64), want, error)


def test_results_do_not_depend_on_threads() -> None:
    draw = np.random.default_rng(5)
    before = tilefold.get_num_threads()
    try:
        for scheme, m, n in (("int4", 9, 700), ("int4", 1, 1030), ("palette6", 9, 700)):
            w = tilefold.quantize(draw.standard_normal((512, n)), scheme)
            x = draw.standard_normal((m, 512), np.float32)
            found = []
            for threads in (1, 2, 5):
                tilefold.set_num_threads(threads)
                found.append(tilefold.qgemm(x, w))
            assert_same("2 threads", found[1], found[0])
            assert_same("5 threads", found[2], found[0])
    finally:
        tilefold.set_num_threads(before)


W = tilefold.quantize(np.ones((48, 40), np.float32), "int8")
X = np.ones((3, 48), np.float32)
HELD = np.ones((6, 48), np.float32)
BAD: dict[str, dict[str, Any]] = {
    "w must be made by tilefold.quantize, got ndarray": {"w": np.ones((48, 40))},
    "activation must be None, 'relu', .* got 'swish'": {"activation": "swish"},
    r"x must be \(..., 48\) for w of 48 x 40, got \(3, 40\)": {"x": X[:, :40]},
    r"x must be \(..., 48\) for w of 48 x 40, got \(\)": {"x": X[0, 0]},
    "x must be one of float32, float16, bfloat16, got float64": {"x": X.astype(np.float64)},
    r"bias must be \(40,\), got \(48,\)": {"bias": X[0]},
    "bias must be float32, got float16": {"bias": np.ones(40, np.float16)},
    "out_dtype must be 'float32', .* got 'int8'": {"out_dtype": "int8"},
    "out must be float32 of shape .* got float32 of": {"out": np.empty((3, 41), np.float32)},
    "out must be float16 of shape .* got float32 of": {
        "out": np.empty((3, 40), np.float32),
        "out_dtype": np.float16,
    },
    "dynamic must be True or False, got 1": {"dynamic": 1},
    r"dynamic needs w of int8, without groups, .* got QuantizedMatrix\('int4'": {
        "w": tilefold.quantize(np.ones((48, 40)), "int4"),
        "dynamic": True,
    },
    "dynamic needs w of int8, without groups, of k a multiple of 16": {
        "x": X[:, :40],
        "w": tilefold.quantize(np.ones((40, 40)), "int8"),
        "dynamic": True,
    },
    "out must not overlap x": {"x": HELD[:3], "out": HELD[2:5, 4:44]},
    "out is written, so no two elements may share a place": {
        "out": np.lib.stride_tricks.as_strided(np.ones(40, np.float32), (3, 40), (0, 4))
    },
    r"no two elements may share a place .* with strides \(4, 4\)": {
        "out": np.lib.stride_tricks.as_strided(np.ones(42, np.float32), (3, 40), (4, 4))
    },
    "out must be a NumPy array, got MaskedArray": {"out": np.ma.ones((3, 40), np.float32)},
    "x must be a NumPy array, .* got NoneType": {"x": None},
    "out is written, so it must not": {"out": np.frombuffer(bytes(480), np.float32).reshape(3, 40)},
    "x must be a torch tensor as out is|out must be a torch": {"out": torch.empty(3, 40)},
    "x is on meta": {"x": torch.ones(3, 48, device="meta")},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message: str) -> None:
    arguments = {"x": X, "w": W} | BAD[message]
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message) as raised:
        tilefold.qgemm(arguments.pop("x"), arguments.pop("w"), **arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore:.*jit.trace")
def test_bad_tensors_are_one_line() -> None:
    x = torch.ones(3, 48)
    held = torch.ones(6, 48)
    for given_, message in (
        ({"out": torch.empty(1, 40).expand(3, 40)}, "no two elements may share a place"),
        ({"out": torch.empty(42).as_strided((3, 40), (1, 1))}, "no two elements may share a"),
        ({"x": None, "bias": torch.ones(40)}, "x must be a torch tensor as bias is, got NoneType"),
        ({"x": held[:3], "out": held[2:5, 4:44]}, "out must not overlap x"),
        ({"x": x.double()}, "x must be one of"),
        ({"bias": torch.ones(1)}, r"bias must be \(40,\)"),
        ({"x": x.to_sparse()}, "x must be"),
    ):
        arguments = {"x": x} | given_
        with pytest.raises((TypeError, ValueError), match=message):
            tilefold.qgemm(arguments.pop("x"), W, **arguments)
    with pytest.raises(NotImplementedError, match="where a gradient is wanted"):
        tilefold.qgemm(x.requires_grad_(), W, out=torch.empty(3, 40))
    with pytest.raises(NotImplementedError, match="nothing traces it"):
        torch.jit.trace(lambda x: tilefold.qgemm(x, W), x.detach())


def test_results_may_lie_between_the_rows_that_are_read() -> None:
    wide = np.ones((3, 96), np.float32)
    want = tilefold.qgemm(X, W)
    assert_same("columns", tilefold.qgemm(wide[:, ::2], W, out=wide[:, 1:80:2]), want)
    tensor = torch.ones(3, 96)
    version = tensor._version
    tilefold.qgemm(tensor[:, ::2], W, out=tensor[:, 1:80:2])
    assert_same("columns of a tensor", tensor[:, 1:80:2].numpy(), want)
    assert tensor._version > version  # autograd counts what is written


def test_tensors_that_are_not_what_their_memory_holds() -> None:
    """Tensors that negate their memory, and ones whose memory was freed."""
    draw = torch.Generator().manual_seed(0)
    x, bias = torch.randn(3, 48, generator=draw), torch.randn(40, generator=draw)
    want = tilefold.qgemm(-x, W, bias=-bias)

    def negated(tensor: torch.Tensor) -> torch.Tensor:
        found = torch.complex(tensor, tensor).conj().imag
        assert found.is_neg()
        return found

    def freed(*shape: int) -> torch.Tensor:
        found = torch.ones(2, *shape)[1]  # its address is not 0, but small
        found.untyped_storage().resize_(0)
        return found

    for context in (torch.enable_grad, torch.no_grad):
        with context():
            for _ in range(2):  # also where all but addresses is known
                for given_x, given_bias in ((-x, -bias), (negated(x), -bias), (-x, negated(bias))):
                    got = tilefold.qgemm(given_x, W, bias=given_bias)
                    assert_same("negated", got.numpy(), want.numpy())
                for given_x, given_bias in ((freed(3, 48), None), (x, freed(40))):
                    with pytest.raises(ValueError, match="bytes of memory, and its storage holds"):
                        tilefold.qgemm(given_x, W, bias=given_bias)
    out = negated(torch.ones(3, 40))
    tilefold.qgemm(-x, W, bias=-bias, out=out)
    assert_same("negated result", out.resolve_neg().numpy(), want.numpy())
    with pytest.raises(ValueError, match=r"out needs .* bytes of memory"):
        tilefold.qgemm(x, W, out=freed(3, 40))


@pytest.mark.filterwarnings("ignore:.*jit.script")  # torch's own, in its forward mode
@pytest.mark.slow
def test_transforms_of_torch() -> None:
    draw = torch.Generator().manual_seed(5)
    w = tilefold.quantize(torch.randn(32, 24, generator=draw), "int8")
    weights = torch.from_numpy(w.dequantize())
    x, slope = (torch.randn(4, 3, 32, generator=draw) for _ in range(2))
    bias = torch.randn(4, 24, generator=draw)

    def mine(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return tilefold.qgemm(x, w, bias=bias, activation="tanh")

    def other(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ weights + bias)

    for make in (
        lambda f: torch.func.vmap(f)(x, bias),
        lambda f: torch.func.vmap(f, (None, 0))(x[0, 0], bias),
        lambda f: torch.func.vmap(f, (1, None))(x, bias[0]),
        lambda f: torch.func.jvp(f, (x, bias[0]), (slope, bias[1]))[1],
        lambda f: torch.func.grad(lambda x: f(x, bias[0]).sum())(x),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x, bias[0]).sum()))(x),
        lambda f: torch.func.jvp(
            torch.func.grad(lambda x: f(x, bias[0]).sum()), (x[0],), (slope[0],)
        )[1],
    ):
        with torch.no_grad():
            torch.testing.assert_close(make(mine), make(other), rtol=1e-4, atol=1e-5)


def test_examples() -> None:
    outcome = doctest.testmod(quantized_calls)
    assert outcome.attempted and not outcome.failed
