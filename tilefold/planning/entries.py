"""The gradients of the arrays that a score reads, on GPUs: who adds what to which entries.

Blocks of queries of a head are *units*. An index of a pair (b, h or q) that stands alone on an axis
of every look-up keeps entries apart: units that differ in it never add to the same entry.

    bias (heads, len_q, len_k)    h and q keep apart; the units of all batch entries share
    T5 table (heads, buckets)     h keeps apart; the units of all batch entries and blocks share

How a tile is added follows from the indices of the entry:

    rows         the key does not matter, and q is an index or does not matter: sums of rows
    columns      the query does not matter, and k is an index: sums of columns
    tile         q and k are indices: the tile as it is
    scattered    else, as in buckets of distances: entry by entry
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tilefold.masks.expression import Expression, Index, names
from tilefold.masks.pairs import kept_apart
from tilefold.masks.skeleton import Skeleton
from tilefold.masks.tables import Input
from tilefold.planning.masked import Scored


class Entry(NamedTuple):
    """An entry of an array in the values of a score: the number of its derivative, after which its
    `rank` indices stand.
    """

    value: int
    rank: int


class Added(NamedTuple):
    """The gradient of an input, in parts: `shared` units have the same entries, and `parts` is the
    name of the buffer.
    """

    given: Input
    shared: int

    @property
    def parts(self) -> str:
        """The name of the buffer of the parts."""
        return f"d{self.given.name}_parts"


class Read(NamedTuple):
    """A look-up: its number, how it is added, its rank, and whether the query is an index."""

    number: int
    way: str
    rank: int
    by_query: bool


def entries_of(scored: Scored, number: int) -> tuple[Input | None, tuple[Entry, ...]]:
    """An input, and where its entries stand in the values of a score; None if it has none."""
    found: list[Entry] = []
    first, of_input = 1, None
    for given in scored.entries:
        entry = Entry(first, len(given.shape))
        first += 1 + entry.rank
        if given.number == number:
            of_input = given
            found.append(entry)
    return of_input, tuple(found)


def apart(scored: Scored, entries: tuple[Entry, ...]) -> frozenset[str]:
    """The indices that keep the entries of an array apart."""
    values = scored.parts.skeleton.expression.parts
    return kept_apart([values[at + 1 : at + 1 + rank] for at, rank in entries])


def units(sizes: Mapping[str, int], apart: frozenset[str]) -> tuple[NDArray[np.int32], int]:
    """The units in order, and how many in a row share their entries.

    `sizes` counts batch entries, heads and block rows. A unit is (b heads + h) block_rows + block.

    >>> units({"b": 2, "h": 1, "q": 3}, frozenset("q"))
    (array([0, 3, 1, 4, 2, 5], dtype=int32), 2)
    """
    axes = [*sizes]
    number = np.arange(np.prod([*sizes.values()]), dtype=np.int32).reshape([*sizes.values()])
    own = [axes.index(name) for name in axes if name in apart]
    others = [axis for axis in range(len(axes)) if axis not in own]
    shared = int(np.prod([number.shape[axis] for axis in others], dtype=np.int64))
    return np.ascontiguousarray(number.transpose(own + others)).ravel(), shared


class Limits(Protocol):
    """The constants of a planner that bound the parts of a gradient."""

    @property
    def part_elements(self) -> int:
        """Most elements of all parts, where there are more than `fixed_parts`."""

    @property
    def fixed_parts(self) -> int:
        """Parts of a large array."""


def parts_of(given: Input, shared: int, enough: int, limits: Limits) -> int:
    """How many parts the gradient of an input has, whose entries `shared` units share.

    With `enough` parts there is work for the whole GPU.
    """
    most = max(1, limits.part_elements // max(1, math.prod(given.shape)))
    return max(1, min(shared, enough, max(most, limits.fixed_parts)))


def reads_of(score: Skeleton, entries: Sequence[Entry]) -> list[Read]:
    """The look-ups of a kernel that adds to these entries."""
    found = []
    for number, (first, rank) in enumerate(entries):
        indices = score.expression.parts[first + 1 : first + 1 + rank]
        found.append(Read(number, _way(indices), rank, _alone("q", indices)))
    return found


def _way(indices: tuple[Expression, ...]) -> str:
    used = frozenset().union(*(names(index) for index in indices))
    if "k" not in used and ("q" not in used or _alone("q", indices)):
        return "rows"
    if "q" not in used and _alone("k", indices):
        return "columns"
    return "tile" if _alone("q", indices) and _alone("k", indices) else "scattered"


def _alone(name: str, indices: tuple[Expression, ...]) -> bool:
    """True where an index stands alone on an axis: then its values have entries of their own."""
    return any(isinstance(index, Index) and index.name == name for index in indices)
