"""How many items a worker takes at a time. Results do not depend on it."""

from __future__ import annotations

FLOPS, BYTES = 5e5, 2**17
"""A worker takes items of at most so many operations and bytes at a time: 10 us of a core."""

_CLAIMS = 4
"""Each worker has this number of claims at least. Claims of one item of 16 x 16 pairs let two cores
take the lines of each other's caches: 192 such items ran in 113 us on two threads and 128 on one
(Xeon with AMX, float32, dim 32), and run in 63 us by claims of 16."""


def items_per_claim(most: float, items: int, workers: int) -> int:
    """At most so many items, and one at least."""
    return max(1, min(int(most), items // (_CLAIMS * workers)))
