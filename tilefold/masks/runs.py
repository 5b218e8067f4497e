"""A mask cut into tiles: which runs of tiles each block row must visit, and which need masking.

A tile is skipped, full or partial. Super-tiles are classified first, and only partial ones are
looked into. So a window over a million tokens costs its own length, not the square of it. The
intervals of `evaluate` decide, so every rule is served by the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilefold.masks.evaluate import intervals
from tilefold.masks.expression import Boolean, names
from tilefold.masks.table_bounds import TableBounds

Array = NDArray[Any]

FAN = 8  # a super-tile is 8 x 8 of the next finer kind; 4 and 16 plan a 1M window no faster
TOP_TILES = 1 << 14  # grids up to this many tiles are classified at once, without super-tiles
CHUNK_TILES = 1 << 16  # tiles classified at a time: their int64 bounds stay within a 2 MiB cache
COMPACT_SEGMENTS = 1 << 18  # above this many (8 MiB), segments are merged before more are made

SKIP, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of tiles that each block row visits, as compressed rows.

    Runs `rows[i]` to `rows[i + 1]` belong to block row `i = (b * planes_h + h) * block_rows + r`,
    with b or h taken as 0 where the mask does not depend on it (then that plane count is 1). A run
    is (first, last, masked): elements first <= x < last of the traversed axis, of full tiles
    (masked 0) or partial ones (masked 1). Runs ascend, and adjacent ones differ in kind.
    """

    rows: NDArray[np.int64]
    runs: NDArray[np.int64]
    planes_b: int
    planes_h: int

    @property
    def block_rows(self) -> int:
        """Block rows in one plane."""
        planes = self.planes_b * self.planes_h
        return (len(self.rows) - 1) // planes if planes else 0

    @property
    def met(self) -> NDArray[np.int64]:
        """Traversed elements that each block row visits, over all planes."""
        ends = np.concatenate([[0], np.cumsum(self.runs[:, 1] - self.runs[:, 0])])
        met: NDArray[np.int64] = ends[self.rows[1:]] - ends[self.rows[:-1]]
        return met


class Counts(NamedTuple):
    """Numbers of skipped, full and partial tiles of a mask, over all its planes."""

    skip: int
    full: int
    partial: int


class _Grid(NamedTuple):
    """Tiles of one level: block sizes in elements along the parallel and the traversed axis."""

    rows: int
    columns: int
    block_row: int
    block_column: int


class _Segments(NamedTuple):
    """Runs in tiles: the row over all planes, the first tile, one past the last, and the kind."""

    row: Array
    first: Array
    last: Array
    kind: Array


def runs(
    expression: Boolean,
    *,
    parallel: str,
    batch: int,
    heads: int,
    len_parallel: int,
    len_traverse: int,
    block_parallel: int,
    block_traverse: int,
    group: int = 1,
) -> Runs:
    """The runs of each block row of a mask, block rows along `parallel` ("q" or "k").

    Each `group` of heads shares its block rows: they visit what any of its heads sees.

    >>> from tilefold.masks.expression import (Index)
    >>> sizes = dict(batch=1, heads=1, len_parallel=4, len_traverse=4)
    >>> blocks = dict(block_parallel=2, block_traverse=2)
    >>> causal = runs(Index("q") >= Index("k"), parallel="q", **sizes, **blocks)
    >>> causal.rows.tolist(), causal.runs.tolist()
    ([0, 1, 3], [[0, 2, 1], [0, 2, 0], [2, 4, 1]])
    """
    assert parallel in ("q", "k"), parallel
    assert block_parallel > 0 and block_traverse > 0, (block_parallel, block_traverse)
    read = names(expression)
    planes_b, planes_h = (
        size if name in read else 1 for name, size in (("b", batch), ("h", heads // group))
    )
    scan = _Scan(expression, parallel, planes_h, group, len_parallel, len_traverse)
    grid = _Grid(
        -(-len_parallel // block_parallel),
        -(-len_traverse // block_traverse),
        block_parallel,
        block_traverse,
    )
    segments = scan.segments(planes_b * planes_h, grid)
    rows = np.zeros(planes_b * planes_h * grid.rows + 1, np.int64)
    np.cumsum(np.bincount(segments.row, minlength=len(rows) - 1), out=rows[1:])
    first = segments.first * block_traverse
    last = np.minimum(segments.last * block_traverse, len_traverse)
    return Runs(rows, np.stack((first, last, segments.kind == PARTIAL), axis=1), planes_b, planes_h)


def count(runs: Runs, len_traverse: int, block_traverse: int) -> Counts:
    """The tiles of each kind, given the traversed axis that the runs were made with."""
    tiles = -(-(runs.runs[:, 1] - runs.runs[:, 0]) // block_traverse)
    partial = int(tiles[runs.runs[:, 2] == 1].sum())
    full = int(tiles.sum()) - partial
    total = (len(runs.rows) - 1) * -(-len_traverse // block_traverse)
    return Counts(total - full - partial, full, partial)


class _Scan:
    """One expression over one pair of lengths, classified level by level."""

    def __init__(
        self,
        expression: Boolean,
        parallel: str,
        planes_h: int,
        group: int,
        len_parallel: int,
        len_traverse: int,
    ) -> None:
        self.expression = expression
        self.parallel = parallel
        self.traverse = "k" if parallel == "q" else "q"
        self.planes_h = planes_h
        self.group = group
        self.len_parallel = len_parallel
        self.len_traverse = len_traverse

    def segments(self, planes: int, grid: _Grid) -> _Segments:
        """The merged segments of all planes, in the order of rows and columns."""
        self.summary = TableBounds(
            {self.parallel: grid.block_row, self.traverse: grid.block_column}
        )
        found = _Found(grid.columns)
        if not planes * grid.rows * grid.columns:
            return found.merged()
        span = 1
        while -(-grid.rows // span) * -(-grid.columns // span) > TOP_TILES:
            span *= FAN
        zeros = np.zeros(planes, np.int64)
        parents: tuple[Array, ...] = (np.arange(planes), zeros, zeros)
        fan = (-(-grid.rows // span), -(-grid.columns // span))
        while span:
            level = _Grid(
                -(-grid.rows // span),
                -(-grid.columns // span),
                grid.block_row * span,
                grid.block_column * span,
            )
            descend = []
            for part in _chunks(parents, fan):
                states = self.classify(part, fan, level)
                found.add(_expand(_segments(part, states, level, span == 1), span, level, grid))
                if span > 1:
                    which, row, column = np.nonzero(states == PARTIAL)
                    plane, top, left = (values[which] for values in part)
                    descend.append((plane, (top + row) * FAN, (left + column) * FAN))
            parents = tuple(np.concatenate(parts) for parts in zip(*descend, strict=True))
            fan = (min(FAN, grid.rows), min(FAN, grid.columns))
            span = span // FAN if parents else 0
        return found.merged()

    def classify(self, part: tuple[Array, ...], fan: tuple[int, int], level: _Grid) -> Array:
        """SKIP, PARTIAL or FULL for the tiles (parent, row, column) below each parent."""
        plane, top, left = (values[:, None, None] for values in part)
        rows = top + np.arange(fan[0])[:, None]
        columns = left + np.arange(fan[1])
        batch, head = plane // self.planes_h, plane % self.planes_h * self.group
        ranges = {
            "b": (batch, batch),
            "h": (head, head + (self.group - 1)),
            self.parallel: _elements(rows, level.block_row, self.len_parallel),
            self.traverse: _elements(columns, level.block_column, self.len_traverse),
        }
        known = intervals(self.expression, ranges, self.summary)
        inside = (rows < level.rows) & (columns < level.columns)
        states: Array = np.add(known.all, known.any, dtype=np.int8) * inside
        return states


def _elements(blocks: Array, block: int, length: int) -> tuple[Array, Array]:
    """The first and last element of each block; blocks past the end repeat the last element."""
    first = np.minimum(blocks * block, length - 1)
    return first, np.minimum(blocks * block + (block - 1), length - 1)


def _chunks(parents: tuple[Array, ...], fan: tuple[int, int]) -> Iterator[tuple[Array, ...]]:
    step = max(1, CHUNK_TILES // (fan[0] * fan[1]))
    for start in range(0, len(parents[0]), step):
        yield tuple(values[start : start + step] for values in parents)


def _segments(part: tuple[Array, ...], states: Array, level: _Grid, finest: bool) -> _Segments:
    """Neighbouring tiles of one kind within each row of each parent, in tiles of this level."""
    kinds = states if finest else states * (states == FULL)
    change = np.ones(kinds.shape, np.bool_)
    np.not_equal(kinds[..., 1:], kinds[..., :-1], out=change[..., 1:])
    starts = np.flatnonzero(change)
    lengths = np.diff(starts, append=kinds.size)
    kind = kinds.reshape(-1)[starts]
    wanted = kind != SKIP
    starts, lengths, kind = starts[wanted], lengths[wanted], kind[wanted]
    parent, row, column = np.unravel_index(starts, kinds.shape)
    plane, top, left = (values[parent] for values in part)
    first = left + column
    return _Segments(plane * level.rows + top + row, first, first + lengths, kind)


def _expand(segments: _Segments, span: int, level: _Grid, grid: _Grid) -> _Segments:
    """Segments of a level as segments of single tiles: each row becomes `span` rows."""
    if span == 1:
        return segments
    row, first, last, kind = _merge([segments], level.columns)
    plane, coarse = row // level.rows, row % level.rows
    height = np.minimum(grid.rows - coarse * span, span)
    below = np.arange(height.sum()) - np.repeat(np.cumsum(height) - height, height)
    fine = np.repeat(plane * grid.rows + coarse * span, height) + below
    return _Segments(
        fine,
        np.repeat(first * span, height),
        np.repeat(last * span, height),
        np.repeat(kind, height),
    )


def _merge(found: list[_Segments], columns: int) -> _Segments:
    """Segments sorted by row and first tile, neighbours of one kind joined."""
    row, first, last, kind = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(row * columns + first, kind="stable")
    row, first, last, kind = row[order], first[order], last[order], kind[order]
    fresh = np.ones(len(row), np.bool_)
    fresh[1:] = (row[1:] != row[:-1]) | (kind[1:] != kind[:-1]) | (first[1:] != last[:-1])
    starts = np.flatnonzero(fresh)
    ends = np.append(starts[1:], len(row))[: len(starts)] - 1
    return _Segments(row[starts], first[starts], last[ends], kind[starts])


class _Found:
    """Segments on their way to runs, merged now and then so that they take little memory."""

    def __init__(self, columns: int) -> None:
        empty = np.zeros(0, np.int64)
        self.columns = columns
        self.parts = [_Segments(empty, empty, empty, empty.astype(np.int8))]
        self.size = 0
        self.limit = COMPACT_SEGMENTS

    def add(self, segments: _Segments) -> None:
        self.parts.append(segments)
        self.size += len(segments.row)
        if self.size > self.limit:
            self.merged()

    def merged(self) -> _Segments:
        """All segments in order; the next merge waits until their number has doubled."""
        whole = _merge(self.parts, self.columns)
        self.parts, self.size = [whole], len(whole.row)
        self.limit = max(COMPACT_SEGMENTS, 2 * self.size)
        return whole
