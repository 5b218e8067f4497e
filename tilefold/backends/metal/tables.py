"""Tuned blocks, by GPU, kernel, type and head dimension: the twelve tables of Metal FlashAttention.

A row holds for head dimensions up to its first number, the last row for all beyond. Then come the
blocks (parallel, traverse, head) and the operands that stay in registers.

Philip Turner tuned them on an M1 Max and an M4 in 2024, with one head, square problems and long
sequences, and published them with Metal FlashAttention (MIT licence). Nobody measured them with our
kernels. The tables of half types were tuned with scores in half precision too; ours are float32,
so `choice` checks every row against the registers again. Read across, they say: a sum that is left
out of the registers costs more than an input, so K and V leave before dK and dV, dO before Q before
dQ; and a kernel whose sums spill walks a longer traverse block for each spill.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from tilefold.backends.metal.spec import Blocks


class Row(NamedTuple):
    """One row: its blocks and cached operands serve head dimensions up to `dim`."""

    dim: int
    blocks: Blocks
    cached: tuple[str, ...]

    def __str__(self) -> str:
        return f"dim up to {self.dim}: {self.blocks}, cached {' '.join(self.cached) or 'nothing'}"


_TABLES = {
    ("apple7", "forward", "half"): """
         96 | 32 128 32 | q o
        128 | 32 128 32 | q
        384 | 32 128 32 |
    """,
    ("apple7", "forward", "float32"): """
         24 | 32  64 24 | q o
         32 | 32  64 32 | o
         56 | 32  32 56 | o
        384 | 32  80 16 |
    """,
    ("apple7", "backward_dq", "half"): """
         32 | 32  64 32 | q dq
         96 | 32  64 32 | dq
        384 | 32  64 32 |
    """,
    ("apple7", "backward_dq", "float32"): """
         16 | 32  64 16 | q dq
         32 | 32  64 32 | dq
         56 | 32  64 24 | dq
        384 | 32  80 16 |
    """,
    ("apple7", "backward_dkv", "half"): """
         16 | 32  64 16 | v dv dk
         32 | 32  64 32 | dv dk
         56 | 32  80 32 | dv
         96 | 32  64 32 | dv
        384 | 32  64 32 |
    """,
    ("apple7", "backward_dkv", "float32"): """
         16 | 32  32 16 | v dv dk
         24 | 32  64 24 | dv dk
         56 | 32  80 16 | dv
        384 | 32  80 16 |
    """,
    ("apple9", "forward", "half"): """
         32 | 16 128 16 | q o
         96 | 16 128 32 | q o
        160 | 16 128 32 | o
        224 | 16 128 32 | q
        384 | 16 128 32 |
    """,
    ("apple9", "forward", "float32"): """
          8 | 16 128 16 | q o
         16 | 16  64 16 | q o
         48 | 16  32  8 | q o
        192 | 16  64 16 | o
        384 | 16 128 16 |
    """,
    ("apple9", "backward_dq", "half"): """
         80 | 16  64  8 | q do dq
        192 | 16  64 32 | q dq
        384 | 16 128 32 |
    """,
    ("apple9", "backward_dq", "float32"): """
         16 | 16  64  8 | q do dq
         32 | 16  64 16 | q dq
        192 | 16  64 32 | q dq
        384 | 16 128 16 |
    """,
    ("apple9", "backward_dkv", "half"): """
         56 | 16  64  8 | k v dv dk
         80 | 16  32 16 | v dv dk
        144 | 16 128 16 | dv dk
        224 | 16 128 16 | dv
        384 | 16 128 32 |
    """,
    ("apple9", "backward_dkv", "float32"): """
         16 | 16  64  8 | k v dv dk
         32 | 16  32 16 | k v dv dk
         64 | 16  32 16 | v dv dk
        128 | 16 128 16 | dv dk
        160 | 16 128 16 | dv
        384 | 16 128 16 |
    """,
}
"""Tables by GPU, kernel and type: "half" stands for float16 and bfloat16."""


@functools.cache
def table(gpu: str, kernel: str, dtype: str) -> tuple[Row, ...]:
    """The rows of one table, for the narrowest heads first."""
    kind = "float32" if dtype == "float32" else "half"
    return tuple(_row(line) for line in _TABLES[gpu, kernel, kind].strip().splitlines())


def row(gpu: str, kernel: str, dtype: str, dim: int) -> Row:
    """The row of a head dimension.

    >>> print(row("apple9", "forward", "float16", 128))
    dim up to 160: 16 x 128 x 32, cached o
    """
    rows = table(gpu, kernel, dtype)
    return next((found for found in rows if dim <= found.dim), rows[-1])


def _row(line: str) -> Row:
    dim, blocks, cached = line.split("|")
    return Row(int(dim), Blocks(*map(int, blocks.split())), tuple(cached.split()))
