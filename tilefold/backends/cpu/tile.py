"""One tile of a pass: the steps that forward, dQ and dK/dV share.

The rows of a tile are `count` rows of the traversed axis, its lanes the parallel block. Scores and
weights of the tile lie in scratch, row by row.

Pairs that the rule forbids carry markers, so that no later step asks the rule again and nothing
leaks from them: a score becomes a signalling NaN, which arithmetic never returns, and a weight
becomes -0.0, which no exponential is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tilefold.backends.cpu import gemm
from tilefold.backends.cpu.ir import Body, Operand, Value, Variable, overload, vector
from tilefold.backends.cpu.mask import MaskText
from tilefold.backends.cpu.softmax import FORMATS

_SIGNALLING_NAN = {"float": 0x7FA00000, "double": 0x7FF4000000000000}


@dataclass(frozen=True)
class Matrix:
    """An operand of one head: the address of its first row, and its strides in elements."""

    address: Value
    row_stride: Value
    d_stride: Value


@dataclass(frozen=True)
class Tile:
    """The frame of one tile: where it is and in which shape of registers it is computed."""

    body: Body
    shape: gemm.Shape
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

    def rows_of(self, matrix: Matrix, row: Value, rows: int) -> list[Value]:
        """Addresses of `rows` rows of the traversed side; past the tile's end, of its last row.

        What is computed from a repeated row is equal to what the last row gives, and is not used.
        """
        body = self.body
        addresses = []
        for i in range(rows):
            index = body.mul(self.inside(body.add(row, i)), matrix.row_stride)
            addresses.append(body.offset(matrix.address, self.shape.scalar, index, "row"))
        return addresses

    def inside(self, row: Value) -> Value:
        """The traversed index of a row of the tile; past the tile's end, of its last row."""
        body = self.body
        return body.add(self.first, body.minimum(row, body.sub(self.count, 1)), "inside")

    def scores(
        self,
        matrix: Matrix,
        packed: Value,
        dim: int,
        use: Callable[[Value, gemm.Accumulators], None],
    ) -> None:
        """`use(first row, block)` for each register block of matrix x packed (dim x lanes)."""
        body, shape = self.body, self.shape
        with body.loop("r", 0, self.count, shape.rows) as row:
            block = gemm.multiply(
                body,
                shape,
                shape.rows,
                self.rows_of(matrix, row, shape.rows),
                matrix.d_stride,
                packed,
                shape.width,
                dim,
                gemm.zeros(body, shape),
            )
            use(row, block)

    def allowed_rows(self, mask: MaskText, row: Value) -> list[tuple[Value, ...]]:
        """The rule's truths for one block of rows, repeated past the end like the rows."""
        rows = range(self.shape.rows)
        return [mask.row(self.inside(self.body.add(row, i))) for i in rows]

    def accumulate(
        self,
        matrix: Matrix,
        weights: Value,
        total: Value,
        dim: int,
        factors: list[Value] | None = None,
    ) -> None:
        """total (dim x lanes) <- factors * total + matrix^T (dim x count) x weights."""
        body, shape = self.body, self.shape
        start = body.mul(self.first, matrix.row_stride)
        corner = body.offset(matrix.address, shape.scalar, start, "corner")

        def tile(first: Operand, rows: int) -> None:
            left = [
                body.offset(corner, shape.scalar, body.mul(body.add(first, i), matrix.d_stride))
                for i in range(rows)
            ]

            def begin(i: int, j: int) -> Value:
                old = body.load(self.at(total, body.add(first, i), j), shape.vector, "total")
                return old if factors is None else body.binary("fmul", old, factors[j])

            block = gemm.multiply(
                body, shape, rows, left, matrix.row_stride, weights, shape.width, self.count, begin
            )
            for i, line in enumerate(block):
                for j, value in enumerate(line):
                    body.store(value, self.at(total, body.add(first, i), j))

        gemm.row_tiles(body, dim, shape.rows, tile, "d")

    def accumulate_visible(
        self,
        matrix: Matrix,
        weights: Value,
        marks: Value,
        total: Value,
        dim: int,
        factors: list[Value] | None = None,
    ) -> None:
        """As `accumulate`, but leaves out the pairs whose entry in `marks` is a forbidden weight.

        0 * NaN is NaN, so a forbidden row of `matrix` with a NaN must not be multiplied at all.
        This is for tiles that hold such numbers: one row of d at a time, slow and rare.
        """
        body, shape = self.body, self.shape
        with body.loop("d", 0, dim) as d:
            places = []
            for j in range(shape.vectors):
                old = body.load(self.at(total, d, j), shape.vector, "total")
                scaled = old if factors is None else body.binary("fmul", old, factors[j])
                places.append(body.variable(shape.vector, scaled, "acc"))
            with body.loop("c", 0, self.count) as c:
                index = body.add(
                    body.mul(body.add(self.first, c), matrix.row_stride),
                    body.mul(d, matrix.d_stride),
                )
                number = body.load(body.offset(matrix.address, shape.scalar, index), shape.scalar)
                wide = body.splat(number, shape.lanes)
                for j, place in enumerate(places):
                    weight = body.load(self.at(weights, c, j), shape.vector)
                    mark = body.load(self.at(marks, c, j), shape.vector)
                    old = body.read(place)
                    new = body.multiply_add(wide, weight, old)
                    body.write(place, body.select(self.marked(mark, "weight"), old, new))
            for j, place in enumerate(places):
                body.store(body.read(place), self.at(total, d, j))

    def accumulate_safely(
        self,
        masked: bool,
        matrix: Matrix,
        weights: Value,
        marks: Value,
        total: Value,
        dim: int,
        factors: list[Value] | None = None,
    ) -> None:
        """`accumulate`, or in a partial tile that holds infinities or NaN, `accumulate_visible`."""
        if not masked:
            self.accumulate(matrix, weights, total, dim, factors)
            return
        with self.body.choose(self.finite(matrix, dim), "finite") as branch:
            self.accumulate(matrix, weights, total, dim, factors)
            branch.otherwise()
            self.accumulate_visible(matrix, weights, marks, total, dim, factors)

    def finite(self, matrix: Matrix, dim: int) -> Value:
        """Whether every number of the tile's rows of `matrix` is finite: 0 * x summed stays 0.

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
        start = body.mul(self.first, matrix.row_stride)
        corner = body.offset(matrix.address, shape.scalar, start)
        outer_stride = matrix.d_stride if along_rows else matrix.row_stride
        inner_stride = matrix.row_stride if along_rows else matrix.d_stride
        zero = body.constant(0.0, shape.vector)
        wide_total = body.variable(shape.vector, zero, "zeros")
        unit = body.compare("eq", inner_stride, Value("1", "i64"))
        whole = body.sub(inner, body.binary("urem", inner, shape.lanes))
        vectors_end = body.select(unit, whole, Value("0", "i64"))
        scalar_total = body.variable(shape.scalar, body.constant(0.0, shape.scalar), "zero")
        with body.loop("o", 0, outer) as o:
            line = body.offset(corner, shape.scalar, body.mul(o, outer_stride))
            with body.loop("i", 0, vectors_end, shape.lanes) as i:
                numbers = body.load(body.offset(line, shape.scalar, i), shape.vector)
                folded = body.multiply_add(numbers, zero, body.read(wide_total))
                body.write(wide_total, folded)
            with body.loop("i", vectors_end, inner) as i:
                at = body.offset(line, shape.scalar, body.mul(i, inner_stride))
                number = body.load(at, shape.scalar)
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
