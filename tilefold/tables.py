"""Block sizes by device family: the only place with tuned numbers.

A register tile is rows x vectors accumulators; it wants at least eight of them in flight (two fused
multiply-adds start per cycle and take four), and all of them, one row of vectors and one broadcast
must fit the registers: 32 of AVX-512 and NEON, 16 of AVX2 and SSE2.
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
    """What kernels of one instruction set look like."""

    vector_bytes: int
    registers: int
    tiles: tuple[RegisterTile, ...]
    scratch_bytes: int

    def lanes(self, item_bytes: int) -> int:
        """Elements of one vector register."""
        return self.vector_bytes // item_bytes


# The wider tiles read less per product, the narrower ones waste fewer lanes on short sequences: the
# planner picks by length. NEON and SSE2 rows are chosen by the register count and not measured.
FAMILIES = {
    "avx512": Family(
        64,
        32,
        (RegisterTile(6, 4), RegisterTile(8, 3), RegisterTile(12, 2), RegisterTile(14, 1)),
        32768,
    ),
    "avx2": Family(32, 16, (RegisterTile(4, 3), RegisterTile(6, 2), RegisterTile(12, 1)), 16384),
    "sse2": Family(16, 16, (RegisterTile(4, 3), RegisterTile(6, 2), RegisterTile(12, 1)), 16384),
    "neon": Family(
        16,
        32,
        (RegisterTile(6, 4), RegisterTile(8, 3), RegisterTile(12, 2), RegisterTile(14, 1)),
        16384,
    ),
}
