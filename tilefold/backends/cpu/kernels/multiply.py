"""How a kernel multiplies: the operands of a product, and products number by number.

Every product of a pass is left x right. The right side lies in scratch with the parallel block in
its lanes: operands of the block itself, or the weights of a tile. The left side is of the traversed
axis, read along d for scores (`rows`) and along the traversed axis for sums (`columns`).

    unit   left                                   right                    one step
    fma    numbers where they lie, any strides    rows of floats           a * b, one number
    dot    lines of bfloat16, contiguous          rows of bfloat16 pairs   two numbers
    amx    as dot                                 as dot                   16 x 16 x 32 numbers

The other two units are in `products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilefold.backends.cpu.kernels import microkernel
from tilefold.backends.cpu.kernels.block import Block
from tilefold.backends.cpu.kernels.ir import Value
from tilefold.backends.cpu.kernels.tile import Factor, Matrix, Scores, Side, Tile


@dataclass(frozen=True)
class Right:
    """The right side, in parts that sum to it."""

    parts: tuple[Value, ...]


@dataclass(frozen=True)
class Sides:
    """A tile's rows of an operand as left sides, in parts, read along d and along the rows."""

    rows: tuple[Matrix, ...]
    columns: tuple[Matrix, ...]


class Products:
    """Products in the type of the scores, element by element."""

    step = 1
    """Rows of weights that are kept together."""

    slack = 0.0
    """How far, in powers of 2, the largest score may exceed m before sums are rescaled."""

    exp2_terms: tuple[float, ...] | None = None
    """The polynomial of the weights, where less than the precision of the scores will do."""

    def __init__(self, block: Block) -> None:
        self.block, self.body = block, block.body
        self.shape, self.spec = block.shape, block.spec

    def pack(self, name: str, dim: int, factor: Value | None = None) -> Right:
        """The block's rows of an operand as the right side, multiplied by a factor."""
        one = self.block.scalar(1.0)
        return Right((self.block.pack(name, dim, one if factor is None else factor),))

    def sides(
        self, tile: Tile, matrix: Matrix, region: str, dim: int, *, rows: bool, columns: bool
    ) -> Sides:
        """A tile's rows of an operand as the left sides that are wanted."""
        near = (self.block.near(tile, tile.of(matrix), region, dim),)
        return Sides(near, near)

    def scores(
        self, tile: Tile, left: Sequence[Matrix], right: Right, dim: int, use: Scores
    ) -> None:
        """`use(first row, block)` for each block of rows of left x right, over d."""
        tile.scores(factors_of(left, right), Value(str(dim), "i64"), use)

    def pad(self, tile: Tile, scores: Value) -> None:
        """Complete the scores to a multiple of `step` rows: what is added weighs nothing."""

    def keep(
        self, tile: Tile, region: str, row: Value, lines: microkernel.Accumulators, masked: bool
    ) -> None:
        """Keep `step` rows of weights, or more, for `accumulate_safely`."""
        scratch = self.block.region(region)
        for i, line in enumerate(lines):
            for j, value in enumerate(line):
                self.body.store(value, tile.at(scratch, self.body.add(row, i), j))

    def mark(self, tile: Tile, row: Value, weights: microkernel.Accumulators) -> None:
        """Keep rows of P for their marks alone."""
        Products.keep(self, tile, "p", row, weights, True)

    def kept(self, tile: Tile, region: str) -> Right:
        """The weights that were kept in a region as the right side, once all rows are there."""
        return Right((self.block.region(region),))

    def accumulate(
        self,
        tile: Tile,
        left: Sequence[Matrix],
        right: Right,
        total: Value,
        dim: int,
        scales: list[Value] | None = None,
    ) -> None:
        """total (dim x lanes) <- scales * total + left^T x right, over the tile's rows."""
        tile.accumulate(factors_of(left, right), tile.count, total, dim, scales)

    def accumulate_safely(
        self,
        masked: bool,
        tile: Tile,
        matrix: Matrix,
        left: Sequence[Matrix],
        region: str,
        total: Value,
        dim: int,
        scales: list[Value] | None = None,
    ) -> None:
        """`accumulate` of the weights kept in a region, without the weights of forbidden pairs.

        They are 0, and 0 times a number is 0; in a partial tile where `matrix` holds infinities or
        NaN they are left out one by one. The marks lie in region "p".
        """
        right = self.kept(tile, region)
        if not masked:
            self.accumulate(tile, left, right, total, dim, scales)
            return
        rows, block = tile.of(matrix), self.block
        with self.body.choose(tile.finite(rows, dim), "finite") as branch:
            self.accumulate(tile, left, right, total, dim, scales)
            branch.otherwise()
            weights, marks = block.region(region), block.region("p")
            tile.accumulate_visible(rows, weights, marks, total, dim, scales)


def factors_of(left: Sequence[Side], right: Right) -> list[Factor[Side]]:
    """The products whose sum is left x right: all products but the ones of two low parts.

    Each has a side in common with the next: high low, high high, low high. The low part of an
    infinity is infinite: times a low part of 0 it would be NaN.
    """
    return [
        Factor(a, b) for i, a in enumerate(left) for b in reversed(right.parts[: len(left) - i])
    ]
