"""`tilefold.blas`: BLAS's arguments, their order and leading dimensions, beside plain loops."""

from __future__ import annotations

import inspect
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gemms import normal
from numpy.typing import NDArray

from tilefold import blas
from tilefold.products import plans

Array = NDArray[Any]

KINDS = {"s": "f", "d": "d", "h": "e", "b": ml_dtypes.bfloat16}
NEAR = {"s": 1e-5, "d": 1e-13, "h": 4e-3, "b": 3e-2}


def buffer(letter: str, length: int) -> Array:
    """Random elements, and a few more than are needed."""
    return normal(length + 3, dtype="float64").astype(KINDS[letter])


def matrix(flat: Array, rows: int, columns: int, leading: int) -> Array:
    """Element (i, j) is flat[i + j * leading]."""
    found = np.empty((rows, columns))
    for j in range(columns):
        found[:, j] = flat[j * leading : j * leading + rows]
    return found


def vector(flat: Array, length: int, step: int) -> Array:
    """Elements that are `step` apart; the first one lies last if it is negative."""
    first = 0 if step > 0 else (length - 1) * -step
    return np.array([flat[first + i * step] for i in range(length)], float)


def op(a: Array, trans: str) -> Array:
    return a if trans in "Nn" else a.T


CASES = (
    *(("s", "N", "N", 5, 4, 3), ("s", "t", "N", 20, 2, 7), ("d", "N", "C", 3, 9, 33)),
    *(("d", "T", "T", 1, 40, 2), ("h", "n", "T", 17, 6, 9), ("b", "T", "N", 6, 17, 12)),
    *(("s", "C", "c", 2, 3, 0), ("d", "N", "N", 0, 3, 2)),
)


@pytest.mark.feature("A01")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gemm(case: tuple[str, str, str, int, int, int]) -> None:
    letter, transa, transb, m, n, k = case
    rows_a, rows_b = (m if transa in "Nn" else k), (k if transb in "Nn" else n)
    lda, ldb, ldc = max(1, rows_a), rows_b + 2, m + 3
    a, b, c = (buffer(letter, 60 + lead * max(m, n, k)) for lead in (lda, ldb, ldc))
    left = op(matrix(a, rows_a, k if transa in "Nn" else m, lda), transa)
    right = op(matrix(b, rows_b, n if transb in "Nn" else k, ldb), transb)
    for alpha, beta in ((0.5, 0.0), (-1.0, 1.5)):
        before = c.copy()
        if beta == 0:
            for j in range(n):  # NaN is ignored, and the gaps between columns are not touched
                c[j * ldc : j * ldc + m] = np.nan
        want = alpha * (left @ right) + (beta * matrix(before, m, n, ldc) if beta else 0)
        routine = getattr(blas, f"{letter}gemm")
        assert routine(transa, transb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc) is c
        got = matrix(c, m, n, ldc)
        assert abs(got - want).max(initial=0) <= NEAR[letter] * max(1, abs(want).max(initial=0))
        for j in range(n):
            before[j * ldc : j * ldc + m] = c[j * ldc : j * ldc + m]
        assert (before.view("u1") == c.view("u1")).all()


@pytest.mark.slow
@pytest.mark.feature("A01")
@pytest.mark.parametrize("letter", KINDS)
def test_gemv(letter: str) -> None:
    routine, m, n, lda = getattr(blas, f"{letter}gemv"), 7, 5, 9
    a = buffer(letter, lda * n)
    for trans, incx, incy, beta in (("N", 1, 2, 0.0), ("T", -2, 1, 0.5), ("c", 3, -1, -1.0)):
        rows, columns = (m, n) if trans == "N" else (n, m)
        x, y = buffer(letter, 3 * columns), buffer(letter, 3 * rows)
        want = 2 * op(matrix(a, m, n, lda), trans) @ vector(x, columns, incx)
        if beta:
            want += beta * vector(y, rows, incy)
        else:
            y[...] = np.nan
        assert routine(trans, m, n, 2.0, a, lda, x, incx, beta, y, incy) is y
        assert abs(vector(y, rows, incy) - want).max() <= NEAR[letter] * abs(want).max() * 2


@pytest.mark.feature("A01")
def test_ger() -> None:
    a, x, y = buffer("d", 20), buffer("d", 6), buffer("d", 6)
    want = matrix(a, 3, 4, 5) + 0.5 * np.outer(vector(x, 3, -2), vector(y, 4, 1))
    assert blas.dger(3, 4, 0.5, x, -2, y, 1, a, 5) is a
    assert abs(matrix(a, 3, 4, 5) - want).max() < 1e-15
    x[...] = np.nan
    blas.dger(3, 4, 0.0, x, 1, y, 1, a, 5)
    assert abs(matrix(a, 3, 4, 5) - want).max() < 1e-15


@pytest.mark.slow
def test_the_result_is_that_of_scipy() -> None:
    scipy = pytest.importorskip("scipy.linalg.blas")
    a, b = normal(6, 4, dtype="float64"), normal(6, 5, dtype="float64")
    want = scipy.dgemm(1.5, a, b, trans_a=True)
    c = np.zeros((4, 5), order="F")
    a, b = np.asfortranarray(a), np.asfortranarray(b)
    assert abs(blas.dgemm("T", "N", 4, 5, 6, 1.5, a, 6, b, 6, 0.0, c, 4) - want).max() < 1e-14


@pytest.mark.feature("A01")
def test_elements_are_not_read_where_alpha_is_0() -> None:
    a, c = np.full(9, np.nan, "f"), np.arange(9, dtype="f")
    assert (blas.sgemm("N", "N", 3, 3, 3, 0.0, a, 3, a, 3, 2.0, c, 3) == 2 * np.arange(9)).all()
    y = np.ones(3, "f")
    assert (blas.sgemv("T", 3, 3, 0.0, a, 3, a, 1, 3.0, y, 1) == 3).all()


def test_signatures_are_those_of_blas() -> None:
    order = "transa transb m n k alpha a lda b ldb beta c ldc strict"
    for name in blas.__all__:
        routine = getattr(blas, name)
        assert routine.__name__ == name and routine.__doc__
        if name.endswith("gemm"):
            assert " ".join(inspect.signature(routine).parameters) == order
    one = np.ones(1)
    assert blas.dgemm("N", "N", 1, 1, 1, 1.0, one, 1, b=one, ldb=1, beta=0.0, c=one + 1, ldc=1) == 1
    with pytest.raises(TypeError, match="missing a required argument: 'n'"):
        blas.dgemm("N", "N", 1)


GOOD: dict[str, Any] = dict(
    zip(
        ["transa", "transb", *"mnk", "alpha", "a", "lda", "b", "ldb", "beta", "c", "ldc"],
        ("N", "T", 3, 2, 4, 1.0, np.ones(12, "f"), 3, np.ones(8, "f"), 2, 0.0, np.ones(6, "f"), 3),
        strict=True,
    )
)
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"transa": "X"}, ValueError, "sgemm: parameter 1 (transa) must be 'N', 'T' or 'C', got 'X'"),
    ({"transb": 1}, ValueError, "sgemm: parameter 2 (transb) must be 'N'"),
    ({"m": -1}, ValueError, "sgemm: parameter 3 (m) must be an integer >= 0, got -1"),
    ({"k": 2.0}, TypeError, "sgemm: parameter 5 (k) must be an integer >= 0, got 2.0"),
    ({"alpha": "1"}, TypeError, "sgemm: parameter 6 (alpha) must be a number"),
    ({"lda": 2}, ValueError, "sgemm: parameter 8 (lda) must be an integer >= 3, got 2"),
    ({"ldb": 1}, ValueError, "sgemm: parameter 10 (ldb) must be an integer >= 2, got 1"),
    ({"ldc": 2}, ValueError, "sgemm: parameter 13 (ldc) must be an integer >= 3"),
    ({"lda": 5}, ValueError, "sgemm: parameter 7 (a) must have at least 18 elements for its sizes"),
    ({"c": np.ones(5, "f")}, ValueError, "parameter 12 (c) must have at least 6 elements"),
    ({"a": np.ones(12)}, TypeError, "sgemm: parameter 7 (a) must be float32, got float64"),
    ({"b": [1.0] * 8}, TypeError, "parameter 9 (b) must be a NumPy array or a torch tensor, got l"),
    ({"b": np.ones(16, "f")[::2]}, ValueError, "parameter 9 (b) must be one piece of memory"),
    ({"c": GOOD["a"]}, ValueError, "sgemm: parameter 12 (c) must not overlap an operand"),
    ({"a": np.frombuffer(bytes(49), "u1")[1:].view("f")}, ValueError, "7 (a) must lie at a mult"),
    ({"a": np.ma.ones(12, "f")}, TypeError, "7 (a) must be an array without a mask of its own"),
    ({"c": np.frombuffer(bytes(24), "f")}, ValueError, "parameter 12 (c) is written, so it must"),
]


@pytest.mark.feature("T15", "A01")
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[2])
def test_bad_arguments_are_named_by_their_numbers(case: Any) -> None:
    other, kind, line = case
    with pytest.raises(kind) as caught:
        blas.sgemm(**(GOOD | other))
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.feature("T15", "A01")
def test_steps_are_integers_of_any_size() -> None:
    def call(incx: Any, n: int = 1, **more: Any) -> Any:
        given = {"alpha": 1.0, "lda": 1, "y": np.ones(1, "f")} | more
        x, a, y = np.full(3, 2, "f"), np.full(3, 3, "f"), given["y"]
        return blas.sgemv("N", 1, n, given["alpha"], a, given["lda"], x, incx, 0.5, y, 1)[0]

    line = r"sgemv: parameter 8 \(incx\) must be an integer that is not 0, got "
    for step, kind in ((0, ValueError), (0.5, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(kind, match=line + str(step)):
            call(step)
    with pytest.raises(
        ValueError, match=r"7 \(x\) must have at least 9223372036854775809 elements"
    ):
        call(-(2**63), n=2)
    for step in (2**70, -(2**70), np.int8(-3)):  # steps of one element, or of none
        assert call(step, lda=2**70) == 6.5 and call(step, n=0) == 0.5
        assert call(step, n=2, alpha=0.0) == 0.5


@pytest.mark.feature("A06")
def test_nothing_happens_where_there_is_no_kernel_and_that_is_asked_for(monkeypatch: Any) -> None:
    def refuse(product: Any, out: Any, **options: Any) -> None:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(plans.kernels, "prepare", refuse)
    given = GOOD | {"c": np.arange(6, dtype="f"), "alpha": 0.7171}
    with pytest.raises(NotImplementedError, match="no kernel"):
        blas.sgemm(**given)
    assert blas.sgemm(**given, strict=False) is given["c"]
    assert (given["c"] == np.arange(6)).all()
    with pytest.raises(ValueError, match="parameter 3"):
        blas.sgemm(**(given | {"m": -1}), strict=False)


@pytest.mark.feature("A01")
def test_tensors_are_buffers_too() -> None:
    torch = pytest.importorskip("torch")
    a, b = torch.arange(6.0), torch.ones(3, 2).T  # one piece: columns one after the other
    c = torch.full((4,), torch.nan)
    version = c._version
    assert blas.sgemm("N", "T", 2, 2, 3, 1.0, a, 2, b, 2, 0.0, c, 2) is c and c._version > version
    assert c.tolist() == [6.0, 9.0, 6.0, 9.0]
    half, y = torch.ones(4, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)
    assert blas.bgemv("N", 2, 2, 1.0, half, 2, half, -1, 0.0, y, -1).tolist() == [2.0, 2.0]
    with pytest.raises(TypeError, match=r"sgemv: parameter 5 \(a\) must be float32, got bfloat16"):
        blas.sgemv("N", 2, 2, 1.0, half, 2, half, -1, 0.0, y, -1)

    refused: list[tuple[Any, type[Exception], str]] = [
        (a.to_sparse(), TypeError, "must be a strided tensor, .* pass a.to_dense()"),
        (a.to("meta"), NotImplementedError, "must be a tensor on the CPU, got one on meta"),
        (torch.complex(a, a).conj().imag, NotImplementedError, "must be a plain tensor, whose mem"),
        (torch.ones(12)[::2], ValueError, "must be one piece of memory"),
        (torch.ones(6, requires_grad=True), ValueError, "takes no gradients: pass a.detach()"),
    ]
    for tensor, kind, line in refused:
        with pytest.raises(kind, match=rf"^sgemm: parameter 7 \(a\) {line}"):
            blas.sgemm("N", "T", 2, 2, 3, 1.0, tensor, 2, b, 2, 0.0, c, 2)
