"""Block sizes by device family: the only place with tuned numbers.

A register tile of rows x vectors accumulators wants eight or more of them in flight (two fused
multiply-adds start per cycle and take four), and one row of vectors and a broadcast beside them in
the registers: 32 in AVX-512 and NEON, 16 in AVX2 and SSE2. Where LLVM needs one register more than
there are, it spills an accumulator in the inner loop, and half the speed goes.

The rows serve machines that nobody measured; `tilefold tune` measures the one at hand (`winners`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


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

    def __str__(self) -> str:
        return f"{self.rows}x{self.vectors}"


@dataclass(frozen=True)
class Row:
    """One row of the table: a register tile, and the measurement that chose it."""

    tile: RegisterTile
    measured: str


@dataclass(frozen=True)
class Family:
    """What kernels of one instruction set look like.

    `table` from the widest tile to the narrowest: a wide one reads less per product, a narrow one
    wastes fewer lanes on a short sequence. `scratch_bytes` bounds the scores of one tile, which
    decides how many rows are traversed at a time. The rows of a tile are a multiple of `row_step`,
    traversed rows one of `traverse_step`.
    """

    vector_bytes: int
    registers: int
    table: tuple[Row, ...]
    scratch_bytes: int
    row_step: int = 1
    traverse_step: int = 1

    @property
    def tiles(self) -> tuple[RegisterTile, ...]:
        """The register tiles of the table, in its order."""
        return tuple(row.tile for row in self.table)

    def row(self, tile: RegisterTile) -> Row | None:
        """The row of a tile, if the table has one."""
        return next((row for row in self.table if row.tile == tile), None)

    def lanes(self, item_bytes: int) -> int:
        """Elements of one vector register."""
        return self.vector_bytes // item_bytes

    def block_traverse(self, tile: RegisterTile, item_bytes: int) -> int:
        """Traversed rows at a time: whole register tiles, as many as the scratch holds."""
        rows = self.scratch_bytes // (tile.vectors * self.lanes(item_bytes) * item_bytes)
        step = math.lcm(tile.rows, self.traverse_step)
        return max(1, rows // step) * step

    def candidates(self) -> tuple[RegisterTile, ...]:
        """The table's tiles and others worth measuring: the tallest ones of each width that fit.

        At least half of the registers accumulate; more than 12 rows want more addresses than
        x86 has registers for.
        """
        found = list(self.tiles)
        if self.traverse_step > 1:
            return tuple(found)
        for vectors in range(1, 7):
            tallest = min(12, (self.registers - 1) // vectors - 1)
            for rows in range(tallest, max(1, tallest - 3), -1):
                tile = RegisterTile(rows, vectors)
                if (
                    rows % self.row_step == 0
                    and tile not in found
                    and 2 * rows * vectors >= self.registers
                ):
                    found.append(tile)
        return tuple(found)


# GFLOP/s of one core, float32 dense forward, 1 x 2 x 2048 x 64, random data, turn by turn in one
# run. The narrow tiles of AVX2 and SSE2 spill nothing, and no measurement chose them.
_ZEN_5 = "AMD EPYC Zen 5, 2026-11-21"
_NOT_MEASURED = "not measured"

_AVX512 = Family(
    vector_bytes=64,
    registers=32,
    table=(
        Row(RegisterTile(6, 4), f"{_ZEN_5}: 248; 5x4 251, 8x3 249, 7x3 248, 4x5 246"),
        Row(RegisterTile(8, 3), f"{_ZEN_5}: 249; 6x4 248, 7x3 248"),
        Row(RegisterTile(10, 2), f"{_ZEN_5}: 232; 6x4 233, 8x2 231, 11x2 190, 12x2 175"),
        Row(RegisterTile(12, 1), f"{_ZEN_5}: 191; 6x4 233, 16x1 189, 14x1 184, 20x1 178"),
    ),
    scratch_bytes=32768,
)
FAMILIES = {
    "amx": _AVX512,
    "avx512": _AVX512,
    "avx2": Family(
        vector_bytes=32,
        registers=16,
        table=(
            Row(RegisterTile(6, 2), f"{_ZEN_5}: 125; 5x2 118, 2x4 117, 3x3 116, 4x3 68"),
            Row(RegisterTile(10, 1), _NOT_MEASURED),
        ),
        scratch_bytes=8192,
    ),
    "sse2": Family(
        vector_bytes=16,
        registers=16,
        table=(
            Row(RegisterTile(2, 4), f"{_ZEN_5}: 47; 4x2 44, 5x2 44, 3x3 43, 6x2 41, 4x3 35"),
            Row(RegisterTile(4, 2), f"{_ZEN_5}: 44; 2x4 47, 5x2 44, 6x2 41"),
            Row(RegisterTile(10, 1), _NOT_MEASURED),
        ),
        scratch_bytes=8192,
    ),
    "neon": Family(
        vector_bytes=16,
        registers=32,
        table=(
            Row(RegisterTile(6, 4), _NOT_MEASURED),
            Row(RegisterTile(8, 3), _NOT_MEASURED),
            Row(RegisterTile(10, 2), _NOT_MEASURED),
            Row(RegisterTile(12, 1), _NOT_MEASURED),
        ),
        scratch_bytes=8192,
    ),
}

PAIRS = {
    "dot": replace(_AVX512, row_step=2),
    "amx": Family(
        vector_bytes=64,
        registers=32,
        table=tuple(Row(RegisterTile(2, vectors), _NOT_MEASURED) for vectors in (8, 6, 4, 2)),
        scratch_bytes=65536,
        row_step=2,
        traverse_step=32,
    ),
}
"""Kernels that multiply bfloat16 pairs, by the unit that does. Tiles of AMX have a shape of their
own: what is chosen for them is how many vectors of the parallel axis a block has, by twos.
"""
