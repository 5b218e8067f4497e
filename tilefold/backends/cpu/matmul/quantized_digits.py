"""The product of one row with codes of 4 bits on AVX2, as exact sums of integers.

    x <- for 32 inputs a power of two as scale:  scale (65536 a + 256 b + c)
    for panel of 32 columns:                                       workers take items
        for block of 128 inputs of a group, or fewer:
            for 32 inputs of the block:
                integers = 65536 a w + 256 b w + c w - 8 (65536 a + 256 b + c)
                sums += scale integers
            totals += scales (sums - (zeros - 8) (the sum of x))
        out <- totals                                              `finish`

a, b and c have 8 bits with a sign. A step of 8 inputs is a word of each column: its even codes are
the low halves of its bytes, the odd ones the high halves. `pmaddubsw` multiplies bytes without a
sign by bytes with one, and adds two products in 16 bits, where 8 such sums fit: 8 x 2 x 15 x 128 <
2^15. With 8 taken off, codes are between -8 and 7, and integers fit 32 bits: 32 x 8 x 2^23 = 2^31.
What goes beyond on the way wraps around.

For 64 weights these are 17 instructions, and 28 where codes become floats: 4096 x 11008 with groups
of 128 took 0.77 of the time (AMD Zen 3). More rows share the conversions of floats: 2 rows took
1.05 of the time, 4 took 1.02 and 8 took 0.97.

Nothing is rounded before sums of 32 inputs but x, to 2^-23 of their largest at worst. Beside those
of float sums, root mean squares of errors are 0.3 to 0.7 for normal x, and 0.4 to 1.8 with one
number 10^6 times as large: 1.4 and 1.8 with groups of 32, at most 1.1 with groups of 128.
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels import claims
from tilefold.backends.cpu.kernels.ir import Body, Module, Value, Variable, overload, vector
from tilefold.backends.cpu.matmul.quantized import Quantized
from tilefold.backends.cpu.matmul.spec import QuantizedSpec

PART = 32
"""Inputs that share a scale, and a word of memory each. Fewer stay at the end of a group."""

_BLOCK = 128
"""Inputs whose sums are multiplied by the scales of their group: 2 KiB of codes."""

_STEP = 8
"""Inputs of a word of codes, which have 8 words too: six of digits, then two that are free."""

_EIGHTFOLD, _SCALE, _SUM = 6, 7, 14
"""Free words of a part: -8 times the sum of its integers; its scale; the sum of x of its block so
far.
"""

_DIGITS = (2, 1, 0)
"""The bytes of an integer, the highest first."""

_SPLIT_LANES = 8

_HALVES = 0x808080
"""What makes digits of bytes: 128 in each is added, and taken off the bytes one by one."""

_ROOM = 0x20000
"""Added to the bits of a number, it raises the exponent of those for which digits have no room:
65793 x 127 < 2^23 (1 - 2^-7).
"""

_INFINITY = 0x7F800000


def splitting(module: Module) -> str:
    """The name of a function (x, its digits, k, group_size) that splits a row of float32."""
    name = "split_row"
    x, target = Value("%row", "ptr"), Value("%words", "ptr")
    k, size = Value("%k", "i64"), Value("%group_size", "i64")
    with module.function(name, [x, target, k, size], internal=True) as body:
        part = body.variable("i64", Value("0", "i64"), "part")
        with body.loop("group", 0, k, size) as group, body.loop("block", 0, size, _BLOCK) as block:
            first = body.add(group, block)
            count = body.minimum(body.sub(size, block), _BLOCK)
            sum_ = body.variable("float", hint="sum")
            body.write(sum_, body.constant(0.0, "float"))
            with body.loop("at", 0, count, PART) as at:
                number = body.read(part)
                body.write(part, body.add(number, 1))
                many = body.minimum(body.sub(count, at), PART)
                inputs = body.offset(x, "float", body.add(first, at))
                place = body.offset(target, "i32", body.mul(number, PART))
                _split(body, inputs, many, place, sum_)
    return name


def _split(body: Body, x: Value, many: Value, target: Value, sum_: Variable) -> None:
    """Digits of some numbers that share a scale. A part with NaN or an infinity has the scale NaN.

    The largest is between 2^22 and 2^23 in integers. It counts as 2^-126 at least.
    """
    integers, floats = vector(_SPLIT_LANES, "i32"), vector(_SPLIT_LANES, "float")
    none = body.constant(0, integers)
    most = body.variable(integers, hint="most")
    body.write(most, none)
    with body.loop("c", 0, many, _STEP) as c:  # bits of sizes are in order, NaN last
        size = body.binary("and", body.load(body.offset(x, "float", c), integers), 0x7FFFFFFF)
        name = f"llvm.smax.{overload(integers)}"
        body.write(most, body.call(name, integers, [size, body.read(most)]))
    name = f"llvm.vector.reduce.smax.{overload(integers)}"
    largest = body.call(name, "i32", [body.read(most)], "largest")
    exponent = body.binary("lshr", body.add(largest, _ROOM), 23)
    exponent = body.call("llvm.smax.i32", "i32", [exponent, Value("2", "i32")])
    exponent = body.call("llvm.smin.i32", "i32", [exponent, Value("255", "i32")], "exponent")
    # the scale is 2^(exponent - 149); neither it nor its inverse is a normal number everywhere
    below = body.cast("bitcast", body.binary("shl", body.sub(exponent, 1), 23), "float")
    scale = body.binary("fmul", below, body.constant(2.0**-21, "float"), "scale")
    zero = body.compare("eq", largest, Value("0", "i32"), "zero")
    scale = body.select(zero, body.constant(0.0, "float"), scale)
    finite = body.compare("slt", largest, Value(str(_INFINITY), "i32"), "finite")
    scale = body.select(finite, scale, Value("0x7FF8000000000000", "float"))
    kept = body.splat(body.cast("sext", finite, "i32"), _SPLIT_LANES, "kept")
    inverse = body.binary("shl", body.sub(Value("256", "i32"), exponent), 23)
    inverse = body.splat(body.cast("bitcast", inverse, "float"), _SPLIT_LANES, "inverse")
    total = body.variable(integers, hint="total")
    body.write(total, none)
    with body.loop("c", 0, many, _STEP) as c:
        bits = body.binary("and", body.load(body.offset(x, "float", c), integers), kept)
        number = body.binary("fmul", body.cast("bitcast", bits, floats), inverse)
        number = body.binary("fmul", number, body.constant(2.0**20, floats))
        number = body.call(f"llvm.rint.{overload(floats)}", floats, [number])
        number = body.cast("fptosi", number, integers, "number")
        body.write(total, body.add(body.read(total), number))
        digits = body.binary("xor", body.add(number, _HALVES), _HALVES)
        bytes_ = body.cast("bitcast", digits, vector(4 * _SPLIT_LANES, "i8"))
        places = [4 * t + digit for odd in (0, 1) for digit in _DIGITS for t in range(odd, 8, 2)]
        line = body.shuffle(bytes_, bytes_, [*places, *places[:8]], "digits")
        body.store(line, body.offset(target, "i32", c))
    name = f"llvm.vector.reduce.add.{overload(integers)}"
    whole = body.call(name, "i32", [body.read(total)], "whole")
    body.store(body.mul(whole, -8), body.offset(target, "i32", _EIGHTFOLD))
    body.store(scale, body.offset(target, "i32", _SCALE))
    number = body.binary("fmul", body.cast("sitofp", whole, "float"), scale)
    body.write(sum_, body.binary("fadd", body.read(sum_), number))
    body.store(body.read(sum_), body.offset(target, "i32", _SUM))


def words_of_row(groups: int, group_size: int) -> int:
    """Words of the digits of a row."""
    return groups * -(-group_size // PART) * PART


Sums = list[list[Value | None]]
"""The sums of each digit, for each vector of columns; None where nothing was added."""


class Digits(Quantized):
    """The kernel "qgemm" for a row of digits."""

    def begin(self) -> None:
        """Totals of a panel, and this worker's digits of the row."""
        body, words, spec = self.body, self.words, self.spec
        self.bytes, self.halves = vector(4 * spec.lanes, "i8"), vector(2 * spec.lanes, "i16")
        self.integers = vector(spec.lanes, "i32")
        self.totals = Value(body.variable(f"[{spec.width} x float]", hint="totals").address, "ptr")
        self.x = claims.scratch_of_worker(body, words)
        row = [words["x"], self.x, words["inputs"], words["group_size"]]
        body.invoke(splitting(body.module), row)
        whole = body.add(words["group_size"], PART - 1)
        self.words_of_group = body.mul(body.binary("udiv", whole, PART), PART, "words_of_group")

    def rows(self, start: Value, stop: Value) -> None:
        """The only row."""
        body, words, spec = self.body, self.words, self.spec
        zero = body.constant(0.0, self.type)
        for column in range(0, spec.width, spec.lanes):
            body.store(zero, body.offset(self.totals, "float", column))
        with body.loop("group", 0, words["groups"]) as group:
            scales = self.line_of_scales(group, 0)
            self.ask_for_scales(scales)
            x = body.offset(self.x, "i32", body.mul(group, self.words_of_group))
            first = body.mul(group, words["group_size"])
            with body.loop("block", 0, words["group_size"], _BLOCK) as at:
                count = body.minimum(body.sub(words["group_size"], at), _BLOCK, "count")
                digits, c = body.offset(x, "i32", at, "x"), body.add(first, at, "c")
                for column in self.parts:
                    self._add_block(digits, c, count, column, body.add(scales, column))
        self.finish_rows(start, body.sub(stop, start), self.totals)

    def _halves(self, words: Value) -> tuple[Value, Value]:
        """The even and the odd codes of words, as bytes."""
        body = self.body
        low = body.binary("and", words, 0x0F0F0F0F, "even")
        return low, body.binary("and", body.binary("lshr", words, 4), 0x0F0F0F0F, "odd")

    def _add_block(self, x: Value, c: Value, count: Value, column: int, scales: Value) -> None:
        """Add a block of inputs to the totals of some columns."""
        body, spec = self.body, self.spec
        vectors = range(spec.vectors)
        sums = [body.variable(self.type, hint="sum") for _ in vectors]
        for total in sums:
            body.write(total, body.constant(0.0, self.type))
        parts = body.binary("udiv", count, PART, "parts")
        with body.loop("part", 0, parts) as part:
            inputs = body.mul(part, PART)
            digits = body.offset(x, "i32", inputs, "digits")
            words = self.codes_at(body.add(c, inputs), PART, column)
            found: Sums = [[None] * len(_DIGITS) for _ in vectors]
            for step in range(PART // _STEP):
                place = body.offset(digits, "i32", step * _STEP)
                self._step(place, body.offset(words, "i32", step * spec.width), found)
            self._add_part(digits, found, sums)
        whole = body.mul(parts, PART)
        with body.when(body.compare("slt", whole, count), "rest"):
            self._rest(x, c, whole, count, column, sums)
        last = body.mul(body.binary("udiv", body.sub(count, 1), PART), PART)
        below = self._splat(body.offset(x, "i32", last), _SUM, "float")
        zeros = self.numbers("zeros", scales) if spec.scheme == "int4" else None
        for j, scale in enumerate(self.numbers("scales", scales)):
            found_sum = body.read(sums[j])
            if zeros:
                above = body.binary("fsub", body.constant(8.0, self.type), zeros[j])
                found_sum = body.multiply_add(above, below, found_sum)
            place = body.offset(self.totals, "float", column + j * spec.lanes)
            more = body.multiply_add(found_sum, scale, body.load(place, self.type))
            body.store(more, place)

    def _rest(
        self, x: Value, c: Value, whole: Value, count: Value, column: int, sums: list[Variable]
    ) -> None:
        """Add the last part of a block, which has fewer steps."""
        body, spec = self.body, self.spec
        held = [
            [body.variable(self.halves, hint="rest") for _ in _DIGITS] for _ in range(spec.vectors)
        ]
        for place in (place for line in held for place in line):
            body.write(place, body.constant(0, self.halves))
        with body.loop("at", whole, count, _STEP) as at:
            found: Sums = [[body.read(place) for place in line] for line in held]
            words = self.codes_at(body.add(c, at), _STEP, column)
            self._step(body.offset(x, "i32", at), words, found)
            for line, values in zip(held, found, strict=True):
                for place, value in zip(line, values, strict=True):
                    assert value is not None
                    body.write(place, value)
        found = [[body.read(place) for place in line] for line in held]
        self._add_part(body.offset(x, "i32", whole), found, sums)

    def _splat(self, base: Value, index: int, type_: str) -> Value:
        """A word of x in all lanes."""
        word = self.body.load(self.body.offset(base, "i32", index), type_)
        return self.body.splat(word, self.spec.lanes)

    def _step(self, digits: Value, words: Value, sums: Sums) -> None:
        """Add the products of a step to the sums."""
        body, spec = self.body, self.spec
        places = (body.offset(words, "i32", j * spec.lanes) for j in range(spec.vectors))
        codes = [self._halves(body.load(place, self.integers, "words")) for place in places]
        for odd in (0, 1):
            for place in range(len(_DIGITS)):
                digit = self._splat(digits, len(_DIGITS) * odd + place, "i32")
                for line, halves in zip(sums, codes, strict=True):
                    line[place] = self._added(line[place], halves[odd], digit)

    def _added(self, total: Value | None, codes: Value, digits: Value) -> Value:
        """total + the products of bytes of codes and of digits, two in 16 bits."""
        body = self.body
        pair = [body.cast("bitcast", each, self.bytes) for each in (codes, digits)]
        found = body.call("llvm.x86.avx2.pmadd.ub.sw", self.halves, pair)
        return body.add(total, found, "sum") if total else found

    def _add_part(self, digits: Value, found: Sums, sums: list[Variable]) -> None:
        """Add the integers of a part, times its scale."""
        body = self.body
        eightfold = self._splat(digits, _EIGHTFOLD, "i32")
        scale = self._splat(digits, _SCALE, "float")
        for line, place in zip(found, sums, strict=True):
            integers = body.add(self._joined(line), eightfold, "integers")
            number = body.cast("sitofp", integers, self.type)
            body.write(place, body.multiply_add(number, scale, body.read(place), "sum"))

    def _joined(self, line: list[Value | None]) -> Value:
        """One integer of the sums of three digits."""
        body = self.body
        high, middle, low = (each for each in line if each)
        upper = body.add(self._widened(high, 256), self._widened(middle, 1))
        low = self._widened(low, 1)
        return body.add(body.binary("shl", upper, 8), low)

    def _widened(self, halves: Value, factor: int) -> Value:
        """The sums of two neighbours of 16 bits, times a factor."""
        pair = [halves, self.body.constant(factor, self.halves)]
        return self.body.call("llvm.x86.avx2.pmadd.wd", self.integers, pair)


def emit(spec: QuantizedSpec) -> str:
    """The LLVM source of a kernel."""
    module = Module(repr(spec), 32 * spec.lanes)
    Digits(module, spec)
    return module.text()
