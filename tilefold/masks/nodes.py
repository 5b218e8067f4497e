"""The nodes of expressions: integers over the indices, truths, and real numbers.

A mask is a truth over integers. A score is a real number over the score `s` of a pair and the
indices. Operators on nodes build larger nodes: see `symbols`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from tilefold.masks.symbols import MADE, Boolean, Expression, Integer, Real
from tilefold.masks.tables import AnyTable


@dataclass(frozen=True, eq=False, repr=False)
class Index(Integer):
    """One of the four indices: `b`, `h`, `q` or `k`."""

    name: str

    @property
    def label(self) -> tuple[Any, ...]:
        """The name."""
        return (self.name,)

    def spelled(self, below: tuple[str, ...]) -> str:
        """The name."""
        return self.name


@dataclass(frozen=True, eq=False, repr=False)
class Constant(Integer):
    """An integer that is known when the rule is bound."""

    value: int

    @property
    def label(self) -> tuple[Any, ...]:
        """The number."""
        return (self.value,)

    def spelled(self, below: tuple[str, ...]) -> str:
        """The number."""
        return str(self.value)


@dataclass(frozen=True, eq=False, repr=False)
class _Received(Expression):
    """A number that a kernel receives at run time. In a `Skeleton` it replaces a constant."""

    slot: int
    dtype: str

    @property
    def name(self) -> str:
        """The name of the kernel's argument."""
        return f"p{self.slot}"

    @property
    def label(self) -> tuple[Any, ...]:
        """The slot and the type."""
        return (self.slot, self.dtype)

    def spelled(self, below: tuple[str, ...]) -> str:
        """The name, and the type unless it is "int"."""
        return self.name if self.dtype == "int" else f"{self.name}:{self.dtype}"


@dataclass(frozen=True, eq=False, repr=False)
class Parameter(_Received, Integer):
    """An integer that a kernel receives: as wide as the indices that it computes with."""

    dtype: str = "int"


@dataclass(frozen=True, eq=False, repr=False)
class _OneSided(Expression):
    """An operator or a function of one number."""

    operator: str
    operand: Any

    @property
    def children(self) -> tuple[Expression, ...]:
        """The operand."""
        return (self.operand,)

    @property
    def label(self) -> tuple[Any, ...]:
        """The operator."""
        return (self.operator,)

    def spelled(self, below: tuple[str, ...]) -> str:
        """`-x`, `abs(x)` or another function of x."""
        return f"-{below[0]}" if self.operator == "-" else f"{self.operator}({below[0]})"


class Unary(_OneSided, Integer):
    """`-x` or `abs(x)`."""


class RealUnary(_OneSided, Real):
    """`-x` or `abs(x)`, `exp(x)`, `log(x)`, `tanh(x)`, `sigmoid(x)`, `sqrt(x)`."""


@dataclass(frozen=True, eq=False, repr=False)
class _TwoSided(Expression):
    """An operator between two numbers."""

    operator: str
    left: Any
    right: Any

    @property
    def children(self) -> tuple[Expression, ...]:
        """The left side and the right side."""
        return (self.left, self.right)

    @property
    def label(self) -> tuple[Any, ...]:
        """The operator."""
        return (self.operator,)

    def spelled(self, below: tuple[str, ...]) -> str:
        """`(x + y)`, or `minimum(x, y)`."""
        if self.operator in ("minimum", "maximum"):
            return f"{self.operator}({below[0]}, {below[1]})"
        return f"({below[0]} {self.operator} {below[1]})"


class Binary(_TwoSided, Integer):
    """`x + y`, `x - y`, `x * y`, `minimum(x, y)`, `maximum(x, y)`.

    With a positive constant on the right also `x // y` and `x % y`.
    """


class RealBinary(_TwoSided, Real):
    """`x + y`, `x - y`, `x * y`, `x / y`, `minimum(x, y)`, `maximum(x, y)`."""

    def spelled(self, below: tuple[str, ...]) -> str:
        """`(x + y)`, or `minimum(x, y)`."""
        return super().spelled(below if self.operator == "/" else _with_points(self, below))


@dataclass(frozen=True, eq=False, repr=False)
class _Entry(Expression):
    """An entry of a table."""

    table: AnyTable
    indices: tuple[Integer, ...]

    @property
    def children(self) -> tuple[Expression, ...]:
        """The indices."""
        return self.indices

    @property
    def label(self) -> tuple[Any, ...]:
        """The table."""
        return (self.table,)

    @classmethod
    def made(cls, label: tuple[Any, ...], children: tuple[Any, ...]) -> Any:
        """The entry of the table at these indices."""
        return cls(label[0], children)

    def spelled(self, below: tuple[str, ...]) -> str:
        """`table[i, j]`."""
        return f"{self.table}[{', '.join(below)}]"


class Lookup(_Entry, Integer):
    """An entry `table[i, j, ...]` of an int32 table; its indices are within the table."""


class TruthLookup(_Entry, Boolean):
    """An entry `table[i, j, ...]` of a boolean table; its indices are within the table."""


class RealLookup(_Entry, Real):
    """An entry `table[i, j, ...]` of an array of floats; its indices are within the array."""


@dataclass(frozen=True, eq=False, repr=False)
class Truth(Boolean):
    """Always true, or always false."""

    value: bool

    @property
    def label(self) -> tuple[Any, ...]:
        """The truth."""
        return (self.value,)

    def spelled(self, below: tuple[str, ...]) -> str:
        """True or False."""
        return str(self.value)


@dataclass(frozen=True, eq=False, repr=False)
class ScoreValue(Real):
    """The score `s` of a pair: scale * (q . k), or what the modification before has made of it."""

    def spelled(self, below: tuple[str, ...]) -> str:
        """`s`."""
        return "s"


@dataclass(frozen=True, eq=False, repr=False)
class RealConstant(Real):
    """A real number that is known when the score is bound."""

    value: float

    @property
    def label(self) -> tuple[Any, ...]:
        """The number, and its sign, which tells 0.0 from -0.0."""
        return ("nan" if math.isnan(self.value) else self.value, math.copysign(1.0, self.value))

    @classmethod
    def made(cls, label: tuple[Any, ...], children: tuple[Any, ...]) -> Any:
        """The constant."""
        return cls(float(label[0]))

    def spelled(self, below: tuple[str, ...]) -> str:
        """The number; a whole one as Python writes an integer, which reads as the same node."""
        whole = self.value.is_integer() and 0 < abs(self.value) < 2**53
        return str(int(self.value)) if whole else repr(self.value)


@dataclass(frozen=True, eq=False, repr=False)
class RealParameter(_Received, Real):
    """A real number that a kernel receives: its word has the bits of a double."""

    dtype: str = "real"


@dataclass(frozen=True, eq=False, repr=False)
class FromInteger(Real):
    """An integer as a real number."""

    operand: Integer

    @property
    def children(self) -> tuple[Expression, ...]:
        """The integer."""
        return (self.operand,)

    def spelled(self, below: tuple[str, ...]) -> str:
        """The integer: beside a real number Python writes it so."""
        return below[0]


@dataclass(frozen=True, eq=False, repr=False)
class Where(Real):
    """`where(truth, x, y)`: x where the truth holds, else y."""

    truth: Boolean
    then: Real
    otherwise: Real

    @property
    def children(self) -> tuple[Expression, ...]:
        """The truth and both numbers."""
        return (self.truth, self.then, self.otherwise)

    def spelled(self, below: tuple[str, ...]) -> str:
        """`where(truth, x, y)`."""
        return f"where({', '.join(below)})"


@dataclass(frozen=True, eq=False, repr=False)
class Several(Expression):
    """Several expressions, which may share nodes: what a kernel computes at once."""

    parts: tuple[Expression, ...]

    @property
    def children(self) -> tuple[Expression, ...]:
        """The expressions."""
        return self.parts

    @classmethod
    def made(cls, label: tuple[Any, ...], children: tuple[Any, ...]) -> Any:
        """These expressions."""
        return cls(children)

    def spelled(self, below: tuple[str, ...]) -> str:
        """`(x, y)`."""
        return f"({', '.join(below)},)"


class Compare(_TwoSided, Boolean):
    """A comparison: `x < y`, `<=`, `>`, `>=`, `==` or `!=`."""

    def spelled(self, below: tuple[str, ...]) -> str:
        """`(x < y)`."""
        return super().spelled(_with_points(self, below))


def _with_points(node: _TwoSided, below: tuple[str, ...]) -> tuple[str, ...]:
    """The texts of two sides; `2.0` for a constant where `2` would be read as an integer."""
    sides = (node.left, node.right)
    if not all(isinstance(side, (FromInteger, RealConstant)) for side in sides):
        return below
    return tuple(
        repr(side.value) if isinstance(side, RealConstant) else text
        for side, text in zip(sides, below, strict=True)
    )


@dataclass(frozen=True, eq=False, repr=False)
class Logic(Boolean):
    """`x & y`, `x | y` or `~x`."""

    operator: str
    operands: tuple[Boolean, ...]

    @property
    def children(self) -> tuple[Expression, ...]:
        """The operands."""
        return self.operands

    @property
    def label(self) -> tuple[Any, ...]:
        """The operator."""
        return (self.operator,)

    @classmethod
    def made(cls, label: tuple[Any, ...], children: tuple[Any, ...]) -> Any:
        """The operator on these operands."""
        return cls(label[0], children)

    def spelled(self, below: tuple[str, ...]) -> str:
        """`~x` or `(x & y & z)`."""
        if self.operator == "~":
            return f"~{below[0]}"
        # Python reads from the left, and would make one of two constants: the second goes along
        # with what follows.
        constants = len(list(takewhile(lambda one: isinstance(one, Truth), self.operands)))
        apart = max(0, min(constants - 1, len(below) - 2))
        text = f" {self.operator} ".join(below[apart:])
        for constant in reversed(below[:apart]):
            text = f"{constant} {self.operator} ({text})"
        return f"({text})"


for _kind in (
    Truth,
    Constant,
    RealConstant,
    FromInteger,
    Unary,
    RealUnary,
    Binary,
    RealBinary,
    Compare,
    Logic,
):
    setattr(MADE, _kind.__name__, _kind)
