"""The kernel of a product with few rows of A: B is read once, where it lies.

    for item in (matrix, block of columns, chunk of inputs):        workers take items
        x <- the rows of A, unless the worker has them
        "wide", columns are neighbours:  for some inputs, for vector of columns: sums += x B
        "deep", inputs are neighbours:   for some columns, for vector of inputs: sums += x B
        the last chunk of a block that is done:
            sums <- the sums of all chunks, in order
            out <- sums                                             `finish`

So few products are made of each element that memory is what takes time. "wide" walks several long
rows of B at once, and asks for the next ones ahead; "deep" walks several columns.
"""

from __future__ import annotations

from collections.abc import Callable

from tilefold.backends.cpu.kernels.ir import Module, Operand, Value, Variable, overload, vector
from tilefold.backends.cpu.matmul.arguments import OFFSETS, Arguments
from tilefold.backends.cpu.matmul.finish import finish
from tilefold.backends.cpu.matmul.panels import SCALARS, reading
from tilefold.backends.cpu.matmul.spec import ITEM_BYTES, FewRowsSpec

_PRODUCTS = {64: 24, 32: 10, 16: 10}
"""Accumulators of the form "deep", by the bytes of a vector."""

_ROWS_AT_ONCE = 8
"""Rows of A that the form "deep" takes at once: B's lines come from the first cache again."""


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
        self.a_store = reading(spec.a, spec.sums, spec.native_half)
        self.b_store = reading(spec.b, spec.sums, spec.native_half)
        self.finish = finish(module, spec)
        self.block = Value("%arguments", "ptr")
        with module.function(spec.kernel, [self.block]) as body:
            self.body = body
            self.words = Arguments(body, spec, self.block)
            self._write()

    def _write(self) -> None:
        body, words = self.body, self.words
        worker = words.take("next_worker")
        at = body.offset(words["workspace"], "i8", body.mul(worker, words["workspace_bytes"]))
        self.x = at
        self.sums = body.offset(at, "i8", words["a_bytes"])
        self.other = self._second(self.sums)
        held = body.variable("i64", Value("-1", "i64"), "held")
        with body.forever("item") as end:
            item = words.take("next_item")
            body.leave_unless(body.compare("slt", item, words["items"]), end, "work")
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
            first = body.mul(block, self.spec.width, "first")
            count = body.minimum(body.sub(words["n"], first), self.spec.width, "columns")
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
        return self.spec.rows * self.spec.width

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
        """The rows of A, ready to multiply, one behind the other."""
        body, words, store = self.body, self.words, self.a_store
        start = store.at(body, words["a"], self.begins["a"])
        with body.loop("row", 0, self.spec.rows) as row:
            line = store.at(body, start, body.mul(row, words["a_m"]))
            with body.loop("c", 0, words["k"]) as c:
                number = store.load(body, store.at(body, line, body.mul(c, words["a_k"])))
                body.store(number, self._x(row, c))

    def _x(self, row: Operand, c: Operand) -> Value:
        body = self.body
        index = body.add(body.mul(self.words["k"], row), c)
        return body.offset(self.x, self.scalar, index)

    def _sum(self, name: str, target: Value, first: Value, count: Value) -> None:
        """The sums of a block of columns."""
        raise NotImplementedError

    def _place(self, base: Value, row: int, column: Operand) -> Value:
        """The place of a sum in scratch."""
        body = self.body
        return body.offset(base, self.scalar, body.add(column, row * self.spec.width))

    def _finish(self, first: Value, count: Value) -> None:
        body, words, spec = self.body, self.words, self.spec
        pointers = []
        for name, dtype in (("out", spec.out), ("c", spec.c), ("bias", spec.bias)):
            if dtype is None:
                pointers.append(Value("null", "ptr"))
                continue
            store = reading(dtype, spec.finished, spec.native_half)
            index = body.add(body.mul(first, words[f"{name}_n"]), self.begins[name])
            pointers.append(store.at(body, words[name], index))
        rows = Value(str(spec.rows), "i64")
        body.invoke(self.finish, [self.block, self.sums, self.other, rows, count, *pointers])

    def _masked(self, address: Value, exist: Value) -> Value:
        """A vector of B of which so many elements exist; the others are 0."""
        body, store, lanes = self.body, self.b_store, self.spec.lanes
        stored = "i16" if store.stored == "half" else store.stored
        type_ = vector(lanes, stored)
        numbers = ", ".join(f"i64 {lane}" for lane in range(lanes))
        each = Value(f"<{numbers}>", vector(lanes, "i64"))
        exists = body.compare("slt", each, body.splat(exist, lanes), "exists")
        align = Value(str({"i16": 2, "float": 4, "double": 8}[stored]), "i32")
        given = [address, align, exists, body.constant(0, type_)]
        bits = body.call(f"llvm.masked.load.{overload(type_)}.p0", type_, given)
        return store.widen(body, body.cast("bitcast", bits, vector(lanes, store.stored)))


class _Wide(_FewRows):
    """Columns are neighbours."""

    def _sum(self, name: str, target: Value, first: Value, count: Value) -> None:
        self.name = name
        body, words, spec = self.body, self.words, self.spec
        zero = body.constant(0.0, self.type)
        with body.loop("row", 0, spec.rows) as row:
            line = body.offset(target, self.scalar, body.mul(row, spec.width))
            with body.loop("j", 0, spec.width, spec.lanes) as j:
                body.store(zero, body.offset(line, self.scalar, j))
        start = body.add(self.begins[name], first)
        array = self.b_store.at(body, words[name], start)
        inputs = 8
        rest = body.binary("urem", body.sub(self.stop, self.start), inputs)
        whole = body.sub(self.stop, rest)
        with body.loop("c", self.start, whole, inputs) as c:
            self._inputs(array, target, c, inputs, count)
        with body.loop("c", whole, self.stop) as c:
            self._inputs(array, target, c, 1, count)

    def _inputs(self, array: Value, target: Value, c: Value, inputs: int, count: Value) -> None:
        """Add the products of some inputs to the sums of all columns."""
        body, words, spec, store = self.body, self.words, self.spec, self.b_store
        step = words[f"{self.name}_k"]
        lines = [store.at(body, array, body.mul(body.add(c, n), step)) for n in range(inputs)]
        ahead = body.mul(step, inputs)
        numbers = [
            [
                body.splat(body.load(self._x(row, body.add(c, n)), self.scalar), spec.lanes)
                for n in range(inputs)
            ]
            for row in range(spec.rows)
        ]

        def columns(j: Value, read: Callable[[Value], Value]) -> None:
            right = [read(store.at(body, line, j)) for line in lines]
            for row in range(spec.rows):
                place = self._place(target, row, j)
                total = body.load(place, self.type, "total")
                for number, x in zip(numbers[row], right, strict=True):
                    total = body.multiply_add(number, x, total, "total")
                body.store(total, place)

        whole = body.sub(count, body.binary("urem", count, spec.lanes))
        with body.loop("j", 0, whole, spec.lanes) as j:
            for line in lines:
                self._fetch(store.at(body, line, body.add(ahead, j)))
            columns(j, lambda address: store.load(body, address, spec.lanes))
        with body.when(body.compare("slt", whole, count), "last"):
            left = body.sub(count, whole)
            columns(whole, lambda address: self._masked(address, left))

    def _fetch(self, address: Value) -> None:
        body = self.body
        name, flags = "llvm.prefetch.p0", [Value(number, "i32") for number in ("0", "2", "1")]
        body.module.declare(name, "void", ["ptr", "i32", "i32", "i32"])
        body.invoke(name, [address, *flags])


class _Deep(_FewRows):
    """Inputs are neighbours."""

    def _sum(self, name: str, target: Value, first: Value, count: Value) -> None:
        self.name = name
        body, words, spec = self.body, self.words, self.spec
        at_once = min(spec.rows, _ROWS_AT_ONCE)
        most = _PRODUCTS[spec.lanes * self.item_bytes]
        columns = max(1, min(4, most // at_once))
        start = body.add(self.begins[name], body.mul(first, words[f"{name}_n"]))
        array = self.b_store.at(body, words[name], start)
        whole = body.sub(count, body.binary("urem", count, columns))
        with body.loop("j", 0, whole, columns) as j:
            for row in range(0, spec.rows, at_once):
                self._columns(array, target, j, columns, row, min(at_once, spec.rows - row))
        with body.loop("j", whole, count) as j:
            for row in range(0, spec.rows, at_once):
                self._columns(array, target, j, 1, row, min(at_once, spec.rows - row))

    def _columns(
        self, array: Value, target: Value, j: Value, columns: int, first: int, rows: int
    ) -> None:
        """The sums of some rows and columns."""
        body, words, spec, store = self.body, self.words, self.spec, self.b_store
        zero = body.constant(0.0, self.type)
        totals = [
            [body.variable(self.type, zero, "acc") for _ in range(columns)] for _ in range(rows)
        ]
        lines = [
            store.at(body, array, body.mul(body.add(j, n), words[f"{self.name}_n"]))
            for n in range(columns)
        ]
        rest = body.binary("urem", body.sub(self.stop, self.start), spec.lanes)
        whole = body.sub(self.stop, rest)
        with body.loop("c", self.start, whole, spec.lanes) as c:
            right = [store.load(body, store.at(body, line, c), spec.lanes) for line in lines]
            left = [body.load(self._x(first + row, c), self.type, "x") for row in range(rows)]
            self._add(totals, left, right)
        with body.when(body.compare("slt", whole, self.stop), "last"):
            exist = body.sub(self.stop, whole)
            right = [self._masked(store.at(body, line, whole), exist) for line in lines]
            # behind the rows of A there is room, and what is there is multiplied by 0
            left = [self._last(first + row, whole, exist) for row in range(rows)]
            self._add(totals, left, right)
        for row in range(rows):
            for column in range(columns):
                total = self._across(body.read(totals[row][column]))
                body.store(total, self._place(target, first + row, body.add(j, column)))

    def _last(self, row: int, c: Value, exist: Value) -> Value:
        """The last elements of a row of A; what follows them is another row, and becomes 0."""
        body, lanes = self.body, self.spec.lanes
        found = body.load(self._x(row, c), self.type, "x")
        numbers = ", ".join(f"i64 {lane}" for lane in range(lanes))
        each = Value(f"<{numbers}>", vector(lanes, "i64"))
        exists = body.compare("slt", each, body.splat(exist, lanes), "exists")
        return body.select(exists, found, body.constant(0.0, self.type))

    def _add(self, totals: list[list[Variable]], left: list[Value], right: list[Value]) -> None:
        body = self.body
        for x, line in zip(left, totals, strict=True):
            for w, total in zip(right, line, strict=True):
                body.write(total, body.multiply_add(x, w, body.read(total), "acc"))

    def _across(self, value: Value) -> Value:
        """The sum of all lanes: halves, then halves of them."""
        body, lanes = self.body, value.lanes
        while lanes > 2:
            lanes //= 2
            low = body.shuffle(value, value, range(lanes))
            high = body.shuffle(value, value, range(lanes, 2 * lanes))
            value = body.binary("fadd", low, high, "half")
        return body.binary("fadd", body.lane(value, 0), body.lane(value, 1), "sum")
