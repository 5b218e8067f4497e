"""Register tiles: sums of a panel of A by a panel of B.

    sums[i, j] = begin[i, j] + the sum over c of A[c, i] B[c, j]        i < rows, j < columns

Both panels lie in the order in which they are read. In vector registers a step takes `rows`
broadcasts and `vectors` loads for rows x vectors products; in tile registers (AMX) two loads of
each side feed four products.
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels import masked
from tilefold.backends.cpu.kernels.ir import (
    Body,
    Module,
    Operand,
    Value,
    Variable,
    vector,
)
from tilefold.backends.cpu.kernels.prefetch import prefetch
from tilefold.backends.cpu.matmul.panels import SCALARS
from tilefold.backends.cpu.matmul.spec import ITEM_BYTES, GemmSpec

TILE_ROWS = 16
"""Rows of a tile register, and words of a row."""


def tile(module: Module, spec: GemmSpec, vectors: int, *, short: bool = False) -> str:
    """The name of `(a, b, depth, sums, stride, begin, begin stride, ahead, ahead step)`.

    It makes the sums of the first `vectors` of a panel. `depth` counts steps. Strides are those of
    the rows of `sums` and of `begin`, what they begin with, in elements. `ahead` is memory that the
    next tiles read: each step asks for a line of it, `ahead step` bytes further, so that lines
    arrive one by one while products are made.

    `spec.more` are further integers: the rows and columns that exist, and the stride of A's rows
    where these are read in place. A `short` tile has a row less.
    """
    name = f"short_{vectors}" if short else f"tile_{vectors}"
    if not module.defines(name):
        kind = _InTiles if spec.unit.tiles else _InVectors
        kind(module, name, spec, vectors, spec.rows - short)
    return name


def add_product(body: Body, unit: str, left: Value, right: Value, total: Value) -> Value:
    """total + left * right, and all products of the words of a lane.

    Integers of words of "vnni" have no sign in left, and one in right.
    """
    lanes, type_ = total.lanes, total.type
    if unit == "fma" and total.element == "i32":
        return body.add(total, body.mul(left, right))
    if unit == "fma":
        return body.multiply_add(left, right, total, "acc")
    if unit == "vnni":
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return body.call(name, type_, [total, left, right], "acc")
    if unit == "dot":
        halves = [body.cast("bitcast", each, vector(2 * lanes, "bfloat")) for each in (left, right)]
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}"
        return body.call(name, type_, [total, *halves], "acc")
    halves = [body.cast("bitcast", each, vector(2 * lanes, "i16")) for each in (left, right)]
    names = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}
    return body.add(total, body.call(f"llvm.x86.{names[lanes]}", type_, halves))


class _Tile:
    """The parameters, and memory that is asked for ahead."""

    def __init__(self, module: Module, name: str, spec: GemmSpec, vectors: int, rows: int) -> None:
        self.spec, self.vectors, self.rows = spec, vectors, rows
        self.scalar = SCALARS[spec.sums]
        self.type = vector(spec.lanes, self.scalar)
        pointers = [Value(f"%{name}", "ptr") for name in ("left", "right", "to", "from", "ahead")]
        self.left, self.right, self.sums, self.begin, self.ahead = pointers
        names = ("depth", "to_stride", "from_stride", "ahead_step")
        integers = [Value(f"%{name}", "i64") for name in names]
        self.depth, self.stride, self.begin_stride, self.ahead_step = integers
        parameters = [self.left, self.right, self.depth, self.sums, self.stride]
        parameters += [self.begin, self.begin_stride, self.ahead, self.ahead_step]
        self.more = {name: Value(f"%{name}", "i64") for name in spec.more}
        parameters += self.more.values()
        with module.function(name, parameters, internal=True) as body:
            self.body = body
            self.write()

    def write(self) -> None:
        """The body of the function."""
        raise NotImplementedError

    def row(self, base: Value, row: int, stride: Value) -> Value:
        """The address of a row of sums."""
        body = self.body
        return body.offset(base, self.scalar, body.mul(stride, row)) if row else base

    def fetch(self, start: Value, size: int, *, write: bool) -> None:
        """Ask for memory that is used after the loop, or in the next one."""
        for before in range(0, size, 64):
            address = self.body.offset(start, "i8", before)
            prefetch(self.body, address, near=3 if write else 2, write=write)


class _InVectors(_Tile):
    """Sums in vector registers: one row of them for each row of A."""

    def write(self) -> None:
        body, spec = self.body, self.spec
        self._fetch_sums()
        if spec.a_in_place:
            self.lefts = self._rows_that_exist(self.left, self.more["left_stride"])
        places = [
            [body.variable(self.type, first, "acc") for first in self._first()]
            for _ in range(self.rows)
        ]
        with body.loop("c", 0, self.depth) as c:
            at = body.offset(self.ahead, "i8", body.mul(c, self.ahead_step))
            self.fetch(at, 1, write=False)
            right = [self._right(c, j) for j in range(self.vectors)]
            for i, line in enumerate(places):
                left = self._left(c, i)
                for j, place in enumerate(line):
                    body.write(place, self._product(left, right[j], body.read(place, "acc")))
        if not spec.clipped:
            self._write_whole(places)
            return
        columns = Value(str(self.vectors * spec.lanes), "i64")
        whole = body.compare("sge", self.more["columns"], columns)
        if not self.all_exist:
            rows = body.compare("eq", self.more["rows"], Value(str(self.rows), "i64"))
            whole = body.binary("and", rows, whole)
        with body.choose(whole, "whole") as branch:
            self._write_whole(places)
            branch.otherwise()
            self._write_clipped(places)

    @property
    def all_exist(self) -> bool:
        """True if this tile never has rows that do not exist: a short one has them."""
        return self.spec.shortens and self.rows == self.spec.rows

    def _fetch_sums(self) -> None:
        """Ask for the sums: they lie 100 ns away if they are in memory.

        A clipped tile asks for the result, which the first block writes without reading it. Its
        rows begin anywhere in a line, so for their ends too.
        """
        body, spec = self.body, self.spec
        size = self.vectors * spec.lanes * ITEM_BYTES[spec.sums]
        base, stride = self.begin, self.begin_stride
        if spec.clipped:
            base, stride = self.sums, self.stride
        for i in range(self.rows):
            row = self.row(base, i, stride)
            self.fetch(row, size, write=True)
            if spec.clipped:
                self.fetch(body.offset(row, "i8", size - 1), 1, write=True)

    def _write_whole(self, places: list[list[Variable]]) -> None:
        """Write all sums, with what they begin with."""
        for i, line in enumerate(places):
            source = self.row(self.begin, i, self.begin_stride)
            target = self.row(self.sums, i, self.stride)
            for j, place in enumerate(line):
                before = self.body.load(self._at(source, j), self.type, "before")
                self.body.store(self._sum(before, place), self._at(target, j))

    def _write_clipped(self, places: list[list[Variable]]) -> None:
        """Write the rows and columns that exist. Rows behind the last one are equal to it.

        All are read before any is written, so the last one may be written several times.
        """
        body, last = self.body, self.vectors - 1
        left = body.sub(self.more["columns"], last * self.spec.lanes)
        exists = masked.first(body, left, self.spec.lanes)
        sources = self._rows_that_exist(self.begin, self.begin_stride)
        totals = []
        for source, line in zip(sources, places, strict=True):
            for j, place in enumerate(line):
                address = self._at(source, j)
                if j < last:
                    before = body.load(address, self.type, "before")
                else:
                    before = masked.load(body, address, self.type, exists, "before")
                totals.append(self._sum(before, place))
        for target in self._rows_that_exist(self.sums, self.stride):
            for j in range(self.vectors):
                total, address = totals.pop(0), self._at(target, j)
                if j < last:
                    body.store(total, address)
                else:
                    masked.store(body, total, address, exists)

    def _rows_that_exist(self, base: Value, stride: Value) -> list[Value]:
        """The addresses of all rows; those behind the last one are its own."""
        body, rows = self.body, [base]
        if self.all_exist:
            return [self.row(base, i, stride) for i in range(self.rows)]
        for i in range(1, self.rows):
            more = body.compare("sgt", self.more["rows"], Value(str(i), "i64"))
            following = body.offset(rows[-1], self.scalar, stride)
            rows.append(body.select(more, following, rows[-1], "row"))
        return rows

    def _sum(self, before: Value, place: Variable) -> Value:
        opcode = "add" if self.spec.sums == "int32" else "fadd"
        return self.body.binary(opcode, before, self.body.read(place))

    def _at(self, row: Value, j: int) -> Value:
        return self.body.offset(row, self.scalar, j * self.spec.lanes)

    @property
    def _element(self) -> str:
        return "i32" if self.spec.unit.bits else self.scalar

    def _first(self) -> list[Value]:
        """What the sums of a row begin with: 0, or the head of the panel."""
        body, spec = self.body, self.spec
        if not spec.flips:
            return [body.constant(0, self.type)] * self.vectors
        head = body.offset(self.right, "i32", -spec.width)
        return [body.load(self._at(head, j), self.type, "head") for j in range(self.vectors)]

    def _right(self, c: Value, j: int) -> Value:
        body, spec = self.body, self.spec
        index = body.add(body.mul(c, spec.width), j * spec.lanes)
        address = body.offset(self.right, self._element, index)
        return body.load(address, vector(spec.lanes, self._element), "b")

    def _left(self, c: Value, i: int) -> Value:
        body, spec = self.body, self.spec
        if spec.a_in_place:
            address = body.offset(self.lefts[i], self._element, c)
        else:
            index = body.add(body.mul(c, spec.rows), i)
            address = body.offset(self.left, self._element, index)
        number = body.load(address, self._element, "a")
        return body.splat(number, spec.lanes, "a")

    def _product(self, left: Value, right: Value, total: Value) -> Value:
        if self.spec.unit.name == "vnni" and self.spec.b == "uint8":
            left, right = right, left
        return add_product(self.body, self.spec.unit.name, left, right, total)


class _InTiles(_Tile):
    """Sums in tile registers: up to two rows and two columns of tiles."""

    def write(self) -> None:
        body, spec = self.body, self.spec
        ups = spec.rows // TILE_ROWS
        line = Value(str(4 * spec.width), "i64")
        strides = [body.mul(each, 4) for each in (self.stride, self.begin_stride)]
        for i in range(ups):
            for j in range(self.vectors):
                corner = self._corner(self.begin, i, j, self.begin_stride)
                self._tile("tileloadd64", 2 * i + j, corner, strides[1])
        with body.loop("c", 0, self.depth) as c:
            at = body.offset(self.ahead, "i8", body.mul(c, self.ahead_step))
            self.fetch(at, 128, write=False)
            start = body.mul(c, spec.rows * TILE_ROWS)
            for i in range(ups):
                place = body.offset(self.left, "i32", body.add(start, i * TILE_ROWS * TILE_ROWS))
                self._tile("tileloadd64", 4 + i, place, Value("64", "i64"))
            start = body.mul(c, spec.width * TILE_ROWS)
            for j in range(self.vectors):
                place = body.offset(self.right, "i32", body.add(start, j * TILE_ROWS))
                self._tile("tileloadd64", 6 + j, place, line)
                for i in range(ups):
                    tiles = [Value(str(n), "i8") for n in (4 + i, 6 + j)]
                    self._tile(self._instruction, 2 * i + j, *tiles)
        for i in range(ups):
            for j in range(self.vectors):
                corner = self._corner(self.sums, i, j, self.stride)
                self._tile("tilestored64", 2 * i + j, corner, strides[0])

    @property
    def _instruction(self) -> str:
        if self.spec.unit.name == "amx":
            return "tdpbf16ps"
        signs = {"int8": "s", "uint8": "u"}
        return f"tdpb{signs[self.spec.a]}{signs[self.spec.b]}d"

    def _corner(self, base: Value, i: int, j: int, stride: Value) -> Value:
        body = self.body
        index: Operand = j * TILE_ROWS
        if i:
            index = body.add(body.mul(stride, i * TILE_ROWS), index)
        return body.offset(base, self.scalar, index)

    def _tile(self, name: str, number: int, *arguments: Value) -> None:
        body = self.body
        given = [Value(str(number), "i8"), *arguments]
        body.module.declare(f"llvm.x86.{name}", "void", [each.type for each in given])
        body.invoke(f"llvm.x86.{name}", given)
