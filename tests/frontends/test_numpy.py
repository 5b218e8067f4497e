"""NumPy arrays and what shares their memory: layouts, strides, copies and results."""

from __future__ import annotations

import array
import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from compare import HALVES, UNITS, assert_near
from numpy.typing import NDArray

import tilefold
from tilefold import attention, attention_backward, causal
from tilefold.backends.cpu import dispatch
from tilefold.problems import reference
from tilefold.problems.attention import ITEM_BYTES, STATISTICS
from tilefold.problems.request import LAYOUTS

Array = NDArray[Any]
TOLERANCES = {"float64": 1e-12, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
SHAPES = {"q": (2, 4, 5, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 6), "do": (2, 4, 5, 6)}


def normal(dtype: str = "float64", **shapes: tuple[int, ...]) -> dict[str, Array]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def in_layout(given: Array, layout: str) -> Array:
    """The same numbers, their axes in the order of the layout, contiguous."""
    return np.ascontiguousarray(given.transpose(LAYOUTS[layout]))


def every_second(given: Array) -> Array:
    """The same numbers between others."""
    wide = np.full([2 * size for size in given.shape], np.nan, given.dtype)
    view = wide[::2, 1::2, ::2, 1::2]
    view[...] = given
    return view


def backwards(given: Array) -> Array:
    """The same numbers, all strides negative."""
    flip = (slice(None, None, -1),) * given.ndim
    return given[flip].copy()[flip]


def misaligned(given: Array) -> Array:
    raw = np.zeros(given.nbytes + 1, np.uint8)
    view = raw[1:].view(given.dtype).reshape(given.shape)
    view[...] = given
    return view


def records(given: Array) -> Array:
    """The same numbers as a field of 12- or 20-byte records: strides that are no multiples."""
    kind = np.dtype([("tag", "V1"), ("value", given.dtype), ("rest", "V2")])
    table = np.zeros(given.shape, kind)
    table["value"] = given
    return table["value"]


def swapped(given: Array) -> Array:
    return given.astype(given.dtype.newbyteorder())


def read_only(given: Array) -> Array:
    given = given.copy()
    given.flags.writeable = False
    return given


def fortran(given: Array) -> Array:
    return np.asfortranarray(given)


FORMS = [every_second, backwards, misaligned, records, swapped, read_only, fortran]


@pytest.mark.slow
@pytest.mark.feature("T02", "M16")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_layouts(layout: str, dtype: str) -> None:
    canonical = normal(dtype, **SHAPES)
    given = {name: in_layout(value, layout) for name, value in canonical.items()}
    do = given.pop("do")
    o, lse = attention(**given, mask=causal(), layout=layout, return_lse=True)
    gradients = attention_backward(do, **given, o=o, lse=lse, mask=causal(), layout=layout)
    do = canonical.pop("do")
    expected = reference.attention(**canonical, mask=causal())
    slopes = reference.attention_backward(
        do, **canonical, o=expected[0], lse=expected[1], mask=causal()
    )
    tolerance = TOLERANCES[dtype]
    for got, want in zip((o, *gradients), (expected[0], *slopes), strict=True):
        assert got.dtype == dtype and got.flags.c_contiguous and got.flags.owndata
        found = got.astype(np.float64)
        np.testing.assert_allclose(found, in_layout(want, layout), rtol=tolerance, atol=tolerance)
    assert lse.dtype == STATISTICS[dtype]
    np.testing.assert_allclose(lse, expected[1], rtol=TOLERANCES[STATISTICS[dtype]])


@pytest.mark.feature("T02")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forms_of_the_same_numbers(form: Any, layout: str) -> None:
    plain = {name: in_layout(value, layout) for name, value in normal(**SHAPES).items()}
    given = {name: form(value) for name, value in plain.items()}
    before = {name: value.tobytes() for name, value in given.items()}
    results = []
    for arrays in (plain, given):
        inputs = {name: arrays[name] for name in "qkv"}
        o, lse = attention(**inputs, layout=layout, return_lse=True)
        slopes = attention_backward(arrays["do"], **inputs, o=o, lse=lse, layout=layout)
        results.append((o, lse, *slopes))
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
    assert before == {name: value.tobytes() for name, value in given.items()}


@pytest.mark.slow
@pytest.mark.feature("T01", "T02")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", HALVES)
def test_forms_of_the_same_halves(form: Any, dtype: str) -> None:
    plain = normal(dtype, **SHAPES)
    given = {name: form(value) for name, value in plain.items()}
    results = []
    for arrays in (plain, given):
        inputs = {name: arrays[name] for name in "qkv"}
        o, lse = attention(**inputs, return_lse=True)
        slopes = attention_backward(arrays["do"], **inputs, o=o, lse=lse)
        assert all(array.dtype == np.dtype(dtype) for array in (o, *slopes))
        assert lse.dtype == np.float32
        results.append((o, lse, *slopes))
    for got, want in zip(*results, strict=True):
        unit = UNITS[got.dtype.name]  # sums in another order: rounded the other way at most
        assert_near(form.__name__, got, want, 8 * unit * abs(want).astype(np.float64).max())


def operands_of(
    monkeypatch: pytest.MonkeyPatch, *arrays: Any, **options: Any
) -> list[tuple[int, tuple[int, ...]]]:
    """Where the kernel is told that q, k and v lie, and their canonical strides in elements."""
    seen: list[tuple[int, tuple[int, ...]]] = []

    def run(step: dispatch._Step, pointers: tuple[int, ...], workers: int) -> None:
        words = dict(zip(step.kernel.names, np.frombuffer(step.template, np.int64), strict=True))
        for name, pointer in zip("qkv", pointers, strict=False):
            seen.append((pointer, tuple(int(words[f"{name}_{axis}"]) for axis in "bhsd")))

    monkeypatch.setattr(dispatch._Step, "run", run)
    attention(*arrays, **options)
    return seen


@pytest.mark.feature("M16")
@pytest.mark.parametrize("form", [every_second, backwards, read_only, fortran])
def test_arrays_of_any_strides_are_read_where_they_lie(
    form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = form(normal(q=(2, 5, 4, 8))["q"])
    found = operands_of(monkeypatch, given, given, given, layout="bnhd")
    assert found == [(given.ctypes.data, tuple(given.strides[a] // 8 for a in (0, 2, 1, 3)))] * 3


@pytest.mark.parametrize("form", [misaligned, records, swapped])
def test_other_arrays_are_copied(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = normal(q=(2, 5, 4, 8))["q"]
    given = form(plain)
    first = given.ctypes.data
    last = first + sum((n - 1) * far for n, far in zip(given.shape, given.strides, strict=True)) + 8
    expected = attention(plain, plain, plain)
    assert np.array_equal(attention(given, plain, given), expected)
    for pointer, strides in operands_of(monkeypatch, given, given, given):
        assert not first <= pointer < last and pointer % 8 == 0
        assert strides == (160, 32, 8, 1)


def test_a_broadcast_array_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    q = np.ones((3, 2, 5, 8))
    k = np.broadcast_to(np.ones((1, 1, 7, 8)), (3, 2, 7, 8))
    assert operands_of(monkeypatch, q, k, k)[1] == (k.ctypes.data, (0, 0, 8, 1))


class ByInterface:
    """An object with nothing but `__array_interface__`."""

    def __init__(self, given: Array) -> None:
        self.given = given

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.given.__array_interface__


class ByDlpack:
    """An object with nothing but DLPack."""

    def __init__(self, given: Array) -> None:
        self.given = given

    def __dlpack__(self, **options: Any) -> Any:
        return self.given.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.given.__dlpack_device__()


@pytest.mark.feature("T01", "T15")
def test_other_arrays_of_half_types() -> None:
    """NumPy views float16 both ways; it has no name for bfloat16, and that is what is said."""
    given = normal("float16", q=(1, 2, 5, 8))["q"]
    expected = attention(given, given, given)
    for kind in (ByInterface, ByDlpack):
        assert np.array_equal(attention(kind(given), given, kind(given)), expected)
    short = given.astype("bfloat16")
    with pytest.raises(TypeError, match=r"pass array\.view\(ml_dtypes\.bfloat16\)$"):
        attention(ByInterface(short), short, short)
    with pytest.raises(TypeError, match=r"^k must be an array that NumPy can view, got ByDlpack: "):
        attention(short, ByDlpack(short), short)
    small = given.astype(ml_dtypes.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"^q must be of .* or bfloat16, got float8_e4m3fn$"):
        attention(small, small, small)


@pytest.mark.parametrize("kind", [ByInterface, ByDlpack])
def test_other_arrays_are_viewed(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = normal(q=(1, 2, 5, 8))["q"]
    expected = attention(given, given, given)
    mixed = attention(kind(given), given, kind(given))
    assert type(mixed) is np.ndarray
    assert np.array_equal(mixed, expected)
    for pointer, _ in operands_of(monkeypatch, *[kind(given)] * 3):
        assert pointer == given.ctypes.data


def test_a_subclass_gives_plain_arrays() -> None:
    class Tagged(np.ndarray):
        pass

    given = normal(q=(1, 2, 5, 8))["q"].view(Tagged)
    assert type(attention(given, given, given)) is np.ndarray


def test_results_are_kept_from_the_memory_of_inputs() -> None:
    given = normal(q=(1, 2, 5, 8))["q"]
    o, lse = attention(given, given, given, return_lse=True)
    gradients = attention_backward(o, given, given, given, o, lse)
    for result in (o, lse, *gradients):
        assert not np.shares_memory(result, given)
    assert not np.shares_memory(gradients[1], gradients[2])


def test_memory_that_is_no_array_at_all() -> None:
    """ctypes and array.array memory, through NumPy views that do not own it."""
    numbers = array.array("d", np.random.default_rng(1).normal(size=80).tolist())
    q = np.frombuffer(numbers).reshape(1, 2, 5, 8)
    k = np.ctypeslib.as_array((ctypes.c_double * 80)(*numbers)).reshape(1, 2, 5, 8)
    assert np.array_equal(attention(q, k, k), attention(q.copy(), q.copy(), q.copy()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("q", "k"),
    [
        ((0, 2, 3, 4), (0, 2, 5, 4)),
        ((2, 0, 3, 4), (2, 0, 5, 4)),
        ((2, 0, 3, 4), (2, 2, 5, 4)),
        ((2, 2, 0, 4), (2, 2, 5, 4)),
        ((2, 2, 3, 4), (2, 2, 0, 4)),
        ((0, 0, 0, 4), (0, 0, 0, 4)),
    ],
)
def test_empty_axes(q: tuple[int, ...], k: tuple[int, ...], layout: str) -> None:
    shapes = {"q": q, "k": k, "v": (*k[:3], 6), "do": (*q[:3], 6)}
    given = {name: in_layout(np.ones(shape), layout) for name, shape in shapes.items()}
    do = given.pop("do")
    o, lse = attention(**given, mask=causal(), layout=layout, return_lse=True)
    assert o.shape == do.shape and not o.any()
    assert lse.shape == q[:3] and (lse == -np.inf).all()
    gradients = attention_backward(do, **given, o=o, lse=lse, layout=layout)
    for gradient, value in zip(gradients, given.values(), strict=True):
        assert gradient.shape == value.shape and not gradient.any()


@pytest.mark.feature("T10")
def test_lse_is_returned_on_request_alone() -> None:
    given = normal(q=(1, 2, 5, 8))["q"]
    o = attention(given, given, given)
    both = attention(given, given, given, return_lse=True)
    assert type(both) is tuple and np.array_equal(o, both[0])
    assert both[1].shape == (1, 2, 5)


def test_scale_may_be_any_number() -> None:
    given = normal(q=(1, 2, 5, 8))["q"]
    expected = attention(given, given, given, scale=2.0)
    for scale in (2, np.float32(2), np.array(2), True + 1):
        assert np.array_equal(attention(given, given, given, scale=scale), expected)


@pytest.mark.feature("T12")
def test_only_the_arrays_are_positional() -> None:
    given = np.ones((1, 1, 2, 2))
    with pytest.raises(TypeError, match="positional"):
        attention(given, given, given, causal())  # type: ignore[misc]  # the point
    assert tilefold.attention(q=given, k=given, v=given).shape == given.shape
