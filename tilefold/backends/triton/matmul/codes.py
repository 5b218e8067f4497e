"""Weights of a quantised B: tiles of them, read from their codes and widened in registers.

    scheme           in memory   multiplied
    int8             int8        code
    float8_e4m3      uint8       the number of these bits
    int4             int32       code - zero
    int4_symmetric   int32       code - 8
    palette6         int32       table[code]

`tilefold/products/schemes.py` draws how codes lie: in panels of 32 columns; 8 codes of 4 bits in a
word, and 16 codes of 6 bits in three. A word is loaded once, and spread over its rows of the tile.
Codes are whole numbers, which half types hold. Scales multiply the sums: of each group of inputs,
or once at the end where all inputs share a scale. One row of `_ROWS` is all that a kernel knows of
a scheme.
"""

from __future__ import annotations

from typing import NamedTuple

from tilefold.backends.matmul import PANEL, Codes
from tilefold.backends.triton.kernels.text import Text


class Row(NamedTuple):
    """A scheme: `block` inputs of a column have `words` items of a panel; then a code's number."""

    memory: str
    number: str
    block: int = 1
    words: int = 1


_ROWS = {
    "int8": Row("int8", "right.to(tl.float32)"),
    "float8_e4m3": Row("uint8", "e4m3(right)"),
    "int4": Row("int32", "(right.to(tl.float32) - zero[None, :])", 8),
    "int4_symmetric": Row("int32", "(right - 8).to(tl.float32)", 8),
    "palette6": Row("int32", "tl.load(table + right)", 16, 3),
}

_E4M3 = """\
@triton.jit
def e4m3(code):
    size = (code & 127).to(tl.int32)  # 4 bits of exponent, 3 of mantissa
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    small = size.to(tl.float32) * 0.001953125
    found = tl.where(size < 8, small, tl.where(size == 127, float("nan"), normal))
    return tl.where(code < 128, found, -found)

"""


def memory(codes: Codes) -> str:
    """The type of an item of codes."""
    return _ROWS[codes.scheme].memory


def multiplied(codes: Codes, a: str) -> str:
    """The type of B's tiles beside an A of a type: numbers of a palette are float16.

    >>> multiplied(Codes("int8", scales="float32"), "bfloat16")
    'bfloat16'
    >>> multiplied(Codes("palette6"), "float16"), multiplied(Codes("palette6"), "bfloat16")
    ('float16', 'float32')
    """
    return a if codes.scales or a == "float16" else "float32"


def products(codes: Codes, a: str, how: str) -> str:
    """How float32 is multiplied beside an A of a type: TF32 holds all bits of both half types.

    >>> [products(Codes("palette6"), a, "ieee") for a in ("float32", "bfloat16")]
    ['ieee', 'tf32']
    """
    return "tf32" if a != "float32" and multiplied(codes, a) == "float32" else how


def define(text: Text, codes: Codes) -> None:
    """The functions that tiles call."""
    if codes.scheme == "float8_e4m3":
        text(_E4M3)


def place(text: Text, codes: Codes) -> None:
    """Where the first tile of codes lies; all columns of a tile may be in panels of their own."""
    row = _ROWS[codes.scheme]
    blocks = "k" if row.block == 1 else f"(k + {row.block - 1}) // {row.block}"
    lines = "K" if row.block == 1 else "K // 8"
    text(
        f"line = tl.arange(0, {lines})",
        "n_b = first_n + column",
        f"b_tile = b + (n_b // {PANEL}).to(tl.int64) * ({blocks}) * {PANEL * row.words}",
        f"b_tile += n_b % {PANEL}",
    )
    if row.words == 1:
        text(f"b_tile = b_tile[None, :] + line[:, None] * {PANEL}")
    else:
        text(
            f"pair = tl.arange(0, K // {row.block})",
            f"high_tile = b_tile[None, :] + pair[:, None] * {PANEL * row.words} + {2 * PANEL}",
            f"b_tile = b_tile[None, :] + (line // 2 * {PANEL * row.words})[:, None]",
            f"b_tile += (line % 2 * {PANEL})[:, None]",
        )
    if codes.scales:
        if codes.group is None:
            _group(text, codes, "n_b")
        else:
            text(
                f"line_of_scales = (n_b // {PANEL}).to(tl.int64) * (k // {codes.group})",
                f"in_line_of_scales = n_b % {PANEL}",
            )


def _group(text: Text, codes: Codes, at: str) -> None:
    """Scales and zeros of a group of inputs, which lie in panels as codes do."""
    text(f"at = {at}")
    for name in codes.besides:
        text(f"{name[:-1]} = tl.load({name} + at, mask=n_b < n, other=0.0).to(tl.float32)")


def read(text: Text, codes: Codes, kind: str) -> None:
    """The tile of numbers, `right`, of a type; what is beyond the edges is a code of 0."""
    row = _ROWS[codes.scheme]
    if row.block == 1:
        text("right = tl.load(b_tile, mask=in_k[:, None] & in_columns, other=0)")
    else:
        left = "(k - first + 7) // 8" if row.words == 1 else "(k - first + 15) // 16 * 2"
        text(
            f"in_line = (line < {left})[:, None] & in_columns",
            "right = tl.load(b_tile, mask=in_line, other=0)",
            _spread("right", 8, 4, 15),
        )
    if row.words == 3:
        text(
            "in_pair = (pair < (k - first + 15) // 16)[:, None] & in_columns",
            "high = tl.load(high_tile, mask=in_pair, other=0)",
        )
        text(_spread("high", 16, 2, 3), "right = right | high << 4")
    if codes.scales and codes.group is not None:
        line = f"(line_of_scales + first // {codes.group}) * {PANEL}"
        _group(text, codes, f"{line} + in_line_of_scales")
    text(f"right = {row.number}.to(tl.{kind})")


def _spread(name: str, count: int, bits: int, most: int) -> str:
    """Words of rows as rows of codes: each word has `count` of them."""
    shifts = f"(tl.arange(0, {count}) * {bits})[None, :, None]"
    return f"{name} = ({name}[:, None, :] >> {shifts} & {most}).reshape(K, N)"


def advance(text: Text, codes: Codes) -> None:
    """To the next tile."""
    row = _ROWS[codes.scheme]
    step = f"K // {row.block} * {PANEL * row.words}" if row.block > 1 else f"K * {PANEL}"
    text(f"b_tile += {step}")
    if row.words == 3:
        text(f"high_tile += {step}")
