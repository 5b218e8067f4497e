"""AMX: products of whole tiles, 16 x 16 sums over 32 bfloat16 numbers in one instruction.

    tiles 0 to 3   C   16 rows x 16 floats      two rows of tiles by two columns
    tiles 4, 5     A   16 rows x 32 bfloat16    lines of the left side
    tiles 6, 7     B   16 pairs x 16 words      rows of the right side

Two loads of A and two of B feed four products: a load from L1 takes half as long as a product. With
two parts eight loads feed twelve, since each of three products shares a side with the next. All
tiles have their full size all the time: operands are padded with zeros, and rows that nobody reads
are computed from whatever lies there. (Intel 64 and IA-32 Architectures Software Developer's
Manual, volume 1, chapter 18. Denormal numbers count as 0.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tilefold.backends.cpu.kernels.ir import Body, Value
from tilefold.backends.cpu.kernels.microkernel import Shape
from tilefold.backends.cpu.kernels.tile import Factor

ROWS = 16
"""Rows of a tile, and floats of a row."""

DEPTH = 32
"""Numbers of the contraction in one product."""

_CONFIG = "tile_config"


@dataclass(frozen=True)
class Lines:
    """Lines of the left side: the address of the first, and how many numbers apart they are."""

    address: Value
    stride: Value


@contextmanager
def configured(body: Body) -> Iterator[None]:
    """The tiles of this thread are set up inside, and released after."""
    config = bytearray(64)
    config[0] = 1
    for tile in range(8):
        config[16 + 2 * tile] = 64
        config[48 + tile] = ROWS
    address = body.module.constant(_CONFIG, bytes(config), align=64)
    _tile(body, "ldtilecfg", address)
    yield
    _tile(body, "tilerelease")


def panel(
    body: Body,
    shape: Shape,
    factors: Sequence[Factor[Lines]],
    depth: Value,
    target: Value,
    rows: int,
    start: Value | None,
) -> None:
    """target <- start + the sum of the factors: `rows` (1 or 2) rows of tiles, all columns.

    `target` and `start` (zero if None) are scratch as wide as the block, `depth` counts products.
    """
    columns = shape.width // ROWS
    row_bytes = Value(str(4 * shape.width), "i64")
    for first in range(0, columns, 2):
        wide = range(first, min(first + 2, columns))
        corners = {
            (i, j): shape.at(body, target, i * ROWS, column, shape.width)
            for i in range(rows)
            for j, column in enumerate(wide)
        }
        for (i, j), corner in corners.items():
            if start is None:
                _tile(body, "tilezero", _number(2 * i + j))
            else:
                _tile(body, "tileloadd64", _number(2 * i + j), corner, row_bytes)
        _sum(body, shape, factors, depth, rows, wide)
        for (i, j), corner in corners.items():
            _tile(body, "tilestored64", _number(2 * i + j), corner, row_bytes)


def products(body: Body, steps: int, instruction: str) -> None:
    """So many times four products of zeros, none of which waits for another: a measurement."""
    for tile in range(8):
        _tile(body, "tilezero", _number(tile))
    with body.loop("step", 0, steps):
        for tile in range(4):
            _tile(body, instruction, _number(tile), _number(4 + tile // 2), _number(6 + tile % 2))


def _sum(
    body: Body,
    shape: Shape,
    factors: Sequence[Factor[Lines]],
    depth: Value,
    rows: int,
    columns: range,
) -> None:
    """C += left x right for all factors, over the whole contraction.

    A side that two factors in a row share is loaded once: with two parts 8 loads feed 12 products.
    """
    row_bytes = Value(str(4 * shape.width), "i64")
    tops = {
        factor.left: [
            body.offset(factor.left.address, "i16", body.mul(factor.left.stride, ROWS * i))
            if i
            else factor.left.address
            for i in range(rows)
        ]
        for factor in factors
    }
    with body.loop("c", 0, depth) as c:
        line, row = body.mul(c, DEPTH), body.mul(c, DEPTH // 2)
        left, right = None, None
        for factor in factors:
            if factor.left != left:
                left = factor.left
                line_bytes = body.mul(left.stride, 2)
                for i, top in enumerate(tops[left]):
                    place = body.offset(top, "i16", line)
                    _tile(body, "tileloadd64", _number(4 + i), place, line_bytes)
            for j, column in enumerate(columns):
                if factor.right != right:
                    place = shape.at(body, factor.right, row, column, shape.width)
                    _tile(body, "tileloadd64", _number(6 + j), place, row_bytes)
                for i in range(rows):
                    _tile(body, "tdpbf16ps", _number(2 * i + j), _number(4 + i), _number(6 + j))
            right = factor.right


def _number(tile: int) -> Value:
    return Value(str(tile), "i8")


def _tile(body: Body, name: str, *arguments: Value) -> None:
    """One tile instruction."""
    types = [argument.type for argument in arguments]
    body.module.declare(f"llvm.x86.{name}", "void", types)
    body.invoke(f"llvm.x86.{name}", list(arguments))
