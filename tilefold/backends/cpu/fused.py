"""The fused backward kernel: one owner per key head makes dQ, dK and dV from the same P and dS.

    for each key head:                                       one owner
        dQ <- 0
        for each block of keys, each query head of the group, each tile of queries:
            P, dS as in `backward`;  dV^T += dO^T P;  dK^T += Q^T dS
            dQ += dS (scale K)                               rows are queries, the dim in the lanes

Five products per pair where the split form takes seven, and no scratch for dQ: it is summed in the
caller's array, key block by key block, by the one worker that owns the head. So it serves where
there are heads enough for the cores, and where the rows of dQ are contiguous.
"""

from __future__ import annotations

from tilefold.backends.cpu import gemm
from tilefold.backends.cpu.backward import KeyGradients
from tilefold.backends.cpu.block import emit
from tilefold.backends.cpu.ir import Operand, Value, Variable, overload, vector
from tilefold.backends.cpu.tile import Matrix, Tile
from tilefold.expression import Truth
from tilefold.plan import KernelSpec


def fused(spec: KernelSpec) -> str:
    """The text of the kernel that is parallel over heads."""
    title = """
for each key head:                                       one owner
    dQ <- 0
    for each block of keys, each query head of the group, each tile of queries:
        S <- Q K^T;  P <- 2^(S - lse)                    rows are queries, lanes are keys
        dP <- dO V^T;  dS <- P (dP - delta)
        dV^T += dO^T P;  dK^T += Q^T dS;  dQ += dS (scale K)
    dK <- scale dK"""
    return emit(spec, title.strip(), lambda block: _AllGradients(block).write())


class _AllGradients(KeyGradients):
    """All blocks of keys of one key head, and the dQ of its query heads."""

    def write(self) -> None:
        body, block = self.body, self.block
        body.comment("dQ <- 0")
        group = block.arguments["group"]
        with body.loop("g", 0, group) as g:
            self._zero_dq(block.matrix("dq", body.add(body.mul(block.h, group), g)))
        with body.loop("keys", 0, block.arguments["block_rows"]) as row:
            block.at_row(row)
            self.k_rows, self.k_finite = self._copy_keys()
            super().write()

    def take_head(self, h: Value) -> None:
        super().take_head(h)
        self.dq = self.block.matrix("dq", h)

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

    def _zero_dq(self, dq: Matrix) -> None:
        body, zero = self.body, self.block.scalar(0.0)
        with body.loop("q", 0, self.block.arguments["len_q"]) as q:
            row = body.offset(dq.address, self.shape.scalar, body.mul(q, dq.row_stride))
            with body.loop("d", 0, self.spec.dim) as d:
                body.store(zero, body.offset(row, self.shape.scalar, d))

    def _copy_keys(self) -> tuple[Value, Variable]:
        """scale K of the block, row by row in whole vectors; and whether K is finite there."""
        body, block, scalar = self.body, self.block, self.shape.scalar
        region = block.region("k_rows")
        keys = block.matrix("k", block.h)
        scale = block.scale()
        with body.loop("key", 0, block.valid) as key:
            index = body.mul(body.add(block.first, key), keys.row_stride)
            source = body.offset(keys.address, scalar, index)
            target = body.offset(region, scalar, body.mul(key, self._line))
            with body.loop("d", 0, self.spec.dim) as d:
                number = body.load(body.offset(source, scalar, body.mul(d, keys.d_stride)), scalar)
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
        step = self.shape.width
        whole_rows = body.sub(tile.count, body.binary("urem", tile.count, rows))
        whole_columns = self.spec.dim - self.spec.dim % step
        rest = -(-(self.spec.dim - whole_columns) // self.shape.lanes)
        for start, stop, height in ((0, whole_rows, rows), (whole_rows, tile.count, 1)):
            with body.loop("q", start, stop, height) as row:
                if whole_columns:
                    with body.loop("d", 0, whole_columns, step) as d:
                        self._add_dq_tile(tile, row, height, d, self.shape.vectors)
                if rest:
                    self._add_dq_tile(tile, row, height, whole_columns, rest)

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
