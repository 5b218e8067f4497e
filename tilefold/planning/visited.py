"""What a kernel visits: the bound mask, its runs by block width, and their splits."""

from __future__ import annotations

import functools

import numpy as np

from tilefold.masks.expression import Boolean
from tilefold.masks.runs import Runs, runs
from tilefold.problems.attention import Problem

MASK_STEP = 32
"""Traversed rows that are classified together; a run is cut into tiles only inside the kernel."""


def bound(problem: Problem) -> Boolean:
    """The mask of a problem as an expression of its lengths."""
    return problem.mask.bind(problem.len_q, problem.len_k)


@functools.lru_cache(maxsize=4)  # few, since they may be large; `_launch` asks again at once
def visited_by(problem: Problem, parallel: str, width: int) -> Runs:
    """The runs of blocks that are so wide."""
    length, traversed = problem.len_q, problem.len_k
    if parallel == "k":
        length, traversed = traversed, length
    return runs(
        bound(problem),
        parallel=parallel,
        batch=problem.batch,
        heads=problem.heads_q,
        len_parallel=length,
        len_traverse=traversed,
        block_parallel=width,
        block_traverse=MASK_STEP,
    )


def cut(visited: Runs, keys: int) -> Runs:
    """Each block row in pieces that visit `keys` elements; all rows in as many pieces.

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
    pieces = max(1, -(-int(_visited(visited).max(initial=0)) // keys))
    spans = -(-stop // keys) - start // keys
    run = np.repeat(np.arange(len(first)), spans)
    piece = np.arange(len(run)) - np.repeat(np.cumsum(spans) - spans, spans) + start[run] // keys
    left = first[run] + np.maximum(piece * keys - start[run], 0)
    right = first[run] + np.minimum((piece + 1) * keys, stop[run]) - start[run]
    counts = np.bincount(row[run] * pieces + piece, minlength=(len(visited.rows) - 1) * pieces)
    rows = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=rows[1:])
    cut_runs = np.stack((left, right, masked[run]), axis=1)
    return Runs(rows, cut_runs, visited.planes_b, visited.planes_h)


def _visited(visited: Runs) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """How many keys each block row visits."""
    ends = np.concatenate([[0], np.cumsum(visited.runs[:, 1] - visited.runs[:, 0])])
    counts: np.ndarray[tuple[int], np.dtype[np.int64]] = (
        ends[visited.rows[1:]] - ends[visited.rows[:-1]]
    )
    return counts
