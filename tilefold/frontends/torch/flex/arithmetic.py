"""Operators between symbols, with PyTorch's types: integers, truths and real numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilefold.frontends.torch.flex.entries import computed, number
from tilefold.frontends.torch.flex.symbols import Symbol, Tracing, Unexpressed, made
from tilefold.masks.expression import (
    Compare,
    Constant,
    Logic,
    Lookup,
    Real,
    RealConstant,
    Truth,
    TruthLookup,
    Where,
    as_real,
)
from tilefold.masks.symbols import binary


def symbols(*given: Any) -> list[Symbol]:
    """Numbers, tensors of one element, and symbols as symbols."""
    tracing = next(x for x in given if isinstance(x, Symbol)).tracing
    return [number(tracing, value) for value in given]


def numbers(*given: Any) -> list[Symbol]:
    """The same, with truths as integers, and all of them real where one is."""
    found = [count(x) if x.kind == "bool" else x for x in symbols(*given)]
    if len(found) == 1 or all(x.kind == "int" for x in found):
        return found
    return [real(x) for x in found]


def count(x: Symbol) -> Symbol:
    """A truth as an integer; an integer as it is."""
    if x.kind == "int":
        return x
    return made([x], "int", lambda: _counted(x.tracing, x.node), lambda t: t.long(), (0, 1))


def real(x: Symbol) -> Symbol:
    """A number or a truth as a real number."""
    if x.kind == "real":
        return x

    def make() -> Any:
        if x.kind == "bool":
            return Where(x.node, RealConstant(1.0), RealConstant(0.0))
        return as_real(x.node)

    return made([x], "real", make, lambda t: t.float())


def _counted(tracing: Tracing, truth: Any) -> Any:
    """A truth over integers as 1 or 0. Raises NotImplementedError for one over real numbers."""
    if isinstance(truth, Truth):
        return Constant(int(truth.value))
    if isinstance(truth, TruthLookup):
        place: int = truth.table.number  # type: ignore[union-attr]  # entries are of given tables
        return Lookup(tracing.table(tracing.tables[place].int()), truth.indices)
    if isinstance(truth, Logic):
        result, *others = [_counted(tracing, part) for part in truth.operands]
        if truth.operator == "~":
            return 1 - result
        for other in others:
            result = binary("minimum" if truth.operator == "&" else "maximum", result, other)
        return result
    assert isinstance(truth, Compare)
    left, right = truth.left, truth.right
    if isinstance(left, Real):
        raise Unexpressed(
            "flex_attention: a comparison of real numbers is no integer in the language of kernels;"
            " write torch.where(truth, x, y)"
        )
    if truth.operator in ("==", "!="):
        differ = binary("minimum", abs(left - right), 1)
        return differ if truth.operator == "!=" else 1 - differ
    if truth.operator in (">", ">="):
        left, right = right, left
    gap = right - left + (1 if truth.operator in ("<=", ">=") else 0)
    return binary("minimum", binary("maximum", gap, 0), 1)


def add(x: Any, y: Any, *, alpha: Any = 1) -> Symbol:
    """x + alpha y."""
    x, y = numbers(x, _times(y, alpha))
    bounds = (x.low + y.low, x.high + y.high)
    return made([x, y], x.kind, lambda: x.node + y.node, operator.add, bounds)


def sub(x: Any, y: Any, *, alpha: Any = 1) -> Symbol:
    """x - alpha y."""
    x, y = numbers(x, _times(y, alpha))
    bounds = (x.low - y.high, x.high - y.low)
    return made([x, y], x.kind, lambda: x.node - y.node, operator.sub, bounds)


def _times(y: Any, alpha: Any) -> Any:
    if isinstance(alpha, int) and alpha == 1:
        return y
    return mul(y, alpha) if isinstance(y, Symbol) else y * alpha


def mul(x: Any, y: Any) -> Symbol:
    """x y."""
    x, y = numbers(x, y)
    ends = (x.low * y.low, x.low * y.high, x.high * y.low, x.high * y.high)
    return made([x, y], x.kind, lambda: x.node * y.node, operator.mul, (min(ends), max(ends)))


def neg(x: Any) -> Symbol:
    """-x."""
    (x,) = numbers(x)
    return made([x], x.kind, lambda: -x.node, operator.neg, (-x.high, -x.low))


def absolute(x: Any) -> Symbol:
    """|x|."""
    (x,) = numbers(x)
    bounds = (max(x.low, -x.high, 0), max(x.high, -x.low))
    return made([x], x.kind, lambda: abs(x.node), operator.abs, bounds)


def div(x: Any, y: Any, *, rounding_mode: str | None = None) -> Symbol:
    """x / y, as PyTorch rounds it."""
    if rounding_mode == "floor":
        return floor_divide(x, y)
    x, y = numbers(x, y)
    if rounding_mode == "trunc":
        if x.kind != "int" or x.low < 0:
            return computed("div", lambda a, b: torch.div(a, b, rounding_mode="trunc"), [x, y])
        return floor_divide(x, y)
    x, y = real(x), real(y)
    return made([x, y], "real", lambda: x.node / y.node, operator.truediv)


def floor_divide(x: Any, y: Any) -> Symbol:
    """x // y of an integer and a positive constant."""
    x, y = _divided("//", x, y)
    bounds = (x.low // y.low, x.high // y.low)
    return made([x, y], "int", lambda: x.node // y.node, operator.floordiv, bounds)


def remainder(x: Any, y: Any) -> Symbol:
    """x % y of an integer and a positive constant."""
    x, y = _divided("%", x, y)
    within = x.low // y.low == x.high // y.low
    bounds = (x.low % y.low, x.high % y.low) if within else (0, y.low - 1)
    return made([x, y], "int", lambda: x.node % y.node, operator.mod, bounds)


def fmod(x: Any, y: Any) -> Symbol:
    """The remainder with the sign of x: of integers >= 0."""
    x, y = symbols(x, y)
    if x.kind != "int" or x.low < 0:
        raise Unexpressed("flex_attention: fmod takes integers >= 0; write %")
    return remainder(x, y)


def _divided(name: str, x: Any, y: Any) -> list[Symbol]:
    x, y = numbers(x, y)
    if x.kind != "int" or y.low != y.high or y.low < 1:
        raise Unexpressed(
            f"flex_attention: {name} takes integers, and a divisor that is a positive constant"
        )
    return [x, y]


def _extreme(name: str, pick: Callable[[int, int], int]) -> Callable[..., Symbol]:
    both = getattr(torch, name)

    def extreme(x: Any, y: Any) -> Symbol:
        x, y = numbers(x, y)
        bounds = (pick(x.low, y.low), pick(x.high, y.high))
        return made([x, y], x.kind, lambda: binary(name, x.node, y.node), both, bounds)

    return extreme


minimum, maximum = _extreme("minimum", min), _extreme("maximum", max)


def clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    """x within limits, of which one may be absent."""
    found = x if min is None else maximum(x, min)
    return found if max is None else minimum(found, max)


def _comparison(compare: Callable[..., Any]) -> Callable[..., Symbol]:
    def comparison(x: Any, y: Any) -> Symbol:
        x, y = symbols(x, y)
        if x.kind == y.kind == "bool" and compare in (operator.eq, operator.ne):
            differ = exclusive(x, y)
            return differ if compare is operator.ne else invert(differ)
        x, y = numbers(x, y)
        return made([x, y], "bool", lambda: compare(x.node, y.node), compare)

    return comparison


lt, le = _comparison(operator.lt), _comparison(operator.le)
gt, ge = _comparison(operator.gt), _comparison(operator.ge)
eq, ne = _comparison(operator.eq), _comparison(operator.ne)


def _logic(sign: str, join: Callable[..., Any]) -> Callable[..., Symbol]:
    def logic(x: Any, y: Any) -> Symbol:
        x, y = symbols(x, y)
        if x.kind == y.kind == "bool":
            return made([x, y], "bool", lambda: _joined(sign, join, x.node, y.node), join)
        return _bitwise(sign, *numbers(x, y))

    return logic


def _joined(sign: str, join: Callable[..., Any], left: Any, right: Any) -> Any:
    """Two truths joined; a constant one is left out."""
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Truth):
            return other if one.value == (sign == "&") else one
    return join(left, right)


both, either = _logic("&", operator.and_), _logic("|", operator.or_)


def exclusive(x: Any, y: Any) -> Symbol:
    """x ^ y of truths, or of an integer and a constant."""
    x, y = symbols(x, y)
    if x.kind == y.kind == "bool":
        return both(either(x, y), invert(both(x, y)))
    return _bitwise("^", *numbers(x, y))


def _bitwise(sign: str, x: Symbol, y: Symbol) -> Symbol:
    """`&`, `|` and `^` of an integer and a constant >= 0, from the bits that both have."""
    if y.low != y.high:
        x, y = y, x
    if x.kind != "int" or y.low != y.high or y.low < 0:
        raise Unexpressed(
            f"flex_attention: {sign} of integers takes a constant >= 0 on one side; between truths"
            " it takes both"
        )
    common: Any = number(x.tracing, 0)
    for bit in [place for place in range(int(y.low).bit_length()) if y.low >> place & 1]:
        common = add(mul(remainder(floor_divide(x, 2**bit), 2), 2**bit), common)
    if sign == "&":
        return number(x.tracing, common)
    return sub(add(x, y), common if sign == "|" else mul(common, 2))


def invert(x: Symbol) -> Symbol:
    """~x of a truth or an integer."""
    if x.kind == "bool":
        return made([x], "bool", lambda: ~x.node, torch.logical_not)
    if x.kind == "int":
        return sub(-1, x)
    raise NotImplementedError("flex_attention: ~ takes truths and integers, got a real number")


def truth(x: Any) -> Any:
    """A number, a tensor or a symbol as a truth."""
    if isinstance(x, Symbol):
        return x if x.kind == "bool" else ne(x, 0)
    return x.bool() if isinstance(x, Tensor) else bool(x)


def where(condition: Any, x: Any, y: Any) -> Symbol:
    """x where the condition holds, else y."""
    condition, x, y = symbols(condition, x, y)
    if condition.kind != "bool":
        raise TypeError("flex_attention: torch.where takes a truth first, got a number")
    if x.kind == y.kind == "bool":
        return either(both(condition, x), both(invert(condition), y))
    x, y = numbers(x, y)
    bounds = (min(x.low, y.low), max(x.high, y.high))

    def make() -> Any:
        if x.kind == "real":
            return Where(condition.node, x.node, y.node)
        return y.node + _counted(condition.tracing, condition.node) * (x.node - y.node)

    return made([condition, x, y], x.kind, make, torch.where, bounds)
