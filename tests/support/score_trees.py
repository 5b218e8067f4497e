"""Scores drawn by hypothesis or by a seed: trees of the functions of the language over some leaves.

Functions are bent so that values stay small and no logarithm or root meets its end.
"""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st

from tilefold.masks.expression import Index
from tilefold.scores.functions import exp, log, maximum, minimum, sigmoid, sqrt, tanh, where

Q, K = Index("q"), Index("k")

ONE = {
    "-": lambda x: -x,
    "abs": abs,
    "exp": lambda x: exp(minimum(x, 1)),
    "log": lambda x: log(abs(x) + 0.5),
    "tanh": tanh,
    "sigmoid": sigmoid,
    "sqrt": lambda x: sqrt(x * x + 0.25),
}
TWO = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: tanh(x) * y,
    "/": lambda x, y: x / (abs(y) + 0.5),
    "minimum": minimum,
    "maximum": maximum,
    "where a truth of indices": lambda x, y: where(Q > K, x, y),
    "where a truth of numbers": lambda x, y: where(x > y, x, 2 * x - y),
}


def joined(below: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A function of one or two trees."""
    return st.one_of(
        st.builds(lambda f, x: ONE[f](x), st.sampled_from(sorted(ONE)), below),
        st.builds(lambda f, x, y: TWO[f](x, y), st.sampled_from(sorted(TWO)), below, below),
    )


def trees(leaves: list[Any], most: int = 8) -> st.SearchStrategy[Any]:
    """Trees of at most that many leaves."""
    return st.recursive(st.sampled_from(leaves), joined, max_leaves=most)


def drawn(draw: random.Random, leaves: list[Any], depth: int) -> Any:
    """A tree of that many levels, from a seeded generator: all levels are there."""
    if not depth:
        return draw.choice(leaves)
    if draw.random() < 0.4:
        return draw.choice([*ONE.values()])(drawn(draw, leaves, depth - 1))
    left, right = (drawn(draw, leaves, depth - 1) for _ in range(2))
    return draw.choice([*TWO.values()])(left, right)
