"""Whether a score may hide pairs: give -inf although the score before is finite.

Kernels ask of every pair whether it is hidden only where this says that it may be. A number that
overflows is no -inf that was meant: such a pair has the weight 0, and is not hidden.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tilefold.masks.expression import AnyTable, Collect, Expression, evaluate


def may_hide(expression: Expression) -> bool:
    """True where the value of a real expression may be -inf for a finite score.

    Infinite constants, logarithms, divisions by what is no constant, and what is read from arrays
    count. A factor that is read from an array is taken for finite, a sum with it is not.

    >>> from tilefold.masks.expression import (Index, ScoreValue)
    >>> from tilefold.scores.functions import tanh, where
    >>> s, k = ScoreValue(), Index("k")
    >>> may_hide(tanh(s) - 2 * k), may_hide(where(k > 3, s, -float("inf")))
    (False, True)
    """
    found = evaluate(expression, _Infinite())
    return found.read or found.computed


class _Possible(NamedTuple):
    """Whether a value may be infinite: as it is read from an array, or as it is computed.

    `fixed`: it is a constant or read from an array, which is taken for other than 0.
    """

    read: bool
    computed: bool
    fixed: bool = False


_NO = _Possible(False, False)


class _Infinite(Collect[_Possible]):
    """An infinity of any sign, anywhere below, but where a function bounds it."""

    def combine(self, values: tuple[_Possible, ...]) -> _Possible:
        return _Possible(any(x.read for x in values), any(x.computed for x in values))

    def real(self, value: float) -> _Possible:
        return _Possible(False, math.isinf(value), fixed=True)

    def lookup(self, table: AnyTable, indices: tuple[_Possible, ...]) -> _Possible:
        return _Possible(table.dtype not in ("int32", "bool"), False, fixed=True)

    def real_unary(self, operator: str, operand: _Possible) -> _Possible:
        if operator in ("tanh", "sigmoid", "exp"):
            return _NO
        return _Possible(True, True) if operator == "log" else operand

    def real_binary(self, operator: str, left: _Possible, right: _Possible) -> _Possible:
        below = self.combine((left, right))
        if operator not in ("*", "/"):
            return below
        read = any(factor.read and not factor.fixed for factor in (left, right))
        return _Possible(read, below.computed or (operator == "/" and not right.fixed))

    def compare(self, operator: str, left: _Possible, right: _Possible) -> _Possible:
        return _NO
