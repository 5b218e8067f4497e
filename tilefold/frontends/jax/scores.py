"""Modified scores, masks and dropout of some pairs, in operations of JAX.

The derivatives of a score are those of its tree, as in kernels, and not those of JAX's operations:
what `where` did not choose, and what a mask hides, has no slope even where it is infinite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tilefold.masks.derivative import ZERO, derivatives
from tilefold.masks.expression import (
    AnyTable,
    Expression,
    Interpretation,
    Real,
    RealLookup,
    evaluate,
)
from tilefold.masks.graph import ordered
from tilefold.masks.tables import Given, Input, Table
from tilefold.problems.dropout import MULTIPLIERS, ROUNDS, WEYL, factor, threshold

Indices = Mapping[str, Array]
"""The indices b, h, q and k of pairs, as integers that broadcast."""


class Modification:
    """A score F of pairs, as a function of the scores s and of the entries that it reads of arrays.

    `lookups` are the places where F reads an array: each of them is an argument.
    """

    def __init__(self, score: Real) -> None:
        self._score = score
        self.lookups = [
            node
            for node, _ in ordered(score)
            if isinstance(node, RealLookup) and isinstance(node.table, Input)
        ]

    def read(self, arrays: Mapping[int, Array], indices: Indices) -> list[Array]:
        """The entries of arrays, by their numbers, that pairs with these indices read."""
        tables: list[Any] = [lookup.table for lookup in self.lookups]
        return [
            self.entry(place, arrays[table.number], indices) for place, table in enumerate(tables)
        ]

    def entry(self, place: int, array: Array, indices: Indices) -> Array:
        """What pairs with these indices read of an array at a place."""
        fold = _Traced(indices, {})
        return array[tuple([evaluate(index, fold) for index in self.lookups[place].indices])]

    def value(self, s: Array, entries: Sequence[Array], indices: Indices) -> Array:
        """F, of all pairs."""
        return self._fold(self._score, s, entries, indices)

    def both(
        self, s: Array, entries: Sequence[Array], indices: Indices, hidden: Array
    ) -> tuple[Array, Array, list[Array]]:
        """F, dF/ds, and the derivatives by each entry; all are 0 for hidden pairs."""
        given = s, list(entries), hidden, dict(indices)
        trees = self._score, *self._slopes(self._score)
        value, slope, *slopes = (self._function(tree)(*given) for tree in trees)
        return value, slope, slopes

    def _function(self, tree: Real) -> Any:
        """A tree as a function of scores, entries, hidden pairs and indices.

        It is differentiable any number of times with respect to the first two. It holds none of
        the others: JAX may call its derivative where these mean nothing.
        """

        def function(s: Array, entries: Sequence[Array], hidden: Array, indices: Indices) -> Array:
            value = self._fold(tree, s, entries, indices)
            return jnp.where(hidden, 0, value).astype(s.dtype)

        made: Any = jax.custom_jvp(function)

        def along(given: Any, tangents: Any) -> Any:
            total = jnp.zeros_like(given[0])
            moves = tangents[0], *tangents[1]
            for slope, tangent in zip(self._slopes(tree), moves, strict=True):
                if slope is not ZERO:
                    total = total + self._function(slope)(*given) * tangent
            return made(*given), total

        made.defjvp(along)
        return made

    @functools.lru_cache(maxsize=64)  # noqa: B019  # a modification is kept no longer than its call
    def _slopes(self, tree: Real) -> list[Real]:
        """The derivatives of a tree with respect to s, and to each entry."""
        found = derivatives(tree)
        slopes = {id(entry): slope for entry, slope in found.entries}
        return [found.score, *[slopes.get(id(lookup), ZERO) for lookup in self.lookups]]

    def _fold(self, tree: Real, s: Array, entries: Sequence[Array], indices: Indices) -> Array:
        known = {id(node): entry for node, entry in zip(self.lookups, entries, strict=True)}
        value = evaluate(tree, _Traced(indices, {}, s), known)
        return jnp.broadcast_to(jnp.asarray(value, s.dtype), s.shape)


def visible(expression: Expression, indices: Indices, data: Mapping[int, Array]) -> Array:
    """Which pairs a mask shows; `data` are the arrays of the mask, by number."""
    return jnp.asarray(evaluate(expression, _Traced(indices, data)), bool)


class _Traced(Interpretation[Any]):
    """The value of a node is an array or a number; all of them broadcast."""

    def __init__(self, indices: Indices, data: Mapping[int, Array], s: Array | None = None) -> None:
        self._indices, self._data, self._s = indices, data, s

    def index(self, name: str) -> Any:
        return self._indices[name]

    def constant(self, value: int) -> Any:
        return value

    def truth(self, value: bool) -> Any:
        return np.bool_(value)

    def lookup(self, table: AnyTable, indices: tuple[Any, ...]) -> Any:
        if isinstance(table, Given):
            return self._data[table.number][indices]
        assert isinstance(table, Table)
        return jnp.asarray(table.array)[indices]

    def unary(self, operator: str, operand: Any) -> Any:
        return abs(operand) if operator == "abs" else -operand

    def binary(self, operator: str, left: Any, right: Any) -> Any:
        return _OPERATORS[operator](left, right)

    def compare(self, operator: str, left: Any, right: Any) -> Any:
        return _COMPARE[operator](left, right)

    def logic(self, operator: str, operands: tuple[Any, ...]) -> Any:
        if operator == "~":
            return jnp.logical_not(operands[0])
        join = jnp.logical_and if operator == "&" else jnp.logical_or
        return functools.reduce(join, operands)

    def score(self) -> Any:
        return self._s

    def real(self, value: float) -> Any:
        return value

    def from_integer(self, operand: Any) -> Any:
        assert self._s is not None
        return jnp.asarray(operand, self._s.dtype)

    def real_unary(self, operator: str, operand: Any) -> Any:
        return _FUNCTIONS[operator](operand)

    def real_binary(self, operator: str, left: Any, right: Any) -> Any:
        return _OPERATORS[operator](left, right)

    def where(self, truth: Any, then: Any, otherwise: Any) -> Any:
        return jnp.where(truth, then, otherwise)


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": jnp.divide,
    "//": lambda x, y: x // y,
    "%": lambda x, y: x % y,
    "minimum": jnp.minimum,
    "maximum": jnp.maximum,
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "-": lambda x: -x,
    "abs": jnp.abs,
    "exp": jnp.exp,
    "log": jnp.log,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "sqrt": jnp.sqrt,
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": jnp.less,
    "<=": jnp.less_equal,
    ">": jnp.greater,
    ">=": jnp.greater_equal,
    "==": jnp.equal,
    "!=": jnp.not_equal,
}


def dropped(seed: Array, chance: float, indices: Indices, kind: Any) -> Array:
    """The factors of dropout: see `tilefold.problems.dropout`. `seed` has two words of 32 bits."""
    k = indices["k"].astype(jnp.uint32)
    counter = [indices["q"], k >> 2, indices["h"], indices["b"]]
    words = _philox([x.astype(jnp.uint32) for x in counter], seed)
    place = k & 3
    word = functools.reduce(
        lambda found, n: jnp.where(place == n, words[n], found), range(1, 4), words[0]
    )
    return jnp.where(word >= np.uint32(threshold(chance)), factor(chance), 0.0).astype(kind)


def _philox(counter: Sequence[Array], seed: Array) -> tuple[Array, ...]:
    """The four words of a counter."""
    c0, c1, c2, c3 = counter
    for number in range(ROUNDS):
        k0, k1 = (seed[n] + np.uint32(number * step & 0xFFFFFFFF) for n, step in enumerate(WEYL))
        (high, low), (upper, lower) = _product(MULTIPLIERS[0], c0), _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = upper ^ c1 ^ k0, lower, high ^ c3 ^ k1, low
    return c0, c1, c2, c3


def _product(factor: int, x: Array) -> tuple[Array, Array]:
    """The high and the low word of a product; JAX has no integers of 64 bits by default."""
    f0, f1 = np.uint32(factor & 0xFFFF), np.uint32(factor >> 16)
    x0, x1 = x & 0xFFFF, x >> 16
    middle = f1 * x0 + (f0 * x0 >> 16)
    other = f0 * x1 + (middle & 0xFFFF)
    return f1 * x1 + (middle >> 16) + (other >> 16), np.uint32(factor) * x
