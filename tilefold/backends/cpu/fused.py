"""The fused backward kernel: owners of keys make dQ, dK and dV from the same P and dS.

    for each owner, of some block rows of one key head:
        its part of dQ <- 0
        for each of its blocks of keys, each query head of the group, each tile of queries:
            P, dS as in `backward`;  dV^T += dO^T P;  dK^T += Q^T dS
            its part of dQ += dS (scale K)               rows are queries, the dim in the lanes
    for each block of queries:  dQ <- the parts in their order

Five products per pair where the split form takes seven. With one owner per key head its part is dQ
itself, where rows of dQ are contiguous: then there is no second kernel and no memory for parts.
`owners.py` says how many owners there are and what each of them has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tilefold.backends.cpu import gemm, work
from tilefold.backends.cpu.backward import KeyGradients
from tilefold.backends.cpu.block import Block, emit
from tilefold.backends.cpu.ir import Operand, Value, Variable, overload, vector
from tilefold.backends.cpu.tile import Matrix, Tile
from tilefold.expression import Truth
from tilefold.owners import COLUMNS, FIRST_QUERY, FIRST_ROW, LAST_QUERY, LAST_ROW, PART
from tilefold.plan import KernelSpec


def fused(spec: KernelSpec) -> str:
    """The text of the kernel that makes parts of dQ, or all of it."""
    title = """
for each owner of blocks of keys:
    its dQ <- 0
    for each of its blocks, each query head of the group, each tile of queries:
        S <- Q K^T;  P <- 2^(S - lse)                    rows are queries, lanes are keys
        dP <- dO V^T;  dS <- P (dP - delta)
        dV^T += dO^T P;  dK^T += Q^T dS;  dQ += dS (scale K)
    dK <- scale dK"""
    return emit(spec, title.strip(), lambda block: _AllGradients(block).write())


def reduce_dq(spec: KernelSpec) -> str:
    """The text of the kernel that adds the parts up."""
    title = """
for each block of queries:                               one owner
    dQ^T <- 0
    for each part that holds these queries, in order: dQ^T += part^T
    dQ <- dQ^T"""
    return emit(spec, title.strip(), _write_sum)


def _write_sum(block: Block) -> None:
    body, spec, shape, one = block.body, block.spec, block.shape, block.scalar(1.0)
    total = block.region("dq")
    block.zero("dq", spec.dim)
    with (
        work.runs(body, block.arguments, block.b, block.h, block.row) as (_, first, last),
        body.loop("owner", first, last) as owner,
    ):
        skipped = _of_owner(block, owner, PART)
        part = block.pack("dq_parts", spec.dim, one, skipped=skipped)
        with body.loop("d", 0, spec.dim) as d:
            for j in range(shape.vectors):
                old = body.load(block.at(total, d, j), shape.vector)
                more = body.load(block.at(part, d, j), shape.vector)
                body.store(body.binary("fadd", old, more), block.at(total, d, j))
    block.unpack("dq", total, spec.dim, one)


def _of_owner(block: Block, owner: Value, column: int) -> Value:
    """What the plan's deal says of an owner."""
    body = block.body
    place = body.add(body.mul(owner, COLUMNS), column)
    return body.load(body.offset(block.arguments["owners"], "i64", place), "i64")


class _AllGradients(KeyGradients):
    """The blocks of keys of one owner, and its part of the dQ of their query heads."""

    def write(self) -> None:
        body, block = self.body, self.block
        first_row, last_row, first_query, last_query, self.part = (
            _of_owner(block, block.row, column)
            for column in (FIRST_ROW, LAST_ROW, FIRST_QUERY, LAST_QUERY, PART)
        )
        body.comment("dQ <- 0")
        group = block.arguments["group"]
        with body.loop("g", 0, group) as g:
            self.dq = self._part(body.add(body.mul(block.h, group), g))
            with body.loop("q", first_query, last_query) as q:
                self._zero_dq(q)
        with body.loop("keys", first_row, last_row) as row:
            block.at_row(row)
            self.k_rows, self.k_finite = self._copy_keys()
            super().write()

    def take_head(self, h: Value) -> None:
        super().take_head(h)
        self.dq = self._part(h)

    def _part(self, h: Value) -> Matrix:
        """This owner's part of dQ of one query head, as if it began with the row of query 0."""
        parts = self.block.matrix("dq_parts", h)
        return replace(parts, address=parts.row(self.body, self.part))

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
        return -(-self.spec.dim // self.shape.lanes) * self.shape.lanes

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

    def _copy_keys(self) -> tuple[Value, Variable]:
        """scale K of the block, row by row in whole vectors; and whether K is finite there."""
        body, block, scalar = self.body, self.block, self.shape.scalar
        region = block.region("k_rows")
        keys = block.matrix("k", block.h)
        scale = block.scale()
        with body.loop("key", 0, block.valid) as key:
            source = keys.row(body, body.add(block.first, key))
            target = body.offset(region, scalar, body.mul(key, self._line))
            with body.loop("d", 0, self.spec.dim) as d:
                number = keys.kept.load(body, keys.at(body, source, d))
                body.store(body.binary("fmul", number, scale), body.offset(target, scalar, d))
            with body.loop("d", self.spec.dim, self._line) as d:
                body.store(block.scalar(0.0), body.offset(target, scalar, d))
        finite = body.variable("i1", Value("true", "i1"), "k.finite")
        if not isinstance(self.spec.mask.expression, Truth):
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
        body, scalar = self.body, self.shape.scalar
        shape = gemm.Shape(height, vectors, self.shape.lanes, scalar)
        weights = [
            body.offset(self.ds, scalar, body.mul(body.add(row, i), self.shape.width))
            for i in range(height)
        ]
        targets = [self._dq_at(body.add(tile.first, body.add(row, i)), d) for i in range(height)]
        totals = gemm.multiply(
            body,
            shape,
            height,
            weights,
            1,
            body.offset(self.k_rows, scalar, d),
            self._line,
            self.block.valid,
            lambda i, j: self._load_dq(targets[i], d, j),
        )
        for target, line in zip(targets, totals, strict=True):
            for j, total in enumerate(line):
                self._store_dq(total, target, d, j)

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
        name = f"llvm.masked.load.{overload(type_)}.p0"
        align = Value("4" if self.shape.scalar == "float" else "8", "i32")
        return body.call(name, type_, [place, align, tail, self.block.splat(0.0)], "dq")

    def _store_dq(self, total: Value, row: Value, d: Operand, j: int) -> None:
        body = self.body
        place = body.offset(row, self.shape.scalar, j * self.shape.lanes)
        tail = self._tail(d, j)
        if tail is None:
            body.store(total, place)
            return
        name = f"llvm.masked.store.{overload(total.type)}.p0"
        align = Value("4" if self.shape.scalar == "float" else "8", "i32")
        arguments = [total, place, align, tail]
        body.module.declare(name, "void", [argument.type for argument in arguments])
        body.invoke(name, arguments)

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
                target = self._dq_at(body.add(tile.first, q), 0)
                source = body.offset(self.k_rows, scalar, body.mul(key, self._line))
                with body.loop("d", 0, self.spec.dim) as d:
                    place = body.offset(target, scalar, d)
                    number = body.load(body.offset(source, scalar, d), scalar)
                    total = body.multiply_add(weight, number, body.load(place, scalar))
                    body.store(total, place)
