"""The kernel of a product with a quantised matrix: codes are read once for some rows.

    for item in (panel of 32 columns, block of rows):           workers take items
        for `rows` rows of the block:
            for group of inputs:
                sums = 0
                for step of inputs:
                    w = the codes, widened in registers, less their zeros
                    sums += x[rows, inputs] w
                totals += scales sums
            out <- totals                                       `finish`

Codes lie in the order in which they are read, so few rows cost what reading takes. A scale is
applied once for a group. Each sum is made by one worker, in order.
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels.ir import Module, Operand, Value, Variable, vector
from tilefold.backends.cpu.matmul import widen
from tilefold.backends.cpu.matmul.arguments import Arguments
from tilefold.backends.cpu.matmul.finish import finish
from tilefold.backends.cpu.matmul.panels import reading
from tilefold.backends.cpu.matmul.spec import ITEM_BYTES, QuantizedSpec

_CHAINS = 8
"""Sums that do not wait for each other: an addition takes 4 steps, and two begin in each."""


AHEAD_BYTES = 2048
"""Codes are asked for so many bytes before they are read, and scales likewise."""


def emit(spec: QuantizedSpec) -> str:
    """The LLVM source of a kernel."""
    module = Module(repr(spec), 32 * spec.lanes)
    _Quantized(module, spec)
    return module.text()


class _Quantized:
    def __init__(self, module: Module, spec: QuantizedSpec) -> None:
        self.spec = spec
        self.type = vector(spec.lanes, "float")
        self.finish = finish(module, spec)
        self.step = widen.STEPS[spec.scheme]
        self.block = Value("%arguments", "ptr")
        with module.function(spec.kernel, [self.block]) as body:
            self.body = body
            self.words = Arguments(body, spec, self.block)
            scratch = body.variable(f"[{spec.rows * spec.width} x float]", hint="totals")
            self.scratch = Value(scratch.address, "ptr")
            self._items()

    def _items(self) -> None:
        body, words = self.body, self.words
        with body.forever("claim") as end:
            first = words.take("next_item", words["items_per_claim"])
            body.leave_unless(body.compare("slt", first, words["items"]), end, "work")
            last = body.minimum(body.add(first, words["items_per_claim"]), words["items"])
            with body.loop("item", first, last) as item:
                self.panel = body.binary("udiv", item, words["row_blocks"], "panel")
                block = body.binary("urem", item, words["row_blocks"])
                start = body.mul(block, words["block_m"])
                stop = body.minimum(body.add(start, words["block_m"]), words["m"])
                before = body.mul(self.panel, words["panel_bytes"])
                self.codes = body.offset(words["codes"], "i8", before, "codes")
                with body.loop("row", start, stop, self.spec.rows) as row:
                    self._rows(row, body.minimum(body.sub(stop, row), self.spec.rows))

    def _rows(self, row: Value, exist: Value) -> None:
        """Some rows of a panel. Rows that do not exist are the last one again."""
        body, words, spec = self.body, self.words, self.spec
        last = body.sub(words["m"], 1)
        self.x = []
        for i in range(spec.rows):
            own = body.minimum(body.add(row, i), last)
            self.x.append(body.offset(words["x"], "float", body.mul(own, words["x_m"]), "x"))
        for part in range(spec.width // (spec.vectors * spec.lanes)):
            self._part(part * spec.vectors * spec.lanes)
        column = body.mul(self.panel, spec.width)
        columns = body.minimum(body.sub(words["n"], column), spec.width)
        null = Value("null", "ptr")
        pointers = [null, null, null]
        for place, (name, dtype) in enumerate((("out", spec.out), ("", None), ("bias", spec.bias))):
            if dtype is not None:
                index = body.mul(column, words[f"{name}_n"])
                index = body.add(index, body.mul(row, words[f"{name}_m"]))
                store = reading(dtype, "float32", spec.native_half)
                pointers[place] = store.at(body, words[name], index)
        body.invoke(self.finish, [self.block, self.scratch, null, exist, columns, *pointers])

    def _part(self, column: int) -> None:
        """The totals of some columns of the panel."""
        body, words, spec = self.body, self.words, self.spec
        zero = body.constant(0.0, self.type)
        rows, vectors = range(spec.rows), range(spec.vectors)
        totals = [[body.variable(self.type, zero, "total") for _ in vectors] for _ in rows]
        sets = range(max(1, _CHAINS // (spec.rows * spec.vectors)))
        sums = [
            [[body.variable(self.type, hint="sum") for _ in vectors] for _ in rows] for _ in sets
        ]
        weights = widen.weights(body, spec, words["table"])
        with body.loop("group", 0, words["groups"]) as group:
            for place in (place for each in sums for line in each for place in line):
                body.write(place, zero)
            line = body.add(body.mul(self.panel, words["groups"]), group)
            at = body.add(body.mul(line, spec.width), column)
            if spec.scales and column == 0:
                self._ask_for_group(at)
            zeros = self._numbers("zeros", at) if spec.scheme == "int4" else []
            first = body.mul(group, words["group_size"], "first")
            stop = body.add(first, words["group_size"])
            whole = stop
            if not spec.whole:
                whole = body.add(
                    first, body.mul(body.binary("udiv", words["group_size"], self.step), self.step)
                )
            with body.loop("c", first, whole, self.step) as c:
                self._inputs(c, self.step, column, weights, zeros, sums)
            if not spec.whole:
                with body.loop("rest", whole, stop) as c:
                    self._inputs(c, 1, column, weights, zeros, sums)
            scales = self._numbers("scales", at) if spec.scales else []
            self._add_group(totals, sums, scales)
        for i in rows:
            for j in vectors:
                index = i * spec.width + column + j * spec.lanes
                body.store(body.read(totals[i][j]), body.offset(self.scratch, "float", index))

    def _inputs(
        self,
        c: Value,
        count: int,
        column: int,
        weights: widen.Weights,
        zeros: list[Value],
        sums: list[list[list[Variable]]],
    ) -> None:
        """Add the products of some inputs to the sums."""
        body, spec = self.body, self.spec
        before = body.add(body.mul(c, spec.bits * spec.width // 8), column * spec.item_bytes)
        at = body.offset(self.codes, "i8", before, "at")
        if count > 1:
            step_bytes = count * spec.bits * spec.width // 8
            for ahead in range(0, step_bytes, 64):
                self._ask(body.offset(at, "i8", AHEAD_BYTES + ahead))
        for t in range(count):
            found = weights(at, t)
            if zeros:
                found = [body.binary("fsub", w, z) for w, z in zip(found, zeros, strict=True)]
            for i, x in enumerate(self.x):
                place = body.offset(x, "float", body.add(c, t))
                number = body.splat(body.load(place, "float", "a"), spec.lanes, "a")
                for w, total in zip(found, sums[t % len(sums)][i], strict=True):
                    body.write(total, body.multiply_add(number, w, body.read(total), "sum"))

    def _ask_for_group(self, at: Value) -> None:
        """Ask for scales and zeros of a later group, which may be one of the next panel."""
        body, words, spec = self.body, self.words, self.spec
        assert spec.scales is not None
        later = body.add(at, body.mul(words["groups_ahead"], spec.width))
        store = reading(spec.scales, "float32", spec.native_half)
        for name in ("scales", "zeros") if spec.scheme == "int4" else ("scales",):
            base = store.at(body, words[name], later)
            for line in range(0, spec.width * ITEM_BYTES[spec.scales], 64):
                self._ask(body.offset(base, "i8", line))

    def _ask(self, address: Value) -> None:
        """Ask for a line of memory ahead of its use."""
        body = self.body
        name, flags = "llvm.prefetch.p0", [Value(number, "i32") for number in ("0", "3", "1")]
        body.module.declare(name, "void", ["ptr", "i32", "i32", "i32"])
        body.invoke(name, [address, *flags])

    def _add_group(
        self,
        totals: list[list[Variable]],
        sums: list[list[list[Variable]]],
        scales: list[Value],
    ) -> None:
        body = self.body
        for i, line in enumerate(totals):
            for j, total in enumerate(line):
                found = body.read(sums[0][i][j])
                for more in sums[1:]:
                    found = body.binary("fadd", found, body.read(more[i][j]))
                if scales:
                    found = body.multiply_add(found, scales[j], body.read(total))
                body.write(total, found)

    def _numbers(self, name: str, at: Operand) -> list[Value]:
        """Scales or zeros of a group, from an index on."""
        body, spec = self.body, self.spec
        assert spec.scales is not None
        store = reading(spec.scales, "float32", spec.native_half)
        base = store.at(body, self.words[name], at)
        found = [
            store.load(body, store.at(body, base, j * spec.lanes), spec.lanes, name)
            for j in range(spec.vectors)
        ]
        factor = widen.FACTORS.get(spec.scheme) if name == "scales" else None
        if factor is None:
            return found
        return [body.binary("fmul", each, body.constant(factor, self.type)) for each in found]
