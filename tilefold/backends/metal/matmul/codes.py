"""Weights of a quantised B: read from their codes, and widened in registers.

    scheme           in memory   a weight is
    int8             char        scale code
    float8_e4m3      uchar       scale (the number of these bits)
    int4             uint        scale (code - zero)
    int4_symmetric   uint        scale (code - 8)
    palette6         uint        table[code]

`tilefold/products/schemes.py` draws how codes lie: in panels of 32 columns; 8 codes of 4 bits in a
word, and 16 codes of 6 bits in three. One row of `_ROWS` is all that a kernel knows of a scheme.
"""

from __future__ import annotations

from typing import NamedTuple

from tilefold.backends.matmul import PANEL, Codes
from tilefold.backends.metal.kernels.msl import Text
from tilefold.backends.metal.kernels.storage import storage


class Row(NamedTuple):
    """A scheme: `block` inputs of a column have `words` items of a panel; then a code's number."""

    memory: str
    number: tuple[str, ...]
    block: int = 1
    words: int = 1


_FOUR_BITS = "codes[at] >> (4 * (i % 8)) & 15"

_ROWS = {
    "int8": Row("char", ("float(codes[at])",)),
    "float8_e4m3": Row(
        "uchar",
        (
            "const uint size = codes[at] & 127;  // 4 bits of exponent, 3 of mantissa",
            "const float normal = as_type<float>((size << 20) + (120 << 23));",
            "const float found = size < 8 ? 0.001953125f * size : size == 127 ? NAN : normal;",
            "codes[at] < 128 ? found : -found",
        ),
    ),
    "int4": Row("uint", (f"float({_FOUR_BITS}) - {{zero}}",), 8),
    "int4_symmetric": Row("uint", (f"float({_FOUR_BITS}) - 8.0f",), 8),
    "palette6": Row(
        "uint",
        (
            f"const uint low = codes[at + {PANEL} * (i / 8 % 2)] >> (4 * (i % 8)) & 15;",
            f"const uint high = codes[at + {2 * PANEL}] >> (2 * (i % 16)) & 3;",
            "float(table[low | high << 4])",
        ),
        16,
        3,
    ),
}


def memory(codes: Codes) -> str:
    """Metal's name of the type of an item of codes."""
    return _ROWS[codes.scheme].memory


def define(text: Text, codes: Codes) -> None:
    """The function of a weight, which `weight` calls: input i of column j, of k x n."""
    row = _ROWS[codes.scheme]
    given = [f"device const {row.memory}* codes"]
    for name, kind in codes.besides.items():
        given.append(f"device const {storage(kind, bfloat=False).memory}* {name}")
    given += [f"const uint {name}" for name in ("i", "j", "k", "n")]
    blocks = "k" if row.block == 1 else f"((k + {row.block - 1}) / {row.block})"
    inside = "i" if row.block == 1 else f"i / {row.block}"
    head = ",\n    ".join([", ".join(given[:-4]), ", ".join(given[-4:])])
    with text.block(f"static inline float weight(\n    {head})"):
        line = f"ulong(j / {PANEL}) * {blocks} + {inside}"
        text(f"const ulong at = {PANEL * row.words} * ({line}) + j % {PANEL};")
        *lines, number = row.number
        if codes.scales:
            line = f"(ulong(j / {PANEL}) * (k / {codes.group}) + i / {codes.group}) * {PANEL}"
            of = "j" if codes.group is None else f"{line} + j % {PANEL}"
            text(f"const ulong from = {of};")
            number = f"float(scales[from]) * ({number.format(zero='float(zeros[from])')})"
        text(*lines, f"return {number};")
    text("")


def weight(codes: Codes, i: str, j: str) -> str:
    """The expression of a weight, float: input i of column j.

    >>> weight(Codes("palette6"), "i", "j")
    'weight(b, table, i, j, k, n)'
    """
    return f"weight({', '.join(('b', *codes.besides, i, j, 'k', 'n'))})"
