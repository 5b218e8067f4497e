"""A tree without its numbers and tables: all that kernel source depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from tilefold.masks.expression import Rebuild, evaluate
from tilefold.masks.nodes import Binary, Constant, Parameter, RealConstant, RealParameter
from tilefold.masks.symbols import Expression, Integer, Real, as_integer, as_real
from tilefold.masks.tables import AnyTable, Declared, Slot

KEPT_REALS = (0.0, 1.0, -1.0, math.inf, -math.inf)
"""Real numbers that stay in a skeleton: kernels compute with them for nothing, or test for them."""


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

    @property
    def shown(self) -> str:
        """The text for people: several expressions are separated by commas."""
        parts = getattr(self.expression, "parts", (self.expression,))
        return ", ".join(map(str, parts))

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
