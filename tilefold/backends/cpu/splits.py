"""Decoding, planned: when few queries get a kernel of their own, and how their keys are split.

A split is a block row of the plan: the runs of one head are cut where so many keys have been
visited, so each split of a window or of a padded batch has its share of what is really read. How
many there are follows from the problem and the device, never from the threads that are set.
"""

from __future__ import annotations

from tilefold.backends.cpu.device import Device
from tilefold.masks.runs import Runs
from tilefold.problems.attention import ITEM_BYTES, Problem

MOST_ROWS = 128
"""Queries of one key head, over all its query heads, that a worker holds at a time."""

TILE = 128
"""Keys whose scores are made before their values are read. 64 to 1024 read equally fast within the
noise (EPYC, Zen 4, one thread, dims 64 and 128); the scores of many queries want it small."""

PRODUCT, FOLD, EXP = 1.4, 3, 18
"""Time of a multiply-add of the decode kernel, of adding up one key's lanes, and of a vector of
exponentials, in multiply-adds of the tiled kernel: on one core (Zen 4, AVX-512, float32, dim 64)
16 keys took 68 ns per query there and 635 ns per 16 lanes of queries in the tiled one, so 9 queries
of a head are where the two meet. Not tuned for other levels."""

UNIT = {"fma": 1.0, "dot": 0.5, "amx": 1 / 16}
"""Time of a product by what multiplies in the tiled kernel, as the units are made."""

_MULTIPLY_ADDS_PER_SECOND, _BYTES_PER_SECOND = 3.5e9, 25e9
"""Of one core of that machine: vector multiply-adds in the tiled kernel, and reading."""

ITEMS_PER_CORE = 4
_LEAST_SECONDS = 10e-6
"""Of a split: about what the launch of the merge takes (not tuned)."""


def row_work(problem: Problem, lanes: int) -> float:
    """Multiply-adds of the decode kernel for one query and one key, and what takes as long."""
    vectors = -(-problem.dim // lanes) - (-problem.dim_v // lanes)
    return PRODUCT * vectors + FOLD + EXP / lanes


def most_splits(problem: Problem, lanes: int, keys: int) -> int:
    """Into how many parts so many keys of a head may be split, none of them too small."""
    rows = problem.heads_q // problem.heads_kv * problem.len_q
    key_bytes = (problem.dim + problem.dim_v) * ITEM_BYTES[problem.dtype]
    reading = key_bytes / _BYTES_PER_SECOND
    computing = rows * row_work(problem, lanes) / _MULTIPLY_ADDS_PER_SECOND
    return max(1, int(keys * max(reading, computing) / _LEAST_SECONDS))


def heads_per_item(problem: Problem) -> int:
    """How many key heads one worker reads in turn, where they lie side by side: all it can hold.

    A head alone would take a few lines of memory out of every row; with its neighbours rows are
    read whole. Layout bnhd, 8 heads of dim 64, one core of a busy EPYC (Zen 4), float32: 44 % of
    the bandwidth of plain reading instead of 23 %.
    """
    rows = problem.heads_q // problem.heads_kv * problem.len_q
    fitting = range(1, MOST_ROWS // rows + 1)
    return max(heads for heads in fitting if problem.heads_kv % heads == 0)


def keys_per_split(
    visited: Runs, problem: Problem, device: Device, lanes: int, heads_per_item: int = 1
) -> int:
    """How many keys a split visits: a few splits per core, none small, all of whole tiles.

    A split is of `heads_per_item` heads.
    """
    per_row = visited.met
    most = max(1, int(per_row.max(initial=0)))
    owners = problem.batch * problem.heads_kv // heads_per_item
    items = ITEMS_PER_CORE * device.cores
    if owners >= items or device.cores == 1:
        return most
    total = int(per_row.sum()) * (owners // max(1, len(per_row)))
    keys = max(-(-total // items), -(-most // most_splits(problem, lanes, most * heads_per_item)))
    return max(1, -(-keys // TILE)) * TILE
