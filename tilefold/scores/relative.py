"""Biases by relative position: T5's buckets, clipped distances, and Swin's windows.

The distance of a query and a key counts from the end of both, as in `causal()`: the last query
stands beside the last key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from tilefold.common.check import flag, whole
from tilefold.masks.arrays import as_table
from tilefold.masks.expression import Constant, Index, Integer, Lookup, Real, RealLookup, as_real
from tilefold.masks.symbols import as_integer
from tilefold.masks.tables import Input, Table
from tilefold.scores.functions import floats, maximum, minimum
from tilefold.scores.score import Score, Sizes, shape_text

_FARTHEST = 2**20
"""The largest max_distance: each distance up to it has an entry in a table of buckets."""


@dataclass(frozen=True, repr=False)
class Relative(Score):
    """See `relative_bias`."""

    table: Input
    bidirectional: bool
    max_distance: int

    def bind(self, s: Real, sizes: Sizes) -> Real:
        """S + table[h, bucket of the distance]."""
        place = _clipped(_distance(sizes), self.max_distance)
        options = self.table.shape[1], self.bidirectional, self.max_distance
        bucket = Lookup(_buckets(*options), (place,))
        head = _head("relative_bias: table", self.table, sizes)
        return as_real(s + RealLookup(self.table, (head, bucket)))

    def __repr__(self) -> str:
        options = "" if self.bidirectional else ", bidirectional=False"
        if self.max_distance != 128:
            options += f", max_distance={self.max_distance}"
        return f"relative_bias({shape_text(self.table)}{options})"

    __hash__ = Score.__hash__


def relative_bias(table: Any, bidirectional: bool = True, max_distance: int = 128) -> Score:
    """Adds a bias for each bucket of distances to the scores, as T5 does (Raffel et al., 2020).

    >>> import numpy as np
    >>> relative_bias(np.zeros((8, 32)))
    relative_bias(array[8x32])

    Near distances have a bucket each. Farther ones share buckets, whose width grows with the
    distance, up to max_distance. If bidirectional, half of the buckets is for later keys;
    else later keys share the bucket of distance 0.

    Arguments:
        table: floats (heads, buckets), or (1, buckets) for all heads; it gets a gradient.
            A T5 model of Hugging Face has the transposed one, (buckets, heads).
        bidirectional: True in encoders, False in decoders.
        max_distance: the distance from which on all share the last bucket, an integer that is
            larger than the number of near buckets, and at most 2**20.

    Raises TypeError or ValueError for other values, and ValueError once the table meets another
    number of heads. The paper is arXiv:1910.10683.
    """
    given = _matrix("relative_bias: table", table, 2, "(heads, buckets)")
    both = flag("relative_bias: bidirectional", bidirectional)
    buckets, farthest = given.shape[1], whole("relative_bias: max_distance", max_distance, 1)
    if farthest > _FARTHEST:
        raise ValueError(f"relative_bias: max_distance must be at most {_FARTHEST}, got {farthest}")
    one_side = buckets // 2 if both else buckets
    if one_side < 2 or (both and buckets % 2):
        wanted = "an even number >= 4" if both else "at least 2"
        raise ValueError(f"relative_bias: the table must have {wanted} of buckets, got {buckets}")
    if farthest <= one_side // 2:
        raise ValueError(
            f"relative_bias: max_distance must be above {one_side // 2}, the number of near"
            f" buckets, got {farthest}"
        )
    return Relative(given, both, farthest)


@lru_cache(maxsize=8)
def _buckets(number: int, bidirectional: bool, farthest: int) -> Table:
    """The bucket of each distance: exact ones first, then a logarithmic scale, in float32."""
    distance, one_side = np.arange(-farthest, farthest + 1), number // (1 + bidirectional)
    later = (distance > 0) * one_side if bidirectional else 0
    size = abs(distance) if bidirectional else np.maximum(-distance, 0)
    near = one_side // 2
    scale = np.float32((one_side - near) / math.log(farthest / near))
    far = near + (np.log(np.maximum(size, 1).astype(np.float32) / near) * scale).astype(np.int64)
    numbers = later + np.where(size < near, size, np.minimum(far, one_side - 1))
    return as_table(numbers, np.int32)


@dataclass(frozen=True, repr=False)
class Clipped(Score):
    """See `distance_bias`."""

    table: Input

    def bind(self, s: Real, sizes: Sizes) -> Real:
        """S + table[h, distance, clipped]."""
        place = _clipped(_distance(sizes), self.table.shape[1] // 2)
        head = _head("distance_bias: table", self.table, sizes)
        return as_real(s + RealLookup(self.table, (head, place)))

    def __repr__(self) -> str:
        return f"distance_bias({shape_text(self.table)})"

    __hash__ = Score.__hash__


def distance_bias(table: Any) -> Score:
    """Adds a bias for each distance to the scores; distances are clipped (Shaw et al., 2018).

    >>> import numpy as np
    >>> distance_bias(np.zeros((8, 33)))
    distance_bias(array[8x33])

    Arguments:
        table: floats (heads, 2 * n + 1), or (1, 2 * n + 1) for all heads, for key - query from -n
            to n; larger distances count as n. It gets a gradient.

    Raises TypeError or ValueError for other values, and ValueError once the table meets another
    number of heads. The paper is arXiv:1803.02155.
    """
    given = _matrix("distance_bias: table", table, 2, "(heads, 2 * n + 1)")
    if given.shape[1] % 2 == 0:
        raise ValueError(
            f"distance_bias: the table must have an odd number of distances, got {given.shape[1]}"
        )
    return Clipped(given)


@dataclass(frozen=True, repr=False)
class Grid(Score):
    """See `window_bias`."""

    table: Input

    def bind(self, s: Real, sizes: Sizes) -> Real:
        """S + table[h, difference of rows, difference of columns]."""
        height, width = ((size + 1) // 2 for size in self.table.shape[1:])
        if (sizes.len_q, sizes.len_k) != (height * width, height * width):
            raise ValueError(
                f"{self!r} is for windows of {height} x {width} positions, but len_q is"
                f" {sizes.len_q} and len_k is {sizes.len_k}"
            )
        q, k = Index("q"), Index("k")
        row = q // width - k // width + (height - 1)
        column = q % width - k % width + (width - 1)
        head = _head("window_bias: table", self.table, sizes)
        # The intervals of the difference of two rows are exact, so no index leaves the table.
        return as_real(s + RealLookup(self.table, (head, row, column)))

    def __repr__(self) -> str:
        return f"window_bias({shape_text(self.table)})"

    __hash__ = Score.__hash__


def window_bias(table: Any) -> Score:
    """Adds a bias by relative position in a 2-D window, as Swin does (Liu et al., 2021).

    >>> import numpy as np
    >>> window_bias(np.zeros((4, 13, 13)))
    window_bias(array[4x13x13])

    Queries and keys are the positions of one window of height x width, row by row.

    Arguments:
        table: floats (heads, 2 * height - 1, 2 * width - 1), or one head for all. Entry [h, i, j]
            is for a query that lies i - (height - 1) rows below its key and j - (width - 1)
            columns right of it. It gets a gradient. A Swin model has it flattened and
            transposed: `table.T.reshape(heads, 2 * height - 1, 2 * width - 1)`.

    Raises TypeError or ValueError for other values, and ValueError once the table meets other
    lengths or another number of heads. The paper is arXiv:2103.14030.
    """
    axes = "(heads, 2 * height - 1, 2 * width - 1)"
    given = _matrix("window_bias: table", table, 3, axes)
    if not all(size % 2 for size in given.shape[1:]):
        raise ValueError(f"window_bias: table must be {axes}, got shape {given.shape}")
    return Grid(given)


def _matrix(name: str, value: Any, rank: int, axes: str) -> Input:
    given = floats(name, value)
    if len(given.shape) != rank or 0 in given.shape:
        raise ValueError(f"{name} must be {axes}, got shape {given.shape}")
    return given


def _head(name: str, given: Input, sizes: Sizes) -> Integer:
    """The index of the head in a table that has one row for each head, or one for all."""
    if given.shape[0] not in (1, sizes.heads):
        raise ValueError(
            f"{name} of shape {given.shape} is for {given.shape[0]} heads, but heads is"
            f" {sizes.heads}"
        )
    return Constant(0) if given.shape[0] == 1 else Index("h")


def _distance(sizes: Sizes) -> Integer:
    """The place of the key less that of the query."""
    return as_integer(Index("k") - Index("q") - (sizes.len_k - sizes.len_q))


def _clipped(distance: Integer, farthest: int) -> Integer:
    """A distance within a limit, counted from 0."""
    return as_integer(maximum(minimum(distance, farthest), -farthest) + farthest)
