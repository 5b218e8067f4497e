"""Units, register tiles and blocks of products: the constants, and what they were measured by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.matmul.spec import AMX, AMX8, DOT, FMA, MADD, VNNI, Unit, lanes_of
from tilefold.problems.matmul import INTEGERS, Product, sums

TILES = {"amx": (14, 2), "avx512": (14, 2), "avx2": (6, 2), "sse2": (6, 2), "neon": (12, 2)}
"""Rows by vectors of register tiles: accumulators, a row of vectors and a broadcast fill the
registers. (14 x 2 takes 16 loads for 28 multiply-adds.)"""

TUNED = "tuned_products.json"
"""The file of `tuned`, which is not imported where there is none."""

CLIPPED = ("avx2", "sse2")
"""Where tiles write the edges of a result themselves: 583 x 111 x 39 takes 0.93 of the time (Zen 3,
one thread, float32, as all figures here that name Zen 3). Not measured elsewhere."""

_MOST_IN_PLACE = {"avx2": 32, "sse2": 32}
"""Panels of B of an item at most, for which A is read where it lies: packing it takes longer than
it saves (Zen 3: 1577 x 38 x 886 takes 0.83 of the time, 150 x 64 x 251 takes 0.87, 512^3 0.99). Not
measured elsewhere."""

_ALL_ROWS = 0.5
"""The share of the second cache that all rows of A fill at most to be in each item, where they are
read in place. An item packs its own part of B then (Zen 3: 150 x 64 x 251 takes 0.86 of the time,
165 x 434 x 140 takes 0.94)."""

_B_CACHE, _MOST_OF_ITEM = 0.25, 16
"""The share of the second cache that an item's part of B fills then, if it has all terms
(Zen 3: 57 x 679 x 611 takes 0.96 of the time), and panels of an item at most."""

_FEW_SUMS, _CHUNK, _MOST_SPLIT = 2**15, 256, 8
"""Products of at most so many sums, which few cores would share, are split into chunks of at least
so many terms. They are not tuned."""

_LEAST_ROWS = 0.7
"""The least share of the table's rows: lower tiles load more for each multiply-add."""

_K_CACHE, _M_CACHE = 1.45, 0.25
"""A panel of B fills this share of the first cache: it streams from the second, and the longer it
is, the fewer sums are read again. A's block fills this share of the second cache. (Xeon with AMX,
float32, 2048^3, one thread, beside MKL: terms of 256 give 0.96, 352 0.97, 512 1.02, 688 1.01.)"""

_K_WHOLE = {"avx2": 1.5}
"""The share up to which all terms are one block, so that no sums are read again. (Zen 3, float32:
384 x 768 x 768, 768^3 and 1024 x 3072 x 768 take 0.97 to 0.98 of the time of two blocks, and 0.94
beside other work; but 3072 terms take 1.02 to 1.06 by blocks of 768 where 624 take 1.) Not measured
elsewhere."""

_K_TILES = 0.7
"""The share where tile registers multiply: they read a panel of B in 2 bytes for each 64 of their
operations, so it stays in the first cache."""

_MOST_PANELS = 64
"""Panels of an item: A's block is packed once for each item (16 give 0.99 where 64 give 1.02)."""

ITEMS_PER_CORE = 4
"""Items that each core gets, where there is work enough."""


@dataclass(frozen=True)
class GemmBlocks:
    """A register tile of `rows` by `vectors`; rows, columns and terms of a block."""

    rows: int
    vectors: int
    block_m: int
    block_n: int
    block_k: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.vectors} by {self.block_m}x{self.block_n}x{self.block_k}"


def usual(
    product: Product,
    unit: Unit,
    device: Device,
    tile: tuple[int, int] | None = None,
    share: float | None = None,
) -> GemmBlocks:
    """The blocks by the constants here; another `tile`, or share of `terms`, is to be measured."""
    most, vectors = tile or TILES[device.isa]
    rows = (32 if product.m > 16 else 16) if unit.tiles else balanced(product.m, most)
    width = vectors * lanes_of(device, product.sums)
    chunks, chunk_k = split(product, unit)
    block_k = terms(chunk_k, width, device, unit, product.sums, share)
    block_m, block_n = blocks(product, rows, width, block_k, device, unit, chunks)
    return GemmBlocks(rows, vectors, block_m, block_n, block_k)


def unit_of(a: str, b: str, device: Device) -> Unit:
    """What multiplies these types on a device."""
    if "bfloat16" in (a, b) and {a, b} <= {"bfloat16", *INTEGERS}:  # which it holds exactly
        tiles = device.isa == "amx" and device.has("amx-bf16")
        return AMX if tiles else DOT if device.has("avx512bf16") else FMA
    if sums(a, b) == "int32":
        if device.isa == "amx" and device.has("amx-int8"):
            return AMX8
        if device.has("avx512vnni"):
            return VNNI
        return FMA if device.isa == "neon" else MADD
    return FMA


def balanced(m: int, most: int) -> int:
    """Rows of register tiles, at most `most`: the fewest idle rows in the last tile of m rows.

    >>> balanced(15, 14), balanced(100, 14), balanced(5, 14), balanced(4096, 14)
    (8, 13, 5, 14)
    """
    if m <= most:
        return max(1, m)
    least = max(1, math.ceil(_LEAST_ROWS * most))
    if m < 2 * most:
        return -(-m // 2)
    return min(range(most, least - 1, -1), key=lambda rows: _cost(m, rows))


def _cost(m: int, rows: int) -> float:
    """Steps for m rows: a tile takes one for each of its rows, and two more."""
    return -(-m // rows) * (rows + 2.0)


def split(product: Product, unit: Unit) -> tuple[int, int]:
    """How many chunks of the contraction are items, and their length; by the sizes alone.

    The head of a panel of VNNI is that of all terms, so it is never split.
    """
    sums, k = product.matrices * product.m * product.n, product.k
    if unit == VNNI or sums > _FEW_SUMS or k < 2 * _CHUNK:
        return 1, k
    chunk_k = up(parts(k, min(_MOST_SPLIT, k // _CHUNK)), 64)
    return parts(k, chunk_k), chunk_k


def terms(
    k: int, width: int, device: Device, unit: Unit, sums: str, share: float | None = None
) -> int:
    """Terms at a time, in equal parts, by a share of the first cache for a panel of B.

    VNNI takes all: the head of a panel is that of all terms.
    """
    if unit == VNNI:
        return max(k, 1)
    l1 = device.l1_bytes or 2**15
    step = max(16, unit.depth)
    deep = width * unit.step_bytes(sums) / unit.depth
    whole_share = _K_WHOLE.get(device.isa, 0.0) if share is None else 0.0
    if k <= whole_share * l1 / deep:
        return max(k, 1)
    share = share or (_K_TILES if unit.tiles else _K_CACHE)
    most = max(64, int(share * l1 / deep) // step * step)
    if k <= most:
        return max(k, 1)
    return up(parts(k, parts(k, most)), step)


def blocks(
    product: Product,
    rows: int,
    width: int,
    block_k: int,
    device: Device,
    unit: Unit,
    chunks: int,
) -> tuple[int, int]:
    """Rows and columns of an item: A's block in a part of the second cache, items for all cores."""
    l2 = device.l2_bytes or 2**19
    item = unit.step_bytes(product.sums) / unit.depth
    wanted = ITEMS_PER_CORE * device.cores // chunks
    panels = parts(product.n, width)
    all_panels, least = product.matrices * panels, 2 * device.cores
    few = chunks == 1 and product.m * block_k * item <= _ALL_ROWS * l2
    if few and all_panels >= least and a_in_place(product, unit, device):
        most = _MOST_OF_ITEM
        if product.k <= block_k:
            most = min(most, max(2, int(_B_CACHE * l2 / (block_k * width * item))))
        return up(product.m, rows), min(most, parts(all_panels, wanted)) * width
    block_m = max(1, int(_M_CACHE * l2 / (block_k * item)) // rows) * rows
    block_m = up(parts(product.m, parts(product.m, block_m)), rows)
    return divided(
        product, rows, width, max(block_m, rows), min(_MOST_PANELS, panels) * width, wanted
    )


def divided(
    product: Product, rows: int, width: int, block_m: int, block_n: int, wanted: int
) -> tuple[int, int]:
    """Fewer rows and columns of an item, until there are so many items as are wanted."""
    while product.matrices * parts(product.m, block_m) * parts(product.n, block_n) < wanted:
        if block_m > 4 * rows:
            block_m = up(parts(block_m, 2), rows)
        elif block_n > 2 * width:
            block_n = up(parts(block_n, 2), width)
        else:
            break
    return block_m, block_n


def a_in_place(product: Product, unit: Unit, device: Device, panels: int = 1) -> bool:
    """True if tiles read A where it lies: its terms are neighbours, and few panels of B read it."""
    near = product.a.axes.strides[-1] == 1 or product.k == 1
    same = unit == FMA and product.a.dtype == product.sums
    return near and same and panels <= _MOST_IN_PLACE.get(device.isa, 0)


def parts(length: int, block: int) -> int:
    """How many blocks cover a length, at least one."""
    return max(1, -(-length // max(1, block)))


def up(length: int, step: int) -> int:
    """The next multiple of a step."""
    return parts(length, step) * step


def whole(size: int) -> int:
    """A size in whole cache lines."""
    return up(size, 64)
