"""The fused backward kernel: owners of keys make dQ, dK and dV from the same P and dS.

    for each owner, of some block rows of one key head:
        its part of dQ <- 0
        for each of its blocks of keys, each query head of the group, each tile of queries:
            P, dS as in `backward`;  dV^T += dO^T P;  dK^T += Q^T dS
            its part of dQ += dS (scale K)               rows are queries, the dim in the lanes
    for each block of queries:  dQ <- the parts in their order

Five products per pair where the split form takes seven. With one owner per key head its part is dQ
itself, where rows of dQ are contiguous: then there is no second kernel and no memory for parts. Or
one worker makes the parts of a head in turn, with the same bits: see `partitions.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from tilefold.backends.cpu.kernels import amx, masked, microkernel, pairs
from tilefold.backends.cpu.kernels.backward import KeyGradients, StatisticsOf
from tilefold.backends.cpu.kernels.block import emit
from tilefold.backends.cpu.kernels.ir import Operand, Value, Variable, vector
from tilefold.backends.cpu.kernels.multiply import Right, factors_of
from tilefold.backends.cpu.kernels.reduce import of_owner
from tilefold.backends.cpu.kernels.tile import Matrix, Tile, padded
from tilefold.backends.cpu.partitions import FIRST_QUERY, FIRST_ROW, LAST_QUERY, LAST_ROW, PART
from tilefold.backends.cpu.spec import KernelSpec
from tilefold.masks.expression import Truth


def fused(spec: KernelSpec) -> str:
    """The source of the kernel that makes parts of dQ, or all of it."""
    title = """
for each owner of blocks of keys:
    its dQ <- 0
    for each of its blocks, each query head of the group, each tile of queries:
        S <- Q K^T;  P <- 2^((S - m) c + r)              rows are queries, lanes are keys
        dP <- dO V^T;  dS <- P (dP - delta)
        dV^T += dO^T P;  dK^T += Q^T dS;  dQ += dS (scale K)
    dK <- scale dK"""
    kinds = {"fma": _AllGradients, "dot": _PairGradients, "amx": _TileGradients}
    return emit(spec, title.strip(), lambda block: kinds[spec.multiplier.unit](block).write())


class _AllGradients(KeyGradients):
    """The blocks of keys of one owner, and its part of the dQ of their query heads."""

    def write(self) -> None:
        if self.spec.in_turn:
            self._write_in_turn()
            return
        self._take_part(self.block.row)
        self.body.comment("dQ <- 0")
        with self._heads() as h:
            self.dq = self._part(h)
            with self.body.loop("q", self.first_query, self.last_query) as q:
                self._zero_dq(q)
        self._write_blocks()

    def _write_in_turn(self) -> None:
        """The first part of a head is made where its sum is, others in scratch, then added."""
        body, arguments = self.body, self.block.arguments
        body.stage("results")
        body.comment("dQ <- 0")
        with self._heads() as h:
            self.dq = self.block.matrix("dq_parts", h)
            with body.loop("q", 0, arguments["len_q"]) as q:
                self._zero_dq(q)
        clean = body.variable("i64", Value("0", "i64"), "clean")
        with body.loop("part", 0, arguments["block_rows"]) as number:
            self._take_part(number)
            self.height = body.sub(self.last_query, self.first_query)
            self.later = body.compare("ne", number, Value("0", "i64"), "later")
            with body.when(self.later, "reset"):
                self._reset(clean)
            self._write_blocks()
            body.stage("results")
            body.comment("dQ += its part")
            with (
                body.when(self.later, "add"),
                self._heads() as h,
                body.loop("q", self.first_query, self.last_query) as q,
            ):
                self._add_part(h, q)

    def _reset(self, clean: Variable) -> None:
        """Set the rows of scratch to zero that no part before has used: `clean` ones are zero."""
        body, before = self.body, self.body.read(clean)
        rows = body.mul(self.block.arguments["group"], self.height)
        self.dq = self._scratch(Value("0", "i64"))
        with body.loop("row", before, rows) as row:
            self._zero_dq(row)
        body.write(clean, body.select(body.compare("sgt", rows, before), rows, before))

    def _add_part(self, h: Value, query: Value) -> None:
        """Add one row of the part to its row of the sum, and set it to zero."""

        def add(d: Operand, vectors: int) -> None:
            self.dq = self._scratch(self._skipped(h))
            source = self._dq_at(query, d)
            self.dq = self.block.matrix("dq_parts", h)
            target = self._dq_at(query, d)
            for j in range(vectors):
                old, more = self._load_dq(target, d, j), self._load_dq(source, d, j)
                self._store_dq(self.body.binary("fadd", old, more), target, d, j)
                self._store_dq(self.block.splat(0.0), source, d, j)

        self._columns(add)

    @contextmanager
    def _heads(self) -> Iterator[Value]:
        """The query heads of the key head."""
        body, group = self.body, self.block.arguments["group"]
        with body.loop("g", 0, group) as g:
            yield body.add(body.mul(self.block.h, group), g)

    def _take_part(self, number: Value) -> None:
        """Read what a part has."""
        self.first_row, self.last_row, self.first_query, self.last_query, self.part = (
            of_owner(self.block, number, column)
            for column in (FIRST_ROW, LAST_ROW, FIRST_QUERY, LAST_QUERY, PART)
        )

    def _write_blocks(self) -> None:
        """dK and dV of the blocks of keys of a part, and their dQ."""
        with self.body.loop("keys", self.first_row, self.last_row) as row:
            self.block.at_row(row)
            self.body.stage("packing")
            self.k_rows, self.k_finite = self._copy_keys()
            KeyGradients.write(self)

    def take_head(self, h: Value) -> None:
        super().take_head(h)
        self.dq = self._part(h)

    def _part(self, h: Value) -> Matrix:
        """This part of dQ of one query head, as if it began with the row of query 0."""
        body, parts = self.body, self.block.matrix("dq_parts", h)
        if not self.spec.in_turn:
            return replace(parts, address=parts.row(body, self.part))
        apart = self._scratch(self._skipped(h))
        address = body.select(self.later, apart.address, parts.address, "dq")
        stride = body.select(self.later, apart.row_stride, parts.row_stride, "dq.step")
        return replace(parts, address=address, row_stride=stride)

    def _skipped(self, h: Value) -> Value:
        """How many rows of scratch lie before query 0 of a head."""
        body = self.body
        g = body.sub(h, body.mul(self.block.h, self.block.arguments["group"]))
        return body.sub(body.mul(g, self.height), self.first_query)

    def _scratch(self, skipped: Value) -> Matrix:
        """Rows of scratch, of one part after the other, from a row on."""
        block = self.block
        line, one = (Value(str(number), "i64") for number in (self._line, 1))
        rows = Matrix(block.beyond, line, one, block.storage("dq_parts"))
        return replace(rows, address=rows.row(self.body, skipped))

    def tile(self, first: Value, count: Value, masked: bool) -> None:
        super().tile(first, count, masked)
        body = self.body
        tile = Tile(body, self.shape, first, count)
        body.comment("dQ += dS (scale K)")
        if not masked:
            self._add_dq(tile)
            return
        with body.choose(body.read(self.k_finite), "finite") as branch:
            self._add_dq(tile)
            branch.otherwise()
            self._add_visible_dq(tile)

    @property
    def _line(self) -> int:
        """Elements of one row of `k_rows`: dim in whole vectors."""
        return self.spec.whole(self.spec.dim)

    def _zero_dq(self, query: Value) -> None:
        """Set one row of the part to zero."""

        def zero(d: Operand, vectors: int) -> None:
            row = self._dq_at(query, d)
            for j in range(vectors):
                self._store_dq(self.block.splat(0.0), row, d, j)

        self._columns(zero)

    def _columns(self, use: Callable[[Operand, int], None]) -> None:
        """`use(d, vectors)` along a row of dQ: the vectors of a register tile, then the rest."""
        whole = self.spec.dim - self.spec.dim % self.shape.width
        if whole:
            with self.body.loop("d", 0, whole, self.shape.width) as d:
                use(d, self.shape.vectors)
        if self.spec.dim > whole:
            use(whole, -(-(self.spec.dim - whole) // self.shape.lanes))

    def key_factor(self) -> Value:
        """The factor of the copy of K beside `power`, so that dQ needs none."""
        return self.block.scale.rest

    def ds_factor(self) -> Value:
        """The factor that dS still lacks."""
        return self.block.scalar(1.0)

    def _copy_keys(self) -> tuple[Value, Variable]:
        """scale K of the block, row by row in whole vectors; and whether K is finite there."""
        body, block, scalar = self.body, self.block, self.shape.scalar
        region = block.region("k_rows")
        keys = block.matrix("k", block.h)
        power, factor = block.scale.power, self.key_factor()
        with body.loop("key", 0, block.valid) as key:
            source = keys.row(body, body.add(block.first, key))
            target = body.offset(region, scalar, body.mul(key, self._line))
            with body.loop("d", 0, self.spec.dim) as d:
                number = keys.storage.load(body, keys.at(body, source, d))
                scaled = body.binary("fmul", body.binary("fmul", number, power), factor)
                body.store(scaled, body.offset(target, scalar, d))
            with body.loop("d", self.spec.dim, self._line) as d:
                body.store(block.scalar(0.0), body.offset(target, scalar, d))
        finite = body.variable("i1", Value("true", "i1"), "k.finite")
        if self.spec.hides or not isinstance(self.spec.mask.expression, Truth):
            whole = Tile(body, self.shape, block.first, block.valid)
            body.write(finite, whole.finite(whole.of(keys), self.spec.dim))
        return region, finite

    def _add_dq(self, tile: Tile) -> None:
        """dq rows += dS rows x k_rows: rows of queries broadcast, the head dim in the lanes."""
        body, rows = self.body, self.shape.rows
        whole_rows = body.sub(tile.count, body.binary("urem", tile.count, rows))
        for start, stop, height in ((0, whole_rows, rows), (whole_rows, tile.count, 1)):
            with body.loop("q", start, stop, height) as row:
                self._columns(partial(self._add_dq_tile, tile, row, height))

    def _add_dq_tile(self, tile: Tile, row: Value, height: int, d: Operand, vectors: int) -> None:
        body = self.body
        shape = replace(self.shape, rows=height, vectors=vectors)
        targets = [self._dq_at(body.add(tile.first, body.add(row, i)), d) for i in range(height)]
        totals = self._multiply(shape, row, d, lambda i, j: self._load_dq(targets[i], d, j))
        for target, line in zip(targets, totals, strict=True):
            for j, total in enumerate(line):
                self._store_dq(total, target, d, j)

    def _multiply(
        self, shape: microkernel.Shape, row: Value, d: Operand, start: Callable[[int, int], Value]
    ) -> microkernel.Accumulators:
        """start + dS rows x k_rows, over the block's keys."""
        body, scalar = self.body, self.shape.scalar
        weights = [
            body.offset(self.ds, scalar, body.mul(body.add(row, i), self.shape.width))
            for i in range(shape.rows)
        ]
        right = body.offset(self.k_rows, scalar, d)
        valid = self.block.valid
        return microkernel.multiply(
            body, shape, shape.rows, weights, 1, right, self._line, valid, start
        )

    def _dq_at(self, query: Value, d: Operand) -> Value:
        body, scalar = self.body, self.shape.scalar
        row = body.offset(self.dq.address, scalar, body.mul(query, self.dq.row_stride))
        return body.offset(row, scalar, d)

    def _tail(self, d: Operand, j: int) -> Value | None:
        """The lanes of a vector of dq that exist, where not all do."""
        if isinstance(d, Value):
            return None
        left = self.spec.dim - d - j * self.shape.lanes
        if left >= self.shape.lanes:
            return None
        bits = ", ".join(f"i1 {int(lane < left)}" for lane in range(self.shape.lanes))
        return Value(f"<{bits}>", vector(self.shape.lanes, "i1"))

    def _load_dq(self, row: Value, d: Operand, j: int) -> Value:
        body, type_ = self.body, self.shape.vector
        place = body.offset(row, self.shape.scalar, j * self.shape.lanes)
        tail = self._tail(d, j)
        if tail is None:
            return body.load(place, type_, "dq")
        return masked.load(body, place, type_, tail, "dq")

    def _store_dq(self, total: Value, row: Value, d: Operand, j: int) -> None:
        body = self.body
        place = body.offset(row, self.shape.scalar, j * self.shape.lanes)
        tail = self._tail(d, j)
        if tail is None:
            body.store(total, place)
            return
        masked.store(body, total, place, tail)

    def _add_visible_dq(self, tile: Tile) -> None:
        """As `_add_dq`, pair by pair without the forbidden ones, for keys that are not finite."""
        body, scalar, width = self.body, self.shape.scalar, self.shape.width
        marker = tile.marker("weight").element
        with body.loop("q", 0, tile.count) as q, body.loop("key", 0, self.block.valid) as key:
            pair = body.add(body.mul(q, width), key)
            bits = body.load(body.offset(self.p, scalar, pair), marker, "bits")
            forbidden = body.constant(tile.marker_bits("weight"), marker)
            with body.when(body.compare("ne", bits, forbidden), "visible"):
                weight = body.load(body.offset(self.ds, scalar, pair), scalar)
                weight = body.binary("fmul", weight, self.ds_factor())
                target = self._dq_at(body.add(tile.first, q), 0)
                source = body.offset(self.k_rows, scalar, body.mul(key, self._line))
                with body.loop("d", 0, self.spec.dim) as d:
                    place = body.offset(target, scalar, d)
                    number = body.load(body.offset(source, scalar, d), scalar)
                    total = body.multiply_add(weight, number, body.load(place, scalar))
                    body.store(total, place)


class _PairGradients(_AllGradients):
    """With dS as lines of bfloat16, and K as words of two keys.

    `rest` goes into dS, which is rounded anyway: rest K would be rounded once more.
    """

    def key_factor(self) -> Value:
        return self.block.scalar(1.0)

    def ds_factor(self) -> Value:
        return self.block.scale.rest

    @property
    def _parts(self) -> int:
        return self.spec.multiplier.parts

    @property
    def _words_of_keys(self) -> int:
        """Words of one part of K."""
        return self.shape.width // 2 * self._line

    @property
    def _elements_of_lines(self) -> int:
        """Elements of one part of the lines of dS."""
        return padded(self.spec.block_traverse, self.spec.multiplier.step) * self.shape.width

    def _copy_keys(self) -> tuple[Value, Variable]:
        body, block = self.body, self.block
        rows, finite = super()._copy_keys()
        with body.loop("key", block.valid, self.shape.width) as key:
            for j in range(self._line // self.shape.lanes):
                place = self.shape.at(body, rows, key, j, self._line)
                body.store(block.splat(0.0), place)
        shape = replace(self.shape, vectors=self._line // self.shape.lanes)
        function = pairs.interleave(body.module, shape, self._parts)
        sizes = (self.shape.width // 2, self._words_of_keys)
        numbers = [Value(str(size), "i64") for size in sizes]
        body.invoke(function, [block.region("k_words"), rows, *numbers])
        return rows, finite

    def keep(
        self,
        tile: Tile,
        row: Value,
        dp: microkernel.Accumulators,
        statistics: StatisticsOf,
        masked: bool,
    ) -> microkernel.Accumulators:
        body = self.body
        changes = super().keep(tile, row, dp, statistics, masked)
        scale = body.splat(self.ds_factor(), self.shape.lanes, "scale")
        # A modified score of no key may have any derivative, and NaN times the zeros of K is NaN.
        exists = self.block.existing_lanes() if self.modified else None
        for i, line in enumerate(changes):
            place = self._line_of(body.add(row, i))
            for j, change in enumerate(line):
                value = body.binary("fmul", change, scale, "ds")
                if exists:
                    value = body.select(exists[j], value, self.block.splat(0.0), "ds")
                for part, number in enumerate(pairs.split(body, value, self._parts)):
                    offset = part * self._elements_of_lines + j * self.shape.lanes
                    body.store(pairs.narrow(body, number), body.offset(place, "i16", offset))
        return changes

    def _line_of(self, row: Operand) -> Value:
        """The address of a line of dS."""
        lines = self.block.region("ds_lines")
        return self.body.offset(lines, "i16", self.body.mul(row, self.shape.width))

    def _multiply(
        self, shape: microkernel.Shape, row: Value, d: Operand, start: Callable[[int, int], Value]
    ) -> microkernel.Accumulators:
        body = self.body
        lines = [self._line_of(body.add(row, i)) for i in range(shape.rows)]
        right = body.offset(self.block.region("k_words"), "i32", d)
        words = body.binary("lshr", body.add(self.block.valid, 1), 1)
        return microkernel.multiply(
            body, shape, shape.rows, lines, 2, right, self._line, words, start
        )


class _TileGradients(_PairGradients):
    """With tiles of dS and of K; what they give is added to dQ from scratch."""

    def _add_dq(self, tile: Tile) -> None:
        body, block = self.body, self.block
        staging, width = block.region("staging"), self.shape.width
        shape = replace(self.shape, vectors=self._line // self.shape.lanes)
        depth = body.binary("lshr", body.add(block.valid, amx.DEPTH - 1), 5)
        words = block.region("k_words")
        with body.loop("q", 0, tile.count, 2 * amx.ROWS) as first:
            line = self._line_of(first)
            stride, parts = Value(str(width), "i64"), range(self._parts)
            lines = [body.offset(line, "i16", part * self._elements_of_lines) for part in parts]
            right = [body.offset(words, "i32", part * self._words_of_keys) for part in parts]
            factors = factors_of([amx.Lines(at, stride) for at in lines], Right(tuple(right)))
            amx.panel(body, shape, factors, depth, staging, 2, start=None)
            last = body.minimum(body.sub(tile.count, first), 2 * amx.ROWS)
            with body.loop("i", 0, last) as i:
                target = self._dq_at(body.add(tile.first, body.add(first, i)), 0)
                for j in range(shape.vectors):
                    more = body.load(shape.at(body, staging, i, j, self._line), shape.vector)
                    total = body.binary("fadd", self._load_dq(target, 0, j), more)
                    self._store_dq(total, target, 0, j)
