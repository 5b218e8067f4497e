"""The expression language of masks: its nodes, and how a tree of nodes gets a meaning.

A rule says which query may see which key. Bound to two lengths it becomes one tree of `nodes` over
the indices `q`, `k`, `b` (batch) and `h` (head). An `Interpretation` gives a meaning to each kind
of node, and `evaluate` folds the tree with it: to exact values, to intervals over a tile, or to
kernel source. Nothing here knows which interpretation will come.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from tilefold.common.check import shown
from tilefold.masks.graph import ordered
from tilefold.masks.nodes import (
    INDEX_NAMES,
    Binary,
    Boolean,
    Compare,
    Constant,
    Expression,
    FromInteger,
    Index,
    Integer,
    Logic,
    Lookup,
    Parameter,
    Real,
    RealBinary,
    RealConstant,
    RealLookup,
    RealParameter,
    RealUnary,
    ScoreValue,
    Several,
    Truth,
    TruthLookup,
    Unary,
    Where,
    as_boolean,
    as_integer,
    as_real,
    is_real,
)
from tilefold.masks.tables import AnyTable, Declared, Slot, Table

__all__ = [
    "INDEX_NAMES",
    "AnyTable",
    "Binary",
    "Boolean",
    "Collect",
    "Compare",
    "Constant",
    "Declared",
    "Expression",
    "FromInteger",
    "Index",
    "Integer",
    "Interpretation",
    "Logic",
    "Lookup",
    "Parameter",
    "Parts",
    "Real",
    "RealBinary",
    "RealConstant",
    "RealLookup",
    "RealParameter",
    "RealUnary",
    "Rebuild",
    "ScoreValue",
    "Several",
    "Skeleton",
    "Slot",
    "Table",
    "Truth",
    "TruthLookup",
    "Unary",
    "Where",
    "as_boolean",
    "as_integer",
    "as_real",
    "check_size",
    "evaluate",
    "names",
    "split",
]

MOST_OPERATIONS = 4096
"""The largest expression of a kernel. With 2,403 operations, of joined windows, the forward kernel
compiled in 25 s and the backward one in 57 s (two busy cores of a Xeon, AVX-512, head size 8)."""

KEPT_REALS = (0.0, 1.0, -1.0, math.inf, -math.inf)
"""Real numbers that stay in a skeleton: kernels compute with them for nothing, or test for them."""

KEPT_VALUES = 64
"""The largest expression all of whose values are kept while it is folded."""

Value = TypeVar("Value")


class Interpretation(Generic[Value]):
    """The meaning of each kind of node, given the meanings of its children.

    A kind without a method of its own means `other`. So a new kind of node costs a method in the
    interpretations that compute with it, and nothing in those that only walk the tree.
    """

    def other(self, kind: str, values: tuple[Value, ...]) -> Value:
        """The value of a kind of node that this interpretation does not define."""
        raise NotImplementedError(f"{type(self).__name__} gives no meaning to a node of {kind}")

    def index(self, name: str) -> Value:
        """The value of `b`, `h`, `q` or `k`."""
        return self.other("Index", ())

    def constant(self, value: int) -> Value:
        """The value of an integer."""
        return self.other("Constant", ())

    def parameter(self, slot: int, dtype: str) -> Value:
        """The value of a kernel's parameter."""
        return self.other("Parameter", ())

    def truth(self, value: bool) -> Value:
        """The value of True or False."""
        return self.other("Truth", ())

    def lookup(self, table: AnyTable, indices: tuple[Value, ...]) -> Value:
        """The value of `table[indices]`: an integer, truth or real number, as its type says."""
        return self.other("Lookup", indices)

    def unary(self, operator: str, operand: Value) -> Value:
        """The value of `-x` or `abs(x)`."""
        return self.other("Unary", (operand,))

    def binary(self, operator: str, left: Value, right: Value) -> Value:
        """The value of `x + y`, `-`, `*`, `//`, `%`, `minimum` or `maximum`."""
        return self.other("Binary", (left, right))

    def score(self) -> Value:
        """The value of the score `s`."""
        return self.other("ScoreValue", ())

    def real(self, value: float) -> Value:
        """The value of a real number."""
        return self.other("RealConstant", ())

    def from_integer(self, operand: Value) -> Value:
        """The value of an integer as a real number."""
        return self.other("FromInteger", (operand,))

    def real_unary(self, operator: str, operand: Value) -> Value:
        """The value of `-x` or of a function: abs, exp, log, tanh, sigmoid, sqrt."""
        return self.other("RealUnary", (operand,))

    def real_binary(self, operator: str, left: Value, right: Value) -> Value:
        """The value of `x + y`, `-`, `*`, `/`, `minimum` or `maximum` of real numbers."""
        return self.other("RealBinary", (left, right))

    def where(self, truth: Value, then: Value, otherwise: Value) -> Value:
        """The value of `where(truth, x, y)`."""
        return self.other("Where", (truth, then, otherwise))

    def several(self, parts: tuple[Value, ...]) -> Value:
        """The values of several expressions."""
        return self.other("Several", parts)

    def compare(self, operator: str, left: Value, right: Value) -> Value:
        """The truth of `x < y` or another comparison."""
        return self.other("Compare", (left, right))

    def logic(self, operator: str, operands: tuple[Value, ...]) -> Value:
        """The truth of `x & y`, `x | y` or `~x`."""
        return self.other("Logic", operands)


def evaluate(
    expression: Expression,
    interpretation: Interpretation[Value],
    known: Mapping[int, Value] | None = None,
) -> Value:
    """The value of an expression in an interpretation; shared nodes are computed once.

    `known` gives values to some nodes beforehand, by `id(node)`. In a large expression a value goes
    with the last node that it is a part of: values may be large arrays.
    """
    done: dict[int, Value] = dict(known or {})
    if id(expression) in done:
        return done[id(expression)]
    order = ordered(expression, done)
    last: dict[int, Expression] = {}
    if len(order) > KEPT_VALUES:
        last = {id(child): node for node, children in order for child in children}
    for node, children in order:
        values = tuple([done[id(child)] for child in children]) if children else ()
        meaning = _MEANINGS.get(type(node), _other)
        done[id(node)] = meaning(interpretation, node, values)
        if last:
            for child in set(map(id, children)):
                if last[child] is node:
                    del done[child]
    return done[id(expression)]


def _other(given: Interpretation[Any], node: Any, values: tuple[Any, ...]) -> Any:
    return given.other(type(node).__name__, values)


_MEANINGS: Mapping[type, Callable[[Interpretation[Any], Any, tuple[Any, ...]], Any]] = {
    Index: lambda given, node, values: given.index(node.name),
    Constant: lambda given, node, values: given.constant(node.value),
    Parameter: lambda given, node, values: given.parameter(node.slot, node.dtype),
    Truth: lambda given, node, values: given.truth(node.value),
    Lookup: lambda given, node, values: given.lookup(node.table, values),
    TruthLookup: lambda given, node, values: given.lookup(node.table, values),
    Unary: lambda given, node, values: given.unary(node.operator, *values),
    Binary: lambda given, node, values: given.binary(node.operator, *values),
    Compare: lambda given, node, values: given.compare(node.operator, *values),
    Logic: lambda given, node, values: given.logic(node.operator, values),
    ScoreValue: lambda given, node, values: given.score(),
    RealConstant: lambda given, node, values: given.real(node.value),
    RealParameter: lambda given, node, values: given.parameter(node.slot, node.dtype),
    RealLookup: lambda given, node, values: given.lookup(node.table, values),
    FromInteger: lambda given, node, values: given.from_integer(*values),
    RealUnary: lambda given, node, values: given.real_unary(node.operator, *values),
    RealBinary: lambda given, node, values: given.real_binary(node.operator, *values),
    Where: lambda given, node, values: given.where(*values),
    Several: lambda given, node, values: given.several(values),
}
"""The method that gives each kind of node its meaning."""


class Collect(Interpretation[Value], ABC):
    """An interpretation that combines the values of a node's children, whatever the node is."""

    @abstractmethod
    def combine(self, values: tuple[Value, ...]) -> Value:
        """The value of a node from the values of its children; of a leaf from none."""

    def other(self, kind: str, values: tuple[Value, ...]) -> Value:
        """The meanings of all kinds of nodes."""
        return self.combine(values)


class Rebuild(Interpretation[Expression]):
    """An interpretation that makes the same tree anew; a subclass changes some of the nodes."""

    def index(self, name: str) -> Expression:
        """The index itself."""
        return Index(name)

    def constant(self, value: int) -> Expression:
        """The constant itself."""
        return Constant(value)

    def parameter(self, slot: int, dtype: str) -> Expression:
        """The parameter itself."""
        return RealParameter(slot) if dtype == "real" else Parameter(slot, dtype)

    def truth(self, value: bool) -> Expression:
        """The truth itself."""
        return Truth(value)

    def lookup(self, table: AnyTable, indices: tuple[Expression, ...]) -> Expression:
        """A lookup at the new indices."""
        kind = _LOOKUPS.get(table.dtype, RealLookup)
        return kind(table, tuple(self.operand(index) for index in indices))

    def unary(self, operator: str, operand: Expression) -> Expression:
        """The operator on the new operand."""
        return Unary(operator, self.operand(operand))

    def binary(self, operator: str, left: Expression, right: Expression) -> Expression:
        """The operator on the new operands."""
        return Binary(operator, self.operand(left), self.operand(right))

    def compare(self, operator: str, left: Expression, right: Expression) -> Expression:
        """The comparison of the new operands."""
        sides = [self.real_operand(x) if is_real(x) else self.operand(x) for x in (left, right)]
        return Compare(operator, *sides)

    def logic(self, operator: str, operands: tuple[Expression, ...]) -> Expression:
        """The operator on the new operands."""
        return Logic(operator, tuple(as_boolean(operand) for operand in operands))

    def score(self) -> Expression:
        """The score itself."""
        return ScoreValue()

    def real(self, value: float) -> Expression:
        """The number itself."""
        return RealConstant(value)

    def from_integer(self, operand: Expression) -> Expression:
        """The new integer as a real number."""
        return FromInteger(self.operand(operand))

    def real_unary(self, operator: str, operand: Expression) -> Expression:
        """The function of the new operand."""
        return RealUnary(operator, self.real_operand(operand))

    def real_binary(self, operator: str, left: Expression, right: Expression) -> Expression:
        """The operator on the new operands."""
        return RealBinary(operator, self.real_operand(left), self.real_operand(right))

    def where(self, truth: Expression, then: Expression, otherwise: Expression) -> Expression:
        """The choice between the new numbers."""
        sides = self.real_operand(then), self.real_operand(otherwise)
        return Where(as_boolean(truth), *sides)

    def several(self, parts: tuple[Expression, ...]) -> Expression:
        """The new expressions."""
        return Several(tuple([self.real_operand(x) if is_real(x) else x for x in parts]))

    def operand(self, node: Expression) -> Integer:
        """The operand of a new node: the value itself, unless a subclass replaces it."""
        return as_integer(node)

    def real_operand(self, node: Expression) -> Real:
        """The same of a real number."""
        return as_real(node)


_LOOKUPS = {"bool": TruthLookup, "int32": Lookup}


def names(expression: Expression) -> frozenset[str]:
    """The indices that a tree reads, of `b`, `h`, `q`, `k`."""
    return evaluate(expression, _Names())


def check_size(rule: object, expression: Expression) -> None:
    """Raises ValueError for a rule or a score that has too many operations to be compiled."""
    nodes = ordered(expression)
    found = sum(bool(children) for _, children in nodes)
    if found > MOST_OPERATIONS:
        mask = isinstance(expression, Boolean)
        language = "mask" if mask else "score"
        instead = "dense(mask.to_dense(len_q, len_k))" if mask else "bias(array)"
        raise ValueError(
            f"the {language} {shown(rule)} has {found} operations, at most {MOST_OPERATIONS} are "
            f"compiled; write it as {instead}"
        )


class _Names(Collect[frozenset[str]]):
    def index(self, name: str) -> frozenset[str]:
        return frozenset((name,))

    def combine(self, values: tuple[frozenset[str], ...]) -> frozenset[str]:
        return frozenset().union(*values)


@dataclass(frozen=True)
class Skeleton:
    """A tree without its numbers and tables: all that kernel source depends on. Equal by `text`.

    Constants become parameters, except divisors: a division by a constant compiles to a
    multiplication. The real numbers 0, 1 and -1 stay, and infinities. Tables become slots.
    """

    text: str
    expression: Any
    parameters: tuple[Parameter | RealParameter, ...]
    slots: tuple[Slot, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Skeleton) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


class Parts(NamedTuple):
    """A tree as its skeleton, the values of its parameters, and its tables in the slots' order."""

    skeleton: Skeleton
    parameters: tuple[Any, ...]
    tables: tuple[Any, ...]

    @property
    def declared(self) -> tuple[Slot, ...]:
        """The slots of the tables whose data are known at launch only."""
        pairs = zip(self.skeleton.slots, self.tables, strict=True)
        return tuple(slot for slot, table in pairs if isinstance(table, Declared))


def split(expression: Expression, beside: Skeleton | None = None) -> Parts:
    """A tree as its skeleton and all that the skeleton leaves out.

    Parameters and slots are numbered from those of a skeleton `beside` it in the kernel on.
    """
    splitter = _Splitter(beside)
    skeleton = evaluate(expression, splitter)
    parameters, slots = tuple(splitter.parameters), tuple(splitter.slots)
    whole = Skeleton(str(skeleton), skeleton, parameters, slots)
    return Parts(whole, tuple(splitter.values), tuple(splitter.tables))


class _Splitter(Rebuild):
    """Takes integers and tables out of a tree, in the order in which its nodes are made."""

    def __init__(self, beside: Skeleton | None) -> None:
        self.first = len(beside.parameters) if beside else 0
        self.first_slot = len(beside.slots) if beside else 0
        self.parameters: list[Parameter | RealParameter] = []
        self.values: list[int | float] = []
        self.slots: list[Slot] = []
        self.tables: list[Any] = []

    def parameter(self, slot: int, dtype: str) -> Expression:
        raise AssertionError("already a skeleton")

    def lookup(self, table: AnyTable, indices: tuple[Expression, ...]) -> Expression:
        assert not isinstance(table, Slot), "already a skeleton"
        slot = Slot(self.first_slot + len(self.slots), table.dtype, len(table.shape))
        self.slots.append(slot)
        self.tables.append(table)
        return super().lookup(slot, indices)

    def binary(self, operator: str, left: Expression, right: Expression) -> Expression:
        if operator not in ("//", "%"):
            return super().binary(operator, left, right)
        return Binary(operator, self.operand(left), as_integer(right))

    def operand(self, node: Expression) -> Integer:
        if not isinstance(node, Constant):
            return as_integer(node)
        parameter = Parameter(self.first + len(self.parameters))
        self.parameters.append(parameter)
        self.values.append(node.value)
        return parameter

    def real_operand(self, node: Expression) -> Real:
        if not isinstance(node, RealConstant) or node.value in KEPT_REALS:
            return as_real(node)
        real = RealParameter(self.first + len(self.parameters))
        self.parameters.append(real)
        self.values.append(node.value)
        return real
