"""Products of bfloat16 pairs, in vectors or on AMX tiles, and which products a kernel has."""

from __future__ import annotations

from collections.abc import Sequence

from tilefold.backends.cpu.kernels import amx, microkernel, pairs
from tilefold.backends.cpu.kernels.block import Block
from tilefold.backends.cpu.kernels.ir import Operand, Value, Variable, overload
from tilefold.backends.cpu.kernels.multiply import Products, Right, Sides, factors_of
from tilefold.backends.cpu.kernels.softmax import EXP2_COARSE
from tilefold.backends.cpu.kernels.storage import storage
from tilefold.backends.cpu.kernels.tile import Matrix, Scores, Tile, padded


def products(block: Block) -> Products:
    """The products of a kernel, by its spec's unit."""
    kind = {"fma": Products, "dot": _PairProducts, "amx": _TileProducts}[block.spec.multiplier.unit]
    return kind(block)


class _PairProducts(Products):
    """Products of bfloat16 pairs: two numbers of the contraction in one step.

    The instruction takes denormal numbers for 0, and sums below the normal ones become 0.
    """

    step = 2

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self._unit = self.spec.multiplier.step
        self._parts = self.spec.multiplier.parts
        if self._parts == 1:
            self.exp2_terms = EXP2_COARSE

    def pack(self, name: str, dim: int, factor: Value | None = None) -> Right:
        body, block = self.body, self.block
        one = block.scalar(1.0)
        staging = block.pack(name, dim, one if factor is None else factor, "staging")
        rows = padded(dim, self._unit)
        for row in range(dim, rows):
            for j in range(self.shape.vectors):
                body.store(block.splat(0.0), block.at(staging, row, j))
        function = pairs.interleave(body.module, self.shape, self._parts)
        part = rows // 2 * self.shape.width
        right = block.region(name)
        body.invoke(function, [right, staging, *_integers(rows // 2, part)])
        return Right(self._in_parts(right, part))

    def sides(
        self, tile: Tile, matrix: Matrix, region: str, dim: int, *, rows: bool, columns: bool
    ) -> Sides:
        matrix = tile.of(matrix)
        return Sides(
            self._rows(tile, matrix, self.block.region(region), dim) if rows else (),
            self._columns(tile, matrix, region, dim) if columns else (),
        )

    def _rows(self, tile: Tile, matrix: Matrix, scratch: Value, dim: int) -> tuple[Matrix, ...]:
        """Lines along d: in scratch, or where they lie as such and no step reads past an end."""
        body = self.body
        line = padded(dim, self.shape.width)
        part = line * padded(self.spec.block_traverse, self._unit)
        direct = self._holds_lines(matrix, matrix.d_stride, dim)
        with body.when(body.binary("xor", direct, Value("true", "i1")), "copy"):
            strides = (matrix.row_stride, matrix.d_stride)
            self._copy(matrix, scratch, (tile.count, _integer(dim)), strides, line, part)
        address = body.select(direct, matrix.address, scratch, "left")
        stride = body.select(direct, matrix.row_stride, Value(str(line), "i64"), "line")
        return self._in_lines(address, stride, Value("2", "i64"), part)

    def _columns(self, tile: Tile, matrix: Matrix, region: str, dim: int) -> tuple[Matrix, ...]:
        """Lines along the rows, or words of two rows: where they lie, else the shortest way."""
        body = self.body
        scratch = self.block.region(f"{region}_columns")
        line = padded(self.spec.block_traverse, self.shape.width)
        part = line * padded(dim, self._unit)
        two = Value("2", "i64")
        address = body.variable("ptr", scratch, "left")
        d_stride = body.variable("i64", Value(str(line), "i64"), "line")
        step = body.variable("i64", two, "step")
        direct = self._holds_lines(matrix, matrix.row_stride, dim if self._unit > 2 else 0)
        direct = body.binary("and", direct, self._whole(tile.count))
        with body.choose(direct, "direct") as branch:
            body.write(address, matrix.address)
            body.write(d_stride, matrix.d_stride)
            branch.otherwise()
            with body.choose(self._can_zip(tile, matrix), "contiguous") as short:
                self._zip(tile, matrix, scratch, dim, line, part, d_stride, step)
                short.otherwise()
                strides = (matrix.d_stride, matrix.row_stride)
                self._copy(matrix, scratch, (_integer(dim), tile.count), strides, line, part)
        return self._in_lines(body.read(address), body.read(step), body.read(d_stride), part)

    def _can_zip(self, tile: Tile, matrix: Matrix) -> Value:
        """True if the words of two rows are made from whole rows; for pairs, from bfloat16 ones."""
        body = self.body
        if self._unit == 2 and not matrix.storage.pairs:
            return Value("false", "i1")
        contiguous = body.compare("eq", matrix.d_stride, Value("1", "i64"))
        if self._unit == 2:
            return contiguous
        return body.binary("and", contiguous, self._whole(tile.count))

    def _zip(
        self,
        tile: Tile,
        matrix: Matrix,
        scratch: Value,
        dim: int,
        line: int,
        part: int,
        d_stride: Variable,
        step: Variable,
    ) -> None:
        """Pairs take words in any order of their axes, tiles of AMX take lines."""
        body = self.body
        if self._unit > 2:
            function = pairs.turn(body.module, matrix.storage, self._parts, dim)
            place = [scratch, matrix.address, tile.count, matrix.row_stride]
            body.invoke(function, [*place, *_integers(line, part)])
            return
        place = [scratch, matrix.address, tile.count, *_integers(dim), matrix.row_stride]
        words = padded(dim, pairs.LANES)
        body.invoke(pairs.zip_rows(body.module), [*place, *_integers(words)])
        body.write(d_stride, Value("2", "i64"))
        body.write(step, Value(str(2 * words), "i64"))

    def _copy(
        self,
        matrix: Matrix,
        scratch: Value,
        sizes: tuple[Value, Value],
        strides: tuple[Value, Value],
        line: int,
        part: int,
    ) -> None:
        """Lines in scratch of any array; sizes and strides are of the lines, then along them."""
        body = self.body
        function = pairs.lines(body.module, self.shape, matrix.storage, self._parts)
        pointers = [scratch, matrix.address, self.block.region("staging")]
        body.invoke(function, [*pointers, *sizes, *strides, *_integers(line, part)])

    def _in_lines(
        self, address: Value, row_stride: Value, d_stride: Value, part: int
    ) -> tuple[Matrix, ...]:
        places = [address]
        places += [self.body.offset(address, "i16", part * i) for i in range(1, self._parts)]
        lines = storage("bfloat16")
        return tuple(Matrix(place, row_stride, d_stride, lines) for place in places)

    def _holds_lines(self, matrix: Matrix, stride: Value, size: int) -> Value:
        """True if an array of bfloat16 is contiguous along an axis of whole steps."""
        if self._parts > 1 or not matrix.storage.pairs or size % self._unit:
            return Value("false", "i1")
        return self.body.compare("eq", stride, Value("1", "i64"))

    def _whole(self, count: Value) -> Value:
        """True if a number of rows is a whole number of steps."""
        rest = self.body.binary("and", count, self._unit - 1)
        return self.body.compare("eq", rest, Value("0", "i64"))

    def scores(
        self, tile: Tile, left: Sequence[Matrix], right: Right, dim: int, use: Scores
    ) -> None:
        words = Value(str(padded(dim, 2) // 2), "i64")
        tile.scores(factors_of(left, right), words, use)

    def pad(self, tile: Tile, scores: Value) -> None:
        body = self.body
        with body.when(self._odd(tile), "odd"):
            for j in range(self.shape.vectors):
                body.store(self.block.splat(float("-inf")), tile.at(scores, tile.count, j))

    def _odd(self, tile: Tile) -> Value:
        """True if the last row has no other to make words with."""
        rest = self.body.binary("and", tile.count, 1)
        return self.body.compare("ne", rest, Value("0", "i64"))

    def keep(
        self, tile: Tile, region: str, row: Value, lines: microkernel.Accumulators, masked: bool
    ) -> None:
        if masked:
            super().keep(tile, region, row, lines, masked)
        body = self.body
        finite = region == "p"  # weights do not exceed 2^slack
        target = self.block.region(f"{region}_pairs")
        part = Value(str(self._words_of_weights), "i64")
        half = body.binary("lshr", row, 1)
        for i in range(0, len(lines), 2):
            for j, (first, second) in enumerate(zip(lines[i], lines[i + 1], strict=True)):
                place = tile.at(target, body.add(half, i // 2), j)
                pairs.store_words(body, place, part, first, second, self._parts, finite=finite)

    def kept(self, tile: Tile, region: str) -> Right:
        """Rows past the tile's end, up to a whole step, become 0 here."""
        body = self.body
        right = self._in_parts(self.block.region(f"{region}_pairs"), self._words_of_weights)
        odd = self._odd(tile)
        words = body.binary("lshr", tile.count, 1)
        for part in right:
            with body.when(odd, "odd"):
                for j in range(self.shape.vectors):
                    place = tile.at(part, words, j)
                    word = body.load(place, f"<{pairs.LANES} x i32>")
                    body.store(body.binary("and", word, 0xFFFF), place)
            if self._unit > 2:
                whole = body.add(tile.count, self._unit - 1)
                end = body.mul(body.binary("lshr", whole, self._unit.bit_length() - 1), 16)
                first = body.binary("lshr", body.add(tile.count, 1), 1)
                with body.loop("rest", first, end) as row:
                    for j in range(self.shape.vectors):
                        body.store(self.block.splat(0.0), tile.at(part, row, j))
        return Right(right)

    def accumulate(
        self,
        tile: Tile,
        left: Sequence[Matrix],
        right: Right,
        total: Value,
        dim: int,
        scales: list[Value] | None = None,
    ) -> None:
        words = self.body.binary("lshr", self.body.add(tile.count, 1), 1)
        tile.accumulate(factors_of(left, right), words, total, dim, scales)

    @property
    def _words_of_weights(self) -> int:
        """Words of one part of a tile's weights."""
        return padded(self.spec.block_traverse, self._unit) // 2 * self.shape.width

    def _in_parts(self, right: Value, words: int) -> tuple[Value, ...]:
        return tuple(self.body.offset(right, "i32", words * part) for part in range(self._parts))


class _TileProducts(_PairProducts):
    """Products of bfloat16 pairs on AMX tiles.

    Sums lie in memory between two tiles, so to rescale them is a pass of its own, left out where no
    factor differs from 1. In two parts m has slack, so that few tiles need it: forward, float16,
    1 x 8 x 2048 tokens, Granite Rapids, took 8 % less time (dim 64) and 14 % less (dim 128), best
    of three runs each on a busy machine. In one part slack would save 5 % and 3 %. But without it
    the largest weight of a row is 1, which rounding leaves as it is: with slack the errors of O
    were 2.7 % larger, and above the errors of torch.
    """

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        if self._parts > 1:
            self.slack = 8.0

    def _rows(self, tile: Tile, matrix: Matrix, scratch: Value, dim: int) -> tuple[Matrix, ...]:
        """Lines along d, of which steps read whole rows too. A copy of contiguous ones is close."""
        body = self.body
        line = padded(dim, self.shape.width)
        part = line * padded(self.spec.block_traverse, self._unit)
        address = body.variable("ptr", scratch, "left")
        stride = body.variable("i64", _integer(line), "line")
        direct = self._holds_lines(matrix, matrix.d_stride, dim)
        direct = body.binary("and", direct, self._whole(tile.count))
        with body.choose(direct, "direct") as branch:
            body.write(address, matrix.address)
            body.write(stride, matrix.row_stride)
            branch.otherwise()
            contiguous = body.compare("eq", matrix.d_stride, Value("1", "i64"))
            with body.choose(contiguous, "contiguous") as short:
                close = _integer(padded(dim, self._unit))
                function = pairs.along(body.module, matrix.storage, self._parts, dim)
                place = [scratch, matrix.address, tile.count, matrix.row_stride]
                body.invoke(function, [*place, close, _integer(part)])
                body.write(stride, close)
                short.otherwise()
                strides = (matrix.row_stride, matrix.d_stride)
                self._copy(matrix, scratch, (tile.count, _integer(dim)), strides, line, part)
        return self._in_lines(body.read(address), body.read(stride), Value("2", "i64"), part)

    def scores(
        self, tile: Tile, left: Sequence[Matrix], right: Right, dim: int, use: Scores
    ) -> None:
        body, shape = self.body, self.shape
        staging = self.block.region("staging")
        depth = Value(str(padded(dim, amx.DEPTH) // amx.DEPTH), "i64")
        with body.loop("r", 0, tile.count, 2 * amx.ROWS) as first:
            lines = [amx.Lines(matrix.row(body, first), matrix.row_stride) for matrix in left]
            amx.panel(body, shape, factors_of(lines, right), depth, staging, 2, start=None)
            last = body.minimum(body.sub(tile.count, first), 2 * amx.ROWS)
            with body.loop("i", 0, last, shape.rows) as i:
                block = []
                for k in range(shape.rows):  # past the end the last row again, as `rows_of` does
                    row = body.minimum(body.add(i, k), body.sub(last, 1))
                    places = [tile.at(staging, row, j) for j in range(shape.vectors)]
                    block.append([body.load(place, shape.vector, "s") for place in places])
                use(body.add(first, i), block)

    def accumulate(
        self,
        tile: Tile,
        left: Sequence[Matrix],
        right: Right,
        total: Value,
        dim: int,
        scales: list[Value] | None = None,
    ) -> None:
        body, shape = self.body, self.shape
        if scales is not None:
            self._rescale(tile, total, dim, scales)
        depth = body.binary("lshr", body.add(tile.count, amx.DEPTH - 1), 5)

        def panel(first: Operand, rows: int) -> None:
            lines = [
                amx.Lines(matrix.at(body, matrix.address, first), matrix.d_stride)
                for matrix in left
            ]
            target = tile.at(total, first, 0)
            amx.panel(
                body, shape, factors_of(lines, right), depth, target, rows // 16, start=target
            )

        microkernel.row_tiles(body, padded(dim, amx.ROWS), 2 * amx.ROWS, panel, "d")

    def _rescale(self, tile: Tile, total: Value, dim: int, scales: list[Value]) -> None:
        body, shape = self.body, self.shape
        one = self.block.splat(1.0)
        change = body.compare("une", scales[0], one)
        for scale in scales[1:]:
            change = body.binary("or", change, body.compare("une", scale, one))
        name = f"llvm.vector.reduce.or.{overload(change.type)}"
        with (
            body.when(body.call(name, "i1", [change], "change"), "rescale"),
            body.loop("d", 0, dim) as d,
        ):
            for j, scale in enumerate(scales):
                place = tile.at(total, d, j)
                old = body.load(place, shape.vector, "total")
                body.store(body.binary("fmul", old, scale), place)


def _integers(*numbers: int) -> list[Value]:
    return [_integer(number) for number in numbers]


def _integer(number: int) -> Value:
    return Value(str(number), "i64")
