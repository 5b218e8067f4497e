"""Arrays of libraries that follow the array API standard: stand-ins with the standard's methods.

MLX 0.32 on a CPU and array-api-strict 2.6 gave the same results by hand.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import tilefold
from tilefold import attention, attention_backward, causal, merge

RANDOM = np.random.default_rng(0)
Q = RANDOM.standard_normal((1, 2, 5, 8), np.float32)
K, V, DO = (RANDOM.standard_normal((1, 2, 5, 8), np.float32) for _ in range(3))


class Strict:
    """An array of a library whose namespace has `asarray` and types, as the standard says."""

    def __init__(self, held: NDArray[Any]) -> None:
        self.held, self.dtype, self.shape = held, held.dtype, held.shape

    def __array_namespace__(self) -> Any:
        return STRICT

    def __dlpack__(self, **options: Any) -> Any:
        return self.held.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class Short(Strict):
    """An array of a library that makes short floats unless it is told, and types of its own."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("no bfloat16 here")

    def __array_namespace__(self) -> Any:
        return SHORT

    def view(self, dtype: Any) -> Short:
        return Short(self.held.view(dtype))


class Plain(Strict):
    """An array of a library that shows `from_dlpack` alone."""

    def __array_namespace__(self) -> Any:
        return PLAIN


def narrowed(array: NDArray[Any], dtype: Any = np.float32) -> Short:
    return Short(np.asarray(array, dtype))


TYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64", "uint16")}
STRICT = SimpleNamespace(
    __name__="strict", asarray=lambda array, dtype: Strict(array.astype(dtype, copy=False)), **TYPES
)
SHORT = SimpleNamespace(
    __name__="short", array=narrowed, bfloat16=np.dtype(ml_dtypes.bfloat16), **TYPES
)
PLAIN = SimpleNamespace(from_dlpack=lambda array: Plain(np.from_dlpack(array)))


@pytest.mark.slow
@pytest.mark.feature("T01", "T09")
@pytest.mark.parametrize("kind", [Strict, Short, Plain])
def test_every_result_is_of_the_kind_of_the_arrays(kind: type[Strict]) -> None:
    options: dict[str, Any] = {"mask": causal(), "sinks": np.ones(2), "score": tilefold.softcap(3)}

    def calls(*given: Any) -> list[Any]:
        q, k, v, do = given
        o, lse, largest = attention(q, k, v, return_lse=True, return_max=True, **options)
        slopes = attention_backward(do, q, k, v, o, lse, **options)
        composed = attention(q, k, v, impl="composed", **options)
        maps = tilefold.weights(q, k, rows=slice(2)), tilefold.key_mass(q, k, lse)
        return [o, lse, largest, *slopes, composed, *merge(o, lse, o, lse), *maps]

    found, expected = calls(*map(kind, (Q, K, V, DO))), calls(Q, K, V, DO)
    for got, want in zip(found, expected, strict=True):
        assert type(got) is kind and got.dtype == want.dtype
        np.testing.assert_array_equal(got.held, want)


@pytest.mark.feature("T01")
@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_a_result_keeps_the_type_of_its_array(dtype: str) -> None:
    given = Q.astype(dtype)
    o, lse = attention(*[Short(given)] * 3, return_lse=True)
    want, log = attention(*[given] * 3, return_lse=True)
    assert (o.dtype, lse.dtype) == (want.dtype, log.dtype)
    np.testing.assert_array_equal(o.held, want)


def test_arrays_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilefold.backends import calls

    seen: list[Any] = []
    monkeypatch.setattr(calls, "run", lambda *given: seen.extend(given[3]) or (Q, Q))
    attention(*map(Strict, (Q, K, V)))
    assert all(np.shares_memory(*pair) for pair in zip(seen, (Q, K, V), strict=True))


@pytest.mark.feature("T15")
def test_numpy_arrays_may_stand_beside_them_and_no_other_library() -> None:
    assert type(attention(Q, Strict(K), V)) is Strict
    assert type(attention(*map(ByInterface, (Q, K, V)))) is np.ndarray
    said = "v must be a NumPy array or an array of strict as k is, got an array of short"
    with pytest.raises(TypeError, match=f"^{re.escape(said)}$"):
        attention(Q, Strict(K), Short(V))


class ByInterface:
    """An array of a library whose functions are NumPy's."""

    def __init__(self, held: NDArray[Any]) -> None:
        self.__array_interface__ = held.__array_interface__

    def __array_namespace__(self) -> Any:
        return np


def test_products_are_arrays_of_the_library() -> None:
    a, b = Q[0, 0], K[0, 0].T
    got = tilefold.gemm(Strict(a), b, activation="relu")
    assert isinstance(got, Strict) and abs(got.held - np.maximum(a @ b, 0)).max() < 1e-5
    plain = tilefold.gemm(ByInterface(a), b)
    assert type(plain) is np.ndarray and abs(plain - a @ b).max() < 1e-5
    packed = tilefold.pack(Strict(np.ascontiguousarray(b)))
    assert (tilefold.gemm(Strict(a), packed).held == tilefold.gemm(a, packed)).all()
    with pytest.raises(TypeError, match="out must be a NumPy array, got Strict"):
        tilefold.gemm(Strict(a), b, out=Strict(a @ b))
