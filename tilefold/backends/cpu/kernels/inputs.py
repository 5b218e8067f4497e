"""The gradients of the arrays that a score reads: a kernel of its own, parallel over queries.

    d array[i] = the sum of P (dP - delta) dF/d array[i] over the pairs whose score reads entry i

An owner has some batch entries, heads and blocks of queries, walks them in order, and adds to the
targets: parts that no other owner adds to at the same entries (see `backends.cpu.inputs`). So no
atomics are needed, and the sums do not depend on threads. P and dS are made as in `backward`. What
a tile changes lies in scratch, row by row, until the tile is done. Then, by what the index of an
entry depends on:

    stored     [.., q, k]: each entry is met once; the tile is turned and written
    added      [.., q, k] met again by other heads or batch entries: the tile is turned and added
    sums       not on the key: a sum for each lane in a block of queries, then added lane by lane
    keys       on the key alone: each row is summed over its lanes, then added
    slots      on both, few entries: each lane has its own copy of them, so that lanes that meet the
               same entry do not collide; where all lanes meet one entry it is one addition of
               vectors
    scattered  on both, many entries: lane by lane

All sums but "added" are in double. Products: S and dP, two per pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tilefold.backends.cpu.kernels import microkernel, pack, work
from tilefold.backends.cpu.kernels.ahead import TileScoreText
from tilefold.backends.cpu.kernels.backward import Statistics, differences, store_scores
from tilefold.backends.cpu.kernels.block import emit
from tilefold.backends.cpu.kernels.entries import Read
from tilefold.backends.cpu.kernels.ir import Value, Variable
from tilefold.backends.cpu.kernels.mask import IndexText, Lanes
from tilefold.backends.cpu.kernels.reduce import summed
from tilefold.backends.cpu.kernels.targets import FIRST_B, FIRST_H, FIRST_ROW, Targets
from tilefold.backends.cpu.kernels.tile import Tile
from tilefold.backends.cpu.spec import KernelSpec


def inputs(spec: KernelSpec) -> str:
    """The source of the kernel that sums the gradients of the arrays of a score."""
    title = """
for each owner: for each of its heads, batch entries and blocks of queries:
    for each tile of keys that the plan names:
        S^T <- K Q^T;  P^T <- 2^((S^T - m) c + r)        rows are keys, lanes are queries
        dP^T <- V dO^T;  dS^T <- P^T (dP^T - delta)
        for each entry that the score reads: its gradient += dS dF/d(entry)"""
    return emit(spec, title.strip(), lambda block: _InputGradients(block).write())


class _Changes(TileScoreText):
    """Gives the modified scores of a tile alone, and keeps what else was computed."""

    def row(self, index: Value, products: Sequence[Value]) -> tuple[Any, ...]:
        self.values = super().row(index, products)
        return self.values[0], (None,) * len(products)


class _InputGradients(Targets):
    """What one owner adds."""

    def write(self) -> None:
        """Walk the owner's heads, batch entries and block rows."""
        body, block = self.body, self.block
        slots = [read for read in self.reads if read.way == "slots"]
        for read in slots:
            self._zero_slots(read)
        with self._owned("h", FIRST_H) as h:
            block.h = h
            with self._owned("b", FIRST_B) as b:
                block.b = b
                with self._owned("row", FIRST_ROW) as row:
                    block.at_row(row)
                    self._block_row()
                for read in slots:
                    if read.by_batch:
                        self._flush_slots(read)
            for read in slots:
                if not read.by_batch:
                    # Its indices do not depend on the batch entry: any one will do.
                    block.b = self._column(FIRST_B)
                    self._flush_slots(read)
        body.comment("the owner is done")

    @contextmanager
    def _owned(self, name: str, first: int) -> Iterator[Value]:
        with self.body.loop(name, self._column(first), self._column(first + 1)) as index:
            yield index

    # One block of queries -------------------------------------------------------------------------

    def _block_row(self) -> None:
        body, block, spec = self.body, self.block, self.spec
        body.comment("Q^T <- power Q^T;  dO^T;  m, r, delta")
        h_kv = body.binary("udiv", block.h, block.arguments["group"], "h_kv")
        self.keys, self.values = block.matrix("k", h_kv), block.matrix("v", h_kv)
        self.q_packed = self.products.pack("q", spec.dim, block.scale.power)
        self.do_packed = self.products.pack("do", spec.dim_v)
        self.statistics = Statistics(*(self._statistic(name) for name in Statistics._fields))
        self.exists = block.existing_lanes()
        sums = [read for read in self.reads if read.way == "sums"]
        for read in sums:
            for j in range(self.shape.vectors):
                body.store(body.constant(0.0, self.double), self._sum_at(read, j))
        work.tiles(body, spec, block.arguments, block.b, block.h, block.row, self._tile)
        for read in sums:
            self._flush_sums(read)

    def _statistic(self, name: str) -> list[Value]:
        block, shape = self.block, self.shape
        region = block.pack(name, 1, block.scalar(1.0))
        places = [block.at(region, 0, j) for j in range(shape.vectors)]
        return [self.body.load(place, shape.vector, name) for place in places]

    # One tile of keys -----------------------------------------------------------------------------

    def _tile(self, first: Value, count: Value, masked: bool) -> None:
        body, spec, block = self.body, self.spec, self.block
        tile = Tile(body, self.shape, first, count)
        mask = block.mask(block.h) if masked else None
        modified = _Changes(block.place(block.h), block.scale.rest, block.tile_of(tile))
        made = self.products.sides
        keys = made(tile, self.keys, "left", spec.dim, rows=True, columns=False)
        values = made(tile, self.values, "left_v", spec.dim_v, rows=True, columns=False)
        body.comment("S^T <- K Q^T")
        p = block.region("p")
        store_scores(self.products, tile, keys.rows, self.q_packed, p, mask)
        factors = block.factors(tile, block.h)
        body.comment("dP^T <- V dO^T;  P^T <- 2^((S^T - m) c + r);  dS^T <- P^T (dP^T - delta)")

        def use(row: Value, dp: microkernel.Accumulators) -> None:
            for i, line in enumerate(dp):
                at = body.add(row, i)
                _, changes = differences(
                    self.products, tile, at, line, self.statistics, masked, modified, factors
                )
                self._keep(tile, at, changes, modified.values)

        self.products.scores(tile, values.rows, self.do_packed, spec.dim_v, use)
        body.comment("gradients += dS dF/d(entry)")
        self.indices = IndexText(
            block.place(block.h), [index for read in self.reads for index in read.indices]
        )
        for read in self.reads:
            if read.way in ("stored", "added"):
                self._move(read, tile)
            elif read.way == "sums":
                self._add_to_sums(read, tile)
            else:
                add = {
                    "keys": self._add_row,
                    "slots": self._add_to_slots,
                    "scattered": self._scatter,
                }[read.way]
                with body.loop("key", 0, count) as row:
                    add(read, tile, row)

    def _keep(self, tile: Tile, row: Value, changes: list[Value], values: Sequence[Lanes]) -> None:
        """Keep a row of dS, times the slope of each entry, and where it will be added."""
        body, place, kept = self.body, 1, set()
        zero = body.constant(0.0, self.shape.vector)
        for read in self.reads:
            slopes, *indices = values[place : place + 1 + len(read.indices)]
            place += 1 + len(read.indices)
            for j, change in enumerate(changes):
                made = change
                if not read.plain:
                    made = body.binary("fmul", change, slopes[j], "change")
                    nothing = body.compare("oeq", change, zero, "nothing")
                    made = body.select(nothing, zero, made, "change")
                if (read.changes, j) not in kept:
                    body.store(made, tile.at(self.block.region(read.changes), row, j))
                kept.add((read.changes, j))
                if read.way in ("slots", "scattered"):
                    offsets = [index[j] for index in indices]
                    body.store(self._place_of(read, offsets), self._place_at(read, tile, row, j))

    # The ways -------------------------------------------------------------------------------------

    def _move(self, read: Read, tile: Tile) -> None:
        """The tile, turned, stored or added where it belongs."""
        body, block = self.body, self.block
        strides, found = self._strides(read), self._storage(read)
        lane_stride, key_stride = strides[read.axis("q")], strides[read.axis("k")]
        base = self._base(read, self._same(read, self.indices))
        offset = body.mul(block.first, lane_stride)
        offset = body.add(offset, body.mul(tile.first, key_stride))
        start = found.at(body, base, offset)
        function = (pack.unpack if read.way == "stored" else pack.add)(
            body.module, self.shape, found
        )
        scratch = block.region(read.changes)
        place = [scratch, start, lane_stride, key_stride, block.valid, tile.count]
        body.invoke(function, [*place, block.scalar(1.0)])

    def _sum_at(self, read: Read, j: int) -> Value:
        region = self.block.region(f"sums{read.number}")
        return self.body.offset(region, "double", j * self.shape.lanes)

    def _add_to_sums(self, read: Read, tile: Tile) -> None:
        """The sum over the rows of the tile, then added in double."""
        body, shape = self.body, self.shape
        zero, region = body.constant(0.0, shape.vector), self.block.region(read.changes)
        totals: list[Variable] = [body.variable(shape.vector, zero) for _ in range(shape.vectors)]
        with body.loop("key", 0, tile.count) as row:
            for j, total in enumerate(totals):
                change = body.load(tile.at(region, row, j), shape.vector, "change")
                body.write(total, body.binary("fadd", body.read(total), change))
        for j, total in enumerate(totals):
            place, wide = self._sum_at(read, j), body.cast("fpext", body.read(total), self.double)
            old = body.load(place, self.double, align=8)
            body.store(body.binary("fadd", old, wide), place)

    def _flush_sums(self, read: Read) -> None:
        """Add the sums of the lanes that exist to their entries."""
        body, shape = self.body, self.shape
        text = self._text_of_head()
        base = self._base(read, self._same(read, text))
        if not read.varying:
            total: Value | None = None
            zero = body.constant(0.0, self.double)
            for j in range(shape.vectors):
                lanes = body.load(self._sum_at(read, j), self.double, "sums")
                lanes = body.select(self.exists[j], lanes, zero)
                total = lanes if total is None else body.binary("fadd", total, lanes)
            assert total is not None
            self._add_number(summed(body, total), base)
            return
        offsets, indices = (
            self.block.region("offsets"),
            self._indices_of(read, text, Value("0", "i64")),
        )
        for j in range(shape.vectors):
            lanes_of = [index[j] if isinstance(index, tuple) else index for index in indices]
            body.store(self._place_of(read, lanes_of), body.offset(offsets, "i64", j * shape.lanes))
        sums = self.block.region(f"sums{read.number}")
        with body.loop("lane", 0, self.block.valid) as lane:
            number = body.load(body.offset(sums, "double", lane), "double")
            offset = body.load(body.offset(offsets, "i64", lane), "i64")
            self._add_number(number, body.offset(base, "double", offset))

    def _add_row(self, read: Read, tile: Tile, row: Value) -> None:
        """One row of the tile, summed over its lanes."""
        body, shape = self.body, self.shape
        indices = self._indices_of(read, self.indices, body.add(tile.first, row))
        region, zero = self.block.region(read.changes), body.constant(0.0, shape.vector)
        total: Value | None = None
        for j in range(shape.vectors):
            change = body.load(tile.at(region, row, j), shape.vector, "change")
            change = body.select(self.exists[j], change, zero)
            total = change if total is None else body.binary("fadd", total, change)
        assert total is not None
        number = body.cast("fpext", summed(body, total), "double")
        self._add_number(number, self._base(read, list(enumerate(indices))))

    def _scatter(self, read: Read, tile: Tile, row: Value) -> None:
        """One row of the tile, lane by lane: lanes may meet the same entry."""
        body, shape = self.body, self.shape
        base = self._base(read, self._same(read, self.indices))
        line = body.mul(row, shape.width)
        with body.loop("lane", 0, self.block.valid) as lane:
            at = body.add(line, lane)
            change = body.load(
                body.offset(self.block.region(read.changes), shape.scalar, at), shape.scalar
            )
            offset = body.load(body.offset(self.block.region(read.places), "i64", at), "i64")
            number = body.cast("fpext", change, "double")
            self._add_number(number, body.offset(base, "double", offset))
