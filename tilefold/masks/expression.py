"""The expression language of masks: its nodes, and how a tree of nodes gets a meaning.

A rule says which query may see which key. Bound to two lengths it becomes one tree of `nodes` over
the indices `q`, `k`, `b` (batch) and `h` (head). An `Interpretation` gives a meaning to each kind
of node, and `evaluate` folds the tree with it: to exact values, to intervals over a tile, or to
kernel source. Nothing here knows which interpretation will come.
"""

from __future__ import annotations

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
    Index,
    Integer,
    Logic,
    Lookup,
    Parameter,
    Truth,
    TruthLookup,
    Unary,
    as_boolean,
    as_integer,
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
    "Index",
    "Integer",
    "Interpretation",
    "Logic",
    "Lookup",
    "Parameter",
    "Parts",
    "Rebuild",
    "Skeleton",
    "Slot",
    "Table",
    "Truth",
    "TruthLookup",
    "Unary",
    "as_boolean",
    "as_integer",
    "check_size",
    "evaluate",
    "names",
    "split",
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
        """The value of `table[indices]`: an integer or a truth, as the table's type says."""
        return self.other("Lookup", indices)

    def unary(self, operator: str, operand: Value) -> Value:
        """The value of `-x` or `abs(x)`."""
        return self.other("Unary", (operand,))

    def binary(self, operator: str, left: Value, right: Value) -> Value:
        """The value of `x + y`, `x - y`, `x * y`, `x // y` or `x % y`."""
        return self.other("Binary", (left, right))

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
        return Parameter(slot, dtype)

    def truth(self, value: bool) -> Expression:
        """The truth itself."""
        return Truth(value)

    def lookup(self, table: AnyTable, indices: tuple[Expression, ...]) -> Expression:
        """A lookup at the new indices."""
        kind = TruthLookup if table.dtype == "bool" else Lookup
        return kind(table, tuple(self.operand(index) for index in indices))

    def unary(self, operator: str, operand: Expression) -> Expression:
        """The operator on the new operand."""
        return Unary(operator, self.operand(operand))

    def binary(self, operator: str, left: Expression, right: Expression) -> Expression:
        """The operator on the new operands."""
        return Binary(operator, self.operand(left), self.operand(right))

    def compare(self, operator: str, left: Expression, right: Expression) -> Expression:
        """The comparison of the new operands."""
        return Compare(operator, self.operand(left), self.operand(right))

    def logic(self, operator: str, operands: tuple[Expression, ...]) -> Expression:
        """The operator on the new operands."""
        return Logic(operator, tuple(as_boolean(operand) for operand in operands))

    def operand(self, node: Expression) -> Integer:
        """The operand of a new node: the value itself, unless a subclass replaces it."""
        return as_integer(node)


def names(expression: Expression) -> frozenset[str]:
    """The indices that a tree reads, of `b`, `h`, `q`, `k`."""
    return evaluate(expression, _Names())


def check_size(rule: object, expression: Expression) -> None:
    """Raises ValueError for a rule whose expression has too many operations to be compiled."""
    nodes = ordered(expression)
    found = sum(bool(children) for _, children in nodes)
    if found > MOST_OPERATIONS:
        raise ValueError(
            f"the mask {shown(rule)} has {found} operations, at most {MOST_OPERATIONS} are "
            "compiled; write it as dense(mask.to_dense(len_q, len_k))"
        )


class _Names(Collect[frozenset[str]]):
    def index(self, name: str) -> frozenset[str]:
        return frozenset((name,))

    def combine(self, values: tuple[frozenset[str], ...]) -> frozenset[str]:
        return frozenset().union(*values)


@dataclass(frozen=True)
class Skeleton:
    """A tree without its integers and tables: all that kernel source depends on. Equal by `text`.

    Constants become parameters, except divisors: a division by a constant compiles to a
    multiplication. Tables become slots.
    """

    text: str
    expression: Boolean
    parameters: tuple[Parameter, ...]
    slots: tuple[Slot, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Skeleton) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


class Parts(NamedTuple):
    """A tree as its skeleton, the values of its parameters, and its tables in the slots' order."""

    skeleton: Skeleton
    parameters: tuple[int, ...]
    tables: tuple[Table | Declared, ...]

    @property
    def declared(self) -> tuple[Slot, ...]:
        """The slots of the tables whose data are known at launch only."""
        pairs = zip(self.skeleton.slots, self.tables, strict=True)
        return tuple(slot for slot, table in pairs if isinstance(table, Declared))


def split(expression: Boolean) -> Parts:
    """A tree as its skeleton and all that the skeleton leaves out."""
    splitter = _Splitter()
    skeleton = evaluate(expression, splitter)
    assert isinstance(skeleton, Boolean)
    parameters, slots = tuple(splitter.parameters), tuple(splitter.slots)
    whole = Skeleton(str(skeleton), skeleton, parameters, slots)
    return Parts(whole, tuple(splitter.values), tuple(splitter.tables))


class _Splitter(Rebuild):
    """Takes integers and tables out of a tree, in the order in which its nodes are made."""

    def __init__(self) -> None:
        self.parameters: list[Parameter] = []
        self.values: list[int] = []
        self.slots: list[Slot] = []
        self.tables: list[Table | Declared] = []

    def parameter(self, slot: int, dtype: str) -> Expression:
        raise AssertionError("already a skeleton")

    def lookup(self, table: AnyTable, indices: tuple[Expression, ...]) -> Expression:
        assert not isinstance(table, Slot), "already a skeleton"
        slot = Slot(len(self.slots), table.dtype, len(table.shape))
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
        self.parameters.append(Parameter(len(self.parameters), "int"))
        self.values.append(node.value)
        return self.parameters[-1]
