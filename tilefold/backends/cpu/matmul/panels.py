"""Panels: parts of A and B in the order in which products read them.

A panel of B has `width` columns, and one of A as many rows as a register tile: its lanes. What one
step of the contraction takes of all lanes lies side by side, one step after the other:

    "fma"                   panel[c, lane]           an element, in the type of the sums
    "dot", "madd", "vnni"   panel[step, lane]        a word: 2 or 4 neighbours along the contraction
    "amx", "amx8"           panel[step, word, lane]  of B: 16 rows of a tile
                            panel[step, lane, word]  of A: a row of a tile for each lane

Lanes that do not exist are 0 in B. In A they repeat the last one that exists: nobody reads what
comes of them, and they take no branch. The end of the contraction is filled with zeros.

VNNI multiplies an integer without a sign by one with a sign, whichever of them is A's. If A and B
have one type, A's integers become those of the other one, by 128 more or less. Then the head of a
panel of B has what sums begin with: 128 times the sum of each column, less or more.

A bfloat16 holds every integer of 8 bits. So beside bfloat16 these are words of bfloat16 too.
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels import masked
from tilefold.backends.cpu.kernels.ir import Body, Module, Operand, Value, alignment, vector
from tilefold.backends.cpu.kernels.pack import transpose
from tilefold.backends.cpu.kernels.prefetch import prefetch
from tilefold.backends.cpu.kernels.storage import Storage, storage, storage_in
from tilefold.backends.cpu.matmul.spec import Unit

SCALARS = {"float32": "float", "float64": "double", "int32": "i32"}

_LINES_AHEAD = 6
"""Lines of B that are asked for before they are packed: each is in another page, where no processor
reads ahead of itself (Zen 3: 35 x 1292 x 2024 takes 0.95 of the time, 48 x 1410 x 1148 takes 0.96;
4 and 12 are as good). Only AVX2 has it: not measured elsewhere."""

_INTEGERS = {"int8": "i8", "uint8": "i8", "int32": "i32"}


def reading(dtype: str, sums: str, native_half: bool) -> Storage:
    """How elements of a type are read to be summed in another type."""
    if dtype in _INTEGERS:
        return Storage(dtype, _INTEGERS[dtype], _INTEGERS[dtype])
    if sums == "int32":
        sums = "float32"
    own = storage(dtype, native_half)
    return own if own.scalar == SCALARS[sums] else storage_in(dtype, SCALARS[sums])


def factor(dtype: str, unit: Unit, sums: str, native_half: bool) -> Storage:
    """How elements of A or B are read: as bits of words, or in the type of the sums."""
    own = reading(dtype, sums, native_half)
    scalar = SCALARS[sums]
    if unit.bits or own.scalar == scalar:
        return own
    signless, signed = ("zext", "sext") if scalar == "i32" else ("uitofp", "sitofp")
    opcode = signless if dtype == "uint8" else signed

    def widen(body: Body, bits: Value, hint: str) -> Value:
        return body.cast(opcode, bits, vector(bits.lanes, scalar), hint)

    return Storage(dtype, own.stored, scalar, widen)


def pack(
    module: Module,
    unit: Unit,
    store: Storage,
    width: int,
    lanes: int,
    of_a: bool,
    flips: bool = False,
) -> str:
    """The name of `(panel, array, lane stride, c stride, lanes that exist, depth)`.

    `depth` counts elements. `flips`: integers become those of the other type.
    """
    name = f"pack_{'a' if of_a else 'b'}_{store.dtype}_{width}"
    if not module.defines(name):
        kind = _Words if unit.bits else _Elements
        kind = _Rows if unit.tiles and of_a else kind
        kind(module, name, unit, store, width, lanes, of_a, flips)
    return name


def pack_columns(module: Module, unit: Unit, store: Storage, width: int, lanes: int) -> str:
    """The name of `(panel, panel bytes, array, lane stride, c stride, columns, depth)`.

    All columns of a block of B become panels. Where columns are neighbours, a line of all whole
    panels is read at once: by panels of 128 bytes each line would be another page.
    """
    name = f"pack_columns_{store.dtype}"
    if module.defines(name):
        return name
    pack(module, unit, store, width, lanes, of_a=False)
    kind = _Words if unit.bits else _Elements
    kind.of_columns(module, name, unit, store, width, lanes)
    return name


class _Elements:
    """One element a step, in the type of the sums."""

    def __init__(
        self,
        module: Module,
        name: str,
        unit: Unit,
        store: Storage,
        width: int,
        lanes: int,
        of_a: bool,
        flips: bool = False,
        columns: bool = False,
    ) -> None:
        self.unit, self.store, self.width, self.lanes, self.of_a = unit, store, width, lanes, of_a
        self.flips = flips
        integers = ("lane_stride", "c_stride", "valid", "depth")
        parameters = [Value("%panel", "ptr"), Value("%array", "ptr")]
        parameters += [Value(f"%{name}", "i64") for name in integers]
        self.panel, self.array, self.lane_stride, self.c_stride, self.valid, self.depth = parameters
        if columns:
            self.panel_bytes = Value("%panel_bytes", "i64")
            parameters.insert(1, self.panel_bytes)
        with module.function(name, parameters, internal=True) as body:
            self.body = body
            (self.write_columns if columns else self.write)()

    @classmethod
    def of_columns(
        cls, module: Module, name: str, unit: Unit, store: Storage, width: int, lanes: int
    ) -> None:
        """Write the function of a block of columns."""
        cls(module, name, unit, store, width, lanes, of_a=False, columns=True)

    deep = 1
    """Elements that lie side by side in a panel."""

    @property
    def element(self) -> str:
        """The type of what lies side by side."""
        return self.store.scalar

    @property
    def filled(self) -> Value:
        """The end of the contraction, with the zeros that fill a step."""
        body, step = self.body, self.unit.depth
        return body.mul(body.binary("udiv", body.add(self.depth, step - 1), step), step)

    def write(self) -> None:
        """All of a panel: squares, lines or numbers."""
        body, one = self.body, Value("1", "i64")
        start = body.variable("i64", Value("0", "i64"), "start")
        whole = body.compare("eq", self.valid, Value(str(self.width), "i64"), "whole")
        step = self.lanes * self.deep
        deep = body.compare("eq", self.c_stride, one, "deep")
        squares = body.binary("and", deep, body.compare("sge", self.depth, Value(str(step), "i64")))
        if not self.of_a:
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
            if self._masks:
                part = body.compare("ne", self.valid, Value(str(self.width), "i64"))
                with body.when(body.binary("and", wide, part), "parts"):
                    self._parts_of_lines()
                    body.write(start, self.depth)
        with (
            body.loop("c", body.read(start), self.filled, self.deep) as c,
            body.loop("lane", 0, self.width) as lane,
        ):
            self._numbers(c, lane)

    @property
    def _masks(self) -> bool:
        """True if lines of B that are not whole are read by masks, which AVX2 has."""
        return self._of_avx2 and self.store.stored == self.element and not self.of_a

    @property
    def _of_avx2(self) -> bool:
        """True for single elements in vectors of AVX2."""
        return self.deep == 1 and self.lanes * alignment(self.element) == 32

    def _parts_of_lines(self) -> None:
        """The lanes of all lines that exist, and 0 for others."""
        body, lanes = self.body, self.lanes
        firsts = range(0, self.width, lanes)
        masks = [masked.first(body, body.sub(self.valid, first), lanes) for first in firsts]
        with body.loop("c", 0, self.depth) as c:
            for first, exist in zip(firsts, masks, strict=True):
                numbers = masked.load(body, self._at(first, c), vector(lanes, self.element), exist)
                body.store(numbers, self._place(c, first))

    def write_columns(self) -> None:
        """Lines of all whole panels, then panel by panel what is left."""
        body, width, first = self.body, self.width, self.panel
        columns, start = self.valid, body.variable("i64", Value("0", "i64"), "start")
        even = body.sub(self.depth, body.binary("urem", self.depth, self.unit.depth))
        wide = body.compare("eq", self.lane_stride, Value("1", "i64"), "wide")
        filled = body.compare("eq", even, self.depth, "filled")
        if not self.unit.head_bytes(width):
            with body.when(body.binary("and", wide, filled), "lines"):
                whole = body.sub(columns, body.binary("urem", columns, width))
                with (
                    body.loop("c", 0, even, self.deep) as c,
                    body.loop("column", 0, whole, width) as column,
                ):
                    self.panel = self._panel_of(first, column)
                    if self._of_avx2:
                        prefetch(body, self._at(column, body.add(c, _LINES_AHEAD)))
                    for lane in range(0, width, self.lanes):
                        numbers = self._vector(body.add(column, lane), c, self.lanes)
                        body.store(numbers, self._place(c, lane))
                body.write(start, whole)
        name = f"pack_b_{self.store.dtype}_{width}"
        with body.loop("column", body.read(start), columns, width) as column:
            source = self._at(column, 0)
            exist = body.minimum(body.sub(columns, column), width)
            strides = (self.lane_stride, self.c_stride)
            panel = self._panel_of(first, column)
            body.invoke(name, [panel, source, *strides, exist, self.depth])

    def _panel_of(self, first: Value, column: Value) -> Value:
        body = self.body
        number = body.binary("udiv", column, self.width)
        return body.offset(first, "i8", body.mul(number, self.panel_bytes))

    def _lane(self, lane: Operand) -> Value:
        """A lane that exists."""
        return self.body.minimum(self.body.operand(lane), self.body.sub(self.valid, 1))

    def _at(self, lane: Operand, c: Operand) -> Value:
        body = self.body
        index = body.add(body.mul(lane, self.lane_stride), body.mul(c, self.c_stride))
        return self.store.at(body, self.array, index)

    def _place(self, c: Value, lane: Operand) -> Value:
        """The place in the panel of a lane at an element of the contraction."""
        body = self.body
        line = c if self.deep == 1 else body.binary("udiv", c, self.deep)
        index = body.add(body.mul(line, self.width), lane)
        return body.offset(self.panel, self.element, index, "place")

    def _square(self, c: Value, first: int) -> None:
        """Lanes from `first` by as many lines, turned in registers.

        What a panel narrower than a vector writes too many lies in its next line, which is written
        after it; behind the last line there is room.
        """
        body, lanes = self.body, self.lanes
        exist = min(lanes, self.width - first)
        rows = []
        for lane in range(first, first + exist):
            row = self._lane(lane) if self.of_a else lane
            rows.append(self._neighbours(self._at(row, c)))
        rows += [rows[-1]] * (lanes - exist)
        for step, column in enumerate(transpose(body, rows)):
            if exist < lanes and first:
                few = range(exist)
                one = exist == 1
                column = body.lane(column, 0) if one else body.shuffle(column, column, few)
            body.store(column, self._place(body.add(c, step * self.deep), first))

    def _line(self, c: Value) -> None:
        """All lanes of one line of the panel, which are neighbours in the array."""
        for first in range(0, self.width, self.lanes):
            exist = min(self.lanes, self.width - first)
            self.body.store(self._vector(first, c, exist), self._place(c, first))

    def _numbers(self, c: Value, lane: Value) -> None:
        """One lane of one line."""
        body = self.body
        number = self._number(self._lane(lane), c)
        if not self.of_a:
            inside = body.compare("slt", lane, self.valid)
            number = body.select(inside, number, body.constant(0.0, self.element))
        body.store(number, self._place(c, lane))

    def _neighbours(self, address: Value) -> Value:
        """A vector along the contraction."""
        return self.store.load(self.body, address, self.lanes)

    def _vector(self, lane: Operand, c: Operand, exist: int) -> Value:
        return self.store.load(self.body, self._at(lane, c), exist)

    def _number(self, lane: Value, c: Value) -> Value:
        return self.store.load(self.body, self._at(lane, c))


class _Words(_Elements):
    """Words of 2 or 4 neighbours along the contraction, as their bits."""

    element = "i32"

    @property
    def deep(self) -> int:  # type: ignore[override]
        return self.unit.per_word

    def write(self) -> None:
        super().write()
        if self.unit.head_bytes(self.width) and not self.of_a:
            self._head()

    def _bits(self, value: Value) -> Value:
        """Loaded elements as integers of the unit's bits."""
        body, wanted = self.body, vector(value.lanes, f"i{self.unit.bits}")
        signless = self.store.dtype == "uint8"
        if self.unit.of_bfloat16 and value.element == "i8":
            real = vector(value.lanes, "float")
            real_bits = body.cast("uitofp" if signless else "sitofp", value, real)
            real_bits = body.cast("bitcast", real_bits, vector(value.lanes, "i32"))
            return body.cast("trunc", body.binary("lshr", real_bits, 16), wanted)
        return body.cast("zext" if signless else "sext", value, wanted)

    def _flipped(self, words: Value) -> Value:
        """Integers plus or minus 128, which changes their first bit."""
        if not self.flips:
            return words
        return self.body.binary("xor", words, self.body.constant(-0x7F7F7F80, words.type))

    def _neighbours(self, address: Value) -> Value:
        body, count = self.body, self.lanes * self.deep
        loaded = body.load(address, vector(count, self.store.stored), "x")
        return self._flipped(
            body.cast("bitcast", self._bits(loaded), vector(self.lanes, "i32"), "words")
        )

    def _vector(self, lane: Operand, c: Operand, exist: int) -> Value:
        body = self.body
        type_ = vector(exist, self.store.stored)
        return self._word(
            [body.load(self._at(lane, body.add(c, step)), type_, "x") for step in range(self.deep)]
        )

    def _number(self, lane: Value, c: Value) -> Value:
        """The word of one lane; elements past the end are 0."""
        body, zero = self.body, Value("0", self.store.stored)
        last, numbers = body.sub(self.depth, 1), []
        for step in range(self.deep):
            at = body.add(c, step)
            exists = body.compare("slt", at, self.depth)
            number = body.load(self._at(lane, body.minimum(at, last)), self.store.stored, "x")
            numbers.append(body.select(exists, number, zero))
        return self._word(numbers)

    def _word(self, parts: list[Value]) -> Value:
        body, words = self.body, vector(parts[0].lanes, "i32")
        total: Value | None = None
        for number, part in enumerate(parts):
            part = body.cast("zext", self._bits(part), words)
            part = body.binary("shl", part, number * self.unit.bits) if number else part
            total = part if total is None else body.binary("or", total, part, "word")
        assert total is not None
        return self._flipped(total)

    def _head(self) -> None:
        """What sums have too little by the flipped integers of A, before the panel."""
        body, type_ = self.body, vector(self.lanes, "i32")
        ones, signless = body.constant(0x01010101, type_), self.store.dtype == "uint8"
        for first in range(0, self.width, self.lanes):
            total = body.variable(type_, body.constant(0, type_), "column")
            with body.loop("c", 0, self.filled, self.deep) as c:
                words = body.load(self._place(c, first), type_)
                name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
                factors = [words, ones] if signless else [ones, words]
                body.write(total, body.call(name, type_, [body.read(total), *factors]))
            place = body.offset(self.panel, "i32", first - self.width)
            body.store(body.mul(body.read(total), 128 if signless else -128), place)


class _Rows(_Words):
    """A of tile registers: a row of 16 words for each lane."""

    def write(self) -> None:
        """Rows of a tile are 64 bytes of the array's own where these are neighbours."""
        body, step = self.body, self.unit.depth
        start = body.variable("i64", Value("0", "i64"), "start")
        deep = body.compare("eq", self.c_stride, Value("1", "i64"), "deep")
        with body.when(deep, "lines"):
            end = body.sub(self.depth, body.binary("urem", self.depth, step))
            with body.loop("c", 0, end, step) as c, body.loop("lane", 0, self.width) as lane:
                type_ = vector(step, self.store.stored)
                line = body.load(self._at(self._lane(lane), c), type_)
                body.store(self._bits(line), self._row(c, lane, 0))
            body.write(start, end)
        with (
            body.loop("c", body.read(start), self.filled, step) as c,
            body.loop("lane", 0, self.width) as lane,
            body.loop("word", 0, self.unit.words) as word,
        ):
            at = body.add(c, body.mul(word, self.deep))
            body.store(self._number(self._lane(lane), at), self._row(c, lane, word))

    def _row(self, c: Value, lane: Value, word: Operand) -> Value:
        body = self.body
        index = body.add(body.mul(body.binary("udiv", c, self.unit.depth), self.width), lane)
        return body.offset(self.panel, "i32", body.add(body.mul(index, self.unit.words), word))
