"""Products of integers with an int8 matrix: rows of x are rounded to 8 bits first.

    "round_rows"   for row in x:                                   workers take tiles of rows
                       scale = max |x| / 127;  x <- 128 + x (127 / max |x|), in whole numbers

    "qgemm"        for item in (panel of 32 columns, block of rows):
                       for block of inputs:
                           panel <- words of four inputs of a column;  below += 128 panel
                           for `rows` rows of the block:  sums += x[rows, inputs] panel
                       out <- scales of rows, scales of columns, (sums - below)       `finish`

The instruction of AVX512-VNNI multiplies four numbers without a sign by four with one, and adds the
four products exactly. So x has 128 added, and what this adds is subtracted: every other machine
computes the same sums.
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels.ir import Body, Module, Value, Variable, vector
from tilefold.backends.cpu.matmul.arguments import Arguments
from tilefold.backends.cpu.matmul.quantized import Quantized
from tilefold.backends.cpu.matmul.spec import QuantizedSpec, RoundingSpec

DEPTH = 1024
"""Inputs of a block: a panel's words take 32 KiB. It is not tuned."""

WORD = 4
"""Inputs of a word."""

LONGEST = 1 << 16
"""Inputs whose sums fit 32 bits: 2^16 x 255 x 127 < 2^31."""

LEAST = 1e-30
"""The largest number of a row counts as this at least."""

ROUNDS = 1.5 * 2**23
"""A float to which this is added has a whole number, to the nearest, in its low bits."""

STEP = 16
"""The inputs are a multiple of this."""


def emit_rounding(spec: RoundingSpec) -> str:
    """The LLVM source of "round_rows"."""
    module = Module(repr(spec), 32 * spec.lanes)
    block = Value("%arguments", "ptr")
    with module.function(spec.kernel, [block]) as body:
        words = Arguments(body, spec, block)
        with body.forever("tile") as end:
            tile = words.take("next_item")
            body.leave_unless(body.compare("slt", tile, words["items"]), end)
            first = body.mul(tile, spec.rows)
            last = body.minimum(body.add(first, spec.rows), words["m"])
            size = body.mul(words["k"], spec.rows)  # bytes of a tile
            target = body.offset(words["words"], "i8", body.mul(tile, size), "target")
            with body.loop("row", first, last) as row:
                x = body.offset(words["x"], "float", body.mul(row, words["k"]), "x")
                place = body.offset(target, "i32", body.sub(row, first))
                _round_row(body, spec, words, x, place, row)
    return module.text()


def _round_row(
    body: Body, spec: RoundingSpec, words: Arguments, x: Value, target: Value, row: Value
) -> None:
    type_, integers = vector(spec.lanes, "float"), vector(spec.lanes, "i32")
    most = body.variable(integers, body.constant(0, integers), "most")
    with body.loop("c", 0, words["k"], spec.lanes) as c:  # bits of sizes are in order, NaN last
        bits = body.load(body.offset(x, "float", c), integers)
        size = body.binary("and", bits, 0x7FFFFFFF)
        suffix = f"v{spec.lanes}i32"
        body.write(most, body.call(f"llvm.smax.{suffix}", integers, [size, body.read(most)]))
    largest = body.call(f"llvm.vector.reduce.smax.{suffix}", "i32", [body.read(most)])
    largest = body.cast("bitcast", largest, "float", "largest")
    least = body.constant(LEAST, "float")  # so that 127 / largest is finite; NaN stays
    largest = body.select(body.compare("olt", largest, least), least, largest)
    steps = body.constant(127.0, "float")
    scale = body.binary("fdiv", largest, steps, "scale")
    body.store(scale, body.offset(words["x_scales"], "float", row))
    inverse = body.splat(body.binary("fdiv", steps, largest), spec.lanes)
    shift = body.constant(ROUNDS + 128, type_)
    with body.loop("c", 0, words["k"], spec.lanes) as c:
        number = body.load(body.offset(x, "float", c), type_)
        code = body.binary("fadd", body.binary("fmul", number, inverse), shift)
        code = body.cast("bitcast", code, integers)
        small = body.cast("trunc", code, vector(spec.lanes, "i8"))
        four = body.cast("bitcast", small, vector(spec.lanes // WORD, "i32"))
        line = body.binary("udiv", c, WORD)
        for number_of_word in range(spec.lanes // WORD):
            word = body.lane(four, number_of_word) if four.lanes > 1 else four
            index = body.mul(body.add(line, number_of_word), spec.rows)
            body.store(word, body.offset(target, "i32", index))


class Integers(Quantized):
    """The kernel "qgemm" for rounded rows."""

    def begin(self) -> None:
        """This worker's scratch: a block of a panel in words, then sums."""
        body, words = self.body, self.words
        before = body.mul(words.take("next_worker"), words["workspace_bytes"])
        self.panel_words = body.offset(words["workspace"], "i8", before, "words")
        self.sums = body.offset(self.panel_words, "i8", DEPTH * self.spec.width, "sums")
        self.integers = vector(self.spec.lanes, "i32")
        self.below = [
            [body.variable(self.integers, hint="below") for _ in range(self.spec.vectors)]
            for _ in self.parts
        ]

    def rows(self, start: Value, stop: Value) -> None:
        """All rows of an item."""
        body, words, spec = self.body, self.words, self.spec
        for place in (place for line in self.below for place in line):
            body.write(place, body.constant(0, self.integers))
        with body.loop("block", 0, words["inputs"], DEPTH) as c:
            depth = body.minimum(body.sub(words["inputs"], c), DEPTH)
            steps = body.binary("udiv", depth, WORD, "steps")
            for column, below in zip(self.parts, self.below, strict=True):
                self._interleave(c, steps, column, below)
            with body.loop("row", start, stop, spec.rows) as row:
                for column in self.parts:
                    self._tile(c, steps, row, body.sub(row, start), column)
        self._scale(start, stop)
        self.finish_rows(start, body.sub(stop, start), self.sums)

    def _interleave(self, c: Value, steps: Value, column: int, below: list[Variable]) -> None:
        """Words of a block of the panel, and 128 times their sums."""
        body, spec = self.body, self.spec
        with body.loop("step", 0, steps) as step:
            place = body.add(c, body.mul(step, WORD))
            codes = self.codes_at(place, WORD, column)
            found = self._whole_lines(codes) if spec.permutes else self._part_lines(codes)
            every = body.constant(-0x7F7F7F80, self.integers)  # 128 in each byte
            for j, word in enumerate(found):
                body.write(below[j], self._added(body.read(below[j]), every, word))
                index = body.add(body.mul(step, spec.width), column + j * spec.lanes)
                body.store(word, body.offset(self.panel_words, "i32", index))

    def _whole_lines(self, codes: Value) -> list[Value]:
        """Four lines of 32 bytes as two vectors of words: one permutation each with VBMI."""
        body, bytes_ = self.body, vector(64, "i8")
        first, second = (
            body.load(body.offset(codes, "i8", at), bytes_, "lines", align=1) for at in (0, 64)
        )
        found = []
        for j in range(2):
            picks = [32 * t + 16 * j + lane for lane in range(16) for t in range(WORD)]
            found.append(
                body.cast("bitcast", body.shuffle(first, second, picks), self.integers, "words")
            )
        return found

    def _part_lines(self, codes: Value) -> list[Value]:
        """Parts of four lines as words."""
        body, lanes = self.body, self.spec.lanes
        found = []
        for j in range(self.spec.vectors):
            lines = [
                body.load(
                    body.offset(codes, "i8", t * self.spec.width + j * lanes), vector(lanes, "i8")
                )
                for t in range(WORD)
            ]
            mixed = [number for lane in range(lanes) for number in (lane, lanes + lane)]
            halves = [
                body.cast(
                    "bitcast", body.shuffle(lines[t], lines[t + 1], mixed), vector(lanes, "i16")
                )
                for t in (0, 2)
            ]
            found.append(
                body.cast(
                    "bitcast", body.shuffle(halves[0], halves[1], mixed), self.integers, "words"
                )
            )
        return found

    def _added(self, total: Value, left: Value, right: Value) -> Value:
        """total + the four products of bytes of left, without a sign, and of right, with one."""
        body, spec = self.body, self.spec
        if spec.vnni:
            name = f"llvm.x86.avx512.vpdpbusd.{32 * spec.lanes}"
            return body.call(name, self.integers, [total, left, right], "sum")
        for t in range(WORD):
            one = body.binary("and", body.binary("lshr", left, 8 * t), 255)
            two = body.binary("ashr", body.binary("shl", right, 24 - 8 * t), 24)
            total = body.add(total, body.mul(one, two), "sum")
        return total

    def _places(self, number: Value, column: int) -> list[list[Value]]:
        """Where the sums of a tile lie."""
        body, spec = self.body, self.spec
        return [
            [
                body.offset(
                    self.sums,
                    "i32",
                    body.add(body.mul(body.add(number, i), spec.width), column + j * spec.lanes),
                )
                for j in range(spec.vectors)
            ]
            for i in range(spec.rows)
        ]

    def _tile(self, c: Value, steps: Value, row: Value, number: Value, column: int) -> None:
        """Add the products of some rows, whose words lie side by side."""
        body, words, spec = self.body, self.words, self.spec
        before = body.add(body.mul(row, words["inputs"]), body.mul(c, spec.rows))
        tile = body.offset(words["x"], "i8", before, "x")
        places = self._places(number, column)
        is_first = body.compare("eq", c, Value("0", "i64"), "is_first")
        none = body.constant(0, self.integers)
        sums = [
            [
                body.variable(
                    self.integers, body.select(is_first, none, body.load(place, self.integers))
                )
                for place in line
            ]
            for line in places
        ]
        with body.loop("step", 0, steps) as step:
            index = body.add(body.mul(step, spec.width), column)
            line = body.offset(self.panel_words, "i32", index)
            found = [
                body.load(body.offset(line, "i32", j * spec.lanes), self.integers, "w")
                for j in range(spec.vectors)
            ]
            for i, places_of_row in enumerate(sums):
                at = body.offset(tile, "i32", body.add(body.mul(step, spec.rows), i))
                four = body.splat(body.load(at, "i32", "four"), spec.lanes)
                for place, w in zip(places_of_row, found, strict=True):
                    body.write(place, self._added(body.read(place), four, w))
        for line_of_places, totals in zip(places, sums, strict=True):
            for place_of_sum, total in zip(line_of_places, totals, strict=True):
                body.store(body.read(total), place_of_sum)

    def _scale(self, start: Value, stop: Value) -> None:
        """Sums of integers become the numbers that they stand for."""
        body, spec = self.body, self.spec
        at = self.line_of_scales(Value("0", "i64"), 0)
        with body.loop("row", start, stop) as row:
            of_row = body.load(body.offset(self.words["x_scales"], "float", row), "float")
            line = body.mul(body.sub(row, start), spec.width)
            for column, below in zip(self.parts, self.below, strict=True):
                scales = self.numbers("scales", body.add(at, column))
                for j, scale in enumerate(scales):
                    place = body.add(line, column + j * spec.lanes)
                    address = body.offset(self.sums, "i32", place)
                    total = body.sub(body.load(address, self.integers), body.read(below[j]))
                    number = body.cast("sitofp", total, self.type)
                    number = body.binary("fmul", number, body.splat(of_row, spec.lanes))
                    body.store(body.binary("fmul", number, scale), address)


def emit(spec: QuantizedSpec) -> str:
    """The LLVM source of a kernel."""
    module = Module(repr(spec), 32 * spec.lanes)
    Integers(module, spec)
    return module.text()
