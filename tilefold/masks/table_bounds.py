"""Bounds of a mask's tables over ranges of their indices, each found in constant time.

A table is first reduced to blocks of the planner's own size, so what is kept beside it is small.
Over one axis of ranges the bounds come from a sparse table (minima over spans of every power of
two; Bender and Farach-Colton, "The LCA Problem Revisited", 2000), over two from a summed-area
table (Crow, 1984) that counts the true entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tilefold.masks.tables import Declared, Table

Array = NDArray[Any]


class IndexRange(Protocol):
    """The first and last value of an index; its name, or None if it is no plain index."""

    @property
    def low(self) -> Any:
        """The first value."""

    @property
    def high(self) -> Any:
        """The last value."""

    @property
    def name(self) -> str | None:
        """`b`, `h`, `q`, `k` or None."""


class Bounds(NamedTuple):
    """The smallest and largest entry over each range."""

    low: Any
    high: Any


class TableBounds:
    """Bounds of all tables of one plan; keeps what it has reduced.

    `grain` gives the block size along `q` and `k` (1 where absent). Bounds are exact for ranges
    that begin and end on blocks, and cover the blocks touched for others. Along `b` and `h` ranges
    must be single points, else the whole table answers.

    >>> from tilefold.masks.evaluate import Range
    >>> table = Table(np.array([5, 3, 8, 9], np.int32))
    >>> TableBounds({"k": 2}).bounds(table, (Range(np.array([0, 2]), np.array([1, 3]), "k"),))
    Bounds(low=array([3, 8]), high=array([5, 9]))
    """

    def __init__(self, grain: Mapping[str, int]) -> None:
        self.grain = grain
        self._kept: dict[tuple[int, tuple[str | None, ...]], _Spans | _Counts] = {}
        self._tables: list[Table] = []

    def bounds(self, table: Table | Declared, indices: tuple[IndexRange, ...]) -> Bounds:
        """The smallest and largest entry of the table where each index is within its range."""
        if isinstance(table, Declared):
            return entire(table)
        axes = tuple(index.name for index in indices)
        ranged = [axis for axis, name in enumerate(axes) if name in ("q", "k")]
        points = [axis for axis, name in enumerate(axes) if name in ("b", "h")]
        truths = table.dtype == "bool"
        simple = len(ranged) + len(points) == len(axes) and len(ranged) <= 1 + truths
        single = all(np.array_equal(indices[axis].low, indices[axis].high) for axis in points)
        if not simple or not single or table.array.size == 0:
            return entire(table)
        place = tuple(np.asarray(indices[axis].low) for axis in points)
        if not ranged:
            value = table.array[place]
            value = value if truths else value.astype(np.int64)
            return Bounds(value, value)
        grains = [self.grain.get(str(axes[axis]), 1) for axis in ranged]
        blocks = [
            (np.asarray(indices[axis].low) // grain, np.asarray(indices[axis].high) // grain)
            for axis, grain in zip(ranged, grains, strict=True)
        ]
        key = (id(table), axes)
        if key not in self._kept:
            moved = table.array.transpose(points + ranged)
            self._kept[key] = (_Spans if len(ranged) == 1 else _Counts)(moved, grains)
            self._tables.append(table)
        return self._kept[key].bounds(place, blocks)


def entire(table: Table | Declared) -> Bounds:
    """The smallest and largest entry of a whole table; zeros for an empty one."""
    if isinstance(table, Declared):
        kind = np.bool_ if table.dtype == "bool" else np.int64
        return Bounds(kind(table.low), kind(table.high))
    array = table.array if table.array.size else np.zeros(1, table.array.dtype)
    low, high = array.min(), array.max()
    truths = array.dtype == np.bool_
    return Bounds(low, high) if truths else Bounds(np.int64(low), np.int64(high))


def _reduce(array: Array, axis: int, grain: int, function: Any) -> Array:
    """The array reduced to blocks of `grain` along one axis (negative); the last may be short."""
    axis += array.ndim
    size = array.shape[axis]
    whole = size // grain
    head = array[(slice(None),) * axis + (slice(0, whole * grain),)]
    shape = (*array.shape[:axis], whole, grain, *array.shape[axis + 1 :])
    blocks = function.reduce(head.reshape(shape), axis=axis + 1)
    if whole * grain == size:
        return np.asarray(blocks)
    tail = array[(slice(None),) * axis + (slice(whole * grain, None),)]
    short = function.reduce(tail, axis=axis, keepdims=True)
    return np.concatenate((blocks, short), axis=axis)


class _Spans:
    """Minima and maxima over spans of 1, 2, 4, ... blocks along the last axis."""

    def __init__(self, array: Array, grains: list[int]) -> None:
        self.truths = array.dtype == np.bool_
        numbers = array.view(np.uint8) if self.truths else array
        self.low = _spans(_reduce(numbers, -1, grains[0], np.minimum), np.minimum)
        self.high = _spans(_reduce(numbers, -1, grains[0], np.maximum), np.maximum)

    def bounds(self, place: tuple[Array, ...], blocks: list[tuple[Array, Array]]) -> Bounds:
        first, last = blocks[0]
        level = np.frexp(last - first + 1)[1] - 1
        second = last + 1 - (1 << level)
        left, right = (level, *place, first), (level, *place, second)
        low = np.minimum(self.low[left], self.low[right])
        high = np.maximum(self.high[left], self.high[right])
        kind = np.bool_ if self.truths else np.int64
        return Bounds(low.astype(kind), high.astype(kind))


def _spans(blocks: Array, function: Any) -> Array:
    count = blocks.shape[-1]
    levels = [blocks]
    while 1 << len(levels) <= count:
        last, half = levels[-1], 1 << (len(levels) - 1)
        wider = last.copy()
        function(last[..., :-half], last[..., half:], out=wider[..., :-half])
        levels.append(wider)
    return np.stack(levels)


class _Counts:
    """Counts of blocks over rectangles: blocks with a true entry, and blocks with no other."""

    def __init__(self, array: Array, grains: list[int]) -> None:
        numbers = array.view(np.uint8)
        self.every = _area(_blocks(numbers, grains, np.minimum))
        self.some = _area(_blocks(numbers, grains, np.maximum))

    def bounds(self, place: tuple[Array, ...], blocks: list[tuple[Array, Array]]) -> Bounds:
        (top, bottom), (left, right) = blocks
        corners = (top, bottom + 1, left, right + 1)
        size = (bottom + 1 - top) * (right + 1 - left)
        return Bounds(
            _count(self.every, place, *corners) == size, _count(self.some, place, *corners) > 0
        )


def _blocks(numbers: Array, grains: list[int], function: Any) -> Array:
    return _reduce(_reduce(numbers, -2, grains[0], function), -1, grains[1], function)


def _area(blocks: Array) -> Array:
    sums = np.zeros((*blocks.shape[:-2], blocks.shape[-2] + 1, blocks.shape[-1] + 1), np.int64)
    np.cumsum(blocks, axis=-2, out=sums[..., 1:, 1:])
    np.cumsum(sums[..., 1:, 1:], axis=-1, out=sums[..., 1:, 1:])
    return sums


def _count(
    sums: Array, place: tuple[Array, ...], top: Array, bottom: Array, left: Array, right: Array
) -> Any:
    outer, above = (*place, bottom, right), (*place, top, right)
    beside, both = (*place, bottom, left), (*place, top, left)
    return sums[outer] - sums[above] - sums[beside] + sums[both]
