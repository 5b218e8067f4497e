"""Block rows cut into pieces that visit as much as each other."""

from __future__ import annotations

import numpy as np

from tilefold.masks.runs import Runs
from tilefold.planning.visited import cut


def test_a_cut_keeps_every_element() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        edges = np.sort(random.choice(1000, (3, 8), replace=False), axis=1).reshape(3, 4, 2)
        counts = random.integers(0, 5, 3)
        runs = [
            (a, b, random.integers(2)) for row, n in enumerate(counts) for a, b in edges[row, :n]
        ]
        whole = Runs(
            np.concatenate([[0], np.cumsum(counts)]),
            np.array(runs, np.int64).reshape(-1, 3),
            *(1, 3),
        )
        keys = int(random.integers(1, 400))
        pieces = cut(whole, keys)
        parts = pieces.block_rows
        assert parts >= 1 and len(pieces.rows) == 3 * parts + 1
        for row in range(3):
            got = elements(pieces, row * parts, (row + 1) * parts)
            assert got == elements(whole, row, row + 1)
            for part in range(row * parts, (row + 1) * parts):
                assert len(elements(pieces, part, part + 1)) <= keys


def elements(runs: Runs, first: int, last: int) -> list[tuple[int, int]]:
    """(element, masked) of some block rows, in order."""
    rows = runs.runs[runs.rows[first] : runs.rows[last]]
    return [(x, int(masked)) for a, b, masked in rows for x in range(a, b)]
