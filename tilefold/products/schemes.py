"""The schemes of quantised matrices, and how codes of few bits lie in memory.

A matrix of weights has `k` inputs and `n` outputs, as in x @ w. Each weight is a code:

| scheme         | bits | a weight is                      | scales                          |
|----------------|------|----------------------------------|---------------------------------|
| int8           | 8    | scale * code                     | per output, or per group        |
| int4           | 4    | scale * (code - zero)            | per group; zeros too            |
| int4_symmetric | 4    | scale * (code - 8)               | per group                       |
| palette6       | 6    | table[code], 64 float16 numbers  | none                            |
| float8_e4m3    | 8    | scale * the number of these bits | per output                      |

A kernel reads the codes once, in order. Outputs are cut into panels of 32 columns. Inputs stay in
order inside of a panel. Codes of less than 8 bits lie in words of 32 bits, one column each, so that
16 columns are widened in one register. Words are little-endian.

| scheme       | array of codes                     | input i of a column                     |
|--------------|------------------------------------|-----------------------------------------|
| int8         | int8 [panels, k, 32]               | item i                                  |
| float8_e4m3  | uint8 [panels, k, 32]              | item i                                  |
| int4 (both)  | uint32 [panels, ceil(k/8), 32]     | word i/8, bits 4t to 4t+3, t = i mod 8  |
| palette6     | uint32 [panels, ceil(k/16), 3, 32] | three words of 16 inputs, t = i mod 16  |

The words of a palette: input t has its low 4 bits in word t/8, from bit 4(t mod 8), and its high 2
bits in word 2, from bit 2t. So an index is `low >> s & 15 | (high >> r & 3) << 4`.

Scales and zeros are float32 or float16, [panels, groups, 32], so they too are read in order: from
[groups, n] a product of one row took 1.4 times as long (groups of 128, Xeon with AMX). Group j has
the inputs from j k/groups on. Columns after n have codes, scales and zeros of 0. Inputs after k
have codes of 0, which are not always weights of 0: a kernel multiplies them by 0.

float8_e4m3: P. Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433, 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.common.check import choice

Array = NDArray[Any]

PANEL = 32
"""Columns of a panel: two registers of 16 lanes."""

ENTRIES = 64
"""Numbers in a palette."""

GROUP_STEP = 16
"""Groups are whole blocks of each scheme, so that no word has codes of two groups."""

E4M3_MOST = 448.0
"""The largest number of float8_e4m3."""


@dataclass(frozen=True)
class Scheme:
    """What follows from the name of a scheme.

    `block` inputs share `words` words of 32 bits; 0 words means a byte for each. `least` and `most`
    are the smallest and the largest code, and `zero` is the code of the weight 0 where the matrix
    has no zeros of its own (`zeros`). `grouped` schemes take a group_size, and `group` inputs is
    the usual one; None means all inputs of an output.
    """

    name: str
    bits: int
    dtype: str
    block: int = 1
    words: int = 0
    least: int = 0
    most: int = 0
    zero: int = 0
    zeros: bool = False
    grouped: bool = False
    group: int | None = None

    @property
    def scaled(self) -> bool:
        """True if the matrix has scales."""
        return self.name != "palette6"

    def scales_shape(self, k: int, n: int, group: int) -> tuple[int, int, int]:
        """The shape of scales, and of zeros."""
        return (-(-n // PANEL), k // group, PANEL)

    def codes_shape(self, k: int, n: int) -> tuple[int, ...]:
        """The shape of the array of codes of a matrix."""
        panels, blocks = -(-n // PANEL), -(-k // self.block)
        words = (self.words,) if self.words > 1 else ()
        return (panels, blocks, *words, PANEL)


SCHEMES = {
    each.name: each
    for each in (
        Scheme("int8", 8, "int8", least=-127, most=127, grouped=True),
        Scheme("int4", 4, "uint32", 8, 1, most=15, zeros=True, grouped=True, group=128),
        Scheme("int4_symmetric", 4, "uint32", 8, 1, most=15, zero=8, grouped=True, group=128),
        Scheme("palette6", 6, "uint32", 16, 3, most=63),
        Scheme("float8_e4m3", 8, "uint8", most=255),
    )
}


def scheme_of(name: Any) -> Scheme:
    """The scheme with this name. Raises ValueError for another name.

    >>> scheme_of("int5")
    Traceback (most recent call last):
    ValueError: scheme must be 'int8', 'int4', 'int4_symmetric', 'palette6' or 'float8_e4m3', got 'int5'
    """  # noqa: E501
    choice("scheme", name, tuple(SCHEMES))
    return SCHEMES[name]


def group_of(scheme: Scheme, k: int, size: int | None) -> int:
    """The inputs of a group. Raises ValueError for a size that does not fit.

    None is the usual size of the scheme. Where that does not divide k, it is the largest one below
    that does, and k itself where there is none.

    >>> group_of(SCHEMES["int4"], 4096, None), group_of(SCHEMES["int4"], 320, None)
    (128, 80)
    >>> group_of(SCHEMES["int4"], 100, None), group_of(SCHEMES["int8"], 4096, None)
    (100, 4096)
    """
    if not scheme.grouped:
        if size is not None:
            raise ValueError(f"group_size must be None for {scheme.name}, got {size}")
        return k
    if size is None:
        if scheme.group is None:
            return k
        fitting = range(scheme.group, 0, -GROUP_STEP)
        return next((each for each in fitting if k % each == 0), k)
    if size != k and (size % GROUP_STEP or k % size):
        raise ValueError(
            f"group_size must be {k}, or a multiple of {GROUP_STEP} that divides {k}, got {size}"
        )
    return size


def pack(scheme: Scheme, codes: Array) -> Array:
    """Codes (k, n), one in each item, as they lie in memory.

    >>> hex(pack(SCHEMES["int4"], np.arange(8, dtype=np.uint8)[:, None])[0, 0, 0])
    '0x76543210'
    """
    k, n = codes.shape
    blocks, panels = -(-k // scheme.block), -(-n // PANEL)
    if (k, n) != (blocks * scheme.block, panels * PANEL):
        codes = np.pad(codes, ((0, blocks * scheme.block - k), (0, panels * PANEL - n)))
    if not scheme.words:
        cut = codes.reshape(k, panels, PANEL).swapaxes(0, 1)
        return np.ascontiguousarray(cut).view(scheme.dtype)
    cut = codes.reshape(blocks, scheme.block, panels, PANEL).transpose(2, 0, 1, 3)
    words = np.zeros((panels, blocks, scheme.words, PANEL), np.uint32)
    for t in range(scheme.block):
        item = cut[:, :, t].astype(np.uint32)
        words[:, :, t // 8] |= (item & 15) << np.uint32(4 * (t % 8))
        if scheme.words == 3:
            words[:, :, 2] |= (item >> 4) << np.uint32(2 * t)
    return words.reshape(scheme.codes_shape(k, n))


def unpack(scheme: Scheme, packed: Array, k: int) -> Array:
    """The codes of some panels, (k, 32 panels), one in each item."""
    panels = len(packed)
    if not scheme.words:
        return np.ascontiguousarray(packed.swapaxes(0, 1)).reshape(k, panels * PANEL)
    blocks = -(-k // scheme.block)
    words = packed.reshape(panels, blocks, scheme.words, PANEL).transpose(1, 2, 0, 3)
    codes = np.empty((blocks, scheme.block, panels, PANEL), np.uint8)
    for t in range(scheme.block):
        item = words[:, t // 8] >> np.uint32(4 * (t % 8)) & np.uint32(15)
        if scheme.words == 3:
            item |= (words[:, 2] >> np.uint32(2 * t) & np.uint32(3)) << np.uint32(4)
        codes[:, t] = item
    return codes.reshape(blocks * scheme.block, panels * PANEL)[:k]


def e4m3_codes(numbers: Array) -> Array:
    """The bits of the nearest float8_e4m3 of float32 numbers; ties go to even, large ones to 448.

    >>> e4m3_codes(np.float32([0, 1, -448, 1000, 0.001953125])).tolist()
    [0, 56, 254, 126, 1]
    """
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    size = np.minimum(bits & np.uint32(0x7FFFFFFF), np.float32(E4M3_MOST).view(np.uint32))
    small = np.rint(size.view(np.float32) * np.float32(512)).astype(np.uint32)  # steps of 2^-9
    rounded = size + np.uint32(0x7FFFF) + (size >> np.uint32(20) & np.uint32(1))
    large = (rounded >> np.uint32(20)) - np.uint32(120 << 3)  # 3 bits stay; exponents begin at -7
    found = np.where(size < np.uint32(121 << 23), small, large)  # below 2^-6
    codes: Array = (found | bits >> np.uint32(24) & np.uint32(128)).astype(np.uint8)
    return codes


def e4m3_table() -> Array:
    """The 256 numbers of float8_e4m3 by their bits, float32."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    size = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    size[code & 127 == 127] = np.nan
    table: Array = np.where(code < 128, size, -size).astype(np.float32)
    return table
