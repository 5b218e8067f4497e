"""Products of rounded rows with an int8 matrix on AVX2, four numbers of 8 bits at a time.

    "round_rows"   x <- x (127 / max |x|), in whole numbers;  rest <- numbers of x set to 0 in it
    "qgemm"        sums += x[rows, inputs] (128 + panel)
                   out <- scales of rows, scales of columns, (sums + rest (128 + panel) - 128 x)

`pmaddubsw` multiplies bytes without a sign by bytes with one, and adds two products in 16 bits.
They fit where the sum of the two numbers of x is between -128 and 128: 255 x 128 < 2^15. Elsewhere
the second one is 0 in x, and its word of four follows in a list of the row. Of normal numbers these
are 3 to 5 % of the words. So all sums are exact, with three instructions for 32 products; with
`pmaddwd` of 16 bits they are four.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilefold.backends.cpu.kernels.ir import Body, Module, Value, Variable, vector
from tilefold.backends.cpu.matmul.quantized_integers import REST, Integers
from tilefold.backends.cpu.matmul.spec import QuantizedSpec

_BYTES, _HALVES, _WORDS = vector(32, "i8"), vector(16, "i16"), vector(8, "i32")


def add_product(body: Body, left: Value, right: Value, total: Value) -> Value:
    """total + the products of bytes of left, with a sign, and of right, without one."""
    one, two = (body.cast("bitcast", word, _BYTES) for word in (right, left))
    pairs = body.call("llvm.x86.avx2.pmadd.ub.sw", _HALVES, [one, two])
    ones = body.constant(1, _HALVES)
    return body.add(total, body.call("llvm.x86.avx2.pmadd.wd", _WORDS, [pairs, ones]), "sum")


class Fours(Integers):
    """The kernel "qgemm" where rounded rows are split."""

    unrolled = 2

    def rows(self, start: Value, stop: Value) -> None:
        """All rows of an item."""
        body, spec = self.body, self.spec
        if spec.shared:
            self._sum_blocks(start, stop)
        else:
            with body.loop("row", start, stop, spec.rows) as row:
                for column in self.parts:
                    self._few_rows(row, body.sub(row, start), column)
        self._scale(start, stop)
        self.finish_rows(start, body.sub(stop, start), self.sums)

    def _interleave(self, c: Value, steps: Value, column: int, below: list[Variable]) -> None:
        """Words of a block of the panel, all columns of it at once."""
        body, spec = self.body, self.spec
        if column:
            return
        with body.loop("step", 0, steps) as step:
            codes = self.codes_at(body.add(c, body.mul(step, 4)), 4, 0)
            for place, word in _ordered(self, self._fours(codes, (0, 1))):
                index = body.add(body.mul(step, spec.width), place)
                body.store(word, body.offset(self.panel_words, "i32", index))

    def _few_rows(self, row: Value, number: Value, column: int) -> None:
        """The sums of a tile of rows, with words that no other tile reads."""
        body, words, spec = self.body, self.words, self.spec
        tile = body.offset(words["x"], "i8", body.mul(row, words["inputs"]), "x")
        none = body.constant(0, self.integers)
        sums = [
            [body.variable(self.integers, none) for _ in range(spec.vectors)]
            for _ in range(spec.rows)
        ]
        halves = (0, 1) if spec.vectors == 4 else (column // 16,)
        with body.loop("c", 0, words["inputs"], 4 * self.unrolled) as c:
            codes = body.offset(self.codes_at(c, 4 * self.unrolled, column), "i8", -column)
            for more in range(self.unrolled):
                found = self._fours(body.offset(codes, "i8", 4 * more * spec.width), halves)
                self._multiply(tile, body.add(body.binary("udiv", c, 4), more), found, sums)
        for i, line in enumerate(sums):
            totals = [body.read(total) for total in line]
            lane = body.mul(body.add(number, i), spec.width)
            for place, total in _ordered(self, totals, halves):
                body.store(total, body.offset(self.sums, "i32", body.add(lane, place)))

    def _fours(self, codes: Value, halves: Sequence[int]) -> list[Value]:
        """Four lines of 32 columns as words of four codes, each with 128 added.

        The words of half h of the lines are two vectors: columns 8h to 8h + 3 and 16 + 8h to
        16 + 8h + 3, then those 4 later.
        """
        body = self.body
        lines = [
            body.load(body.offset(codes, "i8", t * self.spec.width), _BYTES, "line", align=1)
            for t in range(4)
        ]
        signs = body.constant(-128, _BYTES)
        found = []
        for half in halves:
            mixed = [at + 8 * half + i + k for at in (0, 16) for i in range(8) for k in (0, 32)]
            pairs = [body.shuffle(lines[t], lines[t + 1], mixed) for t in (0, 2)]
            pairs = [body.cast("bitcast", body.binary("xor", one, signs), _HALVES) for one in pairs]
            for first in (0, 4):
                mixed = [at + first + i + k for at in (0, 8) for i in range(4) for k in (0, 16)]
                words = body.shuffle(pairs[0], pairs[1], mixed)
                found.append(body.cast("bitcast", words, _WORDS, "words"))
        return found

    def _added(self, total: Value, left: Value, right: Value) -> Value:
        return add_product(self.body, left, right, total)

    def _scale(self, start: Value, stop: Value) -> None:
        """Sums of integers, with what rows were split into, become the numbers they stand for."""
        body, words, spec = self.body, self.words, self.spec
        at = self.line_of_scales(Value("0", "i64"), 0)
        scales = [
            scale for column in self.parts for scale in self.numbers("scales", body.add(at, column))
        ]
        none = body.constant(0, self.integers)
        with body.loop("row", start, stop) as row:
            of_rows = [
                body.offset(words["x_scales"], "i32", body.add(body.mul(words["m"], place), row))
                for place in range(REST)
            ]
            of_row = body.splat(body.load(of_rows[0], "float"), spec.lanes)
            below = body.splat(body.load(of_rows[1], "i32"), spec.lanes)
            count = body.cast("zext", body.load(of_rows[2], "i32"), "i64")
            before = body.mul(row, body.binary("udiv", words["inputs"], 2))
            before = body.add(body.mul(words["m"], REST), before)
            rest = body.offset(words["x_scales"], "i32", before)
            more = [body.variable(self.integers, none) for _ in range(4)]
            with body.loop("rest", 0, count) as entry:
                pair = body.offset(rest, "i32", body.mul(entry, 2))
                step = body.cast("zext", body.load(pair, "i32"), "i64")
                word = body.splat(body.load(body.offset(pair, "i32", 1), "i32"), spec.lanes)
                codes = body.offset(self.codes, "i8", body.mul(step, 4 * spec.width))
                for place_of_sum, w in zip(more, self._fours(codes, (0, 1)), strict=True):
                    body.write(place_of_sum, self._added(body.read(place_of_sum), word, w))
            line = body.mul(body.sub(row, start), spec.width)
            for place, extra in _ordered(self, [body.read(total) for total in more]):
                address = body.offset(self.sums, "i32", body.add(line, place))
                total = body.add(body.load(address, self.integers), body.sub(extra, below))
                number = body.binary("fmul", body.cast("sitofp", total, self.type), of_row)
                number = body.binary("fmul", number, scales[place // spec.lanes])
                body.store(number, address)


def _ordered(
    kernel: Fours, found: list[Value], halves: Sequence[int] = (0, 1)
) -> list[tuple[int, Value]]:
    """Vectors of neighbouring columns with their first columns, from those of `_fours`."""
    body, placed = kernel.body, []
    for half, first in zip(halves, range(0, len(found), 2), strict=True):
        for side in (0, 1):
            picks = [4 * side + i + k for k in (0, 8) for i in range(4)]
            together = body.shuffle(found[first], found[first + 1], picks)
            placed.append((16 * side + 8 * half, together))
    return placed


def emit(spec: QuantizedSpec) -> str:
    """The LLVM source of a kernel."""
    module = Module(repr(spec), 32 * spec.lanes)
    Fours(module, spec)
    return module.text()
