"""Block sizes by device family: the only place with tuned numbers.

A register tile of rows x vectors accumulators wants eight or more of them in flight (two fused
multiply-adds start per cycle and take four), and one row of vectors and a broadcast beside them in
the registers: 32 in AVX-512 and NEON, 16 in AVX2 and SSE2. Where LLVM needs one register more than
there are, it spills an accumulator in the inner loop, and half the speed goes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RegisterTile:
    """A block of accumulators: `rows` broadcast rows by `vectors` vectors."""

    rows: int
    vectors: int

    @property
    def registers(self) -> int:
        """Accumulators, one row of vectors, and one broadcast."""
        return self.rows * self.vectors + self.vectors + 1

    @property
    def loads_per_product(self) -> float:
        """Loads for each multiply-add; above 1 the load units bind."""
        return (self.rows + self.vectors) / (self.rows * self.vectors)


@dataclass(frozen=True)
class Family:
    """What kernels of one instruction set look like.

    `tiles` from the widest to the narrowest: a wide one reads less per product, a narrow one wastes
    fewer lanes on a short sequence. `scratch_bytes` bounds the scores of one tile, which decides
    how many rows are traversed at a time.
    """

    vector_bytes: int
    registers: int
    tiles: tuple[RegisterTile, ...]
    scratch_bytes: int

    def lanes(self, item_bytes: int) -> int:
        """Elements of one vector register."""
        return self.vector_bytes // item_bytes


# Measured on one core of an AMD EPYC (Zen 5, 48 KiB L1d, 1 MiB L2), GFLOP/s, float32 dense forward,
# 1 x 2 x 2048 x 64, random data, turn by turn in one run, 2026-11-21. Rows x vectors:
#   AVX-512  5x4 251  8x3 249  6x4 248  7x3 248  4x5 246; tiles of 64 to 256 rows within 2 %
#            in another run, busier: 6x4 233  10x2 232  8x2 231  11x2 190  12x2 175 (spills);
#            12x1 191  16x1 189  14x1 184 (spills)  20x1 178
#   AVX2     6x2 125  5x2 118  2x4 117  3x3 116  3x4 70 (spills)  4x3 68 (spills)
#   SSE2     2x4 47  4x2 44  5x2 44  3x3 43  6x2 41  4x3 35 (spills)
# The narrow tiles of AVX2 and SSE2 spill nothing and are not tuned; NEON is not measured at all.
_AVX512 = Family(
    vector_bytes=64,
    registers=32,
    tiles=(RegisterTile(6, 4), RegisterTile(8, 3), RegisterTile(10, 2), RegisterTile(12, 1)),
    scratch_bytes=32768,
)
FAMILIES = {
    "amx": _AVX512,
    "avx512": _AVX512,
    "avx2": Family(
        vector_bytes=32,
        registers=16,
        tiles=(RegisterTile(6, 2), RegisterTile(10, 1)),
        scratch_bytes=8192,
    ),
    "sse2": Family(
        vector_bytes=16,
        registers=16,
        tiles=(RegisterTile(2, 4), RegisterTile(4, 2), RegisterTile(10, 1)),
        scratch_bytes=8192,
    ),
    "neon": Family(
        vector_bytes=16,
        registers=32,
        tiles=(RegisterTile(6, 4), RegisterTile(8, 3), RegisterTile(10, 2), RegisterTile(12, 1)),
        scratch_bytes=8192,
    ),
}
