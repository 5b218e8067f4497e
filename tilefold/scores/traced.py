"""Modifications of a user's own: a function of symbols, traced to an expression."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilefold.common.check import shown
from tilefold.common.computed import computed
from tilefold.common.foreign_arrays import compiled_by_torch
from tilefold.masks.expression import (
    INDEX_NAMES,
    AnyTable,
    Boolean,
    Expression,
    Index,
    Real,
    Rebuild,
    ScoreValue,
    as_real,
    evaluate,
)
from tilefold.masks.graph import hashed, same
from tilefold.masks.tables import Input
from tilefold.masks.traced import called, spelled, symbols_in_graph, symbols_of
from tilefold.scores.score import Renamed, Score, Sizes


@dataclass(frozen=True, repr=False, eq=False)
class Traced(Score):
    """See `score`."""

    traced: Real
    parameters: tuple[str, ...]

    def bind(self, s: Real, sizes: Sizes) -> Real:
        """The traced expression over another score."""
        if isinstance(s, ScoreValue):
            return self.traced
        return as_real(evaluate(self.traced, _Changed(s, None)))

    def renamed(self, rename: Renamed) -> Score:
        """The same expression with other inputs."""
        return Traced(as_real(evaluate(self.traced, _Changed(None, rename))), self.parameters)

    @computed
    def _hash(self) -> int:
        return hashed(self.traced)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Traced) and same(self.traced, other.traced)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        """A hash belongs to its process."""
        return Traced, (self.traced, self.parameters)

    def __repr__(self) -> str:
        return spelled("score", self.parameters, self.traced)


class _Changed(Rebuild):
    """An expression over another score, or with other inputs."""

    def __init__(self, s: Real | None, rename: Renamed | None) -> None:
        self.s, self.rename = s, rename

    def score(self) -> Expression:
        return ScoreValue() if self.s is None else self.s

    def lookup(self, table: AnyTable, indices: tuple[Expression, ...]) -> Expression:
        if isinstance(table, Input) and self.rename is not None:
            table = self.rename(table)
        return super().lookup(table, indices)


def score(function: Callable[..., Any]) -> Score:
    """A modification of your own: a function of the score s and of b, h, q, k.

    >>> score(lambda s, q, k: s - 0.1 * abs(q - k))
    score(lambda s, q, k: s - (0.1 * abs((q - k))))

    The function is called once, with symbols, and must return a number. It may use + - * / and abs,
    // and % of integers by a positive constant, comparisons, & | ~ between them, and
    `tilefold.exp`, `log`, `tanh`, `sigmoid`, `sqrt`, `minimum`, `maximum`, `where`, and entries of
    arrays, `tilefold.table(array)[i, j]`. Its derivative is found from what it computes. A score of
    -inf hides the pair, as a mask does.

    Arguments:
        function: its parameters are any of s (the scaled score, or what the modification before has
            made of it), b (batch), h (head of the query), q (query), k (key), by name.

    Raises TypeError or ValueError for anything that cannot be traced.
    """
    symbols = {"s": ScoreValue(), **{name: Index(name) for name in INDEX_NAMES}}
    if compiled_by_torch():
        inlined = symbols_in_graph(function, symbols)
        return Traced(as_real(function(**inlined)), tuple(inlined))
    taken = symbols_of(function, "score", symbols)
    return Traced(_called(function, taken), tuple(taken))


def _called(function: Callable[..., Any], symbols: dict[str, Any]) -> Real:
    """The number that a function makes of symbols."""
    may = (
        "numbers, + - * / and abs, comparisons, tilefold.exp, log, tanh, sigmoid, sqrt, minimum,"
        " maximum, where, and tilefold.table(array)[i, j]"
    )
    made = called(function, "score", symbols, "number", may)
    if isinstance(made, Boolean):
        raise TypeError(f"score: the function returned the truth `{made}`; write where(...)")
    try:
        return as_real(made)
    except TypeError:
        raise TypeError(f"score: the function returned {shown(made)}, no number") from None
