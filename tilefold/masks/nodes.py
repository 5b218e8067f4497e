"""The nodes of a mask's expression: integers over the indices, and truths over integers.

Operators on nodes build larger nodes, so a function of symbols traces itself. Operators mean what
they mean in Python: `//` and `%` floor. Divisors are positive constants: no fold divides by zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NoReturn

import numpy as np

from tilefold.common.check import shown
from tilefold.masks.graph import Node, spell
from tilefold.masks.tables import AnyTable

INDEX_NAMES = ("b", "h", "q", "k")
_ASK_OPERATORS = (
    "Python's `and`, `or`, `not`, `if` and chained comparisons cannot be traced: "
    "write & | ~ with parentheses instead"
)


@dataclass(frozen=True, eq=False, repr=False)
class Expression(Node):
    """A node of an expression. Nodes compare by identity; `str(node)` is the structure."""

    def __repr__(self) -> str:
        return spell(self)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"the truth of `{self}` is not known while a rule is traced; {_ASK_OPERATORS}"
        )

    @property
    def children(self) -> tuple[Expression, ...]:
        """The nodes that this node is made of."""
        return ()

    __array_ufunc__ = None  # NumPy's numbers leave operators to the node on the other side

    def __array__(self, *arguments: Any, **options: Any) -> NoReturn:
        raise _valueless(self)


def _valueless(node: Expression) -> TypeError:
    return TypeError(
        f"`{node}` has no value while a rule is traced, so it cannot index an array; "
        "use documents(), lengths() or dense()"
    )


def _fraction(left: Any, right: Any) -> TypeError:
    return TypeError(
        f"`{left} / {right}`: a rule computes with integers; write //, which rounds down"
    )


class Integer(Expression):
    """An integer that depends on the indices."""

    def __add__(self, other: Any) -> Integer:
        return _binary("+", self, other)

    def __radd__(self, other: Any) -> Integer:
        return _binary("+", other, self)

    def __sub__(self, other: Any) -> Integer:
        return _binary("-", self, other)

    def __rsub__(self, other: Any) -> Integer:
        return _binary("-", other, self)

    def __mul__(self, other: Any) -> Integer:
        return _binary("*", self, other)

    def __rmul__(self, other: Any) -> Integer:
        return _binary("*", other, self)

    def __floordiv__(self, other: Any) -> Integer:
        return _binary("//", self, _divisor("//", other))

    def __rfloordiv__(self, other: Any) -> Integer:
        return _binary("//", other, _divisor("//", self))

    def __truediv__(self, other: Any) -> NoReturn:
        raise _fraction(self, other)

    def __rtruediv__(self, other: Any) -> NoReturn:
        raise _fraction(other, self)

    def __mod__(self, other: Any) -> Integer:
        return _binary("%", self, _divisor("%", other))

    def __rmod__(self, other: Any) -> Integer:
        return _binary("%", other, _divisor("%", self))

    def __neg__(self) -> Integer:
        return Unary("-", self)

    def __abs__(self) -> Integer:
        return Unary("abs", self)

    def __lt__(self, other: Any) -> Boolean:
        return _compare("<", self, other)

    def __le__(self, other: Any) -> Boolean:
        return _compare("<=", self, other)

    def __gt__(self, other: Any) -> Boolean:
        return _compare(">", self, other)

    def __ge__(self, other: Any) -> Boolean:
        return _compare(">=", self, other)

    def __eq__(self, other: object) -> Boolean:  # type: ignore[override]  # builds a node, as the rules' users expect
        return _compare("==", self, other)

    def __ne__(self, other: object) -> Boolean:  # type: ignore[override]  # builds a node, as the rules' users expect
        return _compare("!=", self, other)

    __hash__ = object.__hash__

    def __index__(self) -> NoReturn:
        raise _valueless(self)

    __int__ = __index__


class Boolean(Expression):
    """A truth that depends on the indices, such as whether the query may see the key."""

    def __and__(self, other: Any) -> Boolean:
        return _join("&", self, other)

    def __rand__(self, other: Any) -> Boolean:
        return _join("&", other, self)

    def __or__(self, other: Any) -> Boolean:
        return _join("|", self, other)

    def __ror__(self, other: Any) -> Boolean:
        return _join("|", other, self)

    def __invert__(self) -> Boolean:
        return Logic("~", (self,))

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError(f"`{self}` == `{other}`: == compares numbers; write (a & b) | ~(a | b)")

    def __ne__(self, other: object) -> NoReturn:
        raise TypeError(f"`{self}` != `{other}`: != compares numbers; write (a | b) & ~(a & b)")

    __hash__ = object.__hash__


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
class Parameter(Integer):
    """A number that a kernel receives at run time. In a `Skeleton` it replaces a constant.

    `dtype` is "int": as wide as the indices that the mask is computed with.
    """

    slot: int
    dtype: str = "int"

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
class Unary(Integer):
    """`-x` or `abs(x)`."""

    operator: str
    operand: Integer

    @property
    def children(self) -> tuple[Expression, ...]:
        """The operand."""
        return (self.operand,)

    @property
    def label(self) -> tuple[Any, ...]:
        """The operator."""
        return (self.operator,)

    def spelled(self, below: tuple[str, ...]) -> str:
        """`-x` or `abs(x)`."""
        return f"abs({below[0]})" if self.operator == "abs" else f"-{below[0]}"


@dataclass(frozen=True, eq=False, repr=False)
class _TwoSided(Expression):
    """An operator between two integers."""

    operator: str
    left: Integer
    right: Integer

    @property
    def children(self) -> tuple[Expression, ...]:
        """The left side and the right side."""
        return (self.left, self.right)

    @property
    def label(self) -> tuple[Any, ...]:
        """The operator."""
        return (self.operator,)

    def spelled(self, below: tuple[str, ...]) -> str:
        """`(x + y)`."""
        return f"({below[0]} {self.operator} {below[1]})"


class Binary(_TwoSided, Integer):
    """`x + y`, `x - y`, `x * y`, and with a positive constant on the right `x // y`, `x % y`."""


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


class Compare(_TwoSided, Boolean):
    """A comparison: `x < y`, `<=`, `>`, `>=`, `==` or `!=`."""


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


def as_integer(value: Any) -> Integer:
    """A node for a node or a Python or NumPy integer; anything else raises TypeError.

    Raises OverflowError for an integer that 64 bits do not hold.
    """
    if isinstance(value, Integer):
        return value
    if isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_)):
        number = int(value)
        if not -(2**63) <= number < 2**63:
            bits = number.bit_length() + 1
            raise OverflowError(f"a rule computes with numbers of 64 bits, got one of {bits} bits")
        return Constant(number)
    raise TypeError(
        f"a rule computes with integers and indices, not with {type(value).__name__} {shown(value)}"
    )


def as_boolean(value: Any) -> Boolean:
    """A node for a node or a Python or NumPy bool; anything else raises TypeError."""
    if isinstance(value, Boolean):
        return value
    if isinstance(value, (bool, np.bool_)):
        return Truth(bool(value))
    raise TypeError(
        f"a rule must be True or False, got {type(value).__name__} `{value}`; "
        "compare it with == or <"
    )


def _binary(operator: str, left: Any, right: Any) -> Integer:
    return Binary(operator, as_integer(left), as_integer(right))


def _compare(operator: str, left: Any, right: Any) -> Boolean:
    return Compare(operator, as_integer(left), as_integer(right))


def _join(operator: str, left: Any, right: Any) -> Boolean:
    """A join whose operands are no joins of the same kind: a chain of a thousand is one node."""
    parts: list[Boolean] = []
    for side in (as_boolean(left), as_boolean(right)):
        flat = isinstance(side, Logic) and side.operator == operator
        parts.extend(side.operands if isinstance(side, Logic) and flat else (side,))
    return Logic(operator, tuple(parts))


def _divisor(operator: str, value: Any) -> Integer:
    node = as_integer(value)
    if not isinstance(node, Constant) or node.value < 1:
        raise ValueError(
            f"the right side of {operator} in a rule must be a constant >= 1, got `{node}`"
        )
    return node
