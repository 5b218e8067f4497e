"""Derivatives of expressions: with respect to the score, and to the entries of arrays.

One walk from the root back to the leaves collects the derivative with respect to every node
(reverse mode; Griewank and Walther, "Evaluating Derivatives", 2008, chapter 3). Derivatives are
expressions that share nodes with the value, so a kernel computes both in one pass. Sums with 0 and
products with 0 and 1 are never made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tilefold.masks.expression import (
    Compare,
    Expression,
    Real,
    RealBinary,
    RealConstant,
    RealLookup,
    RealUnary,
    ScoreValue,
    Where,
)
from tilefold.masks.graph import ordered

ZERO, ONE = RealConstant(0.0), RealConstant(1.0)


class Slope(NamedTuple):
    """An entry of an array, and the derivative of the value with respect to it."""

    entry: RealLookup
    derivative: Real


class Derivatives(NamedTuple):
    """The derivative with respect to `s`, and to each entry that the expression reads."""

    score: Real
    entries: tuple[Slope, ...]


def derivatives(expression: Real) -> Derivatives:
    """The derivatives of an expression.

    Where a function has a corner (abs, minimum, maximum, where) it is the derivative of one side:
    of abs it is 0 at 0, of minimum and maximum that of the first number where both are equal.

    >>> s = ScoreValue()
    >>> derivatives(s * s).score
    (s + s)
    >>> derivatives(s * 2.0 + 1.0).score
    2
    """
    order = [node for node, _ in ordered(expression)]
    found: dict[int, Real] = {id(expression): ONE}
    score: Real = ZERO
    entries = []
    for node in reversed(order):
        slope = found.get(id(node))
        if slope is None or slope is ZERO:
            continue
        if isinstance(node, ScoreValue):
            score = _sum(score, slope)
        elif isinstance(node, RealLookup):
            entries.append(Slope(node, slope))
        elif type(node) in _RULES:
            for child, own in _RULES[type(node)](node):
                found[id(child)] = _sum(found.get(id(child), ZERO), product(slope, own))
    entries.reverse()
    return Derivatives(score, tuple(entries))


def _sum(left: Real, right: Real) -> Real:
    if left is ZERO or right is ZERO:
        return right if left is ZERO else left
    if isinstance(left, Where) and isinstance(right, Where) and left.truth is right.truth:
        return Where(left.truth, _sum(left.then, right.then), _sum(left.otherwise, right.otherwise))
    return RealBinary("+", left, right)


def product(left: Real, right: Real) -> Real:
    """The product, simplified where a factor is 0, 1 or -1.

    A choice with 0 on one side is multiplied on the other: so what was not chosen stays 0, even
    where the other factor is infinite there.
    """
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Where) and (one.otherwise is ZERO or one.then is ZERO):
            return Where(one.truth, product(one.then, other), product(one.otherwise, other))
    for one, other in ((left, right), (right, left)):
        if isinstance(one, RealConstant):
            if one.value == 0:
                return ZERO
            if one.value == 1:
                return other
            if one.value == -1:
                return negative(other)
    if isinstance(left, RealConstant) and isinstance(right, RealConstant):
        return RealConstant(left.value * right.value)
    return RealBinary("*", left, right)


def negative(node: Real) -> Real:
    """`-node`, simplified."""
    if isinstance(node, RealConstant):
        return RealConstant(-node.value)
    if isinstance(node, RealUnary) and node.operator == "-":
        inner: Real = node.operand
        return inner
    return RealUnary("-", node)


Own = list[tuple[Expression, Real]]
"""The children of a node, each with the derivative of the node with respect to it."""


def _of_function(node: RealUnary) -> Own:
    return [(node.operand, _FUNCTIONS[node.operator](node, node.operand))]


def _sign(x: Real) -> Real:
    below = Where(Compare("<", x, ZERO), RealConstant(-1.0), ZERO)
    return Where(Compare(">", x, ZERO), ONE, below)


_FUNCTIONS: dict[str, Callable[[Any, Any], Real]] = {
    "-": lambda y, x: RealConstant(-1.0),
    "abs": lambda y, x: _sign(x),
    "exp": lambda y, x: y,
    "log": lambda y, x: RealBinary("/", ONE, x),
    "tanh": lambda y, x: RealBinary("-", ONE, RealBinary("*", y, y)),
    "sigmoid": lambda y, x: RealBinary("-", y, RealBinary("*", y, y)),
    "sqrt": lambda y, x: RealBinary("/", RealConstant(0.5), y),
}
"""The derivative of a function from its value y and its operand x."""


def _of_operator(node: RealBinary) -> Own:
    x, y = node.left, node.right
    match node.operator:
        case "+":
            return [(x, ONE), (y, ONE)]
        case "-":
            return [(x, ONE), (y, RealConstant(-1.0))]
        case "*":
            return [(x, y), (y, x)]
        case "/":
            inverse = RealConstant(1 / y.value) if _is_divisor(y) else RealBinary("/", ONE, y)
            return [(x, inverse), (y, negative(product(node, inverse)))]
    condition = "<=" if node.operator == "minimum" else ">="
    first = Compare(condition, x, y)
    return [(x, Where(first, ONE, ZERO)), (y, Where(first, ZERO, ONE))]


def _is_divisor(node: Real) -> bool:
    return isinstance(node, RealConstant) and node.value != 0


def _of_choice(node: Where) -> Own:
    first = node.truth
    return [(node.then, Where(first, ONE, ZERO)), (node.otherwise, Where(first, ZERO, ONE))]


_RULES: dict[type, Callable[[Any], Own]] = {
    RealUnary: _of_function,
    RealBinary: _of_operator,
    Where: _of_choice,
}
