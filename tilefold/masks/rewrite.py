"""Expressions made from other ones: with their declared tables filled, or over shifted indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from tilefold.masks.expression import (
    AnyTable,
    Boolean,
    Declared,
    Expression,
    Index,
    Rebuild,
    as_boolean,
    evaluate,
)
from tilefold.masks.tables import Given, Input


def fill(expression: Boolean, arrays: Sequence[NDArray[Any]]) -> Boolean:
    """An expression with arrays in place of its declared tables, in the order of `Parts.declared`.

    Raises ValueError for an array that does not keep what was declared, and for a wrong number.
    """
    filler = _Filler(arrays)
    filled = evaluate(expression, filler)
    if filler.used != len(arrays):
        raise ValueError(f"{filler.used} tables are declared, got {len(arrays)} arrays")
    return as_boolean(filled)


class _Filler(Rebuild):
    def __init__(self, arrays: Sequence[NDArray[Any]]) -> None:
        self.arrays = arrays
        self.used = 0

    def lookup(self, table: AnyTable, indices: tuple[Expression, ...]) -> Expression:
        if isinstance(table, Declared):
            self.used += 1
            if self.used <= len(self.arrays):
                table = table.fill(self.arrays[self.used - 1])
        return super().lookup(table, indices)


def shift(expression: Boolean, q0: int, k0: int) -> Boolean:
    """An expression over the indices of a piece: its query 0 is query q0, its key 0 is key k0.

    A shift by 0 is an addition too, so all pieces of one mask share a kernel.

    >>> print(shift(Index("q") - 5 >= Index("k"), 64, 0))
    (((q + 64) - 5) >= (k + 0))
    """
    return as_boolean(evaluate(expression, _Renamer({"q": Index("q") + q0, "k": Index("k") + k0})))


def place(expression: Boolean, b0: int, h0: int) -> Boolean:
    """An expression over the indices of a part: its entry 0 of the batch is b0, its head 0 is h0.

    >>> print(place(Index("h") > Index("k"), 0, 4))
    ((h + 4) > k)
    """
    return as_boolean(evaluate(expression, Placer(b0, h0)))


def repeat(expression: Boolean, batch: int, own: Sequence[int] = (), copies: int = 1) -> Boolean:
    """An expression over `copies` batches in a row, each of `batch` entries.

    The tables of the numbers `own`, which come with each call, have a first axis with an entry for
    each of these batches.

    >>> print(repeat(Index("b") > Index("k"), 4))
    ((b % 4) > k)
    """
    return as_boolean(evaluate(expression, Repeater(batch, own, copies)))


class _Renamer(Rebuild):
    """Other values for some indices. Each is one node, so that a kernel computes it once."""

    def __init__(self, values: Mapping[str, Expression]) -> None:
        self.values = values

    def index(self, name: str) -> Expression:
        return self.values[name] if name in self.values else Index(name)


class Placer(_Renamer):
    """b and h are counted from the first of a part."""

    def __init__(self, b0: int, h0: int) -> None:
        super().__init__({"b": Index("b") + b0, "h": Index("h") + h0})


class Repeater(_Renamer):
    """b is counted within a batch, and arrays of its own are asked for those of the batch."""

    def __init__(self, batch: int, own: Sequence[int], copies: int) -> None:
        super().__init__({"b": Index("b") % batch})
        self.which, self.own, self.copies = Index("b") // batch, own, copies

    def lookup(self, table: AnyTable, indices: tuple[Expression, ...]) -> Expression:
        """The entry of the array of the batch, where each batch has an array."""
        if isinstance(table, Given | Input) and table.number in self.own:
            table = replace(table, shape=(self.copies, *table.shape))
            indices = (self.which, *indices)
        return super().lookup(table, indices)
