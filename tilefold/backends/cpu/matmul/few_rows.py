"""The kernel of a product with few rows of A: B is read once, where it lies.

    for item in (matrix, block of columns, chunk of inputs):        workers take items
        x <- the rows of A, unless the worker has them
        "wide", columns are neighbours:  for a few inputs, for some vectors of columns: sums += x B
        "deep", inputs are neighbours:   for block of inputs, for some columns: sums += x B
        the last chunk of a block that is done:
            sums <- the sums of all chunks, in order
            out <- sums                                             `finish`

So few products are made of each element that memory is what takes time. More than `tile_rows` rows
are several register tiles, of which the first one reads B from memory and the others from the first
cache. x and the sums lie in scratch in the order in which tiles read them: lines that are 4,096
bytes apart, as those of B often are, share a set of that cache, and a few of them fill it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

from tilefold.backends.cpu.kernels import claims, masked
from tilefold.backends.cpu.kernels.ir import Module, Operand, Value, Variable, vector
from tilefold.backends.cpu.kernels.pack import transpose
from tilefold.backends.cpu.kernels.prefetch import prefetch
from tilefold.backends.cpu.matmul.arguments import OFFSETS, Arguments
from tilefold.backends.cpu.matmul.finish import finish
from tilefold.backends.cpu.matmul.panels import SCALARS, factor, pack, reading
from tilefold.backends.cpu.matmul.spec import FMA, ITEM_BYTES, FewRowsSpec


def emit(spec: FewRowsSpec) -> str:
    """The LLVM source of a kernel."""
    module = Module(repr(spec), spec.lanes * 8 * ITEM_BYTES[spec.sums])
    (_Wide if spec.form == "wide" else _Deep)(module, spec)
    return module.text()


class _FewRows:
    def __init__(self, module: Module, spec: FewRowsSpec) -> None:
        self.spec = spec
        self.scalar = SCALARS[spec.sums]
        self.type = vector(spec.lanes, self.scalar)
        self.item_bytes = ITEM_BYTES[spec.sums]
        self.a_store = factor(spec.a, FMA, spec.sums, spec.native_half)
        self.b_store = factor(spec.b, FMA, spec.sums, spec.native_half)
        if spec.form == "wide":
            self.pack_a = pack(module, FMA, self.a_store, spec.rows, spec.lanes, of_a=True)
        self.finish = finish(module, spec)
        self.block = Value("%arguments", "ptr")
        with module.function(spec.kernel, [self.block]) as body:
            self.body = body
            self.words = Arguments(body, spec, self.block)
            self._write()

    def _write(self) -> None:
        body, words = self.body, self.words
        at = claims.scratch_of_worker(body, words)
        self.x = at
        self.near = body.offset(at, "i8", words["a_bytes"])
        self.sums = body.offset(self.near, "i8", words["b_bytes"])
        self.other = self._second(self.sums)
        held = body.variable("i64", Value("-1", "i64"), "held")
        with claims.single(body, words) as item:
            chunk = body.binary("urem", item, words["chunks"])
            place = body.binary("udiv", item, words["chunks"])
            block = body.binary("urem", place, words["column_blocks"])
            matrix = body.binary("udiv", place, words["column_blocks"])
            self.start = body.mul(chunk, words["chunk_k"], "start")
            self.stop = body.minimum(body.add(self.start, words["chunk_k"]), words["k"], "stop")
            begins = body.offset(words["offsets"], "i64", body.mul(matrix, len(OFFSETS)))
            self.begins = {
                name: body.load(body.offset(begins, "i64", number), "i64", f"{name}.begins")
                for number, name in enumerate(OFFSETS)
            }
            with body.when(body.compare("ne", matrix, body.read(held)), "new"):
                self._take_rows()
                body.write(held, matrix)
            first = body.mul(block, self.spec.columns, "first")
            count = body.minimum(body.sub(words["n"], first), self.spec.columns, "columns")
            one = body.compare("eq", words["chunks"], Value("1", "i64"), "one")
            own = body.offset(words["parts"], "i8", body.mul(item, self._part_bytes))
            self.target = body.select(one, self.sums, own)
            self._sum("b", self.target, first, count)
            if self.spec.gate:
                self._sum("gate", self._second(self.target), first, count)
            with body.choose(one, "alone") as branch:
                self._finish(first, count)
                branch.otherwise()
                done = body.offset(words["finished"], "i64", place)
                before = body.result("before", "i64", f"atomicrmw add {done.typed}, i64 1 acq_rel")
                last = body.compare("eq", body.add(before, 1), words["chunks"])
                with body.when(last, "last"):
                    self._join(body.mul(place, words["chunks"]))
                    self._finish(first, count)

    @property
    def _size(self) -> int:
        """The number of sums of an item."""
        return self.spec.rows * self.spec.columns

    @property
    def _part_bytes(self) -> int:
        return self._size * self.item_bytes * (2 if self.spec.gate else 1)

    def _second(self, sums: Value) -> Value:
        """The sums of the gate, which follow the others."""
        return self.body.offset(sums, self.scalar, self._size)

    def _join(self, item: Value) -> None:
        """Add the sums of all chunks, from an item on, into scratch."""
        body, words = self.body, self.words
        first = body.offset(words["parts"], "i8", body.mul(item, self._part_bytes))
        many = self._part_bytes // self.item_bytes
        with body.loop("sum", 0, many, self.spec.lanes) as at:
            total = body.variable(self.type, body.constant(0.0, self.type), "joined")
            with body.loop("chunk", 0, words["chunks"]) as chunk:
                index = body.add(body.mul(chunk, many), at)
                more = body.load(body.offset(first, self.scalar, index), self.type, "more")
                body.write(total, body.binary("fadd", body.read(total), more))
            body.store(body.read(total), body.offset(self.sums, self.scalar, at))

    def _take_rows(self) -> None:
        """The rows of A, ready to multiply, in the order in which tiles read them."""
        raise NotImplementedError

    @property
    def _groups(self) -> list[range]:
        """The rows of each register tile."""
        rows = self.spec.rows
        count = -(-rows // self.spec.tile_rows)
        edges = [rows * number // count for number in range(count + 1)]
        return [range(*pair) for pair in pairwise(edges)]

    def _sum(self, name: str, target: Value, first: Value, count: Value) -> None:
        """The sums of a block of columns."""
        raise NotImplementedError

    def _totals(self, places: list[list[Value]]) -> list[list[Variable]]:
        """Sums of a tile, out of scratch into registers."""
        body = self.body
        return [
            [body.variable(self.type, body.load(place, self.type), "acc") for place in line]
            for line in places
        ]

    def _keep(self, totals: list[list[Variable]], places: list[list[Value]]) -> None:
        """Sums of a tile, back into scratch."""
        body = self.body
        for line, each in zip(places, totals, strict=True):
            for place, total in zip(line, each, strict=True):
                body.store(body.read(total), place)

    def _add(self, totals: list[list[Variable]], left: Iterable[Value], right: list[Value]) -> None:
        """Add the products of each row by each vector of B."""
        body = self.body
        for x, line in zip(left, totals, strict=True):
            for w, total in zip(right, line, strict=True):
                body.write(total, body.multiply_add(x, w, body.read(total), "acc"))

    def _finish(self, first: Value, count: Value) -> None:
        """The results of all sums, which lie in blocks of `width` columns."""
        body, words, spec = self.body, self.words, self.spec
        with body.loop("j", 0, count, spec.width) as j:
            pointers = []
            for name, dtype in (("out", spec.out), ("c", spec.c), ("bias", spec.bias)):
                if dtype is None:
                    pointers.append(Value("null", "ptr"))
                    continue
                store = reading(dtype, spec.finished, spec.native_half)
                index = body.mul(body.add(first, j), words[f"{name}_n"])
                index = body.add(index, self.begins[name])
                pointers.append(store.at(body, words[name], index))
            before = body.mul(j, spec.rows)
            sums = [body.offset(each, self.scalar, before) for each in (self.sums, self.other)]
            rows = Value(str(spec.rows), "i64")
            columns = body.minimum(body.sub(count, j), spec.width)
            body.invoke(self.finish, [self.block, *sums, rows, columns, *pointers])

    def _masked(self, address: Value, exist: Value) -> Value:
        """A vector of B of which so many elements exist; the others are 0."""
        body, store, lanes = self.body, self.b_store, self.spec.lanes
        stored = "i16" if store.stored == "half" else store.stored
        exists = masked.first(body, exist, lanes)
        bits = masked.load(body, address, vector(lanes, stored), exists)
        return store.widen(body, body.cast("bitcast", bits, vector(lanes, store.stored)))


class _Wide(_FewRows):
    """Columns are neighbours. x[c, row]."""

    def _take_rows(self) -> None:
        body, words, store = self.body, self.words, self.a_store
        array = store.at(body, words["a"], self.begins["a"])
        rows = Value(str(self.spec.rows), "i64")
        strides = (words["a_m"], words["a_k"])
        body.invoke(self.pack_a, [self.x, array, *strides, rows, words["k"]])

    def _sum(self, name: str, target: Value, first: Value, count: Value) -> None:
        self.name, self.target, self.count = name, target, count
        body, words, spec = self.body, self.words, self.spec
        zero = body.constant(0.0, self.type)
        with body.loop("at", 0, self._size, spec.lanes) as at:
            body.store(zero, body.offset(target, self.scalar, at))
        start = body.add(self.begins[name], first)
        array = self.b_store.at(body, words[name], start)
        with body.loop("c", self.start, self.stop, spec.lines) as c:
            self.x_lines = body.offset(self.x, self.scalar, body.mul(c, spec.rows))
            self.lines = self.b_store.at(body, array, body.mul(c, words[f"{name}_k"]))
            self.depth = body.minimum(body.sub(self.stop, c), spec.lines, "depth")
            self._inputs()

    def _inputs(self) -> None:
        """Add the products of some inputs to the sums of all columns."""
        body, spec, store = self.body, self.spec, self.b_store
        tiles = body.sub(self.count, body.binary("urem", self.count, spec.width))
        whole = body.sub(self.count, body.binary("urem", self.count, spec.lanes))
        with body.loop("j", 0, tiles, spec.width) as j:
            sums = body.offset(self.target, self.scalar, body.mul(j, spec.rows))
            self._tiles(sums, j, spec.vectors, lambda at: store.load(body, at, spec.lanes))
        rest = body.offset(self.target, self.scalar, body.mul(tiles, spec.rows))
        with body.loop("j", tiles, whole, spec.lanes) as j:
            sums = body.offset(rest, self.scalar, body.sub(j, tiles))
            self._tiles(sums, j, 1, lambda at: store.load(body, at, spec.lanes))
        with body.when(body.compare("slt", whole, self.count), "last"):
            left = body.sub(self.count, whole)
            sums = body.offset(rest, self.scalar, body.sub(whole, tiles))
            self._tiles(sums, whole, 1, lambda at: self._masked(at, left))

    def _tiles(self, target: Value, j: Value, vectors: int, read: Callable[[Value], Value]) -> None:
        """Add the products of some inputs to the sums of some vectors of columns."""
        body, spec = self.body, self.spec
        for rows in self._groups:
            sums = [self._vectors(target, row * spec.width, vectors) for row in rows]
            totals = self._totals(sums)
            with body.loop("c", 0, self.depth) as c:
                near = self._vectors(self.near, body.mul(c, vectors * spec.lanes), vectors)
                if rows.start:
                    right = [body.load(place, self.type, "b") for place in near]
                else:
                    right = self._line(c, j, vectors, read)
                    if rows.stop < spec.rows:
                        for number, place in zip(right, near, strict=True):
                            body.store(number, place)
                x = body.offset(self.x_lines, self.scalar, body.mul(c, spec.rows))
                self._add(totals, (self._splat(x, row) for row in rows), right)
            self._keep(totals, sums)

    def _splat(self, x: Value, row: int) -> Value:
        body, spec = self.body, self.spec
        number = body.load(body.offset(x, self.scalar, row), self.scalar, "x")
        return body.splat(number, spec.lanes)

    def _vectors(self, base: Value, first: Operand, vectors: int) -> list[Value]:
        """The places of neighbouring vectors."""
        body, spec = self.body, self.spec
        start = body.offset(base, self.scalar, first)
        return [body.offset(start, self.scalar, v * spec.lanes) for v in range(vectors)]

    def _line(
        self, c: Value, j: Value, vectors: int, read: Callable[[Value], Value]
    ) -> list[Value]:
        """Vectors of a line of B."""
        body, spec, store = self.body, self.spec, self.b_store
        step = self.words[f"{self.name}_k"]
        place = store.at(body, self.lines, body.add(body.mul(c, step), j))
        found = [read(store.at(body, place, v * spec.lanes)) for v in range(vectors)]
        if spec.asks and vectors == spec.vectors:
            if spec.ahead:
                ahead = body.offset(place, "i8", spec.ahead)
            else:
                ahead = store.at(body, place, body.mul(step, spec.lines))
            for before in range(0, vectors * spec.lanes * ITEM_BYTES[spec.b], 64):
                prefetch(body, body.offset(ahead, "i8", before), near=spec.near)
        return found


class _Deep(_FewRows):
    """Inputs are neighbours. x[c / lanes, row, c % lanes]; each sum has a vector in scratch."""

    def _take_rows(self) -> None:
        body, words, spec, store = self.body, self.words, self.spec, self.a_store
        lanes, k = spec.lanes, words["k"]
        near = body.compare("eq", words["a_k"], Value("1", "i64"))
        whole = body.select(near, body.sub(k, body.binary("urem", k, lanes)), Value("0", "i64"))
        array = store.at(body, words["a"], self.begins["a"])
        with body.loop("row", 0, spec.rows) as row:
            line = store.at(body, array, body.mul(row, words["a_m"]))
            with body.loop("c", 0, whole, lanes) as c:
                x = store.load(body, store.at(body, line, c), lanes)
                body.store(x, self._x(row, c))
            with (
                body.loop("c", whole, k, lanes) as c,
                body.loop("lane", 0, body.minimum(body.sub(k, c), lanes)) as lane,
            ):
                at = store.at(body, line, body.mul(body.add(c, lane), words["a_k"]))
                place = body.offset(self._x(row, c), self.scalar, lane)
                body.store(store.load(body, at), place)

    def _sum(self, name: str, target: Value, first: Value, count: Value) -> None:
        self.name, self.count = name, count
        body, words, spec = self.body, self.words, self.spec
        start = body.add(self.begins[name], body.mul(first, words[f"{name}_n"]))
        self.array = self.b_store.at(body, words[name], start)
        zero, last = body.constant(0.0, self.type), body.mul(count, spec.rows * spec.lanes)
        with body.loop("at", 0, last, spec.lanes) as at:
            body.store(zero, body.offset(self.near, self.scalar, at))
        whole = body.sub(count, body.binary("urem", count, spec.vectors))
        with body.loop("block", 0, words["k"], words["block_k"]) as c:
            end = body.minimum(body.add(c, words["block_k"]), words["k"])
            with body.loop("j", 0, whole, spec.vectors) as j:
                self._tiles(c, end, j, spec.vectors)
            with body.loop("j", whole, count) as j:
                self._tiles(c, end, j, 1)
        with body.loop("row", 0, spec.rows) as row, body.loop("j", 0, count, spec.lanes) as j:
            place = body.add(body.mul(row, spec.width), j)
            body.store(self._across(j, row), body.offset(target, self.scalar, place))

    def _held(self, j: Value, row: Operand) -> Value:
        """The place of the vector of a sum."""
        body, spec = self.body, self.spec
        index = body.mul(body.add(body.mul(j, spec.rows), row), spec.lanes)
        return body.offset(self.near, self.scalar, index)

    def _tiles(self, c: Value, end: Value, j: Value, columns: int) -> None:
        """Add the products of a block of inputs to the sums of some columns."""
        body, words, spec, store = self.body, self.words, self.spec, self.b_store
        step = words[f"{self.name}_n"]
        lines = [store.at(body, self.array, body.mul(body.add(j, n), step)) for n in range(columns)]
        # what comes next: the same inputs of more columns, or more inputs of the first columns
        after, zero = body.add(j, columns), Value("0", "i64")
        more = body.compare("slt", end, words["k"])
        last = body.compare("sge", body.add(after, columns), self.count)
        again = body.binary("and", more, last)
        after = body.select(again, zero, after)
        later = body.select(again, words["block_k"], zero)
        ahead = [
            store.at(body, self.array, body.add(body.mul(body.add(after, n), step), later))
            for n in range(columns)
        ]
        whole = body.sub(end, body.binary("urem", body.sub(end, c), spec.lanes))
        groups = self._groups
        for number, rows in enumerate(groups):
            places = [[self._held(body.add(j, n), row) for n in range(columns)] for row in rows]
            totals = self._totals(places)
            with body.loop("c", c, whole, spec.lanes) as at:
                right = [store.load(body, store.at(body, line, at), spec.lanes) for line in lines]
                left = [body.load(self._x(row, at), self.type, "x") for row in rows]
                self._add(totals, left, right)
                if spec.asks and columns == spec.vectors:
                    for line in ahead[number :: len(groups)]:
                        prefetch(body, store.at(body, line, at), near=spec.near)
            with body.when(body.compare("slt", whole, end), "last"):
                exist = body.sub(end, whole)
                right = [self._masked(store.at(body, line, whole), exist) for line in lines]
                left = [self._last(row, whole, exist) for row in rows]
                self._add(totals, left, right)
            self._keep(totals, places)

    def _x(self, row: Operand, c: Value) -> Value:
        """The place of a vector of x."""
        body, spec = self.body, self.spec
        before = row * spec.lanes if isinstance(row, int) else body.mul(row, spec.lanes)
        return body.offset(self.x, self.scalar, body.add(body.mul(c, spec.rows), before))

    def _last(self, row: int, c: Value, exist: Value) -> Value:
        """The last elements of a row of A; nothing was written behind them, and they become 0."""
        body = self.body
        found = body.load(self._x(row, c), self.type, "x")
        exists = masked.first(body, exist, self.spec.lanes)
        return body.select(exists, found, body.constant(0.0, self.type))

    def _across(self, j: Value, row: Value) -> Value:
        """The sums of a row and a vector of columns: theirs turned, and added."""
        body = self.body
        columns = (self._held(body.add(j, n), row) for n in range(self.spec.lanes))
        parts = transpose(body, [body.load(place, self.type, "acc") for place in columns])
        while len(parts) > 1:
            half = len(parts) // 2
            pairs = zip(parts[:half], parts[half:], strict=True)
            parts = [body.binary("fadd", *pair, "sum") for pair in pairs]
        return parts[0]
