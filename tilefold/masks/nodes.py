"""The nodes of expressions: integers over the indices, truths, and real numbers.

A mask is a truth over integers. A score is a real number over the score `s` of a pair and the
indices. Operators on nodes build larger nodes, so a function of symbols traces itself. Operators
mean what they mean in Python: `//` and `%` floor, `/` gives a real number, and an integer beside a
real number becomes one. Divisors of `//` and `%` are positive constants: no fold divides by zero.
"""

from __future__ import annotations

import math
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
        "use documents(), lengths() or dense(), or in a score tilefold.table(array)[i]"
    )


class Number(Expression):
    """An integer or a real number that depends on the indices."""

    def __add__(self, other: Any) -> Any:
        return binary("+", self, other)

    def __radd__(self, other: Any) -> Any:
        return binary("+", other, self)

    def __sub__(self, other: Any) -> Any:
        return binary("-", self, other)

    def __rsub__(self, other: Any) -> Any:
        return binary("-", other, self)

    def __mul__(self, other: Any) -> Any:
        return binary("*", self, other)

    def __rmul__(self, other: Any) -> Any:
        return binary("*", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return binary("//", self, _divisor("//", self, other))

    def __rfloordiv__(self, other: Any) -> Any:
        return binary("//", other, _divisor("//", other, self))

    def __truediv__(self, other: Any) -> Real:
        return RealBinary("/", as_real(self), as_real(other))

    def __rtruediv__(self, other: Any) -> Real:
        return RealBinary("/", as_real(other), as_real(self))

    def __mod__(self, other: Any) -> Any:
        return binary("%", self, _divisor("%", self, other))

    def __rmod__(self, other: Any) -> Any:
        return binary("%", other, _divisor("%", other, self))

    def __neg__(self) -> Any:
        return unary("-", self)

    def __abs__(self) -> Any:
        return unary("abs", self)

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

    def __float__(self) -> NoReturn:
        raise TypeError(
            f"`{self}` has no value while a rule is traced: in a score write tilefold.exp, log,"
            " tanh, sigmoid or sqrt for functions of numbers"
        )


class Integer(Number):
    """An integer that depends on the indices."""


class Real(Number):
    """A real number that depends on the score of a pair and on the indices."""


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


def is_real(value: Any) -> bool:
    """True for a real number: a node, or a float of Python or NumPy."""
    return isinstance(value, (Real, float, np.floating))


def as_real(value: Any) -> Real:
    """A node for a number: of a node, or of Python or NumPy. Raises TypeError for others."""
    if isinstance(value, Real):
        return value
    if isinstance(value, (float, np.floating)):
        return RealConstant(float(value))
    if isinstance(value, Boolean):
        raise TypeError(f"`{value}` is a truth where a number is wanted; write where(truth, x, y)")
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{value} is a truth where a number is wanted; write 1.0 or 0.0")
    node = as_integer(value)
    return RealConstant(float(node.value)) if isinstance(node, Constant) else FromInteger(node)


def unary(operator: str, value: Any) -> Number:
    """The operator or function of a number. Functions beside "-" and "abs" give real numbers."""
    if operator in ("-", "abs") and not is_real(value):
        return Unary(operator, as_integer(value))
    return RealUnary(operator, as_real(value))


def binary(operator: str, left: Any, right: Any) -> Number:
    """The operator between two numbers: real where one of them is."""
    if is_real(left) or is_real(right):
        if operator in ("//", "%"):
            raise TypeError(f"`{left} {operator} {right}`: {operator} takes integers alone")
        return RealBinary(operator, as_real(left), as_real(right))
    return Binary(operator, as_integer(left), as_integer(right))


def _compare(operator: str, left: Any, right: Any) -> Boolean:
    if is_real(left) or is_real(right):
        return Compare(operator, as_real(left), as_real(right))
    return Compare(operator, as_integer(left), as_integer(right))


def _join(operator: str, left: Any, right: Any) -> Boolean:
    """A join whose operands are no joins of the same kind: a chain of a thousand is one node."""
    parts: list[Boolean] = []
    for side in (as_boolean(left), as_boolean(right)):
        flat = isinstance(side, Logic) and side.operator == operator
        parts.extend(side.operands if isinstance(side, Logic) and flat else (side,))
    return Logic(operator, tuple(parts))


def _divisor(operator: str, left: Any, value: Any) -> Any:
    if is_real(left) or is_real(value):
        return value  # `binary` refuses it
    node = as_integer(value)
    if not isinstance(node, Constant) or node.value < 1:
        raise ValueError(
            f"the right side of {operator} in a rule must be a constant >= 1, got `{node}`"
        )
    return node
