"""Two folds of an expression with NumPy: exact values, and intervals over tiles.

The exact fold is the definition of a mask. The interval fold says of a whole tile whether all its
pairs are visible, or perhaps some. It computes the smallest and largest value of each node over the
tile, so skipping work needs no code of any rule and no array of len_q x len_k. It may call a tile
partial that is full or empty, never the other way round. It is tight where every index occurs once,
as in comparisons of monotone coordinates: causal order, windows, chunks, lengths. Its source is
Moore, "Interval Analysis" (1966).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilefold.masks.expression import (
    AnyTable,
    Boolean,
    Declared,
    Expression,
    Interpretation,
    Slot,
    Table,
    evaluate,
)
from tilefold.masks.table_bounds import TableBounds, entire
from tilefold.masks.tables import DTYPES, Input

Array = NDArray[Any]

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "/": operator.truediv,
    "minimum": np.minimum,
    "maximum": np.maximum,
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "-": operator.neg,
    "abs": abs,
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sqrt": np.sqrt,
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def exact(expression: Boolean, *, b: Any, h: Any, q: Any, k: Any) -> NDArray[np.bool_]:
    """True if query q sees key k in batch b and head h; the indices broadcast against each other.

    >>> from tilefold.masks.expression import (Index)
    >>> q, k = np.arange(3)[:, None], np.arange(3)
    >>> exact(Index("q") >= Index("k"), b=0, h=0, q=q, k=k).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [1, 1, 1]])
    """
    indices = {
        name: np.asarray(value, np.int64) for name, value in zip("bhqk", (b, h, q, k), strict=True)
    }
    shape = np.broadcast_shapes(*(value.shape for value in indices.values()))
    result = np.asarray(evaluate(expression, _Exact(indices)), np.bool_)
    return np.array(np.broadcast_to(result, shape))


def exact_real(
    expression: Expression,
    s: Any,
    *,
    b: Any,
    h: Any,
    q: Any,
    k: Any,
    inputs: Mapping[int, Array] | None = None,
) -> NDArray[np.float64]:
    """The value of a real expression for pairs whose score is s; all arrays broadcast.

    `inputs` are the arrays of `Input` tables by their numbers, where the tables hold none.

    >>> from tilefold.masks.expression import (Index, ScoreValue)
    >>> exact_real(ScoreValue() + Index("q") / 2, 1.0, b=0, h=0, q=np.arange(3), k=0)
    array([1. , 1.5, 2. ])
    """
    indices = {
        name: np.asarray(value, np.int64) for name, value in zip("bhqk", (b, h, q, k), strict=True)
    }
    score = np.asarray(s, np.float64)
    shape = np.broadcast_shapes(score.shape, *(value.shape for value in indices.values()))
    with np.errstate(all="ignore"):
        result = evaluate(expression, _Exact(indices, score, inputs or {}))
    return np.array(np.broadcast_to(np.asarray(result, np.float64), shape))


class _Exact(Interpretation[Any]):
    """The value of a node is an array, or one number if the node depends on no index."""

    def __init__(
        self,
        indices: Mapping[str, Array],
        score: Array | None = None,
        inputs: Mapping[int, Array] | None = None,
    ) -> None:
        self.indices = indices
        self.scores = score
        self.inputs = inputs or {}

    def index(self, name: str) -> Any:
        return self.indices[name]

    def constant(self, value: int) -> Any:
        return value

    def truth(self, value: bool) -> Any:
        return np.bool_(value)

    def lookup(self, table: AnyTable, indices: tuple[Any, ...]) -> Any:
        assert not isinstance(table, Slot)
        if isinstance(table, Input):
            array = self.inputs.get(table.number)
            return (table.array if array is None else array)[indices].astype(np.float64)
        value = table.array[indices]
        if value.dtype.kind == "f":
            return value.astype(np.float64)
        return value if table.dtype == "bool" else value.astype(np.int64)

    def score(self) -> Any:
        return self.scores

    def real(self, value: float) -> Any:
        return np.float64(value)

    def from_integer(self, operand: Any) -> Any:
        return np.asarray(operand, np.float64)

    def real_unary(self, operator: str, operand: Any) -> Any:
        return _FUNCTIONS[operator](operand)

    def real_binary(self, operator: str, left: Any, right: Any) -> Any:
        return _BINARY[operator](left, right)

    def where(self, truth: Any, then: Any, otherwise: Any) -> Any:
        return np.where(truth, then, otherwise)

    def unary(self, operator: str, operand: Any) -> Any:
        return abs(operand) if operator == "abs" else -operand

    def binary(self, operator: str, left: Any, right: Any) -> Any:
        return _BINARY[operator](left, right)

    def compare(self, operator: str, left: Any, right: Any) -> Any:
        return np.asarray(_COMPARE[operator](left, right))

    def logic(self, operator: str, operands: tuple[Any, ...]) -> Any:
        if operator == "~":
            return ~operands[0]
        result = operands[0]
        for operand in operands[1:]:
            result = result & operand if operator == "&" else result | operand
        return result


class Range(NamedTuple):
    """An integer over a tile: its smallest and largest value, and the name of the index that it is.

    An index plus a constant keeps the name.
    """

    low: Any
    high: Any
    name: str | None = None


class Certainty(NamedTuple):
    """A truth over a tile: whether it surely holds for all pairs, and whether perhaps for any."""

    all: Any
    any: Any


def intervals(
    expression: Boolean, ranges: Mapping[str, tuple[Any, Any]], summary: TableBounds
) -> Certainty:
    """Certainty about each tile, given the first and last `b`, `h`, `q`, `k` in it (inclusive).

    The arrays of `ranges` broadcast against each other; the results broadcast to that shape but may
    be smaller. `summary` answers for the tables.

    >>> from tilefold.masks.expression import (Index)
    >>> tiles = {"q": (np.array([0, 4]), np.array([3, 7])), "k": (4, 7)}
    >>> intervals(Index("q") > Index("k"), tiles, TableBounds({}))
    Certainty(all=array([False, False]), any=array([False,  True]))
    """
    known = evaluate(expression, _Intervals(ranges, summary))
    assert isinstance(known, Certainty)
    return known


class _Intervals(Interpretation[Range | Certainty]):
    def __init__(self, ranges: Mapping[str, tuple[Any, Any]], summary: TableBounds) -> None:
        self.ranges = ranges
        self.summary = summary

    def index(self, name: str) -> Range | Certainty:
        low, high = self.ranges[name]
        return Range(low, high, name)

    def constant(self, value: int) -> Range | Certainty:
        return Range(value, value)

    def truth(self, value: bool) -> Range | Certainty:
        return Certainty(np.bool_(value), np.bool_(value))

    def lookup(self, table: AnyTable, indices: tuple[Range | Certainty, ...]) -> Range | Certainty:
        assert isinstance(table, Table | Declared)
        low, high = self.summary.bounds(table, tuple(_range(index) for index in indices))
        if table.dtype == "bool":
            return Certainty(low, high)
        return Range(low, high)

    def unary(self, operator: str, operand: Range | Certainty) -> Range | Certainty:
        low, high, _ = _range(operand)
        if operator == "-":
            return Range(-high, -low)
        return Range(np.maximum(np.maximum(low, -high), 0), np.maximum(high, -low))

    def binary(
        self, operator: str, left: Range | Certainty, right: Range | Certainty
    ) -> Range | Certainty:
        (a, b, _), (c, d, _) = _range(left), _range(right)
        match operator:
            case "+":
                # A shifted index is still an index to the tables that it looks up.
                name = _range(left).name if isinstance(c, int) and c == d else None
                return Range(a + c, b + d, name)
            case "-":
                return Range(a - d, b - c)
            case "*":
                return _product(a, b, c, d)
            case "//":
                return Range(a // c, b // c)
            case "minimum" | "maximum":
                pick = _BINARY[operator]
                return Range(pick(a, c), pick(b, d))
        return _remainder(a, b, c)

    def compare(
        self, operator: str, left: Range | Certainty, right: Range | Certainty
    ) -> Range | Certainty:
        (a, b, _), (c, d, _) = _range(left), _range(right)
        match operator:
            case "<":
                return Certainty(_truth(b < c), _truth(a < d))
            case "<=":
                return Certainty(_truth(b <= c), _truth(a <= d))
            case ">":
                return Certainty(_truth(a > d), _truth(b > c))
            case ">=":
                return Certainty(_truth(a >= d), _truth(b >= c))
        same = _truth(a == d) & _truth(b == c)
        meet = _truth(a <= d) & _truth(c <= b)
        return Certainty(same, meet) if operator == "==" else Certainty(~meet, ~same)

    def logic(self, operator: str, operands: tuple[Range | Certainty, ...]) -> Range | Certainty:
        known = [operand for operand in operands if isinstance(operand, Certainty)]
        assert len(known) == len(operands)
        every, some = known[0]
        if operator == "~":
            return Certainty(~some, ~every)
        for operand in known[1:]:
            every = every & operand.all if operator == "&" else every | operand.all
            some = some & operand.any if operator == "&" else some | operand.any
        return Certainty(every, some)


def _range(value: Range | Certainty) -> Range:
    assert isinstance(value, Range)
    return value


def _truth(value: Any) -> Any:  # Python's bool has a `~` that is not a `not`
    return np.bool_(value) if isinstance(value, bool) else value


def _product(a: Any, b: Any, c: Any, d: Any) -> Range:
    if isinstance(a, int) and isinstance(b, int) and a == b:
        a, b, c, d = c, d, a, b
    if isinstance(c, int) and isinstance(d, int) and c == d:
        return Range(a * c, b * c) if c >= 0 else Range(b * c, a * c)
    ends = (a * c, a * d, b * c, b * d)
    low = np.minimum(np.minimum(ends[0], ends[1]), np.minimum(ends[2], ends[3]))
    high = np.maximum(np.maximum(ends[0], ends[1]), np.maximum(ends[2], ends[3]))
    return Range(low, high)


def _remainder(a: Any, b: Any, divisor: Any) -> Range:
    """Within one period the remainder grows with the dividend; beyond, any remainder may occur."""
    within = a // divisor == b // divisor
    return Range(np.where(within, a % divisor, 0), np.where(within, b % divisor, divisor - 1))


def index_bits(expression: Expression, batch: int, heads: int, len_q: int, len_k: int) -> int:
    """The width of integers, 32 or 64 bits, that holds every node at these sizes.

    Raises OverflowError when 64 bits do not, and IndexError for what reads beyond an array.

    >>> from tilefold.masks.expression import (Index)
    >>> index_bits(Index("q") * Index("k") < 5, batch=1, heads=1, len_q=46341, len_k=46341)
    32
    >>> index_bits(Index("q") * Index("k") < 5, batch=1, heads=1, len_q=46342, len_k=46342)
    64
    """
    sizes = {"b": batch, "h": heads, "q": len_q, "k": len_k}
    extent = _Extent({name: (0, max(size - 1, 0)) for name, size in sizes.items()}, TableBounds({}))
    extent.bounded = 0 not in sizes.values()
    extent.language = "mask" if isinstance(expression, Boolean) else "score"
    try:
        evaluate(expression, extent)
    except _Beyond as error:
        low, high = error.args
        raise OverflowError(
            f"the {extent.language} computes numbers from {low} to {high} at "
            f"{batch=}, {heads=}, {len_q=}, {len_k=}; at most 64 bits are allowed"
        ) from None
    return 32 if extent.low >= -(2**31) and extent.high < 2**31 else 64


_REAL = Range(0, 0)
"""Stands for all real numbers: they are no index."""


class _Beyond(Exception):
    """The smallest and largest value of a node that 64 bits do not hold."""


class _Extent(_Intervals):
    """Intervals over the whole mask in unbounded integers, and the extremes of all.

    It stops at the first node that leaves 64 bits, so its numbers stay short.
    """

    low = high = 0
    bounded, language = False, "mask"  # whether look-ups are checked, and of what

    def _see(self, low: int, high: int) -> Range:
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.low < -(2**63) or self.high >= 2**63:
            raise _Beyond(self.low, self.high)
        return Range(low, high)

    def index(self, name: str) -> Range | Certainty:
        return self._see(*self.ranges[name])

    def constant(self, value: int) -> Range | Certainty:
        return self._see(value, value)

    def lookup(self, table: AnyTable, indices: tuple[Range | Certainty, ...]) -> Range | Certainty:
        assert not isinstance(table, Slot)
        if self.bounded:
            self._check(table, indices)
        if table.dtype not in DTYPES:
            return _REAL
        low, high = entire(table)  # type: ignore[arg-type]  # an input is of floats
        return Certainty(low, high) if table.dtype == "bool" else self._see(int(low), int(high))

    def _check(self, table: Any, indices: tuple[Range | Certainty, ...]) -> None:
        for axis, (size, index) in enumerate(zip(table.shape, indices, strict=True)):
            low, high, _ = _range(index)
            if size is not None and (low < 0 or high >= size):
                reads = f"the {self.language} reads the entries {low} to {high} of axis {axis} of "
                reads += f"its array {table.number}" if isinstance(table, Input) else "a table"
                keep = "keep the index in it by minimum() and maximum()"
                raise IndexError(f"{reads}, which has {size}; {keep}")

    def other(self, kind: str, values: tuple[Range | Certainty, ...]) -> Range | Certainty:
        return _REAL

    def from_integer(self, operand: Range | Certainty) -> Range | Certainty:
        return _REAL

    def compare(
        self, operator: str, left: Range | Certainty, right: Range | Certainty
    ) -> Range | Certainty:
        if left is _REAL or right is _REAL:
            return Certainty(np.bool_(False), np.bool_(True))
        return super().compare(operator, left, right)

    def unary(self, operator: str, operand: Range | Certainty) -> Range | Certainty:
        low, high, _ = _range(operand)
        if operator == "abs":
            return self._see(max(low, -high, 0), max(high, -low))
        return self._see(-high, -low)

    def binary(
        self, operator: str, left: Range | Certainty, right: Range | Certainty
    ) -> Range | Certainty:
        (a, b, _), (c, d, _) = _range(left), _range(right)
        if operator == "*":
            ends = (a * c, a * d, b * c, b * d)
            return self._see(min(ends), max(ends))
        if operator == "%":
            within = a // c == b // c
            return self._see(a % c, b % c) if within else self._see(0, c - 1)
        low, high, _ = _range(super().binary(operator, left, right))
        return self._see(low, high)
