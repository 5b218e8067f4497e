"""`tilefold.gemm` of NumPy arrays: values, types, strides, sizes, and what it refuses."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gemms import ACTIVATIONS, check, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import tilefold
from tilefold.problems.matmul import INTEGERS
from tilefold.products import plans

Array = NDArray[Any]

SOURCES = (
    *((2, 2, 20), (20, 2, 2), (3, 7, 11), (100, 10, 10), (10, 10, 100), (99, 99, 99)),
    *((64, 64, 64), (64, 128, 64), (128, 64, 64), (128, 128, 64), (64, 64, 128), (256, 192, 128)),
    *((1, 1, 1), (1, 7, 130), (130, 7, 1)),
)
"""Sizes m, k, n of the matrices that other systems test, the largest ones made smaller."""

TYPES = (
    *(("float32", "float32", None), ("float64", "float64", None), ("float16", "float16", None)),
    *(("bfloat16", "bfloat16", None), ("float16", "float16", "float32")),
    *(("bfloat16", "bfloat16", "float32"), ("float16", "float32", "bfloat16")),
    *(("float16", "bfloat16", None), ("float64", "float32", None), ("float32", "bfloat16", None)),
    *(("float64", "float64", "float32"), ("int8", "int8", None), ("uint8", "int8", None)),
    *(("int8", "int8", "float32"), ("int8", "uint8", None), ("uint8", "uint8", None)),
    *(("float16", "int8", "float32"), ("bfloat16", "uint8", None), ("float32", "int8", None)),
    *(
        ("uint8", "float64", None),
        ("int8", "bfloat16", "float32"),
        ("uint8", "float16", "bfloat16"),
    ),
)
"""Types of a, b and the result; None is the one that holds both."""


@pytest.mark.feature("A01", "M11")
@pytest.mark.parametrize("sizes", SOURCES, ids=str)
def test_sizes_of_the_sources(sizes: tuple[int, int, int]) -> None:
    m, k, n = sizes
    check(normal(m, k), normal(k, n))


@pytest.mark.feature("A09", "M11")
@pytest.mark.parametrize("types", TYPES, ids=lambda types: "-".join(map(str, types)))
def test_types(types: tuple[str, str, str | None]) -> None:
    a, b, kept = types
    got = check(normal(5, 37, dtype=a), normal(37, 19, dtype=b), out_dtype=kept)
    floats = {a, b} - {*INTEGERS}
    usual = "float64" if "float64" in floats else "float32"
    usual = {0: "int32", 1: next(iter(floats), ""), 2: usual}[len(floats)]
    assert got.dtype.name == (kept or usual)


def test_sums_of_integers_wrap_around() -> None:
    a = np.full((2, 40_000), 255, "uint8")
    assert check(a, a, transpose_b=True).min() < 0


@pytest.mark.slow
def test_integers_have_all_options_but_activations() -> None:
    for a, b, m, k in (
        ("int8", "int8", 5, 37),
        ("uint8", "int8", 70, 130),
        ("uint8", "uint8", 9, 40),
    ):
        left, right = normal(m, k, dtype=a), normal(k, 19, dtype=b)
        bias, c = normal(m, 1, dtype="int32"), normal(19, dtype="int32")
        check(left, right, c, alpha=-2, beta=3, bias=bias)
        check(left, right, c, beta=0.5, bias=bias, out_dtype="float32")
        check(left, right, out=np.empty((19, m), "i4").T)
        check(left, right, bias=normal(19), activation="tanh", alpha=0.01, out_dtype="float32")


@pytest.mark.feature("A12")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_bias_and_c(activation: str | None) -> None:
    a, b = normal(9, 21), normal(17, 21)
    options = {"alpha": 0.5, "transpose_b": True, "activation": activation}
    check(a, b, normal(9, 17), beta=-1.5, bias=normal(17), **options)
    if activation in (None, "gelu_tanh"):
        check(a, b, normal(17), beta=2.0, bias=normal(9, 1), **options)


@pytest.mark.feature("A12")
def test_a_gated_pair_is_one_call() -> None:
    x, w, gate = normal(3, 8, 24), normal(24, 33), normal(24, 33)
    check(x, w, gate=gate, activation="silu", bias=normal(33), alpha=0.25)
    kept = check(*(each.astype("e") for each in (x, w)), gate=gate.astype("e"), activation="gelu")
    assert kept.dtype == np.float16


BATCHES = (
    *(((2, 3, 9, 5), (5, 11)), ((9, 5), (3, 5, 11)), ((2, 1, 9, 5), (3, 5, 11))),
    *(((2, 1, 1, 2, 1, 3, 5), (3, 1, 2, 2, 5, 4)), ((5,), (5,)), ((5,), (5, 4)), ((9, 5), (5,))),
    *(((5,), (3, 5, 4)), ((2, 9, 5), (5,)), ((0, 9, 5), (5, 4)), ((2, 9, 0), (2, 0, 4))),
    *(((0, 5), (5, 4)), ((9, 5), (5, 0)), ((0,), (0,))),
)
"""Shapes of a and b whose batches broadcast as in NumPy, vectors, and lengths of 0."""


@pytest.mark.feature("A12", "M11")
@pytest.mark.parametrize("shapes", BATCHES, ids=str)
def test_batches_vectors_and_nothing(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (normal(*shape) for shape in shapes)
    shape = np.matmul(a, b).shape
    assert check(a, b).shape == shape
    added = normal(shape[-1]) if shape else normal(1)[0]
    check(a, b, added, beta=0.5, activation="relu")
    if len(shape) > 1 or b.ndim == 1 < a.ndim:
        check(a, b, bias=added, activation="sigmoid")


def test_a_bias_may_have_a_batch() -> None:
    a, b = normal(3, 9, 5), normal(5, 1)
    check(a, b, bias=normal(3, 9, 1))
    check(a, normal(5, 4), bias=normal(3, 1, 4))


def strided(array: Array, form: str) -> Array:
    """The same numbers, lying otherwise."""
    if form == "turned":
        return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2)
    if form == "backwards":
        flip = (slice(None, None, -1),) * array.ndim
        return array[flip].copy()[flip]
    if form == "apart":
        wide = np.full([2 * n + 1 for n in array.shape], 99, array.dtype)
        wide[tuple(slice(1, None, 2) for _ in array.shape)] = array
        return wide[tuple(slice(1, None, 2) for _ in array.shape)]
    if form == "repeated":
        array[...] = array[..., :1, :]
        return np.broadcast_to(array[..., :1, :], array.shape)
    return array


FORMS = ("plain", "turned", "backwards", "apart", "repeated")


@pytest.mark.slow
@settings(max_examples=24, deadline=None, derandomize=True)
@given(st.data())
def test_any_shapes_strides_types_and_transposes(data: Any) -> None:
    draw = data.draw
    m, k, n = (draw(st.sampled_from((0, 1, 2, 7, 8, 16, 33, 65))) for _ in range(3))
    batch = draw(st.sampled_from(((), (2,), (3, 1), (1, 2, 2))))
    kind = draw(st.sampled_from(TYPES))
    flips = draw(st.booleans()), draw(st.booleans())
    a = normal(*batch, *((k, m) if flips[0] else (m, k)), dtype=kind[0])
    b = normal(*batch[1:], *((n, k) if flips[1] else (k, n)), dtype=kind[1])
    if batch and draw(st.booleans()):
        b = b[(0,) * (b.ndim - 2)]
    a, b = (strided(x, draw(st.sampled_from(FORMS))) for x in (a, b))
    options = {"transpose_a": flips[0], "transpose_b": flips[1], "out_dtype": kind[2]}
    integers = {*kind[:2]} <= {*INTEGERS} and kind[2] is None
    alpha, beta = draw(st.sampled_from(((1, 0), (1, 1), (-2, 3))))
    empty = tilefold.gemm(a, b, **options)
    added: dict[str, Any] = {}
    if not integers and draw(st.booleans()):
        options["activation"] = draw(st.sampled_from((*ACTIVATIONS,)))
        added["bias"] = normal(*draw(st.sampled_from(((n,), (m, 1)))), dtype="float32")
        added["bias"] = added["bias"].astype(empty.dtype)
    if not integers and (alpha, beta) == (1, 0) and draw(st.booleans()):
        gate = normal(*b.shape, dtype=kind[1])
        added["gate"] = strided(gate, draw(st.sampled_from(FORMS)))
    c = normal(*empty.shape).astype(empty.dtype)
    out = strided(c, draw(st.sampled_from(FORMS[:-1])))
    got = check(a, b, c.copy(), alpha=alpha, beta=beta, out=out, **options, **added)
    assert got is out


@pytest.mark.feature("M11")
def test_c_may_be_the_result_itself_and_nan_in_it_is_ignored() -> None:
    a, b, c = normal(6, 5), normal(5, 7), normal(6, 7)
    want = 2 * a.astype("d") @ b - 0.5 * c
    got = tilefold.gemm(a, b, c, alpha=2, beta=np.float32(-0.5), out=c)
    assert got is c and abs(c - want).max() < 1e-5
    kept = c.copy()
    tilefold.gemm(a, b, c, beta=1.0)
    assert (kept == c).all()
    c[...] = np.nan
    check(a, b, out=tilefold.gemm(a, b, c, beta=0, out=c))


def test_columns_of_an_array_are_written_and_nothing_beside_them() -> None:
    wide = np.full((8, 20), 7.0)
    a, b = normal(6, 3, dtype="float64"), normal(3, 9, dtype="float64")
    check(a, b, out=wide[1:7, 1:19:2])
    wide[1:7, 1:19:2] = 7
    assert (wide == 7).all()


def test_arrays_that_lie_oddly_are_taken() -> None:
    a, b = normal(4, 5), normal(5, 6)
    record = np.zeros((4, 5), [("tag", "u1"), ("value", "f4")])
    record["value"] = a
    raw = np.zeros(b.nbytes + 1, "u1")
    odd = raw[1:].view("f4").reshape(b.shape)
    odd[...] = b
    check(record["value"], odd)
    check(a.astype(">f4"), b, bias=normal(6).tolist() and normal(6).astype(">f4"))


def test_a_result_of_a_class_of_its_own_is_returned_itself() -> None:
    class Own(np.ndarray[Any, Any]):
        pass

    a, out = normal(3, 3), np.zeros((3, 3), "f").view(Own)
    assert tilefold.gemm(a.view(Own), a, out=out) is out and np.allclose(out, a @ a, atol=1e-5)


def test_types_by_name_or_by_class() -> None:
    a = np.ones((2, 2), "e")
    for kind in ("bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)):
        assert tilefold.gemm(a, a, out_dtype=kind).dtype == ml_dtypes.bfloat16
    assert tilefold.gemm(a, a, out_dtype=np.float32).dtype == np.float32
    assert tilefold.gemm(a, a, np.ones(2, "f")).dtype == np.float32  # that of c


def test_repeated_calls_make_no_plan() -> None:
    a, b = normal(3, 4), normal(4, 5)
    first = tilefold.gemm(a, b, alpha=0.123)
    before = len(plans._kept)
    assert (tilefold.gemm(a, b, alpha=0.123) == first).all() and len(plans._kept) == before


def test_plans_of_large_batches_do_not_fill_memory() -> None:
    b = np.ones((2, 1), "f")
    for batch in range(100_000, 100_008):
        a = np.broadcast_to(np.ones((1, 2), "f"), (batch, 1, 2))
        assert tilefold.gemm(a, b).shape == (batch, 1, 1)
    assert plans._kept._total() <= 2**24


A, B, D = np.ones((2, 3), "f"), np.ones((3, 2), "f"), np.ones((3, 3), "f")
I = np.ones((3, 3), "int8")  # noqa: E741
REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((A, A), {}, ValueError, "op(a) is 2 x 3 and op(b) 2 x 3: the inner two must be equal"),
    ((A, B), {"transpose_b": True}, ValueError, "op(a) is 2 x 3 and op(b) 2 x 3"),
    (
        (A[None][[0, 0]], B[None][[0, 0, 0]]),
        {},
        ValueError,
        "a and b must broadcast, got (2,) and (3,)",
    ),
    ((A, B), {"bias": np.ones((2, 1, 2), "f")}, ValueError, "the batch of bias must broadcast to"),
    ((None, B), {}, TypeError, "a must be a NumPy array, a torch tensor or an object with"),
    ((A, None), {}, TypeError, "b must be a NumPy array, a torch tensor or an object with"),
    ((A, np.ma.ones((3, 2), "f")), {}, TypeError, "b must be an array without a mask of its own"),
    ((A, B), {"out": np.ma.ones((2, 2), "f")}, TypeError, "out must be a NumPy array, got Masked"),
    ((A[0, 0], B), {}, ValueError, "a must have 1 to 64 axes, got ()"),
    ((A.astype("F"), B), {}, TypeError, "a must be one of float32, float64, float16"),
    ((A.astype("i4"), B), {}, TypeError, "a must be one of float32, float64, float16"),
    ((A, B), {"alpha": "1"}, TypeError, "alpha must be a number, got '1'"),
    ((A, B), {"beta": True}, TypeError, "beta must be a number, got True"),
    ((A, B), {"alpha": 10**400}, ValueError, "alpha must fit in float64, got 1000"),
    ((A, B), {"transpose_a": 1}, TypeError, "transpose_a must be True or False, got 1"),
    ((A, B), {"activation": "sine"}, ValueError, "activation must be None, 'relu'"),
    ((A, B), {"precision": "low"}, ValueError, "precision must be 'highest'"),
    ((A, B), {"beta": 1}, ValueError, "beta is 1.0, so c must be given"),
    ((A, B), {"out_dtype": "int8"}, TypeError, "out_dtype must be one of float32"),
    ((A, B), {"out_dtype": "real"}, TypeError, "out_dtype must be one of float32"),
    ((A, B), {"out_dtype": object()}, TypeError, "out_dtype must be a type or its name"),
    ((A, B, np.ones(3, "f")), {"beta": 1}, ValueError, "c must broadcast to the result, (2, 2)"),
    ((A, B, np.ones((1, 2, 2), "f")), {"beta": 1}, ValueError, "c must broadcast to the result"),
    ((A, B, np.ones(2)), {"out_dtype": "float32"}, TypeError, "c must be float32, as the result"),
    ((A, B), {"bias": np.ones(3, "f")}, ValueError, "bias must be (2,) or (2, 1), got (3,)"),
    ((A, B), {"bias": np.ones(2)}, TypeError, "bias must be float32 as the result is, got"),
    ((A, B), {"gate": A}, ValueError, "gate must be float32 of shape (3, 2) as b is"),
    ((A, B, B[:2]), {"gate": B, "beta": 1}, ValueError, "beta must be 0 with a gate, got 1.0"),
    ((A, B), {"out": np.ones((2, 3), "f")}, ValueError, "out must be of shape (2, 2), got (2, 3)"),
    ((A, B), {"out": [[0.0] * 2] * 2}, TypeError, "out must be a NumPy array, got list"),
    ((A, B), {"out": np.ones((2, 2)), "out_dtype": "float32"}, TypeError, "out must be float32"),
    ((A, B), {"out": np.broadcast_to(A[0, 0], (2, 2)).copy()[:, :0]}, ValueError, "out must be of"),
    ((A, B), {"out": np.ones((2, 2), ">f4")}, ValueError, "out must be aligned, in native"),
    ((A, [[1.0]]), {}, TypeError, "b must be a NumPy array, a torch tensor or an object"),
    (
        (I, I),
        {"alpha": 0.5},
        ValueError,
        "alpha must be a whole number of 32 bits where the result",
    ),
    ((I, I), {"alpha": 2**31}, ValueError, "alpha must be a whole number of 32 bits where the"),
    ((I, I), {"alpha": np.inf}, ValueError, "alpha must be a whole number of 32 bits where the"),
    ((I, I), {"gate": I}, ValueError, "gate must be None where the result is int32"),
    ((I, I), {"activation": "relu"}, ValueError, "activation must be None where the"),
]


@pytest.mark.feature("T15", "A03")
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[3])
def test_bad_input_raises_one_line(case: Any) -> None:
    arrays, options, kind, line = case
    with pytest.raises(kind) as caught:
        tilefold.gemm(*arrays, **options)
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.feature("T15")
def test_a_result_overlaps_no_operand() -> None:
    room = np.zeros((9, 9), "f")
    a, b = room[:3, :3], np.ones((3, 3), "f")
    for name, out in (("a", room[2:5, 2:5]), ("a", room.T[:3, :3]), ("a", room[:5:2, :5:2])):
        with pytest.raises(ValueError, match=f"out must not overlap {name}"):
            tilefold.gemm(a, b, out=out)
    with pytest.raises(ValueError, match="out must not overlap c: c is out itself"):
        tilefold.gemm(b, b, room[:3, :3], beta=1.0, out=room[1:4, :3])
    with pytest.raises(ValueError, match="out must not overlap bias"):
        tilefold.gemm(b, b, bias=room[1, :3], out=a)
    between = room[1::2, 1::2][:3, :3]  # in the same rows and columns, at other places
    assert tilefold.gemm(room[::2, ::2][:3, :3], b, out=between) is between
    tilefold.gemm(b, b, room[:3, :3], out=room[1:4, :3])  # beta is 0: c is not read
    for strides in ((4, 0), (4, 4), (0, 4)):
        shared = np.lib.stride_tricks.as_strided(room, (3, 3), strides)
        with pytest.raises(ValueError, match="no two elements may share a place"):
            tilefold.gemm(b, b, out=shared)
    room.flags.writeable = False
    with pytest.raises(ValueError, match="out is written, so it must not be read-only"):
        tilefold.gemm(b, b, out=room[:3, :3])
