"""Weights of a quantised B: read from their codes, and widened in registers.

    scheme           in memory   a weight is
    int8             char        scale code
    float8_e4m3      uchar       scale (the number of these bits)
    int4             uint        scale (code - zero)
    int4_symmetric   uint        scale (code - 8)
    palette6         uint        table[code]

`tilefold/products/schemes.py` draws how codes lie: in panels of 32 columns; 8 codes of 4 bits in a
word, and 16 codes of 6 bits in three. Inputs come in lines of 8. The place of a word depends on the
line and not on the input in it, so a thread that widens a line loads its words once. One row of
`_ROWS` is all that a kernel knows of a scheme.
"""

from __future__ import annotations

from typing import NamedTuple

from tilefold.backends.matmul import PANEL, Codes
from tilefold.backends.metal.kernels.msl import Text
from tilefold.backends.metal.kernels.storage import storage

LINE = 8
"""Inputs of a line."""


class Row(NamedTuple):
    """A scheme: the type of its items, the lines of C++ from a code to its number, and its place.

    `at` is the row of a panel that has input t of a line; rows have `items` times 32 items.
    """

    memory: str
    number: tuple[str, ...]
    at: str = "{panel} * k + 8 * line + t"
    items: int = 1


_WORD = "{panel} * ((k + 7) / 8) + line"
_FOUR_BITS = "codes[at] >> (4 * t) & 15"

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
    "int4": Row("uint", (f"float({_FOUR_BITS}) - {{zero}}",), _WORD),
    "int4_symmetric": Row("uint", (f"float({_FOUR_BITS}) - 8.0f",), _WORD),
    "palette6": Row(
        "uint",
        (
            f"const uint low = codes[at + {PANEL} * (line % 2)] >> (4 * t) & 15;",
            f"const uint high = codes[at + {2 * PANEL}] >> (16 * (line % 2) + 2 * t) & 3;",
            "float(table[low | high << 4])",
        ),
        "{panel} * ((k + 15) / 16) + line / 2",
        3,
    ),
}


def memory(codes: Codes) -> str:
    """Metal's name of the type of an item of codes."""
    return _ROWS[codes.scheme].memory


def define(text: Text, codes: Codes) -> None:
    """The function of a weight, which `weight` calls: input t of a line, in column j."""
    row = _ROWS[codes.scheme]
    given = [f"device const {row.memory}* codes"]
    for name, kind in codes.besides.items():
        given.append(f"device const {storage(kind, bfloat=False).memory}* {name}")
    given += [f"const uint {name}" for name in ("line", "t", "j", "k")]
    head = ",\n    ".join([", ".join(given[:-4]), ", ".join(given[-4:])])
    with text.block(f"static inline float weight(\n    {head})"):
        panel = f"ulong(j / {PANEL})"
        at = row.at.format(panel=panel)
        text(f"const ulong at = {PANEL * row.items} * ({at}) + j % {PANEL};")
        *lines, number = row.number
        if codes.scales:
            of = "j"
            if codes.group is not None:
                group = f"{panel} * (k / {codes.group}) + line / {codes.group // LINE}"
                of = f"{PANEL} * ({group}) + j % {PANEL}"
            text(f"const ulong from = {of};")
            number = f"float(scales[from]) * ({number.format(zero='float(zeros[from])')})"
        text(*lines, f"return {number};")
    text("")


def weight(codes: Codes, line: str, t: str, j: str) -> str:
    """The expression of a weight, float: input t of a line, in column j.

    >>> weight(Codes("palette6"), "line", "t", "j")
    'weight(b, table, line, t, j, k)'
    """
    return f"weight({', '.join(('b', *codes.besides, line, t, j, 'k'))})"
