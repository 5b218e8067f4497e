"""The 64 numbers of a palette: k-means of one dimension, the same in every run.

Weights are counted by their float16 values, of which there are 65,536 at most. A pass of Lloyd's
algorithm then takes two prefix sums and no weight. It begins at the quantiles of the density of the
weights to the power 1/3, which is the best place for many numbers and a smooth density. Where the
density is log-concave, such as a normal one, there is one fixed point, and that is the optimum.

S. P. Lloyd, Least Squares Quantization in PCM, 1957 (IEEE Trans. Inf. Theory 28, 1982).
P. F. Panter and W. Dite, Quantization Distortion in Pulse-Count Modulation, Proc. IRE 39, 1951.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.products.schemes import ENTRIES

Array = NDArray[Any]

_PASSES = 1000  # a matrix of normal weights takes some 200


def palette(blocks: Iterable[Array]) -> Array:
    """The table of 64 float16 numbers, in order, for the weights of all blocks.

    >>> palette([np.float32([[1, 2], [3, 1]])])[:4].tolist()
    [1.0, 2.0, 3.0, 3.0]
    """
    counts = np.zeros(1 << 16, np.int64)
    for block in blocks:
        halves = np.ascontiguousarray(block, np.float16).view(np.uint16)
        counts += np.bincount(halves.ravel(), minlength=1 << 16)
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    found = np.flatnonzero(counts)
    found = found[np.argsort(values[found], kind="stable")]
    return _means(values[found], counts[found]).astype(np.float16)


def nearest(table: Array, numbers: Array) -> Array:
    """The index of the entry of a table that is nearest to each number.

    >>> nearest(np.float16([3, 1, 2]), np.float32([0, 1.9, 9])).tolist()
    [1, 2, 0]
    """
    order = np.argsort(table, kind="stable").astype(np.uint8)
    entries = table[order].astype(np.float32)
    return order[np.searchsorted((entries[1:] + entries[:-1]) / 2, numbers)]


def _means(values: Array, counts: Array) -> Array:
    """The centres of 64 clusters of sorted values."""
    if len(values) <= ENTRIES:
        return np.pad(values, (0, ENTRIES - len(values)), mode="edge")
    number = np.concatenate(([0], np.cumsum(counts)))
    total = np.concatenate(([0.0], np.cumsum(counts * values)))
    centres = values[_starts(values, counts)]
    seen = None
    for _ in range(_PASSES):
        inner = np.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        ends = np.concatenate(([0], inner, [len(values)]))
        if seen is not None and np.array_equal(ends, seen):
            break
        seen = ends
        within = np.diff(number[ends])
        centres = np.where(within > 0, np.diff(total[ends]) / np.maximum(within, 1), centres)
    return centres


def _starts(values: Array, counts: Array) -> Array:
    """64 different indices: the quantiles of density ** (1/3)."""
    weight = np.cumsum(np.cbrt(counts) * np.cbrt(np.gradient(values)) ** 2)
    wanted = (np.arange(ENTRIES) + 0.5) / ENTRIES * weight[-1]
    found = np.searchsorted(weight, wanted)
    rank = np.arange(ENTRIES)
    found = np.maximum.accumulate(found - rank) + rank  # each after the one before
    starts: Array = np.minimum(found, len(values) - ENTRIES + rank)
    return starts
