"""Block sizes by device family: the only place with tuned blocks.

A register tile of rows x vectors accumulators wants eight or more of them in flight (two fused
multiply-adds start per cycle and take four), and one row of vectors and a broadcast beside them in
the registers: 32 in AVX-512 and NEON, 16 in AVX2 and SSE2. Where LLVM needs one register more than
there are, it spills an accumulator in the inner loop, and half the speed goes.

The rows serve machines that nobody measured; `tilefold tune` measures the one at hand (`tuned`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

TUNED = "tuned.json"
"""File of the blocks that were measured on this machine, in the folder of the kernel cache."""

LONG = 256
"""Lengths of the parallel axis above this one are alike: few lanes of the last block are idle. So
fewer kernels compile.
"""


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
class Blocks:
    """A register tile, and how many rows are traversed at a time."""

    tile: RegisterTile
    block_traverse: int

    def __str__(self) -> str:
        return f"{self.tile} by {self.block_traverse}"


@dataclass(frozen=True)
class Row:
    """One row of the table: a register tile, and the measurement that chose it, if there is one.

    `measured` gives its figure on each processor, and in brackets the figures of other tiles.
    """

    tile: RegisterTile
    measured: str | None


@dataclass(frozen=True)
class Family:
    """The shape of the kernels of one instruction set.

    `table` from the widest tile to the narrowest: a wide one reads less per product, a narrow one
    wastes fewer lanes on a short sequence. `scratch_bytes` bounds the scores of one tile, which
    decides how many rows are traversed at a time. The rows of a tile are a multiple of `row_step`,
    traversed rows one of `traverse_step`. `measured` says what the figures of the rows are.
    """

    vector_bytes: int
    registers: int
    table: tuple[Row, ...]
    scratch_bytes: int
    row_step: int = 1
    traverse_step: int = 1
    measured: str = "GFLOP/s of one core, float32, dense forward, dim 64, 2026-11-21"

    @property
    def tiles(self) -> tuple[RegisterTile, ...]:
        """The register tiles of the table, in its order."""
        return tuple(row.tile for row in self.table)

    @property
    def measured_tiles(self) -> tuple[RegisterTile, ...]:
        """The first tile, and the others whose cost was measured."""
        return tuple(row.tile for n, row in enumerate(self.table) if n == 0 or row.measured)

    def row(self, tile: RegisterTile) -> Row | None:
        """The row of a tile, if the table has one."""
        return next((row for row in self.table if row.tile == tile), None)

    def lanes(self, item_bytes: int) -> int:
        """Elements of one vector register."""
        return self.vector_bytes // item_bytes

    def block_traverse(self, tile: RegisterTile, item_bytes: int) -> int:
        """Traversed rows at a time: as many as the scratch holds."""
        rows = self.scratch_bytes // (tile.vectors * self.lanes(item_bytes) * item_bytes)
        return self.cut(tile, rows)

    def cut(self, tile: RegisterTile, rows: int) -> int:
        """So many traversed rows or less, in whole register tiles; at least one of these."""
        step = math.lcm(tile.rows, self.traverse_step)
        return max(1, rows // step) * step

    def allows(self, tile: RegisterTile, block_traverse: int) -> bool:
        """True if kernels can have this tile and `block_traverse` traversed rows at a time."""
        return (
            tile.registers <= self.registers
            and tile.rows % self.row_step == 0
            and block_traverse == self.cut(tile, block_traverse)
        )

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


# Figures are taken turn by turn in one run, on random data. Zen 5 (AMD EPYC with 48 KiB L1d, 1 MiB
# L2): 1 x 2 x 2048 tokens. Zen 4 (AMD EPYC with 32 KiB L1d, 1 MiB L2, a vector of AVX-512 in two
# halves): 1 x 1 x 1024 tokens, on a shared machine, in the thread's own time. There the backward
# passes, fused and split, and dim 128 put the same tile within 2 % of the first place, so the rows
# are the same for all of them. Blocks of 64 to 256 traversed rows were within 2 % too. Granite
# Rapids (Xeon with 48 KiB L1d, 64 KiB L1i, 2 MiB L2 a core, which tell it: the hypervisor hides the
# name): 1 x 8 x 2048 tokens; 2x8 by 256 traversed rows instead of 128 gave 4 % more in one part,
# and 3 % less in two at dim 128. Nobody measured NEON: its rows are the rows of AVX-512, which has
# as many registers.

_AVX512 = Family(
    vector_bytes=64,
    registers=32,
    table=(
        Row(
            RegisterTile(6, 4),
            "Zen 5 248 (5x4 251, 8x3 249, 4x5 246); Zen 4 103 (5x4 104, 4x4 104, 4x5 102)",
        ),
        Row(RegisterTile(8, 3), "Zen 5 249 (6x4 248, 7x3 248); Zen 4 101 (7x3 100, 9x3 99)"),
        Row(
            RegisterTile(10, 2),
            "Zen 5 232 (8x2 231, 11x2 190, 12x2 175); Zen 4 104 (11x2 102, 12x2 99)",
        ),
        Row(RegisterTile(12, 1), "Zen 5 191 (16x1 189, 14x1 184, 20x1 178); Zen 4 104"),
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
            Row(
                RegisterTile(6, 2),
                "Zen 5 125 (5x2 118, 2x4 117, 3x3 116, 4x3 68);"
                " Zen 4 95 (5x2 92, 2x4 90, 3x3 89, 4x3 47)",
            ),
            Row(RegisterTile(10, 1), "Zen 4 77 (11x1 46, 12x1 45)"),
        ),
        scratch_bytes=8192,
    ),
    "sse2": Family(
        vector_bytes=16,
        registers=16,
        table=(
            Row(RegisterTile(2, 5), "Zen 4 33 (2x4 32, 6x2 31, 3x3 30); the first in all passes"),
            Row(RegisterTile(2, 4), "Zen 5 47 (4x2 44, 5x2 44, 3x3 43, 4x3 35); Zen 4 32"),
            Row(RegisterTile(4, 2), "Zen 5 44 (5x2 44, 6x2 41); Zen 4 29 (6x2 31, 5x2 30)"),
            Row(RegisterTile(10, 1), "Zen 4 24 (12x1 21, 11x1 18)"),
        ),
        scratch_bytes=8192,
    ),
    "neon": Family(
        vector_bytes=16,
        registers=32,
        table=(
            Row(RegisterTile(6, 4), None),
            Row(RegisterTile(8, 3), None),
            Row(RegisterTile(10, 2), None),
            Row(RegisterTile(12, 1), None),
        ),
        scratch_bytes=8192,
    ),
}

PAIRS = {
    "dot": replace(
        _AVX512,
        table=(
            Row(RegisterTile(4, 4), "Zen 4 185 (6x4 183, 4x5 182, 4x6 174); first in all passes"),
            Row(RegisterTile(8, 3), "Zen 4 178 (6x4 183)"),
            Row(RegisterTile(10, 2), "Zen 4 177 (12x2 177)"),
            Row(RegisterTile(12, 1), "Zen 4 136"),
        ),
        row_step=2,
        measured="GFLOP/s of one core, bfloat16, dense forward, dim 64, 2026-11-21",
    ),
    "amx": Family(
        vector_bytes=64,
        registers=32,
        table=(
            Row(RegisterTile(2, 8), "Granite Rapids 508 (2x12 415), float16 259 (2x12 265)"),
            Row(RegisterTile(2, 6), "Granite Rapids 508, float16 249"),
            Row(RegisterTile(2, 4), "Granite Rapids 502, float16 219"),
            Row(RegisterTile(2, 2), "Granite Rapids 438, float16 174"),
        ),
        scratch_bytes=65536,
        row_step=2,
        traverse_step=32,
        measured="GFLOP/s of one core, bfloat16, or float16, dense forward, dim 64, 2026-11-29",
    ),
}
"""Kernels that multiply bfloat16 pairs, by the unit that does. Tiles of AMX have a shape of their
own: what is chosen for them is how many vectors of the parallel axis a block has, by twos.
"""


def length_class(length: int, lanes: int) -> int:
    """The parallel axis in elements of whole vectors; 0 where it is long.

    >>> length_class(100, 16), length_class(112, 16), length_class(2048, 16)
    (112, 112, 0)
    """
    return 0 if length > LONG else -(-length // lanes) * lanes


def family(isa: str, unit: str) -> Family:
    """The table of an instruction set and of what multiplies: see `spec.Multiplier`."""
    return FAMILIES[isa] if unit == "fma" else PAIRS[unit]
