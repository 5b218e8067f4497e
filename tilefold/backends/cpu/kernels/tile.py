"""One tile of a pass: the steps that forward, dQ and dK/dV share.

The rows of a tile are `count` rows of the traversed axis, its lanes the parallel block. Scores and
weights of the tile lie in scratch, row by row.

Pairs that the rule forbids carry markers, so that no later step asks the rule again and nothing
leaks from them: a score becomes a signalling NaN, which arithmetic never returns, and a weight
becomes -0.0, which no exponential is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from tilefold.backends.cpu.kernels import microkernel, pack
from tilefold.backends.cpu.kernels.ir import Body, Operand, Value, Variable, overload, vector
from tilefold.backends.cpu.kernels.mask import MaskText
from tilefold.backends.cpu.kernels.softmax import FORMATS
from tilefold.backends.cpu.kernels.storage import Storage

_SIGNALLING_NAN = {"float": 0x7FA00000, "double": 0x7FF4000000000000}


@dataclass(frozen=True)
class Matrix:
    """Rows of an operand, of a whole head or of one tile.

    The address of the first row, strides in elements, and how the elements lie in memory.
    """

    address: Value
    row_stride: Value
    d_stride: Value
    storage: Storage

    def row(self, body: Body, index: Operand, hint: str = "row") -> Value:
        """The address of a row."""
        return self.storage.at(body, self.address, body.mul(index, self.row_stride), hint)

    def at(self, body: Body, row: Value, d: Operand) -> Value:
        """The address of one element of a row, given the row's address."""
        return self.storage.at(body, row, body.mul(d, self.d_stride))


def padded(elements: int, unit: int) -> int:
    """A count of elements, rounded up to whole units."""
    return -(-elements // unit) * unit


Scores = Callable[[Value, microkernel.Accumulators], None]
"""Takes a block of scores: (the first of its rows in the tile, the block)."""

Side = TypeVar("Side")


@dataclass(frozen=True)
class Factor(Generic[Side]):
    """A left side, and the right side in scratch that it is multiplied with."""

    left: Side
    right: Value


@dataclass(frozen=True)
class Tile:
    """The frame of one tile: where it is and in which shape of registers it is computed."""

    body: Body
    shape: microkernel.Shape
    first: Value
    count: Value

    def marker_bits(self, kind: str) -> int:
        """The bits of a forbidden "score" or "weight"."""
        sign = 1 << (int(FORMATS[self.shape.scalar].integer[1:]) - 1)
        return {"score": _SIGNALLING_NAN[self.shape.scalar], "weight": sign}[kind]

    def marker(self, kind: str) -> Value:
        """Those bits as a vector of integers."""
        integers = vector(self.shape.lanes, FORMATS[self.shape.scalar].integer)
        return self.body.constant(self.marker_bits(kind), integers)

    def marked(self, value: Value, kind: str) -> Value:
        """A truth per lane: the pair is forbidden."""
        marker = self.marker(kind)
        return self.body.compare("eq", self.body.cast("bitcast", value, marker.type), marker)

    def mark_where(self, forbidden: Value, value: Value, kind: str) -> Value:
        """The marker where the pair is forbidden, `value` elsewhere."""
        marker = self.body.cast("bitcast", self.marker(kind), self.shape.vector)
        return self.body.select(forbidden, marker, value)

    def mark(self, allowed: Value, value: Value, kind: str) -> Value:
        """`value` where the rule allows the pair, the marker elsewhere."""
        marker = self.body.cast("bitcast", self.marker(kind), self.shape.vector)
        return self.body.select(allowed, value, marker)

    def at(self, scratch: Value, row: Operand, column: int) -> Value:
        """The address of one vector of a row of a scratch matrix as wide as the tile."""
        return self.shape.at(self.body, scratch, row, column, self.shape.width)

    def of(self, matrix: Matrix) -> Matrix:
        """The tile's rows of an operand, where they lie."""
        return replace(matrix, address=matrix.row(self.body, self.first, "corner"))

    def near(self, rows: Matrix, scratch: Value, capacity: int, dim: int) -> Matrix:
        """The tile's rows widened into scratch, as elements to compute with.

        The axis that is contiguous stays so; `capacity` rows must fit.
        """
        body, lanes = self.body, self.shape.lanes
        turned = body.compare("eq", rows.row_stride, Value("1", "i64"), "turned")

        def pick(if_turned: Operand, otherwise: Operand) -> Value:
            return body.select(turned, body.operand(if_turned), body.operand(otherwise), "near")

        line = pick(padded(capacity, lanes), padded(dim, lanes))
        outer, inner = pick(dim, self.count), pick(self.count, dim)
        outer_stride = pick(rows.d_stride, rows.row_stride)
        inner_stride = pick(rows.row_stride, rows.d_stride)
        place = [scratch, rows.address, outer, inner, outer_stride, inner_stride, line]
        body.invoke(pack.widen(body.module, self.shape, rows.storage), place)
        return Matrix(scratch, pick(1, line), pick(line, 1), rows.storage.computed)

    def rows_of(self, matrix: Matrix, row: Value, rows: int) -> list[Value]:
        """Addresses of `rows` of the tile's rows; past the tile's end, of its last row.

        What is computed from a repeated row is equal to what the last row gives, and is not used.
        """
        body = self.body
        return [matrix.row(body, self._clipped(body.add(row, i))) for i in range(rows)]

    def inside(self, row: Value) -> Value:
        """The traversed index of a row of the tile; past the tile's end, of its last row."""
        return self.body.add(self.first, self._clipped(row), "inside")

    def _clipped(self, row: Value) -> Value:
        return self.body.minimum(row, self.body.sub(self.count, 1))

    def scores(self, factors: Sequence[Factor[Matrix]], contraction: Value, use: Scores) -> None:
        """`use(first row, block)` for each register block of the sum of left x right.

        The left sides hold the tile's rows, the right sides `contraction` rows in scratch.
        """
        body, shape = self.body, self.shape
        with body.loop("r", 0, self.count, shape.rows) as row:
            block = None
            for factor in factors:
                left = self.rows_of(factor.left, row, shape.rows)
                step = factor.left.d_stride
                block = self._multiply(factor, left, step, contraction, shape.rows, block)
            assert block is not None
            use(row, block)

    def _multiply(
        self,
        factor: Factor[Matrix],
        left: list[Value],
        step: Operand,
        contraction: Value,
        rows: int,
        total: microkernel.Accumulators | None,
    ) -> microkernel.Accumulators:
        """One left x right, added to `total` where there is one."""
        body, shape = self.body, self.shape
        start = microkernel.zeros(body, shape) if total is None else lambda i, j: total[i][j]
        right, width = factor.right, shape.width
        return microkernel.multiply(body, shape, rows, left, step, right, width, contraction, start)

    def allowed_rows(self, mask: MaskText, row: Value) -> list[tuple[Value, ...]]:
        """The rule's truths for one block of rows, repeated past the end like the rows."""
        rows = range(self.shape.rows)
        return [mask.row(self.inside(self.body.add(row, i))) for i in rows]

    def accumulate(
        self,
        factors: Sequence[Factor[Matrix]],
        contraction: Value,
        total: Value,
        dim: int,
        scales: list[Value] | None = None,
    ) -> None:
        """total (dim x lanes) <- scales * total + the sum of left^T (dim x rows) x right."""
        body, shape = self.body, self.shape

        def tile(first: Operand, rows: int) -> None:
            block: microkernel.Accumulators = []
            for i in range(rows):
                places = [self.at(total, body.add(first, i), j) for j in range(shape.vectors)]
                block.append([body.load(place, shape.vector, "total") for place in places])
            if scales is not None:
                block = [
                    [body.binary("fmul", old, by) for old, by in zip(line, scales, strict=True)]
                    for line in block
                ]
            for factor in factors:
                matrix = factor.left
                left = [matrix.at(body, matrix.address, body.add(first, i)) for i in range(rows)]
                block = self._multiply(factor, left, matrix.row_stride, contraction, rows, block)
            for i, line in enumerate(block):
                for j, value in enumerate(line):
                    body.store(value, self.at(total, body.add(first, i), j))

        microkernel.row_tiles(body, dim, shape.rows, tile, "d")

    def accumulate_visible(
        self,
        matrix: Matrix,
        weights: Value,
        marks: Value,
        total: Value,
        dim: int,
        scales: list[Value] | None = None,
    ) -> None:
        """As `accumulate`, but leaves out the pairs whose entry in `marks` is a forbidden weight.

        0 * NaN is NaN, so a forbidden row of `matrix` with a NaN must not be multiplied at all.
        This is for tiles that hold such elements: one row of d at a time, slow and rare.
        """
        body, shape = self.body, self.shape
        with body.loop("d", 0, dim) as d:
            places = []
            for j in range(shape.vectors):
                old = body.load(self.at(total, d, j), shape.vector, "total")
                scaled = old if scales is None else body.binary("fmul", old, scales[j])
                places.append(body.variable(shape.vector, scaled, "acc"))
            with body.loop("c", 0, self.count) as c:
                number = matrix.storage.load(body, matrix.at(body, matrix.row(body, c), d))
                wide = body.splat(number, shape.lanes)
                for j, place in enumerate(places):
                    weight = body.load(self.at(weights, c, j), shape.vector)
                    mark = body.load(self.at(marks, c, j), shape.vector)
                    old = body.read(place)
                    new = body.multiply_add(wide, weight, old)
                    body.write(place, body.select(self.marked(mark, "weight"), old, new))
            for j, place in enumerate(places):
                body.store(body.read(place), self.at(total, d, j))

    def finite(self, matrix: Matrix, dim: int) -> Value:
        """True if every element of the tile's rows of `matrix` is finite: 0 * x summed stays 0.

        Reads along whichever axis is contiguous, a vector at a time: about 1 % of a tile's work.
        """
        body = self.body
        total = body.variable("i1", Value("true", "i1"), "finite")
        one = Value("1", "i64")
        contiguous_rows = body.compare("eq", matrix.row_stride, one)
        with body.choose(contiguous_rows, "scan") as branch:
            self._scan(matrix, total, Value(str(dim), "i64"), self.count, True)
            branch.otherwise()
            self._scan(matrix, total, self.count, Value(str(dim), "i64"), False)
        return body.read(total)

    def _scan(
        self, matrix: Matrix, total: Variable, outer: Value, inner: Value, along_rows: bool
    ) -> None:
        """Fold finiteness over outer x inner; vectors along `inner` where its stride is 1."""
        body, shape = self.body, self.shape
        outer_stride = matrix.d_stride if along_rows else matrix.row_stride
        inner_stride = matrix.row_stride if along_rows else matrix.d_stride
        zero = body.constant(0.0, shape.vector)
        wide_total = body.variable(shape.vector, zero, "zeros")
        unit = body.compare("eq", inner_stride, Value("1", "i64"))
        whole = body.sub(inner, body.binary("urem", inner, shape.lanes))
        vectors_end = body.select(unit, whole, Value("0", "i64"))
        scalar_total = body.variable(shape.scalar, body.constant(0.0, shape.scalar), "zero")
        with body.loop("o", 0, outer) as o:
            line = matrix.storage.at(body, matrix.address, body.mul(o, outer_stride))
            with body.loop("i", 0, vectors_end, shape.lanes) as i:
                numbers = matrix.storage.load(body, matrix.storage.at(body, line, i), shape.lanes)
                folded = body.multiply_add(numbers, zero, body.read(wide_total))
                body.write(wide_total, folded)
            with body.loop("i", vectors_end, inner) as i:
                at = matrix.storage.at(body, line, body.mul(i, inner_stride))
                number = matrix.storage.load(body, at)
                zero_scalar = body.constant(0.0, shape.scalar)
                folded = body.multiply_add(number, zero_scalar, body.read(scalar_total))
                body.write(scalar_total, folded)
        lanes_total = body.read(wide_total)
        bad = body.compare("uno", lanes_total, lanes_total)
        any_lane = body.call(f"llvm.vector.reduce.or.{overload(bad.type)}", "i1", [bad], "bad")
        number = body.read(scalar_total)
        bad_number = body.compare("uno", number, number)
        none = body.binary("xor", body.binary("or", any_lane, bad_number), Value("true", "i1"))
        body.write(total, none)
