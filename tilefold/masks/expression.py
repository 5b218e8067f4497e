"""The expression language of masks: its nodes, and how a tree of nodes gets a meaning.

A rule says which query may see which key. Bound to two lengths it becomes one tree of `nodes` over
the indices `q`, `k`, `b` (batch) and `h` (head). An `Interpretation` gives a meaning to each kind
of node, and `evaluate` folds the tree with it: to exact values, to intervals over a tile, or to
kernel source. Nothing here knows which interpretation will come.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from tilefold.common.check import shown
from tilefold.masks.graph import ordered
from tilefold.masks.nodes import (
    Binary,
    Compare,
    Constant,
    FromInteger,
    Index,
    Logic,
    Lookup,
    Parameter,
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
)
from tilefold.masks.symbols import (
    INDEX_NAMES,
    Boolean,
    Expression,
    Integer,
    Real,
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
    "Real",
    "RealBinary",
    "RealConstant",
    "RealLookup",
    "RealParameter",
    "RealUnary",
    "Rebuild",
    "ScoreValue",
    "Several",
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
]

MOST_OPERATIONS = 4096
"""The largest expression of a kernel. With 2,403 operations, of joined windows, the forward kernel
compiled in 25 s and the backward one in 57 s (two busy cores of a Xeon, AVX-512, head size 8)."""

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
