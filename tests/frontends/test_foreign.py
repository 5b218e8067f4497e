"""Arrays of frameworks without a frontend: stand-ins with the attributes of the real classes.

JAX 0.10 and TensorFlow 2.21 gave the same lines by hand.
"""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tilefold

Q = np.random.default_rng(0).standard_normal((1, 2, 3, 4), np.float32)


class Foreign:
    """An array on the CPU, as JAX and TensorFlow show theirs: DLPack, and a copy for NumPy."""

    def __init__(self, given: Any) -> None:
        self.given = given
        self.dtype = given.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.given

    def __dlpack__(self, **options: Any) -> Any:
        if self.given.dtype == ml_dtypes.bfloat16:
            raise BufferError("Unsupported dtype in DLTensor.")
        return self.given.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class Tracer(Foreign):
    """A value inside jit or grad: it has the methods of an array, and nothing behind them."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__dlpack_device__":
            raise AttributeError("DynamicJaxprTracer has no attribute __dlpack_device__")
        return super().__getattribute__(name)


@pytest.fixture(autouse=True)
def frameworks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of JAX that is looked up."""
    for name, parts in {
        "jax.core": {"Tracer": Tracer},
    }.items():
        module = ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, name, module)


REFUSED = {
    "traced by JAX": (
        Tracer(Q),
        NotImplementedError,
        "is traced by JAX, and other arguments are no JAX arrays: make them some with jnp.asarray,"
        " or call tilefold.jax.attention",
    ),
}


@pytest.mark.feature("T15")
@pytest.mark.parametrize("case", REFUSED)
def test_lost_gradients_and_values_are_refused_by_name(case: str) -> None:
    given, kind, said = REFUSED[case]
    lse = Q[..., 0]
    for name, call in {
        "k": lambda: tilefold.attention(Q, given, Q),
        "v": lambda: tilefold.attention(Q, Q, given, impl="composed"),
        "do": lambda: tilefold.attention_backward(given, Q, Q, Q, Q, lse),
        "o2": lambda: tilefold.merge(Q, lse, given, lse),
    }.items():
        with pytest.raises(kind, match=f"^{re.escape(f'{name} {said.format(name=name)}')}$"):
            call()


@pytest.mark.slow
@pytest.mark.feature("T01")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_arrays_with_values_are_read(dtype: str) -> None:
    plain = Q.astype(dtype)
    found = tilefold.attention(*[Foreign(plain)] * 3)
    assert found.dtype == plain.dtype
    assert np.array_equal(found, tilefold.attention(plain, plain, plain))


class Raising:
    @property
    def __array_interface__(self) -> dict[str, Any]:
        raise RuntimeError("two\nlines")


class Crooked(Foreign):
    def __dlpack_device__(self) -> Any:
        return "x"


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("given", "said"),
    [(Raising(), "Raising: two lines"), (Crooked(Q), "Crooked: not enough values to unpack")],
)
def test_what_an_object_raises_is_one_line(given: Any, said: str) -> None:
    with pytest.raises(TypeError, match=f"^q must be an array that NumPy can view, got {said}"):
        tilefold.attention(given, Q, Q)
