"""Quantised matrices: what the codes mean, how they lie in memory, how far weights are off."""

from __future__ import annotations

import doctest
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from compare import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import tilefold
from tilefold import QuantizedMatrix
from tilefold.products import palettes, quantized, schemes
from tilefold.products.schemes import PANEL, SCHEMES

Array = NDArray[Any]


def weights(k: int, n: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((k, n), np.float32)


def by_hand(q: QuantizedMatrix) -> Array:
    """The weights by the table of `schemes.py`, one word and one column at a time, in float64."""
    k, n = q.shape
    found = np.empty((k, n))
    for i in range(k):
        for j in range(n):
            panel, column = q.codes[j // PANEL], j % PANEL
            if q.scheme == "palette6":
                t, words = i % 16, panel[i // 16, :, column]
                low = int(words[t // 8]) >> 4 * (t % 8) & 15
                found[i, j] = q.table[low | (int(words[2]) >> 2 * t & 3) << 4]
                continue
            at = (j // PANEL, i // q.group_size, column)
            scale = float(q.scales[at])
            if q.scheme.startswith("int4"):
                code = int(panel[i // 8, column]) >> 4 * (i % 8) & 15
                zero = 8 if q.zeros is None else float(q.zeros[at])
                found[i, j] = scale * (code - zero)
            elif q.scheme == "int8":
                found[i, j] = scale * int(panel[i, column])
            else:
                bits = panel[i, column : column + 1]
                found[i, j] = scale * float(bits.view(ml_dtypes.float8_e4m3fn)[0])
    return found


@pytest.mark.feature("A14")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("k, n", [(48, 33), (19, 5)])
def test_codes_lie_as_the_table_says(scheme: str, k: int, n: int) -> None:
    size = 16 if SCHEMES[scheme].grouped and k == 48 else None
    q = tilefold.quantize(weights(k, n), scheme, group_size=size)
    assert_near("w", q.dequantize("float64"), by_hand(q), 1e-6 * abs(by_hand(q)))


@pytest.mark.slow
@given(
    scheme=st.sampled_from([*SCHEMES]),
    k=st.integers(1, 70),
    n=st.integers(1, 70),
    size=st.sampled_from([None, 16, 32]),
    kind=st.sampled_from(["float32", "float64", "float16"]),
    scale_dtype=st.sampled_from(["float32", "float16"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_a_weight_is_off_by_half_a_step_at_most(
    scheme: str, k: int, n: int, size: int | None, kind: str, scale_dtype: str, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    size = size if SCHEMES[scheme].grouped and k % (size or 1) == 0 else None
    w = (draw.standard_normal((k, n)) * 10.0 ** draw.integers(-3, 3, n)).astype(kind)
    w[draw.random((k, n)) < draw.choice([0, 0.5])] = 0
    q = tilefold.quantize(w, scheme, group_size=size, scale_dtype=scale_dtype)
    assert q.shape == (k, n) and q.nbytes == sum(each.nbytes for each in q.arrays.values())
    assert q.bits_per_weight == 8 * q.nbytes / (k * n)
    got = q.dequantize("float64")
    if q.table is not None:
        near = abs(w.astype(np.float32)[..., None] - q.table.astype(np.float32)).min(-1)
        assert_near("distance to the table", abs(got - w), near, 1e-6 * abs(w).max())
        return
    assert q.scales.dtype == scale_dtype
    scales = q.scales.swapaxes(0, 1).reshape(k // q.group_size, -1)[:, :n]
    step = np.repeat(scales.astype(np.float64), q.group_size, axis=0)
    half = step / 2 if scheme != "float8_e4m3" else np.maximum(abs(w.astype("d")) / 16, step / 1024)
    assert_near("w", got, w, half * (1 + 1e-5) + 2e-7 * abs(got))
    if scheme != "float8_e4m3":
        assert not got[w == 0].any()
    again = tilefold.quantize(w, scheme, group_size=size, scale_dtype=scale_dtype)
    for name, array in q.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_arrays_of_any_kind_and_strides_give_the_same(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = weights(64, 150).astype(ml_dtypes.bfloat16)
    want = tilefold.quantize(w, scheme)
    monkeypatch.setattr(quantized, "_AT_ONCE", 64 * PANEL)  # a panel at a time
    tensor = torch.from_numpy(w.astype(np.float32)).bfloat16()
    wide = np.zeros((64, 300), np.float64)
    wide[:, ::-2] = w
    linear = torch.nn.Linear(64, 150)
    linear.weight.data = tensor.T.contiguous()
    for other in (
        tilefold.quantize(tensor, scheme),
        tilefold.quantize(wide[:, ::-2], scheme),
        tilefold.quantize(linear.weight, scheme, transpose=True),
        tilefold.quantize(tensor.T, scheme, transpose=True),
    ):
        for name, array in want.arrays.items():
            np.testing.assert_array_equal(other.arrays[name], array, err_msg=name)
        np.testing.assert_array_equal(other.dequantize("float16"), want.dequantize("float16"))
        np.testing.assert_array_equal(
            other.dequantize("bfloat16", transpose=True).T, want.dequantize("bfloat16")
        )
    assert all(array.ctypes.data % 64 == 0 for array in want.arrays.values() if array.ndim > 1)
    view = torch.from_numpy(want.codes)
    assert view.data_ptr() == want.codes.ctypes.data


def test_exact_weights_come_back_exactly() -> None:
    draw = np.random.default_rng(1)
    codes = draw.integers(-127, 128, (64, 40))
    codes[0] = 127
    w = codes * np.float32(0.25)
    np.testing.assert_array_equal(tilefold.quantize(w, "int8").dequantize(), w)
    codes = draw.integers(-3, 13, (64, 40))
    codes[::16], codes[1::16] = -3, 12
    w = codes * np.float32(0.5)
    np.testing.assert_array_equal(tilefold.quantize(w, "int4", group_size=16).dequantize(), w)
    table = draw.permutation(np.linspace(-2, 1.9375, 64)).astype(np.float16)
    w = draw.choice(table, (33, 50))
    q = tilefold.quantize(w, "palette6", table=table)
    np.testing.assert_array_equal(q.dequantize(), w)
    np.testing.assert_array_equal(q.table, table)
    np.testing.assert_array_equal(tilefold.quantize(w, "palette6").dequantize(), w)
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    w = every[np.isfinite(every)][:, None]
    np.testing.assert_array_equal(tilefold.quantize(w, "float8_e4m3").dequantize(), w)


def test_float8_is_rounded_as_others_round_it() -> None:
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(schemes.e4m3_table(), every)
    numbers = np.sort(every[np.isfinite(every)])
    ties = (numbers[1:] + numbers[:-1]) / 2
    draw = np.random.default_rng(0).standard_normal(4000) * 2.0 ** np.linspace(-14, 7, 4000)
    x = np.concatenate([numbers, ties, np.nextafter(ties, 0), np.nextafter(ties, 999), draw])
    x = x.clip(-448, 448).astype(np.float32)
    want = x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(schemes.e4m3_codes(x), want)


@pytest.mark.feature("A14")
def test_k_means_ends_in_the_optimum() -> None:
    draw = np.random.default_rng(2).standard_normal(200_000).astype(np.float32)
    table = palettes.palette([draw[:99], draw[99:]]).astype(np.float64)
    nearest = palettes.nearest(table, draw)
    centres = np.bincount(nearest, draw, 64) / np.bincount(nearest, minlength=64)
    assert_near("centres", table, centres, 2e-3)  # each is the mean of its weights
    error = np.mean((draw - table[nearest]) ** 2)
    assert error < 6.64e-4  # sqrt(3) pi / 2 / 64^2: Panter's and Dite's for normal numbers
    outliers = np.append(draw, np.float32(1000))
    assert palettes.palette([outliers])[-1] == 1000
    for few in ([0.0], [-1.0, 1.0, 3.0], np.arange(64), np.arange(65) // 1):
        table = palettes.palette([np.float32(few)])
        assert_near("few", table[palettes.nearest(table, np.float32(few))], few, 0.5)


BAD = {
    "scheme must be 'int8', 'int4', .* got 'int5'": {"scheme": "int5"},
    "group_size must be 48, or a multiple of 16 that divides 48, got 32": {"group_size": 32},
    "group_size must be 48, or a multiple of 16 that divides 48, got 8": {"group_size": 8},
    "group_size must be an integer >= 1, got 0": {"group_size": 0},
    "group_size must be None for palette6, got 16": {"scheme": "palette6", "group_size": 16},
    "table must be None for int4": {"table": np.zeros(64)},
    r"table must have 64 numbers, got shape \(63,\)": {"scheme": "palette6", "table": np.zeros(63)},
    "table must be 64 numbers, got 'x'": {"scheme": "palette6", "table": "x"},
    "table must have finite numbers": {"scheme": "palette6", "table": np.full(64, 1e6)},
    "scale_dtype must be 'float32' or 'float16', got 'int8'": {"scale_dtype": "int8"},
    "transpose must be True or False, got 1": {"transpose": 1},
    "w must be one of float32, .* got int64": {"w": np.zeros((2, 2), np.int64)},
    "w must be one of float32, .* got int8": {"w": torch.zeros(2, 2, dtype=torch.int8)},
    "w must be a NumPy array or a torch tensor, got list": {"w": [[1.0]]},
    r"w must have two axes, none of length 0, got \(0, 4\)": {"w": np.zeros((0, 4))},
    r"w must have two axes, none of length 0, got \(4,\)": {"w": np.zeros(4)},
    "w must have weights of at most 3e.38, got nan": {"w": np.full((16, 1), np.nan)},
    "w must have weights of at most 3e.38, got inf": {"w": np.full((16, 1), 1e300)},
    "w must have weights of at most 3e.38, got 3.1": {"w": np.full((16, 1), -3.1e38)},
    "w must be a NumPy array or a torch tensor, got MaskedArray": {"w": np.ma.ones((16, 1))},
    "float16 ends at 65504": {"w": np.full((16, 1), 1e9), "scale_dtype": "float16"},
    "w must be at most 65504": {"w": np.full((16, 1), 1e5), "scheme": "palette6"},
    "table must be 64 numbers, got array.*j": {"scheme": "palette6", "table": np.ones(64) + 1j},
    "table must be 64 numbers, got .'1', ": {"scheme": "palette6", "table": ["1"] * 64},
    "table must be 64 numbers, got .None, ": {"scheme": "palette6", "table": [None] * 64},
    "w is on meta, where it has no elements": {"w": torch.zeros(2, 2, device="meta")},
}


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if SCHEMES[name].scaled])
def test_large_and_small_weights(scheme: str) -> None:
    signs = np.where(weights(48, 3) > 0, 1, -1)
    large = tilefold.quantize(3e38 * signs, scheme).dequantize("float64")
    assert_near("large weights", large, 3e38 * signs, 0.6e38 / 2)  # and none is infinite
    w = weights(48, 3) * np.float32(1e-4)  # float16 holds scales below 2^-14 with fewer bits
    halves, own = (
        abs(tilefold.quantize(w, scheme, scale_dtype=kind).dequantize() - w).max()
        for kind in ("float16", "float32")
    )
    assert halves < 1.3 * own


def test_tensors_that_are_not_what_their_memory_holds() -> None:
    w = torch.from_numpy(weights(48, 3))
    negated = torch.complex(w, w).conj().imag
    want = tilefold.quantize(-w, "int4").codes
    np.testing.assert_array_equal(tilefold.quantize(negated, "int4").codes, want)
    w = w.clone()
    w.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="w needs 576 bytes of memory, and its storage holds 0"):
        tilefold.quantize(w, "int4")


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(message: str) -> None:
    given = {"w": weights(48, 3), "scheme": "int4"} | BAD[message]
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message) as raised:
        tilefold.quantize(given.pop("w"), given.pop("scheme"), **given)
    assert "\n" not in str(raised.value)


def test_a_matrix_refuses_arrays_that_do_not_fit() -> None:
    q = tilefold.quantize(weights(64, 40), "int4", group_size=32)
    fine = {"scheme": "int4", "shape": (64, 40), "group_size": 32, **q.arrays}
    QuantizedMatrix(**fine)
    for change, message in (
        ({"shape": (64, 65)}, "codes must be contiguous, of shape"),
        ({"shape": (64, 0)}, "an axis of shape must be an integer >= 1"),
        ({"shape": (64,)}, "shape must be"),
        ({"group_size": 24}, "group_size must be"),
        ({"codes": q.codes[::-1]}, "codes must be contiguous"),
        ({"codes": q.codes.view(np.int32)}, "codes must be an array of uint32, got int32"),
        ({"scales": None}, "scales must be of shape"),
        ({"scales": q.scales[:, :1]}, "scales must be contiguous"),
        ({"zeros": q.zeros.astype(np.float16)}, "zeros must be an array of float32, got float16"),
        ({"table": np.zeros(64, np.float16)}, "table must be None"),
        ({"scheme": "int8"}, "codes must be contiguous|codes must be an array of int8"),
        ({"scales": q.scales.astype(">f4")}, "byte order"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            QuantizedMatrix(**fine | change)


@pytest.mark.parametrize("module", [schemes, palettes, quantized])
def test_examples(module: Any) -> None:
    outcome = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert outcome.attempted and not outcome.failed
