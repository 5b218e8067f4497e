"""Runs of a mask as tiles of a GPU kernel: as few tiles as cover what is seen.

A kernel multiplies whole tiles of `traverse` columns, and the runs of a mask are cut wherever full
tiles of 32 meet partial ones. A narrow window would be three tiles then, hardly filled: partial,
full, partial. So what lies side by side is cut again from its first column on, into tiles that are
masked where they hold anything that is: full columns beside a masked one ask the mask for nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tilefold.masks.runs import Runs

Array = NDArray[np.int64]


def runs_to_tiles(visited: Runs, step: int) -> Runs:
    """The same columns in runs of whole tiles of `step`, but for the last one of neighbours.

    >>> window = Runs(np.array([0, 3]), np.array([[32, 64, 1], [64, 256, 0], [256, 288, 1]]), 1, 1)
    >>> runs_to_tiles(window, 64).runs.tolist(), runs_to_tiles(window, 256).runs.tolist()
    ([[32, 96, 1], [96, 224, 0], [224, 288, 1]], [[32, 288, 1]])
    """
    if not len(visited.runs):
        return visited
    first, last, masked = visited.runs.T
    row = np.repeat(np.arange(len(visited.rows) - 1), np.diff(visited.rows))
    apart = np.ones(len(first), np.bool_)
    apart[1:] = (row[1:] != row[:-1]) | (first[1:] != last[:-1])
    heads, chain = np.flatnonzero(apart), np.cumsum(apart) - 1
    begin, end = first[heads], last[_ends(heads, len(first))]
    hidden = masked == 1
    of, low, high = _joined(
        chain[hidden],
        (first - begin[chain])[hidden] // step,
        -(-(last - begin[chain])[hidden] // step),
    )
    # Full tiles lie from the start, or the end of a masked run, to the next one, or the end.
    chains = np.arange(len(heads))
    places = np.concatenate([chains, of])
    starts = np.concatenate([np.zeros_like(chains), high])
    stops = np.concatenate([-(-(end - begin) // step), low])
    ascending, matching = np.lexsort((starts, places)), np.lexsort((stops, places))
    places, starts, stops = places[ascending], starts[ascending], stops[matching]
    some = starts < stops
    which = np.concatenate([places[some], of])
    tiles = np.stack((np.concatenate([starts[some], low]), np.concatenate([stops[some], high])))
    kind = np.repeat([0, 1], [some.sum(), len(of)])
    order = np.lexsort((tiles[0], which))
    which, tiles, kind = which[order], tiles[:, order], kind[order]
    found = begin[which] + tiles * step
    found[1] = np.minimum(found[1], end[which])
    rows = np.zeros_like(visited.rows)
    np.cumsum(np.bincount(row[heads][which], minlength=len(rows) - 1), out=rows[1:])
    return Runs(rows, np.stack((*found, kind), axis=1), visited.planes_b, visited.planes_h)


def parted(visited: Runs, step: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The runs of each block row in two lists: whole tiles without a mask, then all others.

    Returns rows and runs: runs `rows[2 i]` to `rows[2 i + 1]` of block row i are of whole tiles of
    `step` that need no mask, runs from there to `rows[2 i + 2]` the rest; a run is (first, last).

    >>> runs = Runs(np.array([0, 2]), np.array([[0, 32, 1], [32, 176, 0]]), 1, 1)
    >>> rows, spans = parted(runs, 64)
    >>> rows.tolist(), spans.tolist()
    ([0, 1, 3], [[32, 160], [0, 32], [160, 176]])
    """
    first, last, masked = visited.runs.T
    row = np.repeat(np.arange(len(visited.rows) - 1), np.diff(visited.rows))
    middle = np.where(masked == 1, first, first + (last - first) // step * step)
    spans = np.concatenate([np.stack((first, middle), 1), np.stack((middle, last), 1)])
    lists = np.concatenate([2 * row, 2 * row + 1])
    some = spans[:, 0] < spans[:, 1]
    spans, lists = spans[some], lists[some]
    order = np.lexsort((spans[:, 0], lists))
    rows = np.zeros(2 * len(visited.rows) - 1, np.int32)
    np.cumsum(np.bincount(lists, minlength=len(rows) - 1), out=rows[1:])
    return rows, spans[order].astype(np.int32)


def _joined(chain: Array, low: Array, high: Array) -> tuple[Array, Array, Array]:
    """Ascending intervals of each chain; intervals that overlap or touch become one."""
    fresh = np.ones(len(chain), np.bool_)
    fresh[1:] = (chain[1:] != chain[:-1]) | (low[1:] > high[:-1])
    heads = np.flatnonzero(fresh)
    return chain[heads], low[heads], high[_ends(heads, len(chain))]


def _ends(heads: Array, count: int) -> Array:
    """The last of each group, given the first of each and the number of all."""
    return np.append(heads[1:], count)[: len(heads)] - 1
