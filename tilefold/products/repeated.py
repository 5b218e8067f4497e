"""Calls that were made before, by the shortest way: of NumPy arrays, and who has one for others.

A small product takes a microsecond, so the way to it must not take ten. How arrays lie and what was
asked for are the key of a `Way`, which holds all that was found out by the first call. What only
addresses tell is looked at by a `Guard`. Where it finds anything, the call goes the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu import guard
from tilefold.backends.cpu.guard import Guard
from tilefold.backends.cpu.records import Recorded
from tilefold.common import generation
from tilefold.common.lru import LruCache
from tilefold.products.packed import PackedMatrix
from tilefold.products.plans import Plan

Array = NDArray[Any]

_Array = np.ndarray

Asked = tuple[Any, ...]
"""The options of a call as they came: alpha, beta, the transposes, activation, type, precision."""

REPEATED: Final[dict[type, Callable[..., Any]]] = {}
"""By the type of a: what takes ways, a, b, c, bias, gate, out and `Asked`, and returns the product
of a call that was made before, or None. Quantised matrices have ways of their own, and are no b."""


class Way(NamedTuple):
    """The shortest way to a product: what runs it, and the shape and the type of its result.

    `arrange` makes what kernels read of an a that they do not read where it lies.
    """

    guard: Guard
    recorded: Recorded
    shape: tuple[int, ...]
    dtype: Any
    arrange: Callable[[Any], Any] | None = None


Ways = LruCache[Way]

WAYS: Final[Ways] = LruCache(most=256, most_bytes=2**24)
"""The ways of `gemm`."""


def remember(key: Hashable, plan: Plan, dtype: Any) -> None:
    """Keep the way to a product under the key of its call, where this interpreter has ways."""
    if guard.HERE and (ready := plan.prepared) is not None:
        WAYS.put(key, Way(plan.guard, ready.recorded, plan.shape, dtype), ready.nbytes)


def key(a: Any, b: Any, c: Any, bias: Any, gate: Any, out: Any, asked: Asked) -> Hashable:
    """The key of a call of NumPy arrays: how these lie, and what was asked for."""
    if c is bias is gate is out is None and type(a) is type(b) is _Array:
        return key_of((a.shape, a.strides, a.dtype, b.shape, b.strides, b.dtype), asked)
    every = (a, b, c, bias, gate, out)
    lies = [(x.shape, x.strides, x.dtype) if type(x) is _Array else _lie(x) for x in every]
    return key_of(tuple(lies), asked)


def key_of(lies: Hashable, asked: Asked) -> Hashable:
    """The key of operands that lie in some way, and of what was asked for. True is no number."""
    return lies, asked, type(asked[0]), type(asked[1]), generation.number


def _lie(x: Any) -> Hashable:
    """The same of what is no array; other objects are in no key kept."""
    return x.form if type(x) is PackedMatrix else x is None


def _repeated(
    ways: Ways, a: Array, b: Any, c: Any, bias: Any, gate: Any, out: Any, asked: Asked
) -> Array | None:
    try:
        way = ways.get(key(a, b, c, bias, gate, out, asked))
    except TypeError:  # some argument has no hash
        return None
    if way is None or not way.recorded.is_native:
        return None
    if way.arrange is not None:
        a = way.arrange(a)
    if out is None:
        out = np.empty(way.shape, way.dtype)
    elif not out.flags.writeable:
        return None
    b = b.address if type(b) is PackedMatrix else b
    gate = gate.address if type(gate) is PackedMatrix else gate
    return out if way.guard.run(a, b, c, bias, gate, out) else None


if guard.HERE:
    REPEATED[np.ndarray] = _repeated
