"""Products of integers with an int8 matrix: rows of x are rounded to 8 bits first.

    "round_rows"   for row in x:                                   workers take tiles of rows
                       scale = max |x| / 127;  x <- 128 + x (127 / max |x|), in whole numbers

    "qgemm"        for item in (panel of 32 columns, block of rows):
                       for block of inputs:
                           panel <- words of four inputs of a column;  below += 128 panel
                           for `rows` rows of the block:  sums += x[rows, inputs] panel
                       out <- scales of rows, scales of columns, (sums - below)       `finish`

The instruction of AVX512-VNNI multiplies four numbers without a sign by four with one, and adds the
four products exactly. So x has 128 added, and what this adds is subtracted. On other x86 a word has
two numbers of 16 bits, which `pmaddwd` multiplies by two, both with signs: x has nothing added.
With AVX2 rows are split (`quantized_fours`). All machines compute the same sums.
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels import claims
from tilefold.backends.cpu.kernels.ir import Body, Module, Value, Variable, vector
from tilefold.backends.cpu.matmul.arguments import Arguments
from tilefold.backends.cpu.matmul.quantized import Quantized
from tilefold.backends.cpu.matmul.spec import QuantizedSpec, RoundingSpec

_DEPTHS = {"pairs": 256, "fours": 512}
"""Inputs of a block: a panel's words take 16 KiB, which leave room in a first cache of 32 KiB. With
512 in the place of 1024, 64 rows by 2048 x 2048 took 0.95 of the time (AMD Zen 3)."""

LONGEST = 1 << 16
"""Inputs whose sums fit 32 bits: 2^16 x 255 x 127 < 2^31."""

LEAST = 1e-30
"""The largest number of a row counts as this at least."""

ROUNDS = 1.5 * 2**23
"""A float to which this is added has a whole number, to the nearest, in its low bits."""

STEP = 16
"""The inputs are a multiple of this."""


def depth(spec: QuantizedSpec) -> int:
    """Inputs of a block. Elsewhere a panel's words take 32 KiB, which is not tuned."""
    return next((known for unit, known in _DEPTHS.items() if getattr(spec, unit)), 1024)


REST = 3
"""Words of a row that stand before what rows are split into: scale, 128 times its sum, how many.

These follow for all rows: (number of a word, word), as many as a row has words at most.
"""

_PMADDWD = {
    4: "llvm.x86.sse2.pmadd.wd",
    16: "llvm.x86.avx512.pmaddw.d.512",
}
"""The instruction by lanes."""


def emit_rounding(spec: RoundingSpec) -> str:
    """The LLVM source of "round_rows"."""
    module = Module(repr(spec), 32 * spec.lanes)
    block = Value("%arguments", "ptr")
    with module.function(spec.kernel, [block]) as body:
        words = Arguments(body, spec, block)
        with claims.single(body, words) as tile:
            first = body.mul(tile, spec.rows)
            last = body.minimum(body.add(first, spec.rows), words["m"])
            size = body.mul(words["k"], spec.rows)  # numbers of a tile
            target = body.offset(
                words["words"], f"i{32 // spec.per_word}", body.mul(tile, size), "target"
            )
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
    per_word = spec.per_word
    split = _Split(body, spec, words, row) if spec.split else None
    shift = body.constant(ROUNDS + (128 if per_word == 4 and not split else 0), type_)
    with body.loop("c", 0, words["k"], spec.lanes) as c:
        number = body.load(body.offset(x, "float", c), type_)
        code = body.binary("fadd", body.binary("fmul", number, inverse), shift)
        code = body.cast("bitcast", code, integers)
        if split:
            code = split.main(code, c)
        small = body.cast("trunc", code, vector(spec.lanes, f"i{32 // per_word}"))
        made = body.cast("bitcast", small, vector(spec.lanes // per_word, "i32"))
        line = body.binary("udiv", c, per_word)
        for number_of_word in range(spec.lanes // per_word):
            word = body.lane(made, number_of_word) if made.lanes > 1 else made
            index = body.mul(body.add(line, number_of_word), spec.rows)
            body.store(word, body.offset(target, "i32", index))
    if split:
        split.end()


class _Split:
    """A row whose neighbours have no products that overflow 16 bits, and what this leaves."""

    def __init__(self, body: Body, spec: RoundingSpec, words: Arguments, row: Value) -> None:
        self.body, self.lanes = body, spec.lanes
        self.type = vector(spec.lanes, "i32")
        self.total = body.variable(self.type, body.constant(0, self.type), "total")
        self.count = body.variable("i64", Value("0", "i64"), "count")
        self.of_row = [
            body.offset(words["x_scales"], "i32", body.add(body.mul(words["m"], place), row))
            for place in range(REST)
        ]
        before = body.mul(row, body.binary("udiv", words["k"], 2))
        before = body.add(body.mul(words["m"], REST), before)
        self.rest = body.offset(words["x_scales"], "i32", before)

    def main(self, code: Value, c: Value) -> Value:
        """Numbers of the row, from floats that have them in their low bits; the rest is kept."""
        body, lanes = self.body, self.lanes
        number = body.sub(code, 0x4B400000)  # the bits of ROUNDS
        body.write(self.total, body.add(body.read(self.total), number))
        both = body.add(number, body.shuffle(number, number, [lane ^ 1 for lane in range(lanes)]))
        far = body.compare("ugt", body.add(both, 128), body.constant(256, self.type))
        second = ", ".join(f"i1 {lane % 2}" for lane in range(lanes))
        far = body.binary("and", far, Value(f"<{second}>", far.type))
        rest = body.select(far, number, body.constant(0, self.type))
        small = body.cast("trunc", rest, vector(lanes, "i8"))
        made = body.cast("bitcast", small, vector(lanes // 4, "i32"))
        first = body.cast("trunc", body.binary("udiv", c, 4), "i32")
        for place in range(lanes // 4):
            word, count = body.lane(made, place), body.read(self.count)
            pair = body.offset(self.rest, "i32", body.mul(count, 2))
            body.store(body.add(first, place), pair)
            body.store(word, body.offset(pair, "i32", 1))
            some = body.compare("ne", word, Value("0", "i32"))
            body.write(self.count, body.add(count, body.cast("zext", some, "i64")))
        return body.sub(number, rest)

    def end(self) -> None:
        """Keep what is known of the whole row."""
        body, name = self.body, f"llvm.vector.reduce.add.v{self.lanes}i32"
        total = body.call(name, "i32", [body.read(self.total)])
        body.store(body.mul(total, 128), self.of_row[1])
        body.store(body.cast("trunc", body.read(self.count), "i32"), self.of_row[2])


class Integers(Quantized):
    """The kernel "qgemm" for rounded rows."""

    unrolled = 1
    """Steps of a tile that are written one after another. It divides those of 16 inputs."""

    def begin(self) -> None:
        """This worker's scratch: a block of a panel in words, then sums."""
        body, words = self.body, self.words
        self.per_word = self.spec.per_word
        self.depth = depth(self.spec)
        self.panel_words = claims.scratch_of_worker(body, words)
        size = self.depth * self.spec.width * 4 // self.per_word
        self.sums = body.offset(self.panel_words, "i8", size, "sums")
        self.integers = vector(self.spec.lanes, "i32")
        self.below = [
            [body.variable(self.integers, hint="below") for _ in range(self.spec.vectors)]
            for _ in self.parts
        ]

    def rows(self, start: Value, stop: Value) -> None:
        """All rows of an item."""
        body, spec = self.body, self.spec
        if spec.pairs and not spec.shared:
            with body.loop("row", start, stop, spec.rows) as row:
                for column in self.parts:
                    self._few_rows(row, body.sub(row, start), column)
        else:
            self._sum_blocks(start, stop)
        self._scale(start, stop)
        self.finish_rows(start, body.sub(stop, start), self.sums)

    def _sum_blocks(self, start: Value, stop: Value) -> None:
        """The sums of all rows of an item, which share the words of a block of the panel."""
        body, words, spec = self.body, self.words, self.spec
        for place in (place for line in self.below for place in line):
            body.write(place, body.constant(0, self.integers))
        with body.loop("block", 0, words["inputs"], self.depth) as c:
            depth = body.minimum(body.sub(words["inputs"], c), self.depth)
            steps = body.binary("udiv", depth, self.per_word, "steps")
            for column, below in zip(self.parts, self.below, strict=True):
                self._interleave(c, steps, column, below)
            with body.loop("row", start, stop, spec.rows) as row:
                for column in self.parts:
                    self._tile(c, steps, row, body.sub(row, start), column)

    def _interleave(self, c: Value, steps: Value, column: int, below: list[Variable]) -> None:
        """Words of a block of the panel, and 128 times their sums."""
        body, spec = self.body, self.spec
        with body.loop("step", 0, steps) as step:
            place = body.add(c, body.mul(step, self.per_word))
            codes = self.codes_at(place, self.per_word, column)
            if spec.pairs:
                found = self._pairs(codes)
            else:
                found = self._whole_lines(codes) if spec.permutes else self._part_lines(codes)
            every = body.constant(-0x7F7F7F80, self.integers)  # 128 in each byte
            for j, word in enumerate(found):
                if not spec.pairs:
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
            picks = [32 * t + 16 * j + lane for lane in range(16) for t in range(4)]
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
                for t in range(4)
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

    def _pairs(self, codes: Value) -> list[Value]:
        """Parts of two lines as words of two numbers of 16 bits."""
        body, lanes = self.body, self.spec.lanes
        count = self.spec.vectors * lanes
        one, two = (
            body.load(body.offset(codes, "i8", t * self.spec.width), vector(count, "i8"))
            for t in range(2)
        )
        mixed = [number for column in range(count) for number in (column, count + column)]
        found = []
        for first in range(0, 2 * count, 2 * lanes):
            bytes_ = body.shuffle(one, two, mixed[first : first + 2 * lanes])
            wide = body.cast("sext", bytes_, vector(2 * lanes, "i16"))
            found.append(body.cast("bitcast", wide, self.integers, "words"))
        return found

    def _added(self, total: Value, left: Value, right: Value) -> Value:
        """total + the products of a word: bytes of left have no sign, other numbers have one."""
        body, spec = self.body, self.spec
        if spec.pairs:
            halves = vector(2 * spec.lanes, "i16")
            pairs = [body.cast("bitcast", word, halves) for word in (left, right)]
            product = body.call(_PMADDWD[spec.lanes], self.integers, pairs)
            return body.add(total, product, "sum")
        if spec.vnni:
            name = f"llvm.x86.avx512.vpdpbusd.{32 * spec.lanes}"
            return body.call(name, self.integers, [total, left, right], "sum")
        for t in range(4):
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
        tile = body.offset(words["x"], f"i{32 // self.per_word}", before, "x")
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
        with body.loop("step", 0, steps, self.unrolled) as first:
            for more in range(self.unrolled):
                step = body.add(first, more) if more else first
                index = body.add(body.mul(step, spec.width), column)
                line = body.offset(self.panel_words, "i32", index)
                found = [
                    body.load(body.offset(line, "i32", j * spec.lanes), self.integers, "w")
                    for j in range(spec.vectors)
                ]
                self._multiply(tile, step, found, sums)
        self._keep(sums, places)

    def _few_rows(self, row: Value, number: Value, column: int) -> None:
        """The sums of a tile of rows, with words that no other tile reads."""
        body, words, spec = self.body, self.words, self.spec
        tile = body.offset(words["x"], "i16", body.mul(row, words["inputs"]), "x")
        none = body.constant(0, self.integers)
        sums = [
            [body.variable(self.integers, none) for _ in range(spec.vectors)]
            for _ in range(spec.rows)
        ]
        with body.loop("c", 0, words["inputs"], 2 * self.per_word) as c:
            codes = self.codes_at(c, 2 * self.per_word, column)
            for half in range(2):
                found = self._pairs(body.offset(codes, "i8", half * self.per_word * spec.width))
                step = body.add(body.binary("udiv", c, self.per_word), half)
                self._multiply(tile, step, found, sums)
        self._keep(sums, self._places(number, column))

    def _multiply(
        self, tile: Value, step: Value, found: list[Value], sums: list[list[Variable]]
    ) -> None:
        """Add the products of a step: words of the rows of a tile, and of some columns."""
        body, spec = self.body, self.spec
        for i, sums_of_row in enumerate(sums):
            at = body.offset(tile, "i32", body.add(body.mul(step, spec.rows), i))
            word = body.splat(body.load(at, "i32", "word"), spec.lanes)
            for place, w in zip(sums_of_row, found, strict=True):
                body.write(place, self._added(body.read(place), word, w))

    def _keep(self, sums: list[list[Variable]], places: list[list[Value]]) -> None:
        """Store the sums of a tile."""
        for line, totals in zip(places, sums, strict=True):
            for place, total in zip(line, totals, strict=True):
                self.body.store(self.body.read(total), place)

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
                    total = body.load(address, self.integers)
                    if not spec.pairs:
                        total = body.sub(total, body.read(below[j]))
                    number = body.cast("sitofp", total, self.type)
                    number = body.binary("fmul", number, body.splat(of_row, spec.lanes))
                    body.store(body.binary("fmul", number, scale), address)


def emit(spec: QuantizedSpec) -> str:
    """The LLVM source of a kernel."""
    module = Module(repr(spec), 32 * spec.lanes)
    Integers(module, spec)
    return module.text()
