"""Moves between the caller's arrays and a worker's scratch, where the lanes are parallel rows.

    pack:    scratch[d, lane] = array[lane, d] * factor     lanes past the end become 0
    unpack:  array[lane, d]   = scratch[d, lane] * factor   only lanes that exist
    add:     array[lane, d]  += scratch[d, lane] * factor   only lanes that exist
    widen:   scratch[i, j]    = array[i, j]                 as elements to compute with

Arrays may have any strides. Whole squares of lanes x lanes go through a transpose in registers when
`d` is contiguous, whole vectors are copied when the lanes are, and the rest goes element by
element. Each is a function of its own, one for each type of array and width of scratch: kernels
call them for several operands.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from tilefold.backends.cpu.kernels.ir import Body, Module, Value
from tilefold.backends.cpu.kernels.microkernel import Shape
from tilefold.backends.cpu.kernels.storage import Storage


def pack(module: Module, shape: Shape, storage: Storage) -> str:
    """`(scratch, array, stride of lanes, stride of d, lanes that exist, dim, factor)`: its name."""
    return _defined(module, f"pack_{storage.dtype}_{shape.width}", shape, storage, _Pack)


def unpack(module: Module, shape: Shape, storage: Storage) -> str:
    """`(scratch, array, stride of lanes, stride of d, lanes that exist, dim, factor)`: its name."""
    return _defined(module, f"unpack_{storage.dtype}_{shape.width}", shape, storage, _Unpack)


def add(module: Module, shape: Shape, storage: Storage) -> str:
    """`unpack` that adds to the elements of the array."""
    return _defined(module, f"add_{storage.dtype}_{shape.width}", shape, storage, _Add)


def widen(module: Module, shape: Shape, storage: Storage) -> str:
    """`(scratch, array, outer, inner, outer stride, inner stride, line)`: its name.

    Lines of `line` elements in scratch; whole vectors where the inner stride is 1.
    """
    name = f"widen_{storage.dtype}"
    if module.defines(name):
        return name
    integers = ("outer", "inner", "outer_stride", "inner_stride", "line")
    parameters = [Value("%scratch", "ptr"), Value("%array", "ptr")]
    parameters += [Value(f"%{integer}", "i64") for integer in integers]
    scratch, array, outer, inner, outer_stride, inner_stride, line = parameters
    with module.function(name, parameters, internal=True) as body:
        unit = body.compare("eq", inner_stride, Value("1", "i64"))
        whole = body.sub(inner, body.binary("urem", inner, shape.lanes))
        vectors_end = body.select(unit, whole, Value("0", "i64"))
        with body.loop("i", 0, outer) as i:
            source = storage.at(body, array, body.mul(i, outer_stride))
            target = body.offset(scratch, shape.scalar, body.mul(i, line))
            with body.loop("j", 0, vectors_end, shape.lanes) as j:
                numbers = storage.load(body, storage.at(body, source, j), shape.lanes)
                body.store(numbers, body.offset(target, shape.scalar, j))
            with body.loop("j", vectors_end, inner) as j:
                number = storage.load(body, storage.at(body, source, body.mul(j, inner_stride)))
                body.store(number, body.offset(target, shape.scalar, j))
    return name


def _defined(
    module: Module, name: str, shape: Shape, storage: Storage, direction: type[_Move]
) -> str:
    """Both directions: a vector of lanes at a time, the widest way that its strides allow."""
    if module.defines(name):
        return name
    with module.function(name, _parameters(shape), internal=True) as body:
        move = direction(body, shape, storage)
        with body.loop("block", 0, shape.width, shape.lanes) as block:
            start = body.variable("i64", Value("0", "i64"), "start")
            whole = move.whole(block)
            body.comment("d is contiguous: squares of lanes x lanes, turned in registers")
            with body.when(body.binary("and", whole, move.dim_contiguous), "squares"):
                with body.loop("d", 0, move.squares_end, shape.lanes) as d:
                    move.square(block, d)
                body.write(start, move.squares_end)
            body.comment("lanes are contiguous: whole vectors")
            with body.when(body.binary("and", whole, move.lanes_contiguous), "vectors"):
                with body.loop("d", 0, move.dim) as d:
                    move.line(block, d)
                body.write(start, move.dim)
            body.comment("the rest: number by number")
            end = move.end(block)
            with (
                body.loop("d", body.read(start), move.dim) as d,
                body.loop("lane", block, end) as lane,
            ):
                move.number(lane, d)
    return name


def transpose(body: Body, rows: Sequence[Value]) -> list[Value]:
    """The columns of a square of vectors: at each step halves of half the size change places."""
    lanes = len(rows)
    result = list(rows)
    half = lanes // 2
    while half:
        upper = [lane if not lane & half else lanes + lane - half for lane in range(lanes)]
        lower = [lane + half if not lane & half else lanes + lane for lane in range(lanes)]
        for i in range(lanes):
            if not i & half:
                a, b = result[i], result[i + half]
                result[i] = body.shuffle(a, b, upper)
                result[i + half] = body.shuffle(a, b, lower)
        half //= 2
    return result


def _parameters(shape: Shape) -> list[Value]:
    integers = ("lane_stride", "d_stride", "valid", "dim")
    return [
        Value("%scratch", "ptr"),
        Value("%array", "ptr"),
        *(Value(f"%{name}", "i64") for name in integers),
        Value("%factor", shape.scalar),
    ]


class _Move(ABC):
    """The addresses that both directions share, and what each does at one place."""

    def __init__(self, body: Body, shape: Shape, storage: Storage) -> None:
        self._body, self._shape, self._storage = body, shape, storage
        scratch, array, lane_stride, d_stride, valid, dim, factor = _parameters(shape)
        self._scratch, self._array = scratch, array
        self._lane_stride, self._d_stride = lane_stride, d_stride
        self.valid, self.dim, self._factor = valid, dim, factor
        self._factors = body.splat(factor, shape.lanes, "factors")
        one = Value("1", "i64")
        self.dim_contiguous = body.compare("eq", self._d_stride, one)
        lanes_contiguous = body.compare("eq", self._lane_stride, one)
        both = body.binary("and", self.dim_contiguous, lanes_contiguous)
        self.lanes_contiguous = body.binary("xor", lanes_contiguous, both)
        self.squares_end = body.sub(self.dim, body.binary("urem", self.dim, shape.lanes))

    def scaled(self, value: Value) -> Value:
        """An element or a vector times the factor."""
        factor = self._factors if value.lanes > 1 else self._factor
        return self._body.binary("fmul", value, factor)

    def whole(self, block: Value) -> Value:
        """True if all lanes of the vector that begins at `block` exist."""
        return self._body.compare("sle", self._body.add(block, self._shape.lanes), self.valid)

    def scratch(self, d: Value, lane: Value) -> Value:
        index = self._body.add(self._body.mul(d, self._shape.width), lane)
        return self._body.offset(self._scratch, self._shape.scalar, index)

    def load(self, lane: Value, d: Value, lanes: int = 1) -> Value:
        """Read elements of the array, ready to compute with."""
        return self._storage.load(self._body, self.array(lane, d), lanes)

    def store(self, value: Value, lane: Value, d: Value) -> None:
        """Write elements to the array, times the factor, rounded to its type."""
        self._storage.store(self._body, self.scaled(value), self.array(lane, d))

    def array(self, lane: Value, d: Value) -> Value:
        body = self._body
        index = body.add(body.mul(lane, self._lane_stride), body.mul(d, self._d_stride))
        return self._storage.at(body, self._array, index)

    @abstractmethod
    def square(self, block: Value, d: Value) -> None:
        """Move lanes x lanes elements, turned."""

    @abstractmethod
    def line(self, block: Value, d: Value) -> None:
        """Move one vector."""

    @abstractmethod
    def number(self, lane: Value, d: Value) -> None:
        """Move one element."""

    @abstractmethod
    def end(self, block: Value) -> Value:
        """One past the last lane to move one by one."""


class _Pack(_Move):
    def square(self, block: Value, d: Value) -> None:
        body, lanes = self._body, self._shape.lanes
        rows = [self.load(body.add(block, i), d, lanes) for i in range(lanes)]
        for i, column in enumerate(transpose(body, rows)):
            body.store(self.scaled(column), self.scratch(body.add(d, i), block))

    def line(self, block: Value, d: Value) -> None:
        numbers = self.load(block, d, self._shape.lanes)
        self._body.store(self.scaled(numbers), self.scratch(d, block))

    def number(self, lane: Value, d: Value) -> None:
        body, scalar = self._body, self._shape.scalar
        inside = body.compare("slt", lane, self.valid)
        safe = body.minimum(lane, body.sub(self.valid, 1))
        number = self.scaled(self.load(safe, d))
        number = body.select(inside, number, body.constant(0.0, scalar))
        body.store(number, self.scratch(d, lane))

    def end(self, block: Value) -> Value:
        return self._body.add(block, self._shape.lanes)


class _Unpack(_Move):
    def square(self, block: Value, d: Value) -> None:
        body, lanes = self._body, self._shape.lanes
        columns = [
            body.load(self.scratch(body.add(d, i), block), self._shape.vector) for i in range(lanes)
        ]
        for i, row in enumerate(transpose(body, columns)):
            self.store(row, body.add(block, i), d)

    def line(self, block: Value, d: Value) -> None:
        self.store(self._body.load(self.scratch(d, block), self._shape.vector), block, d)

    def number(self, lane: Value, d: Value) -> None:
        self.store(self._body.load(self.scratch(d, lane), self._shape.scalar), lane, d)

    def end(self, block: Value) -> Value:
        return self._body.minimum(self.valid, self._body.add(block, self._shape.lanes))


class _Add(_Unpack):
    def store(self, value: Value, lane: Value, d: Value) -> None:
        body = self._body
        total = body.binary("fadd", self.load(lane, d, value.lanes), self.scaled(value))
        self._storage.store(body, total, self.array(lane, d))
