"""Constants of the planner of processors: what was measured once, or guessed, and decides plans.

Results depend on them by rounding only. A test that asks what follows from other values gives
`plan` a value of its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heuristics:
    """The constants by which a plan is chosen; times are in multiply-adds of the tiled kernel."""

    most_rows: int = 128
    """Queries of one key head, over all its query heads, that a worker decodes at a time."""

    decode_tile: int = 128
    """Keys whose scores are made before their values are read. 64 to 1024 read equally fast within
    the noise (EPYC, Zen 4, one thread, dims 64 and 128); the scores of many queries want it
    small."""

    decode_product: float = 1.4
    """Time of a multiply-add of the decode kernel: on one core (Zen 4, AVX-512, float32, dim 64) 16
    keys took 68 ns per query there and 635 ns per 16 lanes of queries in the tiled one, so 9
    queries of a head are where the two meet. Not tuned for other levels."""

    decode_sum: float = 3
    """Time of adding up the lanes of one key in the decode kernel; measured as above."""

    exponential: float = 18
    """Time of a vector of exponentials; measured as above."""

    multiply_adds_per_second: float = 3.5e9
    """Vector multiply-adds of one core of that machine in the tiled kernel."""

    bytes_per_second: float = 25e9
    """Bytes that one core of that machine reads."""

    least_split_seconds: float = 10e-6
    """Least time of a split where their number follows from the cores (not tuned)."""

    fixed_split_seconds: float = 30e-6
    """Least time of a split where it does not, so that splits that feed no core cost little. One
    query, dim 64, time of one thread over the time without splits, for splits of 10, 20, 30 and 50
    us (Xeon with AMX, busy, 2026-11-30): float32 8 x 4096 1.07 1.06 1.07 1.02, 8 x 20000 1.03 1.03
    1.02 1.02, 32 x 20000 1.02 1.02 1.01 1.01; bfloat16 8 x 20000 1.05 1.03 1.03 1.01."""

    most_fixed_splits: int = 256
    """Most of these splits, so that scratch does not grow with the keys: 4 for each of 64 cores."""

    items_per_core: int = 4
    """Splits of keys for each core, so that none is idle for long (not tuned)."""

    row_products: float = 40
    """Time of a row of a part of dQ (set to zero, read again, added), in float32 products of a
    query and a key. Measured as `partitions.SPLIT_PRODUCTS`, 8 owners less one: 19 to 50; bfloat16
    pairs 63 and 76 of theirs, which take half the time; float16 38."""

    part_keys: int = 256
    """Least keys of a part of dQ where parts follow from the lengths alone, twice as many where
    products are of pairs of bfloat16. Time of one thread with 2, 4 and 8 parts over the time with
    one (Xeon with AMX, busy, 2026-11-30), causal() and full(): float32 2048 1.01 1.02 1.02, 1.01
    1.01 1.02; bfloat16 2048 1.02 1.00 1.05, 1.03 1.04 1.06; 1024 1.00 1.07 and 1.02 1.03."""

    block_queries: float = 16
    """Time of a block row of keys whatever it meets, in queries that it meets (not tuned)."""

    parts_share: float = 2
    """Most bytes of the parts of dQ, as a multiple of the bytes of all inputs and outputs."""

    least_saved: float = 0.05
    """Share of the visited pairs that a narrower block must save to be taken. float32,
    1 x 1 x 4096 x 64, 10x2 beside 6x4 on one core of an AMD EPYC (Zen 4), forward and backward,
    2026-11-21: `causal() & local(64)` saves 25 % of the pairs and took 18 % and 9 % less time,
    `local(256)` 10 % and 6 % and 5 %, `local(1024)` 3 % and 2 % and 0 %; `causal()` at 512 tokens
    6 % and 5 % and 4 %."""


DEFAULT = Heuristics()
"""The constants that calls are planned with."""
