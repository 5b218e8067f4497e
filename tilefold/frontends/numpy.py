"""The frontend of NumPy arrays, and of objects that share memory with them.

An array is read in place if it is in native byte order, is aligned to its items, and has strides
that are multiples of the item size; negative strides and strides of 0 are allowed. Any other array
is copied once. Objects with `__array_interface__` or `__dlpack__` are viewed as arrays. Results are
NumPy arrays, contiguous in the layout of the call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends import calls
from tilefold.backends.arrays import numpy as arrays
from tilefold.backends.extra import NOTHING, Extra, extended_request, rows_of
from tilefold.backends.protocols import BACKWARD, FORWARD, spoken
from tilefold.backends.registry import machine
from tilefold.frontends.foreign import viewed
from tilefold.problems.attention import STATISTICS, check_parts
from tilefold.problems.dropout import check_probability, check_seed
from tilefold.problems.request import Request

__all__ = [
    "PLAIN",
    "arrays_of",
    "as_array",
    "attention",
    "attention_backward",
    "extended_request",
    "merge",
    "request_of",
]

Array = NDArray[Any]

PLAIN = (np.ndarray,)
"""Array types that always belong to this frontend."""

request_of = Request
"""Makes the request of a call from its options."""


chance_of = check_probability
"""Makes a probability of an argument."""


def seed_of(seed: Any, q: Any) -> Array:
    """The seed of dropout as kernels read it. Raises ValueError where there is none."""
    if seed is None:
        raise ValueError(
            "seed must be an integer where dropout is above 0, got None: attention_backward needs"
            " the same one"
        )
    return np.array([check_seed(seed)])


def attention(
    q: Any,
    k: Any,
    v: Any,
    request: Request,
    extra: Extra = NOTHING,
    further: tuple[str, ...] = (),
) -> tuple[Array, ...]:
    """Return o and lse, and `further` results of the pass; see `tilefold.attention`."""
    given = as_array("q", q), as_array("k", k), as_array("v", v)
    if extra is NOTHING and not further:
        return calls.run(machine("cpu"), arrays, FORWARD, given, request)
    wanted = FORWARD.plus(extra.names, further)
    return calls.run(machine("cpu"), arrays, wanted, given + arrays_of(extra, given[0]), request)


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
) -> tuple[Array, ...]:
    """Return dq, dk, dv, and the gradients of extra arrays; see `tilefold.attention_backward`."""
    named = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse}
    given = tuple([as_array(name, array) for name, array in named.items()])
    wanted = BACKWARD.plus(extra.names, extra.gradients)
    given += arrays_of(extra, given[1])
    if dlse is not None:
        wanted, given = wanted.plus(("dlse",)), (*given, as_array("dlse", dlse))
    results = calls.run(machine("cpu"), arrays, wanted, given, request)
    return extra.fitted(wanted, results, _like_sinks)


def _like_sinks(gradient: Array, sinks: Any) -> Array:
    given = as_array("sinks", sinks)
    return gradient.reshape(given.shape).astype(given.dtype, copy=False)


def arrays_of(extra: Extra, q: Array) -> tuple[Array, ...]:
    """The extra arrays as kernels read them: sinks are rows, in the type of lse."""
    found = {}
    for name, array in zip(extra.names, extra.arrays, strict=True):
        if getattr(array, "requires_grad", False):
            raise TypeError(
                f"{spoken(name)} is a tensor that wants a gradient, and q is none: pass tensors, or"
                " array.detach()"
            )
        found[name] = as_array(spoken(name), array)
    if "sinks" in found:
        found["sinks"] = _rows_of_sinks(found["sinks"], q)
    return tuple(found.values())


def _rows_of_sinks(sinks: Array, q: Array) -> Array:
    if sinks.dtype.kind != "f" and sinks.dtype.name != "bfloat16":
        raise TypeError(f"sinks must be an array of floats, got {sinks.dtype.name}")
    rows: Array = rows_of(sinks)
    return rows.astype(STATISTICS.get(q.dtype.name, rows.dtype), copy=False)


def merge(o1: Any, lse1: Any, o2: Any, lse2: Any, layout: str) -> tuple[Array, Array]:
    """Return o and lse; see `tilefold.merge`."""
    given = {"o1": o1, "lse1": lse1, "o2": o2, "lse2": lse2}
    parts = {name: as_array(name, value) for name, value in given.items()}
    shapes = {name: array.shape for name, array in parts.items()}
    dtypes = {name: array.dtype.name for name, array in parts.items()}
    axes = check_parts(shapes, dtypes, layout)
    lses = np.stack((parts["lse1"], parts["lse2"]))
    unseen = lses == -np.inf
    nothing = unseen.all(axis=0)
    with np.errstate(invalid="ignore", under="ignore"):
        top = lses.max(axis=0)
        weights = np.exp(lses - np.where(nothing, 0, top))
        total = np.where(nothing, 1, weights.sum(axis=0))
        lse = np.where(nothing, -np.inf, top + np.log(total)).astype(lses.dtype)
        o = np.zeros(parts["o1"].transpose(axes).shape, lses.dtype)
        for number, name in enumerate(("o1", "o2")):
            part = parts[name].transpose(axes).astype(lses.dtype)
            share = (weights[number] / total)[..., None]
            o += np.where(unseen[number][..., None], 0, share * part)
    merged = np.ascontiguousarray(o.transpose(axes))  # each layout is its own inverse
    return merged.astype(parts["o1"].dtype), lse


def as_array(name: str, value: Any) -> Array:
    """The argument as an array whose items are aligned and in native byte order."""
    array: Array = value if type(value) is np.ndarray else viewed(name, value)
    if array.flags.aligned and array.dtype.isnative:
        return array
    return np.array(array, array.dtype.newbyteorder("="), order="C")
