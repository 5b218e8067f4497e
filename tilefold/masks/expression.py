"""The expression language of masks: its nodes, and how a tree of them is folded.

A rule says which query may see which key. Bound to two lengths it becomes one tree of `nodes` over
the indices `q`, `k`, `b` (batch) and `h` (head). The tree is *folded* (see `fold`): exactly with
NumPy, over intervals to classify whole tiles, and to text inside a kernel. Nothing here knows which
fold will come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np

from tilefold.masks.nodes import (
    INDEX_NAMES,
    Binary,
    Boolean,
    Compare,
    Constant,
    Expression,
    Index,
    Integer,
    Logic,
    Lookup,
    Parameter,
    Slot,
    Table,
    Truth,
    TruthLookup,
    Unary,
    as_boolean,
    as_integer,
)

__all__ = [
    "INDEX_NAMES",
    "Binary",
    "Boolean",
    "Compare",
    "Constant",
    "Expression",
    "Index",
    "Integer",
    "Interpretation",
    "Logic",
    "Lookup",
    "Parameter",
    "Skeleton",
    "Slot",
    "Table",
    "Truth",
    "TruthLookup",
    "Unary",
    "as_boolean",
    "as_integer",
    "children",
    "evaluate",
    "names",
    "split",
]

Value = TypeVar("Value")


class Interpretation(Protocol[Value]):
    """What each node means in one fold."""

    def index(self, name: str) -> Value:
        """The value of `b`, `h`, `q` or `k`."""

    def constant(self, value: int) -> Value:
        """The value of a number."""

    def parameter(self, slot: int) -> Value:
        """The value of a kernel's parameter."""

    def truth(self, value: bool) -> Value:
        """The value of True or False."""

    def lookup(self, table: Table | Slot, indices: tuple[Value, ...]) -> Value:
        """The value of `table[indices]`, a number or a truth as the table's type says."""

    def unary(self, operator: str, operand: Value) -> Value:
        """The value of `-x` or `abs(x)`."""

    def binary(self, operator: str, left: Value, right: Value) -> Value:
        """The value of `x + y`, `x - y`, `x * y`, `x // y` or `x % y`."""

    def compare(self, operator: str, left: Value, right: Value) -> Value:
        """The truth of `x < y` or a sibling."""

    def logic(self, operator: str, operands: tuple[Value, ...]) -> Value:
        """The truth of `x & y`, `x | y` or `~x`."""


def evaluate(
    expression: Expression, algebra: Interpretation[Value], known: Mapping[int, Value] | None = None
) -> Value:
    """The value of a tree in an algebra; shared nodes are computed once.

    `known` gives values to some nodes beforehand, by `id(node)`.
    """
    return _visit(dict(known or {}), algebra, expression)


def _visit(done: dict[int, Value], algebra: Interpretation[Value], node: Expression) -> Value:
    # No closure that calls itself: such a cycle would keep the values until the next collection.
    if id(node) not in done:
        done[id(node)] = _step(node, algebra, partial(_visit, done, algebra))
    return done[id(node)]


def _step(
    node: Expression, algebra: Interpretation[Value], visit: Callable[[Expression], Value]
) -> Value:
    match node:
        case Index(name):
            return algebra.index(name)
        case Constant(value):
            return algebra.constant(value)
        case Parameter(slot):
            return algebra.parameter(slot)
        case Truth(value):
            return algebra.truth(value)
        case Lookup(table, indices) | TruthLookup(table, indices):
            return algebra.lookup(table, tuple(visit(index) for index in indices))
        case Unary(operator, operand):
            return algebra.unary(operator, visit(operand))
        case Binary(operator, left, right):
            return algebra.binary(operator, visit(left), visit(right))
        case Compare(operator, left, right):
            return algebra.compare(operator, visit(left), visit(right))
        case Logic(operator, operands):
            return algebra.logic(operator, tuple(visit(operand) for operand in operands))
    raise AssertionError(f"unknown node {type(node).__name__}")


def children(node: Expression) -> tuple[Expression, ...]:
    """The nodes that a node is made of."""
    match node:
        case Binary(_, left, right) | Compare(_, left, right):
            return (left, right)
        case Unary(_, operand):
            return (operand,)
        case Logic(_, operands):
            return operands
        case Lookup(_, indices) | TruthLookup(_, indices):
            return indices
    return ()


def names(expression: Expression) -> frozenset[str]:
    """The indices that a tree reads, of `b`, `h`, `q`, `k`."""
    return evaluate(expression, _Names())


class _Names:
    def index(self, name: str) -> frozenset[str]:
        return frozenset((name,))

    def constant(self, value: int) -> frozenset[str]:
        return frozenset()

    def parameter(self, slot: int) -> frozenset[str]:
        return frozenset()

    def truth(self, value: bool) -> frozenset[str]:
        return frozenset()

    def lookup(self, table: Table | Slot, indices: tuple[frozenset[str], ...]) -> frozenset[str]:
        return frozenset().union(*indices)

    def unary(self, operator: str, operand: frozenset[str]) -> frozenset[str]:
        return operand

    def binary(self, operator: str, left: frozenset[str], right: frozenset[str]) -> frozenset[str]:
        return left | right

    def compare(self, operator: str, left: frozenset[str], right: frozenset[str]) -> frozenset[str]:
        return left | right

    def logic(self, operator: str, operands: tuple[frozenset[str], ...]) -> frozenset[str]:
        return frozenset().union(*operands)


@dataclass(frozen=True)
class Skeleton:
    """A tree without its numbers and data: all that a kernel's text depends on. Equal by its text.

    Constants become parameters, except divisors (a division by a constant compiles to a
    multiplication); tables become slots.
    """

    text: str
    expression: Boolean
    parameters: int
    slots: tuple[Slot, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Skeleton) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


def split(expression: Boolean) -> tuple[Skeleton, tuple[int, ...], tuple[Table, ...]]:
    """A tree as its skeleton, the parameters' values and the tables, in the slots' order."""
    splitter = _Splitter()
    skeleton = evaluate(expression, splitter)
    assert isinstance(skeleton, Boolean)
    slots = tuple(
        Slot(number, str(table.array.dtype), table.array.ndim)
        for number, table in enumerate(splitter.tables)
    )
    whole = Skeleton(str(skeleton), skeleton, len(splitter.parameters), slots)
    return whole, tuple(splitter.parameters), tuple(splitter.tables)


class _Splitter:
    def __init__(self) -> None:
        self.parameters: list[int] = []
        self.tables: list[Table] = []

    def index(self, name: str) -> Expression:
        return Index(name)

    def constant(self, value: int) -> Expression:
        return Constant(value)

    def parameter(self, slot: int) -> Expression:
        raise AssertionError("already a skeleton")

    def truth(self, value: bool) -> Expression:
        return Truth(value)

    def lookup(self, table: Table | Slot, indices: tuple[Expression, ...]) -> Expression:
        assert isinstance(table, Table)
        slot = Slot(len(self.tables), str(table.array.dtype), table.array.ndim)
        self.tables.append(table)
        kind = TruthLookup if table.array.dtype == np.bool_ else Lookup
        return kind(slot, tuple(self._number(index) for index in indices))

    def unary(self, operator: str, operand: Expression) -> Expression:
        return Unary(operator, self._number(operand))

    def binary(self, operator: str, left: Expression, right: Expression) -> Expression:
        keep = operator in ("//", "%")
        return Binary(
            operator, self._number(left), as_integer(right) if keep else self._number(right)
        )

    def compare(self, operator: str, left: Expression, right: Expression) -> Expression:
        return Compare(operator, self._number(left), self._number(right))

    def logic(self, operator: str, operands: tuple[Expression, ...]) -> Expression:
        return Logic(operator, tuple(as_boolean(operand) for operand in operands))

    def _number(self, node: Expression) -> Integer:
        if not isinstance(node, Constant):
            return as_integer(node)
        self.parameters.append(node.value)
        return Parameter(len(self.parameters) - 1)
