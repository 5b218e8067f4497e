"""Blocks of Triton kernels, by architecture, kernel, kind of type and head dimension.

A row holds for head dimensions up to its first number. A cell is the rows of the parallel and the
traverse axis, warps, pipeline stages, and how many registers of a thread are spilled for each whole
tile; an "s" after the stages says that operands are streamed. Where a cell is empty, the next one
below it serves.

Nobody timed them on a GPU. `tools/triton_tables.py` compiled candidates ahead of time (Triton
3.7.1, a causal mask), the largest tiles first, which is the order of their arithmetic intensity and
begins with the tiles that FlashAttention-2 and -3 published, and took the first that spills nothing
to speak of in the loop over whole tiles. Where all spill it is the one that spills least; where the
first five did, a few smaller ones were tried by hand. The half types were searched most. Kinds:
"half" are float16 and bfloat16; "tf32" float32 in three products of TF32 (in one it takes less);
"float32" the same multiplied exactly, by multiply-adds of single lanes on NVIDIA's GPUs, which
share the rows of an A100 where those fit. An H100 does for float64 too, the others have rows for
multiply-adds, found on a B200.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from tilefold.backends.triton.spec import MOST_DIM, Blocks

KINDS = ("half", "tf32", "float32", "float64")


class Row(NamedTuple):
    """One cell: its blocks serve head dimensions up to `dim`, and spill `spills` registers.

    `spills` is None where nobody compiled the blocks for this.
    """

    dim: int
    blocks: Blocks
    spills: int | None

    def __str__(self) -> str:
        return f"dim up to {self.dim}: {self.blocks}"


DECODING = Blocks(16, 32, 4, 2)
"""Blocks that decode what is not of a half type. Nobody searched for them."""

UNSEARCHED = Blocks(32, 32, 4, 2)
"""Blocks where a table has no cell of a kind."""

_TABLES = {
    ("sm_80", "forward"): """
        dim | half              | tf32              | float32           | float64
         64 | 128 128  8 3     0 |  64  32  4 2     7 |  64  32  8 3     0 | 128  32  8 3     0
         96 | 128  64  8 3     0 |                   |                   |
        128 | 128  64  8 3     0 |  32  32  4 3     0 |  64  16  4 3     0 |  64  32  8 2     0
        256 | 128  64  8 2     2 |  32  32  4 2s  119 |  16  16  4 2     0 |  32  32  8 1     0
        512 |  64  32  8 2     0 |  32  16  8 2s    0 |  32  16  8 2     2 |  16  16  8 2s    0
    """,
    ("sm_80", "backward_dq"): """
        dim | half              | tf32              | float32           | float64
         64 | 128 128  8 3     4 |  32  32  4 2     0 |  64  16  4 2     0 | 128  32  8 1     0
        128 | 128  64  8 3     0 |  32  64  8 1    44 |  32  16  4 2     0 |  32  16  4 2     0
        256 |  64  32  4 1     0 |  32  64  8 2s   74 |  16  16  4 2     0 |  32  32  8 2s    0
        512 |  32  64  4 2s   18 |  16  32  4 2s    3 |  16  16  8 2s    0 |  16  32  8 2s    0
    """,
    ("sm_80", "backward_dkv"): """
        dim | half              | tf32              | float32           | float64
         64 | 128  32  8 3     0 |  32  32  4 2     0 |  64  16  4 2     0 |  32  64  8 1     0
         96 | 128  32  8 3     0 |                   |                   |
        128 |  64 128  8 2     0 |  32  16  8 1    12 |  32  16  4 2     0 |  32  16  4 2     0
        256 |  32  64  8 1     0 |  16  32  4 2s   23 |  16  16  8 2     0 |  16  32  8 2s    0
        512 |  16  32  8 1     0 |  16  32  8 2s    5 |  16  16  8 2     5 |  16  32  8 2s  189
    """,
    ("sm_80", "backward"): """
        dim | half              | tf32              | float32           | float64
         64 | 128  32  8 3     4 |                   |                   |
        128 |  32  64  8 3     0 |                   |                   |
        256 |  64  16  8 1     5 |                   |                   |
        512 |  16  32  8 2s    0 |                   |                   |
    """,
    ("sm_80", "decode"): """
        dim | half              | tf32              | float32           | float64
         64 |  16 128  4 3     0 |                   |                   |
        128 |  16 128  4 3     0 |                   |                   |
        256 |  16  64  4 3     0 |                   |                   |
        512 |  16  32  4 3     0 |                   |                   |
    """,
    ("sm_90", "forward"): """
        dim | half              | tf32              | float32           | float64
         64 | 128 128  8 3     0 |  64  64  4 2     0 |  64  32  8 3     0 | 128  32  8 3     0
         96 | 128 128  8 3     0 |                   |                   |
        128 | 128 128  8 3     0 | 128  64  8 1    61 |  64  16  4 3     0 |  64  32  8 2     0
        192 | 128  64  8 3     0 |                   |                   |
        256 | 128  32  8 3     0 | 128  32  8 2s   95 |  16  16  4 2     0 |  32  32  8 1     0
        512 |  32  32  8 3     0 |  32  16  8 2s    0 |  32  16  8 2     2 |  16  16  8 2s    0
    """,
    ("sm_90", "backward_dq"): """
        dim | half              | tf32              | float32           | float64
         64 | 128 128  8 3     0 |  64  32  8 2     0 |  64  16  4 2     0 | 128  32  8 1     0
         96 | 128 128  8 3     1 |                   |                   |
        128 | 128 128  8 2     1 |  64  32  4 2   100 |  32  16  4 2     0 |  32  16  4 2     0
        192 | 128  64  8 2     0 |                   |                   |
        256 | 128  32  8 3     0 |  32  64  8 2s   78 |  16  16  4 2     0 |  32  32  8 2s    0
        512 |  32  64  8 2     0 |  16  32  4 2s    4 |  16  16  8 2s    0 |  16  32  8 2s    0
    """,
    ("sm_90", "backward_dkv"): """
        dim | half              | tf32              | float32           | float64
         64 | 128  64  8 3     2 |  64  16  4 3    15 |  64  16  4 2     0 |  32  64  8 1     0
         96 | 128  32  8 3     0 |                   |                   |
        128 | 128  32  8 3     1 |  32  64  8 3   116 |  32  16  4 2     0 |  32  16  4 2     0
        192 |  64  32  8 3     2 |                   |                   |
        256 |  32  64  8 3     0 |  16  32  4 2s   11 |  16  16  8 2     0 |  16  32  8 2s    0
        512 |  16  32  8 3     0 |  16  32  8 2s    5 |  16  16  8 2     5 |  16  32  8 2s  189
    """,
    ("sm_90", "backward"): """
        dim | half              | tf32              | float32           | float64
         64 | 128  32  8 3     0 |                   |                   |
        128 |  32  64  8 1     0 |                   |                   |
        256 |  32  16  8 1     1 |                   |                   |
        512 |  16  32  8 2s    0 |                   |                   |
    """,
    ("sm_90", "decode"): """
        dim | half              | tf32              | float32           | float64
         64 |  16 128  4 3     0 |                   |                   |
        128 |  16 128  4 3     0 |                   |                   |
        256 |  16  64  4 3     0 |                   |                   |
        512 |  16  32  4 3     0 |                   |                   |
    """,
    ("sm_100", "forward"): """
        dim | half              | tf32              | float32           | float64
         64 | 128 128  8 3     2 |  64  64  4 2    32 |  64  32  8 3     0 |  32  32  8 2     2
         96 | 128 128  8 2     4 |                   |                   |
        128 | 128 128  8 2     0 |  64  64  8 1    47 |  64  16  4 3     0 |  32  32  8 2     1
        192 | 128  64  8 2     3 |                   |                   |
        256 | 128  32  8 3     2 |  32  32  4 2s   87 |  16  16  4 2     0 |  32  16  4 3    59
        512 |  64  32  8 2     3 |  32  16  8 2s    0 |  32  16  8 2     2 |  16  16  8 2   180
    """,
    ("sm_100", "backward_dq"): """
        dim | half              | tf32              | float32           | float64
         64 | 128 128  8 3     4 |  64  32  4 2    69 |  64  16  4 2     0 |  32  32  8 2    23
         96 | 128  64  8 3     0 |                   |                   |
        128 | 128 128  8 2     3 |  64  32  4 2   308 |  32  16  4 2     0 |  16  16  4 2    62
        192 | 128  32  8 2     0 |                   |                   |
        256 | 128  32  8 2     3 |  32  64  8 2s   51 |  16  16  4 2     0 |  32  16  4 2s  191
        512 |  32  32  4 3     0 |  16  32  4 2s    6 |  16  16  8 2s    0 |  32  16  8 2s  333
    """,
    ("sm_100", "backward_dkv"): """
        dim | half              | tf32              | float32           | float64
         64 | 128  64  8 3     2 |  64  32  4 2   139 |  64  16  4 2     0 |  32  32  8 2     0
         96 | 128  64  8 3     6 |                   |                   |
        128 | 128  64  8 3     5 |  16  32  4 2     5 |  32  16  4 2     0 |  16  16  4 2    10
        192 |  64  64  8 1     4 |                   |                   |
        256 |  64  64  8 1    15 |  16  32  4 2s   18 |  16  16  8 2     0 |  16  32  8 2    76
        512 |  32  32  8 2s    0 |  16  32  8 2s    4 |  16  16  8 2     5 |  16  32  8 2s 1829
    """,
    ("sm_100", "backward"): """
        dim | half              | tf32              | float32           | float64
         64 |  64  64  8 1     0 |                   |                   |
        128 |  64 128  8 1    34 |                   |                   |
        256 |  64  32  8 3    33 |                   |                   |
        512 |  16  32  8 2s    0 |                   |                   |
    """,
    ("sm_100", "decode"): """
        dim | half              | tf32              | float32           | float64
         64 |  16 128  4 3     0 |                   |                   |
        128 |  16 128  4 3     0 |                   |                   |
        256 |  16  64  4 3     0 |                   |                   |
        512 |  16  32  4 3     0 |                   |                   |
    """,
    ("sm_120", "forward"): """
        dim | half              | tf32              | float32           | float64
         64 | 128 128  8 3     0 |  64  32  4 2     7 |  64  32  8 3     0 |  32  32  8 2     2
         96 | 128  64  8 3     0 |                   |                   |
        128 | 128  64  8 3     0 |  32  32  4 1     0 |  64  16  4 3     0 |  16  16  4 2     0
        256 |  64  64  8 1     0 |  32  32  4 2s  119 |  16  16  4 2     0 |  32  16  4 2s  196
        512 |  32  32  4 2     0 |  32  16  8 2s    0 |  32  16  8 1     2 |  16  16  8 2s  169
    """,
    ("sm_120", "backward_dq"): """
        dim | half              | tf32              | float32           | float64
         64 | 128 128  8 3     4 |  32  32  4 2     0 |  64  16  4 2     0 |  32  32  8 2    23
        128 | 128  64  8 2     0 |  32  64  8 1    44 |  32  16  4 2     0 |  16  16  4 2    62
        256 |  64  32  4 1     0 |  32  64  8 2s   74 |  16  16  4 2     0 |  32  16  4 2s  191
        512 |  32  64  4 2s   18 |  16  32  4 2s    3 |  16  16  8 2s    0 |  32  16  8 2s  333
    """,
    ("sm_120", "backward_dkv"): """
        dim | half              | tf32              | float32           | float64
         64 | 128  32  8 3     0 |  32  32  4 2     0 |  64  16  4 2     0 |  32  32  8 2     0
         96 | 128  32  8 3     0 |                   |                   |
        128 |  64  64  8 2     0 |  32  16  8 1    12 |  32  16  4 2     0 |  16  16  4 2    10
        256 |  32  32  4 1    85 |  16  32  4 2s   23 |  16  16  8 2     0 |  32  16  8 2s  470
        512 |  32  32  8 2s    0 |  16  32  8 2s    5 |  16  16  8 1s  326 |  16  32  8 2s 1829
    """,
    ("sm_120", "backward"): """
        dim | half              | tf32              | float32           | float64
         64 | 128  32  8 3     4 |                   |                   |
        128 |  32  64  8 3     0 |                   |                   |
        256 |  64  16  8 1     5 |                   |                   |
        512 |  16  32  8 2s    0 |                   |                   |
    """,
    ("sm_120", "decode"): """
        dim | half              | tf32              | float32           | float64
         64 |  16 128  4 3     0 |                   |                   |
        128 |  16 128  4 2     0 |                   |                   |
        256 |  16  64  4 2     0 |                   |                   |
        512 |  16  32  4 2     0 |                   |                   |
    """,
    ("gfx942", "forward"): """
        dim | half              | tf32              | float32           | float64
         64 | 128 128  4 3     0 |                   |  64  32  4 2     0 |  32  32  4 2     0
        128 | 128 128  4 2     0 |                   |  64  32  4 2     0 |  16  16  4 2     0
        256 | 128  64  4 2     0 |                   |  32  16  4 2     0 |  16  16  4 2s   23
        512 |  64  32  4 1     0 |                   |  16  16  4 1     0 |  16  32  8 2s   35
    """,
    ("gfx942", "backward_dq"): """
        dim | half              | tf32              | float32           | float64
         64 | 128 128  4 3     0 |                   |  64  32  4 2     0 |  16  16  4 2     0
        128 | 128  64  4 3     6 |                   |  32  32  4 2     0 |  16  16  4 2    56
        256 |  64  32  4 2     0 |                   |  16  16  4 2     0 |  16  16  4 2s  308
        512 | 128  64  8 2s    0 |                   |  64 128  4 2s    8 |  16  16  4 2s   81
    """,
    ("gfx942", "backward_dkv"): """
        dim | half              | tf32              | float32           | float64
         64 | 128  64  4 2     0 |                   |  64  32  4 2     0 |  16  16  4 2     0
        128 | 128  64  4 3     0 |                   |  32  16  4 2     0 |  16  16  4 2    82
        256 |  32  32  4 2     2 |                   |  32  32  4 2s    0 |  16  16  4 2s  135
        512 |  32  16  4 1     0 |                   |  32  64  4 2s  149 |  16  16  4 2s  184
    """,
    ("gfx942", "backward"): """
        dim | half              | tf32              | float32           | float64
         64 |  64  64  4 2     0 |                   |                   |
        128 |  64  32  4 2     0 |                   |                   |
        256 |  64  16  4 2     0 |                   |                   |
        512 |  16  32  4 1     1 |                   |                   |
    """,
    ("gfx942", "decode"): """
        dim | half              | tf32              | float32           | float64
         64 |  16 128  4 2     0 |                   |                   |
        128 |  16 128  4 2     0 |                   |                   |
        256 |  16  64  4 2     0 |                   |                   |
        512 |  16  32  4 2     0 |                   |                   |
    """,
}


@functools.cache
def table(name: str, kernel: str, kind: str) -> tuple[Row, ...]:
    """The rows of a kernel and a kind, for the narrowest heads first."""
    if kernel == "decode" and kind != "half":
        return (Row(MOST_DIM, DECODING, None),)
    if kernel == "backward" and kind != "half":
        rows = table(name, "backward_dkv", kind)
        return tuple(found._replace(spills=None) for found in rows)
    if kernel == "backward_inputs":
        return tuple(found._replace(spills=None) for found in table(name, "backward_dq", kind))
    found = []
    for line in _TABLES[name, kernel].strip().splitlines()[1:]:
        dim, *cells = line.split("|")
        cell = cells[KINDS.index(kind)]
        if cell.strip():
            parallel, traverse, warps, stages, spills = map(int, cell.replace("s", " ").split())
            blocks = Blocks(parallel, traverse, warps, stages, streamed="s" in cell)
            found.append(Row(int(dim), blocks, spills))
    return tuple(found) or (Row(MOST_DIM, UNSEARCHED, None),)


def row(name: str, kernel: str, kind: str, dim: int) -> Row:
    """The row of a head dimension; the last for all beyond.

    >>> print(row("sm_90", "forward", "half", 80))
    dim up to 96: 128 x 128, 8 warps, 3 stages
    """
    rows = table(name, kernel, kind)
    return next((found for found in rows if dim <= found.dim), rows[-1])
