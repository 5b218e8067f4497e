"""Functions of real numbers in kernels, over the whole range of a type, against long doubles.

A query that sees one key has that key's score as its largest one, so `return_max` tells what a
kernel makes of any number. Heads take turns with the functions: a type is one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from compare import assert_same
from numpy.typing import NDArray

import tilefold

Array = NDArray[Any]

FUNCTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "exp": (tilefold.exp, np.exp),
    "log": (tilefold.log, np.log),
    "tanh": (tilefold.tanh, np.tanh),
    "sigmoid": (tilefold.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    "sqrt": (tilefold.sqrt, np.sqrt),
    "abs": (abs, np.abs),
    "minus": (lambda x: -x, np.negative),
    "inverse": (lambda x: 1 / x, lambda x: 1 / x),
    "smaller": (lambda x: tilefold.minimum(x, 1.5), lambda x: np.minimum(x, 1.5)),
    "larger": (lambda x: tilefold.maximum(x, -1.5), lambda x: np.maximum(x, -1.5)),
}
"""Each function in the language of scores, and in NumPy."""

WITHIN = {"float32": 3e-7, "float64": 1e-15}
"""The largest relative error."""


def numbers(dtype: str) -> Array:
    """Numbers of all magnitudes and both signs, edges of ranges, infinities, NaN and denormals."""
    limits, random = np.finfo(dtype), np.random.default_rng(0)
    lowest, highest = np.log2(float(limits.smallest_subnormal)), np.log2(float(limits.max))
    sizes = np.exp2(random.uniform(lowest, highest, 3000))
    usual = np.exp2(random.uniform(-12, 12, 6000))
    near_one = 1 + random.normal(size=1000) * 10.0 ** -random.uniform(0, 16, 1000)
    edges = [np.linspace(-110, 110, 2001), np.linspace(-750, 750, 2001), near_one]
    special = [0.0, np.inf, np.nan, 1.0, limits.tiny, limits.max, limits.smallest_subnormal]
    with np.errstate(all="ignore"):
        every = np.concatenate([sizes, usual, *edges, special]).astype(dtype)
    return np.concatenate([every, -every[every != 0]])  # a product never keeps -0


def check_functions() -> None:
    """Raise AssertionError unless every function is right for all numbers of both types."""

    def chosen(s: Any, q: Any, k: Any, b: Any, h: Any) -> Any:
        found = s
        for head, (function, _) in enumerate(FUNCTIONS.values()):
            found = tilefold.where(h == head, function(s), found)
        return found

    score = tilefold.score(chosen)
    for dtype, within in WITHIN.items():
        x, heads = numbers(dtype), len(FUNCTIONS)
        q = np.broadcast_to(x[:, None], (1, heads, len(x), 1))
        one = np.ones((1, heads, 1, 1), dtype)
        _, found = tilefold.attention(q, one, one, scale=1.0, score=score, return_max=True)
        for got, (name, (_, exact)) in zip(found[0], FUNCTIONS.items(), strict=True):
            check_function(f"{name} in {dtype}", x, got, exact, within)


def check_function(
    name: str, x: Array, got: Array, exact: Callable[[Any], Any], within: float
) -> None:
    """Compare one function; below the smallest normal number a result may also be 0."""
    with np.errstate(all="ignore"):
        want = exact(x.astype(np.longdouble))
        rounded = want.astype(x.dtype)
    assert_same(f"NaN of {name}", np.isnan(got), np.isnan(rounded))
    for sign in (np.inf, -np.inf):
        assert_same(f"{sign} of {name}", got == sign, rounded == sign)
    finite = np.isfinite(rounded)
    least = np.finfo(x.dtype).tiny
    allowed = np.where(np.abs(want) < least, least, np.abs(want) * within)[finite]
    errors = np.abs(got[finite] - want[finite])
    worst = np.argmax(errors / np.maximum(allowed, least * 1e-9))
    at = x[finite][worst]
    assert (errors <= allowed).all(), f"{name} of {at!r}: {got[finite][worst]!r}"
