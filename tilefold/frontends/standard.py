"""Arrays of libraries that follow the array API standard, such as MLX: results are of their kind.

Such an array names the functions of its library (`__array_namespace__`) and shares its memory with
others (`__dlpack__`). So it is viewed as a NumPy array, and a result becomes an array of the
library, where the library allows it without a copy. NumPy arrays may stand beside such arrays.
"""

from __future__ import annotations

from typing import Any

from tilefold.backends.extra import NOTHING, Extra, extended_request
from tilefold.frontends import numpy
from tilefold.frontends.foreign import Namespace, namespaces
from tilefold.frontends.numpy import Array, chance_of, request_of, seed_of
from tilefold.problems.request import Request

__all__ = [
    "PLAIN",
    "attention",
    "attention_backward",
    "chance_of",
    "extended_request",
    "given_back",
    "merge",
    "request_of",
    "seed_of",
]

PLAIN = ()
"""No class belongs to this frontend for good: its library may get one of its own."""


def attention(
    q: Any,
    k: Any,
    v: Any,
    request: Request,
    extra: Extra = NOTHING,
    further: tuple[str, ...] = (),
) -> tuple[Any, ...]:
    """Return o and lse, and `further` results of the pass; see `tilefold.attention`."""
    results = numpy.attention(q, k, v, request, extra, further)
    return given_back(results, q=q, k=k, v=v)


def attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    request: Request,
    dlse: Any = None,
    extra: Extra = NOTHING,
) -> tuple[Any, ...]:
    """Return dq, dk, dv, and the gradients of extra arrays; see `tilefold.attention_backward`."""
    results = numpy.attention_backward(do, q, k, v, o, lse, request, dlse, extra)
    return given_back(results, do=do, q=q, k=k, v=v, o=o, lse=lse)


def merge(o1: Any, lse1: Any, o2: Any, lse2: Any, layout: str) -> tuple[Any, ...]:
    """Return o and lse; see `tilefold.merge`."""
    merged = numpy.merge(o1, lse1, o2, lse2, layout)
    return given_back(merged, o1=o1, lse1=lse1, o2=o2, lse2=lse2)


def given_back(results: tuple[Array | None, ...], **given: Any) -> tuple[Any, ...]:
    """The results as arrays of the library of the `given` arrays."""
    namespace = next(iter(namespaces(**given).values()))
    return tuple([None if array is None else _made(namespace, array) for array in results])


def _made(namespace: Namespace, array: Array) -> Any:
    """A result as an array of a library, which is now its only holder."""
    dtype = getattr(namespace, array.dtype.name, None)
    if dtype is None:
        return namespace.from_dlpack(array)
    # MLX makes float32 of float64 unless it is told, and its older versions have `array` alone.
    maker = namespace.asarray if hasattr(namespace, "asarray") else namespace.array
    return maker(array, dtype=dtype)
