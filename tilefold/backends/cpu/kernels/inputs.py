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
from tilefold.backends.cpu.kernels.block import Block, emit
from tilefold.backends.cpu.kernels.entries import Read, reads
from tilefold.backends.cpu.kernels.ir import Value, Variable, overload, vector
from tilefold.backends.cpu.kernels.mask import IndexText, Lanes
from tilefold.backends.cpu.kernels.products import products
from tilefold.backends.cpu.kernels.reduce import summed
from tilefold.backends.cpu.kernels.storage import storage_in
from tilefold.backends.cpu.kernels.tile import Tile
from tilefold.backends.cpu.spec import KernelSpec

FIRST_B, LAST_B, FIRST_H, LAST_H, FIRST_ROW, LAST_ROW, FIRST_PART = range(7)
"""The columns of the table of owners; from the last on there is a part for each target."""


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


class _InputGradients:
    """What one owner adds."""

    def __init__(self, block: Block) -> None:
        self.block, self.body = block, block.body
        self.shape, self.spec = block.shape, block.spec
        self.products = products(block)
        self.reads = reads(self.spec)
        self.owner = block.row
        self.double = vector(self.shape.lanes, "double")

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

    def _column(self, column: int) -> Value:
        """A column of the owner's row in the table."""
        body = self.body
        place = body.mul(self.owner, FIRST_PART + len(self.spec.targets))
        at = body.offset(self.block.arguments["owners"], "i64", body.add(place, column))
        return body.load(at, "i64", "owned")

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
        self.exists = self._existing_lanes()
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

    def _existing_lanes(self) -> list[Value]:
        """A truth per lane: the query exists."""
        body, lanes = self.body, self.shape.lanes
        valid = body.splat(body.cast("trunc", self.block.valid, "i32"), lanes, "valid")
        found = []
        for j in range(self.shape.vectors):
            steps = ", ".join(f"i32 {j * lanes + lane}" for lane in range(lanes))
            found.append(body.compare("slt", Value(f"<{steps}>", valid.type), valid, "exists"))
        return found

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

    def _place_type(self, read: Read) -> str:
        """Slots are few; offsets in an array need all bits."""
        return vector(self.shape.lanes, "i32" if read.way == "slots" else "i64")

    def _place_at(self, read: Read, tile: Tile, row: Value, j: int) -> Value:
        """Where the places of a vector are kept."""
        body, shape = self.body, self.shape
        index = body.add(body.mul(row, shape.width), j * shape.lanes)
        element = Value("", self._place_type(read)).element
        return body.offset(self.block.region(read.places), element, index, "places")

    def _place_of(self, read: Read, indices: Sequence[Value]) -> Value:
        """The sum of indices times strides over the varying axes: of slots, or of the target."""
        body, lanes, kind = self.body, self.shape.lanes, self._place_type(read)
        element = Value("", kind).element
        strides = self._slot_strides(read) if read.way == "slots" else self._strides(read)
        total: Value | None = None
        for axis in read.varying:
            index, stride = indices[axis], strides[axis]
            wider = int(index.element[1:]) < int(element[1:])
            term = body.cast("sext" if wider else "trunc", index, kind, "at")
            if stride.text != "1":
                step = body.cast("trunc", stride, element) if element == "i32" else stride
                term = body.mul(term, body.splat(step, lanes))
            total = term if total is None else body.add(total, term)
        assert total is not None
        return total

    # Where a gradient is --------------------------------------------------------------------------

    def _strides(self, read: Read) -> list[Value]:
        """The strides of the target along the axes of the array."""
        arguments = self.block.arguments
        return [arguments[f"target{read.target}_{axis + 1}"] for axis in range(len(read.indices))]

    def _sizes(self, read: Read) -> list[Value]:
        arguments, axes = self.block.arguments, range(len(read.indices))
        return [arguments[f"target{read.target}_size{axis + 1}"] for axis in axes]

    def _base(self, read: Read, fixed: Sequence[tuple[int, Value]]) -> Value:
        """The address in the owner's part at these indices, 0 along the other axes."""
        body, arguments = self.body, self.block.arguments
        part = self._column(FIRST_PART + read.target)
        offset = body.mul(part, arguments[f"target{read.target}_0"])
        strides = self._strides(read)
        for axis, index in fixed:
            wide = body.cast("sext", index, "i64", "at")
            offset = body.add(offset, body.mul(wide, strides[axis]))
        stored = self._storage(read).stored
        return body.offset(arguments[f"target{read.target}"], stored, offset, "target")

    def _storage(self, read: Read) -> Any:
        return storage_in(self.spec.targets[read.target].dtype, self.shape.scalar)

    def _indices_of(self, read: Read, text: IndexText, row: Value) -> list[Any]:
        """The indices of a look-up: each one number, or lanes."""
        first = sum(len(before.indices) for before in self.reads[: read.number])
        return text.row(row)[first : first + len(read.indices)]

    def _same(self, read: Read, text: IndexText) -> list[tuple[int, Value]]:
        """The axes whose index is the same for all pairs of a head, and these indices."""
        indices = self._indices_of(read, text, Value("0", "i64"))
        return [(axis, i) for axis, i in enumerate(indices) if axis not in read.varying]

    def _text_of_head(self) -> IndexText:
        block = self.block
        return IndexText(
            block.place(block.h), [index for read in self.reads for index in read.indices]
        )

    def _add_number(self, number: Value, place: Value) -> None:
        """Add one double in memory."""
        body = self.body
        body.store(body.binary("fadd", body.load(place, "double"), number), place)

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

    # Slots ----------------------------------------------------------------------------------------

    def _slot_strides(self, read: Read) -> dict[int, Value]:
        """The strides of the varying axes among slots, which lie one after the other."""
        body, sizes = self.body, self._sizes(read)
        stride, found = Value("1", "i64"), {}
        for axis in reversed(read.varying):
            found[axis] = stride
            stride = body.mul(stride, sizes[axis])
        return found

    def _slot_count(self, read: Read) -> Value:
        sizes, count = self._sizes(read), Value("1", "i64")
        for axis in read.varying:
            count = self.body.mul(count, sizes[axis])
        return count

    def _slot(self, read: Read, slot: Value) -> Value:
        """The address of a slot: a double for each lane."""
        body, first = self.body, Value("0", "i64")
        for before in self.reads[: read.number]:
            if before.way == "slots":
                first = body.add(first, self._slot_count(before))
        index = body.mul(body.add(first, slot), self.shape.lanes)
        return body.offset(self.block.beyond, "double", index, "slot")

    def _zero_slots(self, read: Read) -> None:
        body = self.body
        with body.loop("slot", 0, self._slot_count(read)) as slot:
            body.store(body.constant(0.0, self.double), self._slot(read, slot))

    def _add_to_slots(self, read: Read, tile: Tile, row: Value) -> None:
        """One row of the tile, each vector at once."""
        body, shape = self.body, self.shape
        region, zero = self.block.region(read.changes), body.constant(0.0, shape.vector)
        for j in range(shape.vectors):
            change = body.load(tile.at(region, row, j), shape.vector, "change")
            change = body.select(self.exists[j], change, zero)
            wide = body.cast("fpext", change, self.double, "wide")
            at = self._place_at(read, tile, row, j)
            places = body.load(at, self._place_type(read), "places")
            first = body.lane(places, 0)
            alike = body.compare("eq", places, body.splat(first, shape.lanes), "alike")
            name = f"llvm.vector.reduce.and.{overload(alike.type)}"
            with body.choose(body.call(name, "i1", [alike], "one"), "one") as branch:
                slot = self._slot(read, body.cast("sext", first, "i64"))
                old = body.load(slot, self.double, "old")
                body.store(body.binary("fadd", old, wide), slot)
                branch.otherwise()
                self._add_apart(read, places, wide)

    def _add_apart(self, read: Read, places: Value, wide: Value) -> None:
        """Add each lane to its own copy of its entry."""
        body, lanes = self.body, self.shape.lanes
        steps = ", ".join(f"i32 {lane}" for lane in range(lanes))
        iota = Value(f"<{steps}>", places.type)
        elements = body.add(body.mul(places, lanes), iota)
        at = body.offset(self._slot(read, Value("0", "i64")), "double", elements, "at")
        everywhere, align = Value("splat (i1 true)", vector(lanes, "i1")), Value("8", "i32")
        kinds = f"{overload(self.double)}.{overload(at.type)}"
        nothing = Value("poison", self.double)
        arguments = [at, align, everywhere, nothing]
        old = body.call(f"llvm.masked.gather.{kinds}", self.double, arguments, "old")
        new = body.binary("fadd", old, wide)
        scatter = f"llvm.masked.scatter.{kinds}"
        body.module.declare(scatter, "void", [new.type, at.type, "i32", everywhere.type])
        body.invoke(scatter, [new, at, align, everywhere])

    def _flush_slots(self, read: Read) -> None:
        """Add the lanes of each slot up, and to its entry; the slot is 0 then."""
        body = self.body
        self.block.at_row(Value("0", "i64"))  # the indices that are asked for depend on none
        base = self._base(read, self._same(read, self._text_of_head()))
        sizes, strides = self._sizes(read), self._strides(read)
        with body.loop("slot", 0, self._slot_count(read)) as slot:
            rest, offset = slot, Value("0", "i64")
            for axis in reversed(read.varying):
                at = body.binary("urem", rest, sizes[axis])
                rest = body.binary("udiv", rest, sizes[axis])
                offset = body.add(offset, body.mul(at, strides[axis]))
            place = self._slot(read, slot)
            total = summed(body, body.load(place, self.double, "slot"))
            self._add_number(total, body.offset(base, "double", offset))
            body.store(body.constant(0.0, self.double), place)
