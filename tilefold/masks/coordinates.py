"""Coordinates of queries and keys in 1-D and 2-D sequences of different sizes.

Rules such as causal order and windows compare coordinates, not indices. `align` shifts the queries
so that either both first or both last positions meet; `lengths` makes the last query meet the last
key that its batch entry has. `sync` instead spreads the shorter sequence over the longer one by a
whole step. A 2-D sequence of size (H, W) is flattened row by row, and each
of its dimensions has its own coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from tilefold.common.check import choice, whole
from tilefold.masks.arrays import check_batch, key_count, key_counts
from tilefold.masks.expression import Index, Integer, Table
from tilefold.masks.tables import Given

ALIGNS = ("end", "start")
SYNCS = ("none_front", "scale_front", "scale_end")

Grid = tuple[int, int]


@dataclass(frozen=True)
class Coordinates:
    """How the indices of two sequences become comparable coordinates."""

    align: str = "end"
    sync: str | None = None
    grid_q: Grid | None = None
    grid_k: Grid | None = None
    lengths: int | Table | Given | None = None

    def check_batch(self, rule: str, batch: int) -> None:
        """Raises ValueError unless there is one length per batch entry."""
        if isinstance(self.lengths, Table | Given) and self.lengths.shape:
            check_batch(f"{rule}: lengths", self.lengths, batch)

    def check(self, rule: str, len_q: int, len_k: int) -> None:
        """Raises ValueError unless the grids hold exactly these, and no length is above len_k."""
        if self.lengths is not None:
            key_count(f"{rule}: lengths", self.lengths, len_k)
        for name, grid, length in (("q", self.grid_q, len_q), ("k", self.grid_k, len_k)):
            if grid is not None and grid[0] * grid[1] != length:
                raise ValueError(
                    f"{rule}: grid_{name}={grid} holds {grid[0] * grid[1]} positions, "
                    f"but len_{name} is {length}; height x width must equal it"
                )

    def axes(self, len_q: int, len_k: int) -> tuple[Axis, ...]:
        """The coordinates of query and key, one pair per dimension."""
        if self.grid_q is None or self.grid_k is None:
            return (self._axis(Index("q"), Index("k"), len_q, len_k),)
        (height_q, width_q), (height_k, width_k) = self.grid_q, self.grid_k
        q, k = Index("q"), Index("k")
        rows = self._axis(q // max(width_q, 1), k // max(width_k, 1), height_q, height_k)
        columns = self._axis(q % max(width_q, 1), k % max(width_k, 1), width_q, width_k)
        return rows, columns

    def order(self, len_q: int, len_k: int) -> tuple[Integer, Integer]:
        """Integers in the order of the coordinates, which is raster order in 2-D.

        A row is worth more than any difference of columns: M = max(W_q, W_k). With steps A over
        rows and a over columns, A * row * M + a * column is a * index + (A * M - a * W) * row, and
        both terms grow with the index; so intervals of it are tight even from mid-row to mid-row.
        """
        if self.grid_q is None or self.grid_k is None:
            axis = self.axes(len_q, len_k)[0]
            return axis.q, axis.k
        (height_q, width_q), (height_k, width_k) = self.grid_q, self.grid_k
        high = self._steps(height_q, height_k)
        wide = self._steps(width_q, width_k)
        worth = max(width_q, width_k)
        numbers = []
        for index, width, row, column in (
            (Index("q"), width_q, high.q, wide.q),
            (Index("k"), width_k, high.k, wide.k),
        ):
            start = row.start * worth + column.start
            extra = row.step * worth - column.step * width
            number = _line(index, column.step, start)
            numbers.append(number + (index // max(width, 1)) * extra if extra else number)
        return numbers[0], numbers[1]

    def _axis(self, q: Integer, k: Integer, size_q: int, size_k: int) -> Axis:
        if self.lengths is not None:
            last = key_count("lengths", self.lengths, size_k) - size_q
            return Axis(q + last, k, size_q + size_k)
        longest = max(size_q, size_k)
        line_q, line_k = self._steps(size_q, size_k)
        if self.sync is None and self.align == "end":
            return Axis(q + line_q.start, k, longest)
        return Axis(_line(q, *line_q), _line(k, *line_k), longest)

    def _steps(self, size_q: int, size_k: int) -> _Lines:
        """The step and the first coordinate of either side."""
        if self.sync is None and self.align == "end":
            return _Lines(_Line(1, size_k - size_q), _Line(1, 0))
        if self.sync in (None, "none_front"):
            return _Lines(_Line(1, 0), _Line(1, 0))
        longest = max(size_q, size_k)
        step_q, step_k = longest // max(size_q, 1), longest // max(size_k, 1)
        if self.sync == "scale_front":
            return _Lines(_Line(step_q, 0), _Line(step_k, 0))
        return _Lines(_Line(step_q, step_q - 1), _Line(step_k, step_k - 1))


class Axis(NamedTuple):
    """One dimension: the coordinates of query and key, and a number above all their distances."""

    q: Integer
    k: Integer
    longest: int


class _Line(NamedTuple):
    """The coordinates start, start + step, start + 2 step, ..."""

    step: int
    start: int


class _Lines(NamedTuple):
    q: _Line
    k: _Line


def _line(index: Integer, step: int, start: int) -> Integer:
    scaled = index if step == 1 else index * step
    return scaled if start == 0 else scaled + start


def coordinates(
    rule: str, align: Any, sync: Any, grid_q: Any, grid_k: Any, lengths: Any
) -> Coordinates:
    """Coordinates from a rule's arguments; raises ValueError or TypeError naming a bad one."""
    choice(f"{rule}: align", align, ALIGNS)
    if sync is not None:
        choice(f"{rule}: sync", sync, (None, *SYNCS))
        if align != "end":
            raise ValueError(
                f"{rule}: align={align!r} was given together with sync={sync!r}; "
                "sync replaces align, so give only one of them"
            )
    if grid_q is None and grid_k is not None:
        raise ValueError(f"{rule}: grid_k={grid_k!r} was given without grid_q; give both")
    size_q = None if grid_q is None else _grid(f"{rule}: grid_q", grid_q)
    size_k = size_q if grid_k is None else _grid(f"{rule}: grid_k", grid_k)
    if lengths is None:
        return Coordinates(align, sync, size_q, size_k)
    for name, value, default in (
        ("align", align, "end"),
        ("sync", sync, None),
        ("grid_q", size_q, None),
    ):
        if value != default:
            raise ValueError(
                f"{rule}: {name}={value!r} was given together with lengths; "
                "lengths make the last query meet the last key of its batch entry, so give one"
            )
    return Coordinates(lengths=key_counts(f"{rule}: lengths", lengths))


def _grid(name: str, value: Any) -> Grid:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be two integers (height, width), got {value!r}")
    return whole(name, value[0], 0), whole(name, value[1], 0)
