"""Expressions by what they are: integers, truths and real numbers, with the operators of Python.

Operators on nodes build larger nodes, so a function of symbols traces itself. They mean what they
mean in Python: `//` and `%` floor, `/` gives a real number, and an integer beside a real number
becomes one. Divisors of `//` and `%` are positive constants: no fold divides by zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from tilefold.common.check import shown
from tilefold.masks.graph import Node, spell

INDEX_NAMES = ("b", "h", "q", "k")
_ASK_OPERATORS = (
    "Python's `and`, `or`, `not`, `if` and chained comparisons cannot be traced: "
    "write & | ~ with parentheses instead"
)


class Made:
    """The classes of nodes that operators make, by name: `nodes` fills them in."""

    Constant: Any
    Logic: Any
    Truth: Callable[..., Boolean]
    Compare: Callable[..., Boolean]
    Unary: Callable[..., Integer]
    Binary: Callable[..., Integer]
    RealConstant: Callable[..., Real]
    FromInteger: Callable[..., Real]
    RealUnary: Callable[..., Real]
    RealBinary: Callable[..., Real]


MADE = Made()


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
        return MADE.RealBinary("/", as_real(self), as_real(other))

    def __rtruediv__(self, other: Any) -> Real:
        return MADE.RealBinary("/", as_real(other), as_real(self))

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
        negated: Boolean = MADE.Logic("~", (self,))
        return negated

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError(f"`{self}` == `{other}`: == compares numbers; write (a & b) | ~(a | b)")

    def __ne__(self, other: object) -> NoReturn:
        raise TypeError(f"`{self}` != `{other}`: != compares numbers; write (a | b) & ~(a & b)")

    __hash__ = object.__hash__


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
        constant: Integer = MADE.Constant(number)
        return constant
    raise TypeError(
        f"a rule computes with integers and indices, not with {type(value).__name__} {shown(value)}"
    )


def as_boolean(value: Any) -> Boolean:
    """A node for a node or a Python or NumPy bool; anything else raises TypeError."""
    if isinstance(value, Boolean):
        return value
    if isinstance(value, (bool, np.bool_)):
        return MADE.Truth(bool(value))
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
        return MADE.RealConstant(float(value))
    if isinstance(value, Boolean):
        raise TypeError(f"`{value}` is a truth where a number is wanted; write where(truth, x, y)")
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{value} is a truth where a number is wanted; write 1.0 or 0.0")
    if not isinstance(value, (Integer, int, np.integer)):
        raise TypeError(
            f"a score computes with numbers, not with {type(value).__name__} {shown(value)}; an"
            " entry of an array is tilefold.table(array)[i, j]"
        )
    node = as_integer(value)
    return (
        MADE.RealConstant(float(node.value))
        if isinstance(node, MADE.Constant)
        else MADE.FromInteger(node)
    )


def unary(operator: str, value: Any) -> Number:
    """The operator or function of a number. Functions beside "-" and "abs" give real numbers."""
    if operator in ("-", "abs") and not is_real(value):
        return MADE.Unary(operator, as_integer(value))
    return MADE.RealUnary(operator, as_real(value))


def binary(operator: str, left: Any, right: Any) -> Number:
    """The operator between two numbers: real where one of them is."""
    if is_real(left) or is_real(right):
        if operator in ("//", "%"):
            raise TypeError(f"`{left} {operator} {right}`: {operator} takes integers alone")
        return MADE.RealBinary(operator, as_real(left), as_real(right))
    return MADE.Binary(operator, as_integer(left), as_integer(right))


def _compare(operator: str, left: Any, right: Any) -> Boolean:
    if is_real(left) or is_real(right):
        return MADE.Compare(operator, as_real(left), as_real(right))
    return MADE.Compare(operator, as_integer(left), as_integer(right))


def _join(operator: str, left: Any, right: Any) -> Boolean:
    """A join whose operands are no joins of the same kind: a chain of a thousand is one node."""
    parts: list[Boolean] = []
    for side in (as_boolean(left), as_boolean(right)):
        flat = isinstance(side, MADE.Logic) and side.operator == operator
        parts.extend(side.operands if isinstance(side, MADE.Logic) and flat else (side,))
    joined: Boolean = MADE.Logic(operator, tuple(parts))
    return joined


def _divisor(operator: str, left: Any, value: Any) -> Any:
    if is_real(left) or is_real(value):
        return value  # `binary` refuses it
    node = as_integer(value)
    if not isinstance(node, MADE.Constant) or node.value < 1:
        raise ValueError(
            f"the right side of {operator} in a rule must be a constant >= 1, got `{node}`"
        )
    return node
