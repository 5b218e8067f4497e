"""The order of the block rows of a kernel, and how their keys are split."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tilefold.masks.runs import Runs

MASK_STEP = 32
"""Traversed rows that are classified together; a run is cut into tiles only inside the kernel."""


def nothing(block_rows: int = 0) -> Runs:
    """The runs of block rows that visit no pairs."""
    return Runs(np.zeros(block_rows + 1, np.int64), np.zeros((0, 3), np.int64), 1, 1)


def heaviest_first(visited: Runs) -> NDArray[np.int64]:
    """Block rows by what they visit over all planes, most first; ties keep their order."""
    work = visited.met.reshape(-1, max(1, visited.block_rows)).sum(axis=0)
    return np.argsort(-work, kind="stable")


def cut(visited: Runs, keys: int | NDArray[np.int64]) -> Runs:
    """Each block row in pieces that visit `keys` elements; all rows in as many pieces.

    `keys` may be another number for each block row. The last pieces of a row may be empty.

    >>> runs = Runs(np.array([0, 2]), np.array([[0, 6, 0], [8, 10, 1]]), 1, 1)
    >>> pieces = cut(runs, 4)
    >>> pieces.rows.tolist(), pieces.runs.tolist()
    ([0, 1, 3], [[0, 4, 0], [4, 6, 0], [8, 10, 1]])
    """
    first, last, masked = visited.runs.T
    row = np.repeat(np.arange(len(visited.rows) - 1), np.diff(visited.rows))
    ends = np.cumsum(last - first)
    before = np.concatenate([[0], ends])[visited.rows[:-1]]
    stop = ends - before[row]
    start = stop - (last - first)
    pieces = max(1, int((-(-visited.met // keys)).max(initial=0)))
    keys = np.broadcast_to(keys, len(visited.rows) - 1)[row]
    spans = -(-stop // keys) - start // keys
    run = np.repeat(np.arange(len(first)), spans)
    piece = np.arange(len(run)) - np.repeat(np.cumsum(spans) - spans, spans) + (start // keys)[run]
    keys = keys[run]
    left = first[run] + np.maximum(piece * keys - start[run], 0)
    right = first[run] + np.minimum((piece + 1) * keys, stop[run]) - start[run]
    counts = np.bincount(row[run] * pieces + piece, minlength=(len(visited.rows) - 1) * pieces)
    rows = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=rows[1:])
    cut_runs = np.stack((left, right, masked[run]), axis=1)
    return Runs(rows, cut_runs, visited.planes_b, visited.planes_h)
