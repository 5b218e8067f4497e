"""Register tiles: sums of a panel of A by a panel of B.

    sums[i, j] = begin[i, j] + the sum over c of A[c, i] B[c, j]        i < rows, j < columns

Both panels lie in the order in which they are read. In vector registers a step takes `rows`
broadcasts and `vectors` loads for rows x vectors products; in tile registers (AMX) two loads of
each side feed four products.
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels.ir import Module, Operand, Value, vector
from tilefold.backends.cpu.matmul.panels import SCALARS
from tilefold.backends.cpu.matmul.spec import ITEM_BYTES, GemmSpec

TILE_ROWS = 16
"""Rows of a tile register, and words of a row."""


def tile(module: Module, spec: GemmSpec, vectors: int) -> str:
    """The name of `(a, b, depth, sums, stride, begin, begin stride, ahead, ahead step)`.

    It makes the sums of the first `vectors` of a panel. `depth` counts steps. Strides are those of
    the rows of `sums` and of `begin`, what they begin with, in elements. `ahead` is memory that the
    next tiles read: each step asks for a line of it, `ahead step` bytes further, so that lines
    arrive one by one while products are made.
    """
    name = f"tile_{vectors}"
    if not module.defines(name):
        (_InTiles if spec.unit.tiles else _InVectors)(module, name, spec, vectors)
    return name


class _Tile:
    """The parameters, and memory that is asked for ahead."""

    def __init__(self, module: Module, name: str, spec: GemmSpec, vectors: int) -> None:
        self.spec, self.vectors = spec, vectors
        self.scalar = SCALARS[spec.sums]
        self.type = vector(spec.lanes, self.scalar)
        pointers = [Value(f"%{name}", "ptr") for name in ("left", "right", "to", "from", "ahead")]
        self.left, self.right, self.sums, self.begin, self.ahead = pointers
        names = ("depth", "to_stride", "from_stride", "ahead_step")
        integers = [Value(f"%{name}", "i64") for name in names]
        self.depth, self.stride, self.begin_stride, self.ahead_step = integers
        parameters = [self.left, self.right, self.depth, self.sums, self.stride]
        parameters += [self.begin, self.begin_stride, self.ahead, self.ahead_step]
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
        body = self.body
        near = ("1", "3", "1") if write else ("0", "2", "1")
        name, flags = "llvm.prefetch.p0", [Value(number, "i32") for number in near]
        body.module.declare(name, "void", ["ptr", "i32", "i32", "i32"])
        for before in range(0, size, 64):
            body.invoke(name, [body.offset(start, "i8", before), *flags])


class _InVectors(_Tile):
    """Sums in vector registers: one row of them for each row of A."""

    def write(self) -> None:
        body, spec = self.body, self.spec
        size = self.vectors * spec.lanes * ITEM_BYTES[spec.sums]
        for i in range(spec.rows):  # sums lie 100 ns away if they are in memory
            self.fetch(self.row(self.begin, i, self.begin_stride), size, write=True)
        places = [
            [body.variable(self.type, first, "acc") for first in self._first()]
            for _ in range(spec.rows)
        ]
        with body.loop("c", 0, self.depth) as c:
            at = body.offset(self.ahead, "i8", body.mul(c, self.ahead_step))
            self.fetch(at, 1, write=False)
            right = [self._right(c, j) for j in range(self.vectors)]
            for i, line in enumerate(places):
                left = self._left(c, i)
                for j, place in enumerate(line):
                    body.write(place, self._product(left, right[j], body.read(place, "acc")))
        add = "add" if spec.sums == "int32" else "fadd"
        for i, line in enumerate(places):
            source = self.row(self.begin, i, self.begin_stride)
            target = self.row(self.sums, i, self.stride)
            for j, place in enumerate(line):
                before = body.load(self._at(source, j), self.type, "before")
                body.store(body.binary(add, before, body.read(place)), self._at(target, j))

    def _at(self, row: Value, j: int) -> Value:
        return self.body.offset(row, self.scalar, j * self.spec.lanes)

    @property
    def _element(self) -> str:
        return "i32" if self.spec.unit.bits else self.scalar

    def _first(self) -> list[Value]:
        """What the sums of a row begin with: 0, or the head of the panel."""
        body, spec = self.body, self.spec
        if not (spec.unit.head_bytes(spec.width) and spec.a == "int8"):
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
        index = body.add(body.mul(c, spec.rows), i)
        number = body.load(body.offset(self.left, self._element, index), self._element, "a")
        return body.splat(number, spec.lanes, "a")

    def _product(self, left: Value, right: Value, total: Value) -> Value:
        """total + left * right, and all products of the words of a lane."""
        body, unit, lanes = self.body, self.spec.unit.name, self.spec.lanes
        if unit == "fma" and self.spec.sums == "int32":
            return body.add(total, body.mul(left, right))
        if unit == "fma":
            return body.multiply_add(left, right, total, "acc")
        if unit == "vnni":
            name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
            return body.call(name, self.type, [total, left, right], "acc")
        if unit == "dot":
            halves = [
                body.cast("bitcast", each, vector(2 * lanes, "bfloat")) for each in (left, right)
            ]
            name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}"
            return body.call(name, self.type, [total, *halves], "acc")
        halves = [body.cast("bitcast", each, vector(2 * lanes, "i16")) for each in (left, right)]
        names = {4: "sse2.pmadd.wd", 8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}
        return body.add(total, body.call(f"llvm.x86.{names[lanes]}", self.type, halves))


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
        return "tdpbssd" if self.spec.a == "int8" else "tdpbusd"

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
