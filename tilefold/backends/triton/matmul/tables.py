"""Blocks of products: a table for large and small ones, and what quantised matrices ask."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from tilefold.backends.matmul import Codes
from tilefold.backends.triton.architectures import architecture
from tilefold.backends.triton.matmul.gemm import GemmBlocks
from tilefold.backends.triton.spec import LEAST


class Row(NamedTuple):
    """Blocks for large products, and for products that would leave a GPU partly idle."""

    large: GemmBlocks
    small: GemmBlocks


_HALF = GemmBlocks(64, 64, 64, warps=4, stages=3)
_TF32 = GemmBlocks(64, 64, 32, warps=4, stages=3)
_IEEE = Row(GemmBlocks(64, 64, 16, warps=8, stages=2), GemmBlocks(32, 32, 16, warps=4, stages=2))
_FLOAT64 = Row(GemmBlocks(64, 64, 16, warps=4, stages=3), GemmBlocks(32, 32, 16, warps=4, stages=3))

TABLE = {
    ("sm_80", "half"): Row(GemmBlocks(128, 128, 32, warps=4, stages=4), _HALF),
    ("sm_90", "half"): Row(GemmBlocks(128, 256, 64, warps=8, stages=3), _HALF),
    ("sm_100", "half"): Row(GemmBlocks(128, 256, 64, warps=8, stages=3), _HALF),
    ("sm_120", "half"): Row(GemmBlocks(128, 128, 32, warps=4, stages=3), _HALF),
    ("gfx942", "half"): Row(GemmBlocks(128, 128, 32, warps=4, stages=2), _HALF),
    ("sm_80", "tf32"): Row(GemmBlocks(128, 128, 32, warps=8, stages=3), _TF32),
    ("sm_90", "tf32"): Row(GemmBlocks(128, 128, 32, warps=8, stages=4), _TF32),
    ("sm_100", "tf32"): Row(GemmBlocks(128, 128, 32, warps=8, stages=4), _TF32),
    ("sm_120", "tf32"): Row(GemmBlocks(128, 64, 32, warps=8, stages=3), _TF32),
    ("sm_100", "float64"): _FLOAT64._replace(large=GemmBlocks(32, 64, 16, warps=4, stages=3)),
}
"""Blocks by (table of the architecture, what is multiplied): "half" types, float32 as "tf32", or
float64, of which Triton 3.6 and 3.7 compile no block of 64 rows for sm_100. Others are alike.
Chosen so that operands fit shared memory and sums the registers: Triton 3.7.1 spills none in the
loops of sm_80, 90, 100 and 120, but for a few words of float64 in the small blocks of sm_90.
Nobody has measured them."""


def block_sizes(
    name: str,
    multiplied: str,
    m: int,
    n: int,
    batch: int = 1,
    *,
    products: str = "ieee",
    multiprocessors: int = 132,
) -> GemmBlocks:
    """The table's blocks for products m x n on an architecture, smaller where some would be idle.

    >>> print(block_sizes("sm_90", "bfloat16", 4096, 4096))
    128 x 256 x 64, 8 warps, 3 stages
    >>> print(block_sizes("sm_90", "bfloat16", 256, 256))
    64 x 64 x 64, 4 warps, 3 stages
    """
    exact = multiplied == "float32" and products == "ieee"
    kind = {"float32": "tf32", "float64": "float64"}.get(multiplied, "half")
    alike = _FLOAT64 if kind == "float64" else _IEEE
    row = alike if exact else TABLE.get((architecture(name).table, kind), alike)
    programs = batch * _parts(m, row.large.m) * _parts(n, row.large.n)
    return row.small if programs < multiprocessors else row.large


def halved(blocks: GemmBlocks) -> GemmBlocks:
    """Blocks for a product and its gate: two sums of half the columns fill the same registers.

    >>> print(halved(block_sizes("sm_90", "bfloat16", 4096, 4096)))
    128 x 128 x 64, 8 warps, 3 stages
    """
    return replace(blocks, n=max(LEAST, blocks.n // 2))


def quantized_blocks(codes: Codes, m: int) -> GemmBlocks:
    """Blocks of products with a quantised matrix: k divides a group, m is small for few rows.

    Nobody has measured them.

    >>> print(quantized_blocks(Codes("int4", 128, "float16"), 1))
    16 x 32 x 64, 4 warps, 4 stages
    """
    blocks = GemmBlocks(16, 32, 64, warps=4, stages=4) if m <= LEAST else _HALF
    return blocks if codes.group is None else replace(blocks, k=math.gcd(blocks.k, codes.group))


def _parts(length: int, block: int) -> int:
    """How many blocks cover a length."""
    return -(-length // block)
