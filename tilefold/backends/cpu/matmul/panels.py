"""Panels: parts of A and B in the order in which products read them.

A panel of B has `width` columns, and one of A as many rows as a register tile. Its elements are
those that one step of the contraction takes, side by side, one step after the other:

    panel[c, lane] = array[lane, c]        in the type of the sums; "fma"
    panel[c, lane] = array[lane, 2c : 2c + 2]        pairs of bfloat16 in words of 32 bits; "dot"

Lanes that do not exist are 0 in B. In A they repeat the last one that exists: nobody reads what
comes of them, and they take no branch.
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels.ir import Module, Operand, Value, vector
from tilefold.backends.cpu.kernels.pack import transpose
from tilefold.backends.cpu.kernels.storage import Storage, storage, storage_in
from tilefold.backends.cpu.matmul.spec import Unit

SCALARS = {"float32": "float", "float64": "double", "int32": "i32"}


def reading(dtype: str, sums: str, native_half: bool) -> Storage:
    """How elements of a type are read to be summed in another type."""
    own = storage(dtype, native_half)
    return own if own.scalar == SCALARS[sums] else storage_in(dtype, SCALARS[sums])


def pack(module: Module, unit: Unit, store: Storage, width: int, lanes: int, repeat: bool) -> str:
    """The name of `(panel, array, lane stride, c stride, lanes that exist, depth)`.

    `depth` counts elements. A `repeat` function repeats the last lane, another one writes zeros.
    """
    name = f"pack_{'a' if repeat else 'b'}_{store.dtype}_{width}"
    if not module.defines(name):
        kind = _Pairs if unit.depth == 2 else _Elements
        kind(module, name, store, width, lanes, repeat)
    return name


class _Elements:
    """One element a step."""

    deep = 1

    def __init__(
        self, module: Module, name: str, store: Storage, width: int, lanes: int, repeat: bool
    ) -> None:
        self.store, self.width, self.lanes, self.repeat = store, width, lanes, repeat
        integers = ("lane_stride", "c_stride", "valid", "depth")
        parameters = [Value("%panel", "ptr"), Value("%array", "ptr")]
        parameters += [Value(f"%{name}", "i64") for name in integers]
        self.panel, self.array, self.lane_stride, self.c_stride, self.valid, self.depth = parameters
        with module.function(name, parameters, internal=True) as body:
            self.body = body
            self._write()

    @property
    def element(self) -> str:
        """The type of an element of the panel."""
        return self.store.scalar

    def _write(self) -> None:
        body, one = self.body, Value("1", "i64")
        start = body.variable("i64", Value("0", "i64"), "start")
        whole = body.compare("eq", self.valid, Value(str(self.width), "i64"), "whole")
        step = self.lanes * self.deep
        deep = body.compare("eq", self.c_stride, one, "deep")
        squares = body.binary("and", deep, body.compare("sge", self.depth, Value(str(step), "i64")))
        if not self.repeat:
            squares = body.binary("and", squares, whole)
        with body.choose(squares, "squares") as branch:
            end = body.sub(self.depth, body.binary("urem", self.depth, step))
            with body.loop("c", 0, end, step) as c:
                for first in range(0, self.width, self.lanes):
                    self._square(c, first)
            body.write(start, end)
            branch.otherwise()
            wide = body.compare("eq", self.lane_stride, one, "wide")
            with body.when(body.binary("and", wide, whole), "lines"):
                end = body.sub(self.depth, body.binary("urem", self.depth, self.deep))
                with body.loop("c", 0, end, self.deep) as c:
                    self._line(c)
                body.write(start, end)
        with body.loop("c", body.read(start), self.depth, self.deep) as c:
            self._numbers(c)

    def _lane(self, lane: Operand) -> Value:
        """A lane that exists."""
        return self.body.minimum(self.body.operand(lane), self.body.sub(self.valid, 1))

    def _at(self, lane: Operand, c: Operand) -> Value:
        body = self.body
        index = body.add(body.mul(lane, self.lane_stride), body.mul(c, self.c_stride))
        return self.store.at(body, self.array, index)

    def _place(self, c: Value, lane: Operand) -> Value:
        """The place in the panel of a lane at a step of the contraction."""
        body = self.body
        step = c if self.deep == 1 else body.binary("lshr", c, self.deep - 1)
        return body.offset(
            self.panel, self.element, body.add(body.mul(step, self.width), lane), "place"
        )

    def _square(self, c: Value, first: int) -> None:
        """Lanes from `first` by as many steps, turned in registers.

        What a panel narrower than a vector writes too many lies in its next line, which is written
        after it; behind the last line there is room.
        """
        body, lanes = self.body, self.lanes
        exist = min(lanes, self.width - first)
        rows = []
        for lane in range(first, first + exist):
            row = self._lane(lane) if self.repeat else lane
            rows.append(self._neighbours(self._at(row, c)))
        rows += [rows[-1]] * (lanes - exist)
        for step, column in enumerate(transpose(body, rows)):
            if exist == 1:
                column = body.lane(column, 0)
            elif exist < lanes and first:
                column = body.shuffle(column, column, range(exist))
            body.store(column, self._place(body.add(c, step * self.deep), first))

    def _neighbours(self, address: Value) -> Value:
        """As many steps of the contraction as there are lanes."""
        return self.store.load(self.body, address, self.lanes)

    def _line(self, c: Value) -> None:
        """All lanes of one step, which are neighbours."""
        for first in range(0, self.width, self.lanes):
            exist = min(self.lanes, self.width - first)
            self.body.store(self._vector(first, c, exist), self._place(c, first))

    def _vector(self, lane: int, c: Operand, exist: int) -> Value:
        return self.store.load(self.body, self._at(lane, c), exist)

    def _numbers(self, c: Value) -> None:
        """All lanes of one step, one by one."""
        body = self.body
        with body.loop("lane", 0, self.width) as lane:
            number = self._number(self._lane(lane), c)
            if not self.repeat:
                inside = body.compare("slt", lane, self.valid)
                number = body.select(inside, number, body.constant(0.0, self.element))
            body.store(number, self._place(c, lane))

    def _number(self, lane: Value, c: Value) -> Value:
        return self.store.load(self.body, self._at(lane, c))


class _Pairs(_Elements):
    """Two elements of bfloat16 a step, in one word; a missing second one is 0."""

    deep = 2

    @property
    def element(self) -> str:
        return "i32"

    def _neighbours(self, address: Value) -> Value:
        return self.body.load(address, vector(self.lanes, "i32"), "words", align=2)

    def _vector(self, lane: int, c: Operand, exist: int) -> Value:
        body = self.body
        return self._word(
            *(
                body.load(self._at(lane, step), vector(exist, "i16"), "x")
                for step in (c, body.add(c, 1))
            )
        )

    def _number(self, lane: Value, c: Value) -> Value:
        body = self.body
        after = body.add(c, 1)
        exists = body.compare("slt", after, self.depth)
        low = body.load(self._at(lane, c), "i16", "x")
        high = body.load(self._at(lane, body.select(exists, after, c)), "i16", "x")
        return self._word(low, body.select(exists, high, Value("0", "i16")))

    def _word(self, low: Value, high: Value) -> Value:
        body, words = self.body, vector(low.lanes, "i32")
        upper = body.binary("shl", body.cast("zext", high, words), 16)
        return body.binary("or", upper, body.cast("zext", low, words), "pair")
