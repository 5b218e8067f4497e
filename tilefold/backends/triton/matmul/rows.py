"""The kernel of the softmax of every row of a matrix.

    one pass, a row in registers:               online, in blocks of columns:
        x = the row                                 m, l = lowest, 0
        m = max x                                   for each block x of the row:
        p = exp(x - m)                                  top = max(m, max x)
        l = sum p                                       l = l exp(m - top) + sum exp(x - top)
        P = p / l                                       m = top
                                                    for each block x: P = exp(x - m) / l
    lse = m + log l

A row that fits a block is read once, else twice; the running sum is by Milakov and Gimelshein
(2018, arXiv:1805.02867, Algorithm 3). m, l and lse are float32 (float64 for float64). A row of
-inf alone is a query that sees no key, P = 0 and lse = -inf, where torch and SciPy give NaN. A row
that holds NaN or +inf is NaN, as there. m begins at the lowest finite number, so that -inf is
never subtracted from itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.backends.triton.kernels.frame import HEADERS
from tilefold.backends.triton.kernels.storage import storage
from tilefold.backends.triton.kernels.text import ELEMENTS, Text
from tilefold.backends.triton.spec import power_of_two
from tilefold.common.check import choice

ENTRY = "tilefold_softmax"
DTYPES = ("float32", "float16", "bfloat16", "float64")

WIDE = 16384
"""Columns of a block, at most; wider rows are walked. With 16 warps a thread then holds 32 elements
of a row. Not tuned."""

TOGETHER = 1024
"""Elements of a block at least, where rows are narrow: several rows share a program. Not tuned."""

STAGES = 2
"""Stages of a walk. Not tuned."""

LOWEST = {"float32": "-3.4028234663852886e38", "float64": "-1.7976931348623157e308"}
"""The lowest finite numbers."""

STRIDES = ("x_row", "x_column", "x_h", "x_b", "p_row", "p_column", "p_h", "p_b")
"""Strides by axis, in elements, h and b being the two axes of a batch."""


@dataclass(frozen=True)
class SoftmaxBlocks:
    """Rows and columns of a block, and the warps that work on it.

    >>> print(SoftmaxBlocks.of(77))
    8 x 128, 4 warps
    >>> print(SoftmaxBlocks.of(10**6))
    1 x 16384, 16 warps
    """

    rows: int
    columns: int
    warps: int

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        choice("warps", self.warps, (1, 2, 4, 8, 16))

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns}, {self.warps} warps"

    @classmethod
    def of(cls, width: int) -> SoftmaxBlocks:
        """The blocks of rows of a width."""
        columns = min(power_of_two(width), WIDE)
        rows = max(1, TOGETHER // columns)
        return cls(rows, columns, min(max(4, rows * columns // 1024), 16))


@dataclass(frozen=True)
class SoftmaxSpec:
    """All that changes the source: the type of X and P, blocks, and whether lse is written.

    `online`: rows are wider than a block. `wide`: offsets inside of rows may pass 31 bits.
    """

    dtype: str
    blocks: SoftmaxBlocks
    online: bool = False
    lse: bool = False
    wide: bool = False

    def __post_init__(self) -> None:
        choice("dtype", self.dtype, DTYPES)

    @property
    def statistics(self) -> str:
        """The type of all that is computed, and of lse."""
        return storage(self.dtype).compute


def names(spec: SoftmaxSpec) -> tuple[str, ...]:
    """The arguments of the kernel in their order; lse is contiguous: batch, heads, rows."""
    return ("x", "p", *(("lse",) if spec.lse else ()), "rows", "width", "heads", *STRIDES)


def alike() -> tuple[str, ...]:
    """Arguments for whose values no kernel is compiled anew."""
    return "rows", "heads"


def signature(spec: SoftmaxSpec) -> dict[str, str]:
    """The types of all arguments as Triton writes them, for compilation ahead of time."""
    found = dict.fromkeys(names(spec), "i32")
    found |= dict.fromkeys(("x", "p"), f"*{ELEMENTS[spec.dtype]}")
    return found | ({"lse": f"*{ELEMENTS[spec.statistics]}"} if spec.lse else {})


def emit(spec: SoftmaxSpec) -> str:
    """The module of a softmax; its entry is `ENTRY`."""
    text = Text()
    passes = "a row is walked twice" if spec.online else "a row is read once"
    text(f'"""Softmax of every row of X, {spec.dtype}: {passes}."""', "", *HEADERS, "")
    text(f"ROWS = tl.constexpr({spec.blocks.rows})")
    text(f"COLUMNS = tl.constexpr({spec.blocks.columns})", "", "")
    text.listed("@triton.jit(do_not_specialize=[", [f'"{name}"' for name in alike()], "])")
    text.listed(f"def {ENTRY}(", names(spec), "):")
    body = Text()
    _place(body, spec)
    (_online if spec.online else _once)(body, spec)
    if spec.lse:
        body(
            'log = tl.where(l == 0, float("-inf"), m + tl.log(share))',
            "tl.store(lse + plane.to(tl.int64) * rows + row, log, mask=in_rows)",
        )
    text(*(f"    {line}".rstrip() for line in str(body).splitlines()))
    return str(text)


def _place(text: Text, spec: SoftmaxSpec) -> None:
    """The rows of a program, and the addresses of their first blocks."""
    wide = ".to(tl.int64)" if spec.wide else ""
    text(
        "blocks = (rows + ROWS - 1) // ROWS",
        "place = tl.program_id(0)",
        "first, plane = place % blocks * ROWS, place // blocks",
        "h, b = (plane % heads).to(tl.int64), (plane // heads).to(tl.int64)",
        f"line, column = tl.arange(0, ROWS){wide}, tl.arange(0, COLUMNS)[None, :]{wide}",
        "row = first + line",
        "in_rows = row < rows",
    )
    for name in "xp":
        text(
            f"{name}_block = {name} + b * {name}_b + h * {name}_h"
            f" + first.to(tl.int64) * {name}_row",
            f"{name}_block += line[:, None] * {name}_row + column * {name}_column",
        )


def _load(text: Text, spec: SoftmaxSpec, inside: str) -> None:
    """`value`, a block of X; what lies beyond the edges weighs nothing."""
    text(
        f"inside = in_rows[:, None] & ({inside})",
        'value = tl.load(x_block, mask=inside, other=float("-inf"))',
        f"value = {storage(spec.dtype).read('value')}",
    )


def _once(text: Text, spec: SoftmaxSpec) -> None:
    """Rows that fit a block."""
    _load(text, spec, "column < width")
    text(
        f"m = tl.maximum(tl.max(value, 1), {LOWEST[spec.statistics]})",
        "weight = tl.exp(value - m[:, None])",
        "l = tl.sum(weight, 1)",
        "share = tl.where(l == 0, 1.0, l)",
        f"weight = {storage(spec.dtype).write('(weight * (1.0 / share)[:, None])')}",
        "tl.store(p_block, weight, mask=inside)",
    )


def _online(text: Text, spec: SoftmaxSpec) -> None:
    """Rows that are wider than a block; what is read of X is read before P replaces it."""
    kind = spec.statistics
    step = "tl.cast(COLUMNS, tl.int64)" if spec.wide else "COLUMNS"
    text(
        f"m = tl.full([ROWS], {LOWEST[kind]}, tl.{kind})",
        f"l = tl.full([ROWS], 0.0, tl.{kind})",
        "x_first = x_block",
    )
    with text.block("for start in tl.range(0, width, COLUMNS)"):
        _load(text, spec, "column < width - start")
        text(
            "top = tl.maximum(m, tl.max(value, 1))",
            "l = l * tl.exp(m - top) + tl.sum(tl.exp(value - top[:, None]), 1)",
            "m = top",
            f"x_block += {step} * x_column",
        )
    text("share = tl.where(l == 0, 1.0, l)", "inverse = (1.0 / share)[:, None]")
    text("x_block = x_first")
    with text.block("for start in tl.range(0, width, COLUMNS)"):
        _load(text, spec, "column < width - start")
        text(
            "weight = tl.exp(value - m[:, None]) * inverse",
            f"tl.store(p_block, {storage(spec.dtype).write('weight')}, mask=inside)",
            f"x_block += {step} * x_column",
            f"p_block += {step} * p_column",
        )
