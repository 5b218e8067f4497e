"""The kernel of a product with a quantised matrix for many rows: a panel is widened once for them.

    for item in (panel of 32 columns, block of rows):           workers take items
        for block of inputs:
            panel <- scales (codes - zeros)                     scratch, in the first cache
            for `rows` rows of the block:
                sums += x[rows, inputs] panel                   the micro-kernel
        out <- sums                                             `finish`

x lies in tiles of `rows` rows, in which the rows of an input lie side by side. Widening a weight
takes 2 to 4 steps, and its products with 112 rows take 112.
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels import claims, microkernel
from tilefold.backends.cpu.kernels.ir import Module, Value
from tilefold.backends.cpu.matmul import widen
from tilefold.backends.cpu.matmul.quantized import FewRows, Quantized
from tilefold.backends.cpu.matmul.spec import QuantizedSpec


def depth(spec: QuantizedSpec) -> int:
    """Inputs of a block, a multiple of every step.

    With 128 in the place of 256, 128 rows took 0.89 of the time (AVX2, AMD Zen 3, whose first cache
    has 32 KiB). The others are not tuned.
    """
    return 128 if spec.lanes == 8 else 256


class ManyRows(Quantized):
    """The kernel for many rows: those of an item share a widened panel."""

    def begin(self) -> None:
        """This worker's scratch: a block of a panel, then sums."""
        body, words = self.body, self.words
        self.wide = claims.scratch_of_worker(body, words)
        self.sums = body.offset(self.wide, "float", depth(self.spec) * self.spec.width, "sums")

    def rows(self, start: Value, stop: Value) -> None:
        """All rows of an item."""
        body, words, spec = self.body, self.words, self.spec
        most = depth(spec)
        with body.loop("block", 0, words["inputs"], most) as c:
            count = body.minimum(body.sub(words["inputs"], c), most, "depth")
            for column in self.parts:
                self._widen(c, count, column)
            with body.loop("row", start, stop, spec.rows) as row:
                for column in self.parts:
                    self._tile(c, count, row, body.sub(row, start), column)
        self.finish_rows(start, body.sub(stop, start), self.sums)

    def _widen(self, c: Value, depth: Value, column: int) -> None:
        """Some columns of the panel, for a block of inputs."""
        body, spec = self.body, self.spec
        weights = widen.weights(body, spec, self.table)
        whole = depth
        if not spec.whole:
            whole = body.mul(body.binary("udiv", depth, self.step), self.step)
        with body.loop("input", 0, whole, self.step) as first:
            self._inputs_at(c, first, self.step, column, weights)
        if not spec.whole:
            with body.loop("rest", whole, depth) as first:
                self._inputs_at(c, first, 1, column, weights)

    def _inputs_at(
        self, c: Value, first: Value, count: int, column: int, weights: widen.Weights
    ) -> None:
        body, words, spec = self.body, self.words, self.spec
        place = body.add(c, first)
        scales = zeros = None
        if spec.scales:
            group = body.binary("udiv", place, words["group_size"], "group")
            at = self.line_of_scales(group, column)
            scales = self.numbers("scales", at)
            zeros = self.numbers("zeros", at) if spec.scheme == "int4" else None
        codes = self.codes_at(place, count, column)
        for t in widen.order(spec) if count > 1 else (0,):
            found = weights(codes, t)
            if zeros:
                found = [body.binary("fsub", w, z) for w, z in zip(found, zeros, strict=True)]
            if scales:
                found = [body.binary("fmul", w, s) for w, s in zip(found, scales, strict=True)]
            line = body.mul(body.add(first, t), spec.width)
            for j, w in enumerate(found):
                index = body.add(line, column + j * spec.lanes)
                body.store(w, body.offset(self.wide, "float", index))

    def _tile(self, c: Value, depth: Value, row: Value, number: Value, column: int) -> None:
        """Add the products of some rows, whose inputs lie side by side."""
        body, words, spec = self.body, self.words, self.spec
        shape = microkernel.Shape(spec.rows, spec.vectors, spec.lanes, "float")
        before = body.add(body.mul(row, words["inputs"]), body.mul(c, spec.rows))
        tile = body.offset(words["x"], "float", before, "x")
        left = [body.offset(tile, "float", i) for i in range(spec.rows)]
        lines = [body.mul(body.add(number, i), spec.width) for i in range(spec.rows)]
        places = [
            [
                body.offset(self.sums, "float", body.add(line, column + j * spec.lanes))
                for j in range(spec.vectors)
            ]
            for line in lines
        ]
        is_first = body.compare("eq", c, Value("0", "i64"), "is_first")
        zero = body.constant(0.0, self.type)

        def start(i: int, j: int) -> Value:
            return body.select(is_first, zero, body.load(places[i][j], self.type, "sum"))

        right = body.offset(self.wide, "float", column)
        totals = microkernel.multiply(
            body, shape, spec.rows, left, spec.rows, right, spec.width, depth, start
        )
        for line, found in zip(places, totals, strict=True):
            for place, total in zip(line, found, strict=True):
                body.store(total, place)


def emit(spec: QuantizedSpec) -> str:
    """The LLVM source of a kernel."""
    module = Module(repr(spec), 32 * spec.lanes)
    (ManyRows if spec.shared else FewRows)(module, spec)
    return module.text()
