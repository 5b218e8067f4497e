"""The kernel of a product: BLIS's five loops around a register tile.

    for item in (matrix, block of columns, block of rows):     workers take items        loops 5, 3
        for block of the contraction:                          A's block goes to L2      loop 4
            panels of A <- rows of A;  panels of B <- columns of B, unless packed before
            for panel of B in the item:                        it stays in L1            loop 2
                for panel of A in the block:                                             loop 1
                    sums += A's panel  B's panel               `tile`
                    after the last block: out <- sums          `finish`

(Van Zee and van de Geijn, "BLIS: a framework for rapidly instantiating BLAS functionality", 2015.)
The sum of an element goes through the contraction in order, whatever the blocks of rows and columns
and whoever makes it, so results do not depend on threads. Where few sums have many terms, an item
has a chunk of the contraction; who finishes the last chunk of a block adds all of them, in order.
"""

from __future__ import annotations

from contextlib import nullcontext

from tilefold.backends.cpu.kernels import amx, claims
from tilefold.backends.cpu.kernels.ir import Module, Value, vector
from tilefold.backends.cpu.matmul import panels
from tilefold.backends.cpu.matmul.arguments import OFFSETS, Arguments
from tilefold.backends.cpu.matmul.finish import finish
from tilefold.backends.cpu.matmul.panels import SCALARS, reading
from tilefold.backends.cpu.matmul.spec import ITEM_BYTES, GemmSpec, PackSpec
from tilefold.backends.cpu.matmul.tile import tile

PANELS_PER_ITEM = 8
"""Panels of B that a worker packs at a time: lines of 256 floats are read at once."""


def emit(spec: GemmSpec | PackSpec) -> str:
    """The LLVM source of a kernel."""
    module = Module(repr(spec), spec.lanes * 8 * ITEM_BYTES[spec.sums])
    if isinstance(spec, PackSpec):
        _pack_b(module, spec)
    else:
        _Gemm(module, spec)
    return module.text()


def _pack_b(module: Module, spec: PackSpec) -> None:
    """The kernel "pack_b": items are groups of panels of one matrix."""
    block = Value("%arguments", "ptr")
    store = panels.factor(spec.dtype, spec.unit, spec.sums, spec.native_half)
    function = panels.pack_columns(module, spec.unit, store, spec.width, spec.lanes)
    with module.function(spec.kernel, [block]) as body:
        words = Arguments(body, spec, block)
        with claims.single(body, words) as item:
            matrix = body.binary("udiv", item, words["groups"])
            group = body.binary("urem", item, words["groups"])
            start = body.load(body.offset(words["offsets"], "i64", matrix), "i64", "begins")
            array = store.at(body, words["array"], start)
            target = body.offset(words["panels"], "i8", body.mul(matrix, words["matrix_bytes"]))
            first = body.mul(group, spec.width * PANELS_PER_ITEM)
            last = body.minimum(body.add(first, spec.width * PANELS_PER_ITEM), words["n"])
            number = body.binary("udiv", first, spec.width)
            head = spec.unit.head_bytes(spec.width)
            before = body.add(body.mul(number, words["panel_bytes"]), head)
            panel = body.offset(target, "i8", before)
            source = store.at(body, array, body.mul(first, words["lane_stride"]))
            strides = (words["lane_stride"], words["c_stride"])
            columns = body.sub(last, first)
            given = [panel, words["panel_bytes"], source, *strides, columns, words["k"]]
            body.invoke(function, given)


class _Gemm:
    """The kernel "gemm"."""

    def __init__(self, module: Module, spec: GemmSpec) -> None:
        self.spec, self.module = spec, module
        self.item_bytes = ITEM_BYTES[spec.sums]
        self.step_bytes = spec.step_bytes
        self.head_bytes = spec.unit.head_bytes(spec.width)
        self.a_store = panels.factor(spec.a, spec.unit, spec.sums, spec.native_half)
        self.b_store = panels.factor(spec.b, spec.unit, spec.sums, spec.native_half)
        common = (module, spec.unit)
        if not spec.a_in_place:
            sizes = spec.rows, spec.lanes
            self.pack_a = panels.pack(*common, self.a_store, *sizes, of_a=True, flips=spec.flips)
        if not spec.packed:
            self.pack_b = panels.pack_columns(*common, self.b_store, spec.width, spec.lanes)
        self.heights = [(spec.rows, self._tiles(short=False))]
        if spec.shortens:
            self.heights.append((spec.rows - 1, self._tiles(short=True)))
        if not spec.clipped:
            self.finish = finish(module, spec)
        self.zeros = module.constant("zeros", bytes(spec.width * self.item_bytes), 64)
        block = Value("%arguments", "ptr")
        with module.function(spec.kernel, [block]) as body:
            self.body, self.block = body, block
            self.words = Arguments(body, spec, block)
            with amx.configured(body) if spec.unit.tiles else nullcontext():
                self._write()

    def _tiles(self, *, short: bool) -> dict[int, str]:
        """The tiles of one height, by their vectors."""
        spec, widths = self.spec, range(1, self.spec.vectors + 1)
        return {vectors: tile(self.module, spec, vectors, short=short) for vectors in widths}

    def _write(self) -> None:
        body, words = self.body, self.words
        at = claims.scratch_of_worker(body, words)
        self.a_panels = at
        self.b_panels = body.offset(at, "i8", words["a_bytes"])
        after = body.offset(self.b_panels, "i8", words["b_bytes"])
        self.gate_panels = after
        self.sums = body.offset(after, "i8", words["b_bytes"]) if self.spec.gate else after
        self.other = body.offset(self.sums, "i8", words["sums_bytes"])
        with claims.several(body, words) as item:
            self._item(item)

    def _item(self, item: Value) -> None:
        body, words, spec = self.body, self.words, self.spec
        place = item
        self.start, self.stop = Value("0", "i64"), words["k"]
        self.part = item
        if spec.split:
            chunk = body.binary("urem", item, words["chunks"])
            place = body.binary("udiv", item, words["chunks"], "place")
            self.start = body.mul(chunk, words["chunk_k"], "start")
            self.stop = body.minimum(body.add(self.start, words["chunk_k"]), words["k"], "stop")
        row_block = body.binary("urem", place, words["row_blocks"])
        rest = body.binary("udiv", place, words["row_blocks"])
        column_block = body.binary("urem", rest, words["column_blocks"])
        matrix = body.binary("udiv", rest, words["column_blocks"])
        self.first_row = body.mul(row_block, words["block_m"], "first_row")
        self.last_row = body.minimum(body.add(self.first_row, words["block_m"]), words["m"])
        self.first_column = body.mul(column_block, words["block_n"], "first_column")
        self.last_column = body.minimum(body.add(self.first_column, words["block_n"]), words["n"])
        self.spans = self._spans()
        begins = body.offset(words["offsets"], "i64", body.mul(matrix, len(OFFSETS)))
        self.begins = {
            name: body.load(body.offset(begins, "i64", number), "i64", f"{name}.begins")
            for number, name in enumerate(OFFSETS)
        }
        once = body.add(self.start, 1)
        at_least = body.select(body.compare("sgt", self.stop, once), self.stop, once)
        with body.loop("c", self.start, at_least, words["block_k"]) as c:
            self._block(c)
        if spec.split:
            self._join_if_last(place)

    def _spans(self) -> list[tuple[Value, Value]]:
        """From which row of the item to which one tiles have each height.

        So many have a row less that none is idle: 13 rows are 3 + 3 + 3 + 2 + 2.
        """
        body, most = self.body, self.spec.rows
        if not self.spec.shortens:
            return [(self.first_row, self.last_row)]
        rows = body.sub(self.last_row, self.first_row)
        tiles = body.binary("udiv", body.add(rows, most - 1), most)
        idle = body.sub(body.mul(tiles, most), rows)
        high = body.sub(tiles, body.minimum(idle, tiles))
        split = body.add(self.first_row, body.mul(high, most), "split")
        return [(self.first_row, split), (split, self.last_row)]

    def _block(self, c: Value) -> None:
        """One block of the contraction."""
        body, words, spec = self.body, self.words, self.spec
        end = body.add(c, words["block_k"])
        depth = body.minimum(words["block_k"], body.sub(self.stop, c), "depth")
        self.is_last = body.compare("sge", end, self.stop, "is_last")
        self.is_first = body.compare("eq", c, self.start, "is_first")
        steps = depth
        if spec.unit.depth > 1:
            steps = body.binary("udiv", body.add(depth, spec.unit.depth - 1), spec.unit.depth)
        self.steps = steps
        if spec.a_in_place:
            self.first_term = c
        else:
            self._pack_a(c, depth)
        if not spec.packed:
            self._pack_b("b", self.b_panels, c, depth)
            if spec.gate:
                self._pack_b("gate", self.gate_panels, c, depth)
        with body.loop("column", self.first_column, self.last_column, spec.width) as column:
            exist = body.minimum(body.sub(self.last_column, column), spec.width, "columns")
            number = body.binary("udiv", body.sub(column, self.first_column), spec.width)
            rights = [self._panel("b", self.b_panels, column, number, c)]
            if spec.gate:
                rights.append(self._panel("gate", self.gate_panels, column, number, c))
            for (height, tiles), (start, stop) in zip(self.heights, self.spans, strict=True):
                self.height, self.tiles = height, tiles
                with body.loop("row", start, stop, height) as row:
                    self._tile(row, column, exist, number, rights)

    def _pack_a(self, c: Value, depth: Value) -> None:
        body, words, spec, store = self.body, self.words, self.spec, self.a_store
        array = store.at(body, words["a"], body.add(self.begins["a"], body.mul(c, words["a_k"])))
        with body.loop("row", self.first_row, self.last_row, spec.rows) as row:
            source = store.at(body, array, body.mul(row, words["a_m"]))
            exist = body.minimum(body.sub(self.last_row, row), spec.rows)
            strides = (words["a_m"], words["a_k"])
            body.invoke(self.pack_a, [self._a_panel(row), source, *strides, exist, depth])

    def _a_panel(self, row: Value) -> Value:
        """Where a tile reads A: the address of its panel, or of its first row."""
        body = self.body
        if self.spec.a_in_place:
            index = body.add(self.begins["a"], body.mul(row, self.words["a_m"]))
            index = body.add(index, self.first_term)
            return self.a_store.at(body, self.words["a"], index)
        before = body.mul(body.sub(row, self.first_row), body.mul(self.steps, self.step_bytes))
        return body.offset(self.a_panels, "i8", before)

    def _pack_b(self, name: str, target: Value, c: Value, depth: Value) -> None:
        body, words, spec, store = self.body, self.words, self.spec, self.b_store
        start = body.add(self.begins[name], body.mul(c, words[f"{name}_k"]))
        array = store.at(body, words[name], start)
        panel_bytes = body.mul(self.steps, spec.width * self.step_bytes)
        panel_bytes = body.add(panel_bytes, self.head_bytes)
        panel = body.offset(target, "i8", self.head_bytes)
        source = store.at(body, array, body.mul(self.first_column, words[f"{name}_n"]))
        strides = (words[f"{name}_n"], words[f"{name}_k"])
        columns = body.sub(self.last_column, self.first_column)
        body.invoke(self.pack_b, [panel, panel_bytes, source, *strides, columns, depth])

    def _panel(self, name: str, scratch: Value, column: Value, number: Value, c: Value) -> Value:
        """The address of a panel of B, at the step of this block."""
        body, words, spec = self.body, self.words, self.spec
        line = spec.width * self.step_bytes
        if not spec.packed:
            size = body.add(body.mul(self.steps, line), self.head_bytes)
            return body.offset(scratch, "i8", body.add(body.mul(number, size), self.head_bytes))
        index = body.binary("udiv", column, spec.width)
        start = body.offset(words[name], "i8", self.begins[name])
        panel = body.offset(start, "i8", body.mul(index, words["panel_bytes"]))
        before = c if spec.unit.depth == 1 else body.binary("udiv", c, spec.unit.depth)
        return body.offset(panel, "i8", body.add(body.mul(before, line), self.head_bytes))

    def _tile(
        self, row: Value, column: Value, columns: Value, number: Value, rights: list[Value]
    ) -> None:
        body, words, spec = self.body, self.words, self.spec
        rows = body.minimum(body.sub(self.last_row, row), self.height, "rows")
        self.more = {"rows": rows, "columns": columns, "left_stride": words["a_m"]}
        if spec.clipped:
            index = body.add(body.mul(row, words["out_m"]), body.add(column, self.begins["out"]))
            target = body.offset(words["out"], SCALARS[spec.sums], index)
            self._sum(row, columns, [target], words["out_m"], rights)
            return
        tile_number = body.binary("udiv", body.sub(row, self.first_row), spec.rows)
        tile_number = body.add(tile_number, body.mul(number, words["tiles_m"]))
        # one tile serves all where the contraction is one block
        several = body.compare("ne", words["tiles_m"], Value("0", "i64"))
        tile_number = body.select(several, tile_number, Value("0", "i64"))
        places = self._places(tile_number)
        width = Value(str(spec.width), "i64")
        if not spec.direct:
            self._sum(row, columns, places, width, rights)
            if not spec.split:
                with body.when(self.is_last, "last"):
                    self._finish(row, column, rows, columns, places)
            return
        full = body.binary(
            "and",
            body.compare("eq", rows, Value(str(spec.rows), "i64")),
            body.compare("eq", columns, width),
        )
        with body.choose(full, "whole") as branch:
            index = body.add(body.mul(row, words["out_m"]), body.add(column, self.begins["out"]))
            target = body.offset(words["out"], SCALARS[spec.sums], index)
            self._sum(row, width, [target], words["out_m"], rights)
            branch.otherwise()
            self._sum(row, columns, places, width, rights)
            with body.when(self.is_last, "last"):
                self._finish(row, column, rows, columns, places)

    def _places(self, tile_number: Value) -> list[Value]:
        """Where the sums of a tile are, and those of the gate: in scratch, or for all chunks."""
        body, words, spec = self.body, self.words, self.spec
        bases = [self.sums, self.other]
        if spec.split:
            both = body.mul(words["sums_bytes"], 2 if spec.gate else 1)
            first = body.offset(words["parts"], "i8", body.mul(self.part, both))
            bases = [first, body.offset(first, "i8", words["sums_bytes"])]
        before = body.mul(tile_number, spec.rows * spec.width)
        return [body.offset(base, SCALARS[spec.sums], before) for base in bases]

    def _join_if_last(self, place: Value) -> None:
        """Add the sums of all chunks, in order, if all are done."""
        body, words, spec = self.body, self.words, self.spec
        done = body.offset(words["finished"], "i64", place)
        before = body.result("before", "i64", f"atomicrmw add {done.typed}, i64 1 acq_rel")
        last = body.compare("eq", body.add(before, 1), words["chunks"])
        with (
            body.when(last, "all"),
            body.loop("column", self.first_column, self.last_column, spec.width) as column,
            body.loop("row", self.first_row, self.last_row, spec.rows) as row,
        ):
            number = body.binary("udiv", body.sub(column, self.first_column), spec.width)
            tile_number = body.binary("udiv", body.sub(row, self.first_row), spec.rows)
            tile_number = body.add(tile_number, body.mul(number, words["tiles_m"]))
            targets = [self.sums, self.other] if spec.gate else [self.sums]
            for which, target in enumerate(targets):
                self._join(place, tile_number, which, target)
            rows = body.minimum(body.sub(self.last_row, row), spec.rows)
            columns = body.minimum(body.sub(self.last_column, column), spec.width)
            self._finish(row, column, rows, columns, [self.sums, self.other])

    def _join(self, place: Value, tile_number: Value, which: int, target: Value) -> None:
        """The sums of a tile over all chunks, into scratch."""
        body, words, spec = self.body, self.words, self.spec
        scalar = SCALARS[spec.sums]
        type_ = vector(spec.lanes, scalar)
        add = "add" if spec.sums == "int32" else "fadd"
        with body.loop("sum", 0, spec.rows * spec.width, spec.lanes) as at:
            total = body.variable(type_, body.constant(0, type_), "joined")
            with body.loop("chunk", 0, words["chunks"]) as chunk:
                self.part = body.add(body.mul(place, words["chunks"]), chunk)
                more = body.offset(self._places(tile_number)[which], scalar, at)
                found = body.load(more, type_, "more")
                body.write(total, body.binary(add, body.read(total), found))
            body.store(body.read(total), body.offset(target, scalar, at))

    def _sum(
        self, row: Value, columns: Value, targets: list[Value], stride: Value, rights: list[Value]
    ) -> None:
        """Add the products of this block to the sums, by a tile no wider than the panel."""
        body, words, spec = self.body, self.words, self.spec
        left = self._a_panel(row)
        for target, right in zip(targets, rights, strict=False):
            start = body.select(self.is_first, self.zeros, target)
            start_stride = body.select(self.is_first, Value("0", "i64"), stride)
            line = body.mul(self.steps, spec.width * self.step_bytes)
            ahead = words["panel_bytes"] if spec.packed else line
            done = body.binary("udiv", body.sub(row, self.first_row), spec.rows)
            done = body.mul(done, body.mul(self.steps, words["ahead"]))
            ahead = body.offset(right, "i8", body.add(ahead, done))
            arguments = [left, right, self.steps, target, stride, start, start_stride]
            arguments += [ahead, words["ahead"], *(self.more[name] for name in spec.more)]
            self._narrowest(columns, 1, arguments)

    def _narrowest(self, columns: Value, vectors: int, arguments: list[Value]) -> None:
        """Call the tile of the fewest vectors that have all columns."""
        body, spec = self.body, self.spec
        if vectors == spec.vectors or columns.text == str(spec.width):
            body.invoke(self.tiles[spec.vectors], arguments)
            return
        fits = body.compare("sle", columns, Value(str(vectors * spec.lanes), "i64"), "fits")
        with body.choose(fits, "narrow") as branch:
            body.invoke(self.tiles[vectors], arguments)
            branch.otherwise()
            self._narrowest(columns, vectors + 1, arguments)

    def _finish(
        self, row: Value, column: Value, rows: Value, columns: Value, places: list[Value]
    ) -> None:
        body, words, spec = self.body, self.words, self.spec
        pointers = []
        for name, dtype in (("out", spec.out), ("c", spec.c), ("bias", spec.bias)):
            if dtype is None:
                pointers.append(Value("null", "ptr"))
                continue
            store = reading(dtype, spec.finished, spec.native_half)
            index = body.add(
                body.mul(row, words[f"{name}_m"]), body.mul(column, words[f"{name}_n"])
            )
            index = body.add(index, self.begins[name])
            pointers.append(store.at(body, words[name], index))
        body.invoke(self.finish, [self.block, *places, rows, columns, *pointers])
