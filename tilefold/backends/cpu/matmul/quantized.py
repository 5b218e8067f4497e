"""The kernel of a product of few rows with a quantised matrix: codes are read once for them.

    for item in (panel of 32 columns, block of rows):           workers take items
        for `rows` rows of the block:
            for group of inputs:
                sums = 0
                for step of inputs:
                    w = the codes, widened in registers
                    sums += x[rows, inputs] w
                totals += scales (sums - zeros (the sum of x[rows, inputs of the group]))
            out <- totals                                       `finish`

Codes lie in the order in which they are read, so few rows cost what reading takes. Scale and zero
are applied once for a group. Each sum is made by one worker, in order.
"""

from __future__ import annotations

import itertools

from tilefold.backends.cpu.kernels import claims
from tilefold.backends.cpu.kernels.ir import Module, Value, Variable, vector
from tilefold.backends.cpu.kernels.prefetch import prefetch
from tilefold.backends.cpu.matmul import widen
from tilefold.backends.cpu.matmul.arguments import Arguments
from tilefold.backends.cpu.matmul.finish import finish
from tilefold.backends.cpu.matmul.panels import reading
from tilefold.backends.cpu.matmul.spec import ITEM_BYTES, QuantizedSpec

_CHAINS = 8
"""Sums that do not wait for each other: an addition takes 4 steps, and two begin in each."""


AHEAD_BYTES = 2048
"""Codes are asked for so many bytes before they are read, and scales likewise."""


class Quantized:
    """What both kernels have: items, and what becomes of sums. A subclass makes the sums."""

    def __init__(self, module: Module, spec: QuantizedSpec) -> None:
        self.spec = spec
        self.type = vector(spec.lanes, "float")
        self.parts = range(0, spec.width, spec.vectors * spec.lanes)
        self.step = widen.STEPS[spec.scheme]
        self._finish = finish(module, spec)
        self._block = Value("%arguments", "ptr")
        with module.function(spec.kernel, [self._block]) as body:
            self.body = body
            self.words = Arguments(body, spec, self._block)
            self.table = widen.table(body, spec, self.words["table"])
            self.begin()
            self._items()

    def begin(self) -> None:
        """Write what comes before all items."""
        raise NotImplementedError

    def rows(self, start: Value, stop: Value) -> None:
        """Write the work of an item: some rows of a panel."""
        raise NotImplementedError

    def _items(self) -> None:
        body, words = self.body, self.words
        with claims.several(body, words) as item:
            self.panel = body.binary("udiv", item, words["row_blocks"], "panel")
            block = body.binary("urem", item, words["row_blocks"])
            start = body.mul(block, words["block_m"])
            before = body.mul(self.panel, words["panel_bytes"])
            self.codes = body.offset(words["codes"], "i8", before, "codes")
            stop = body.minimum(body.add(start, words["block_m"]), words["m"])
            self.rows(start, stop)

    def codes_at(self, c: Value, count: int, column: int) -> Value:
        """The address of the codes of inputs from c on, from a column of the panel on."""
        body, spec = self.body, self.spec
        bytes_of_input = spec.bits * spec.width // 8
        at = body.offset(self.codes, "i8", body.mul(c, bytes_of_input), "line")
        if count > 1 and column == 0:
            for ahead in range(0, count * bytes_of_input, 64):
                prefetch(body, body.offset(at, "i8", AHEAD_BYTES + ahead))
        return body.offset(at, "i8", column * spec.item_bytes, "at")

    def finish_rows(self, row: Value, exist: Value, sums: Value) -> None:
        """Write results from sums in lines of a panel's width."""
        body, words, spec = self.body, self.words, self.spec
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
        body.invoke(self._finish, [self._block, sums, null, exist, columns, *pointers])

    def line_of_scales(self, group: Value, column: int) -> Value:
        """The index of a group's first scale, from a column of the panel on."""
        body = self.body
        line = body.add(body.mul(self.panel, self.words["groups"]), group)
        return body.add(body.mul(line, self.spec.width), column)

    def numbers(self, name: str, at: Value) -> list[Value]:
        """Scales or zeros of some columns, from an index on."""
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

    def ask_for_scales(self, at: Value) -> None:
        """Ask for scales and zeros of a later group, which may be one of the next panel."""
        body, words, spec = self.body, self.words, self.spec
        assert spec.scales is not None
        later = body.add(at, body.mul(words["groups_ahead"], spec.width))
        store = reading(spec.scales, "float32", spec.native_half)
        for name in ("scales", "zeros") if spec.scheme == "int4" else ("scales",):
            base = store.at(body, words[name], later)
            for line in range(0, spec.width * ITEM_BYTES[spec.scales], 64):
                prefetch(body, body.offset(base, "i8", line))


class FewRows(Quantized):
    """The kernel for few rows."""

    def begin(self) -> None:
        """Totals of a tile."""
        spec = self.spec
        scratch = self.body.variable(f"[{spec.rows * spec.width} x float]", hint="totals")
        self._totals = Value(scratch.address, "ptr")

    def rows(self, start: Value, stop: Value) -> None:
        """Tiles of rows, each with all inputs."""
        body = self.body
        with body.loop("row", start, stop, self.spec.rows) as row:
            self._x = self._rows_of_x(row)
            self._sum()
            exist = body.minimum(body.sub(stop, row), self.spec.rows)
            self.finish_rows(row, exist, self._totals)

    def _rows_of_x(self, row: Value) -> list[Value]:
        """The addresses of the rows of a tile. Rows that do not exist are the last one again."""
        body, words = self.body, self.words
        last = body.sub(words["m"], 1)
        rows = [body.minimum(body.add(row, i), last) for i in range(self.spec.rows)]
        return [body.offset(words["x"], "float", body.mul(own, words["x_m"]), "x") for own in rows]

    def _sum(self) -> None:
        """The totals of a tile. Its parts read a group in turn, so that it comes from the cache."""
        body, words, spec = self.body, self.words, self.spec
        zero = body.constant(0.0, self.type)
        rows, vectors = range(spec.rows), range(spec.vectors)
        totals = [
            [[body.variable(self.type, zero, "total") for _ in vectors] for _ in rows]
            for _ in self.parts
        ]
        chains = 2 if widen.looked_up(spec) else _CHAINS  # looking up takes longer than additions
        sets = range(max(1, chains // (spec.rows * spec.vectors)))
        sums = [
            [[body.variable(self.type, hint="sum") for _ in vectors] for _ in rows] for _ in sets
        ]
        weights = widen.weights(body, spec, self.table, len(sets))
        with body.loop("group", 0, words["groups"]) as group:
            first = body.mul(group, words["group_size"], "first")
            stop = body.add(first, words["group_size"])
            below = [self._sum_of_inputs(x, first, stop) for x in self._x] if self._zeros else []
            whole = stop
            if not spec.whole:
                whole = body.add(
                    first, body.mul(body.binary("udiv", words["group_size"], self.step), self.step)
                )
            for column, totals_of_part in zip(self.parts, totals, strict=True):
                for place in (place for each in sums for line in each for place in line):
                    body.write(place, zero)
                at = self.line_of_scales(group, column)
                if spec.scales and column == 0:
                    self.ask_for_scales(at)
                with body.loop("c", first, whole, self.step) as c:
                    self._inputs(c, self.step, column, weights, sums)
                if not spec.whole:
                    with body.loop("rest", whole, stop) as c:
                        self._inputs(c, 1, column, weights, sums)
                self._add_group(totals_of_part, sums, below, at)
        for column, totals_of_part in zip(self.parts, totals, strict=True):
            for i, j in itertools.product(rows, vectors):
                index = i * spec.width + column + j * spec.lanes
                total = body.read(totals_of_part[i][j])
                body.store(total, body.offset(self._totals, "float", index))

    def _inputs(
        self,
        c: Value,
        count: int,
        column: int,
        weights: widen.Weights,
        sums: list[list[list[Variable]]],
    ) -> None:
        """Add the products of some inputs to the sums."""
        body, spec = self.body, self.spec
        at = self.codes_at(c, count, column)
        for number, t in enumerate(widen.order(spec, len(sums)) if count > 1 else (0,)):
            found = weights(at, t)
            own = sums[(t if widen.masked(spec) else number) % len(sums)]
            for i, x in enumerate(self._x):
                place = body.offset(x, "float", body.add(c, t))
                a = body.splat(body.load(place, "float", "a"), spec.lanes, "a")
                for w, total in zip(found, own[i], strict=True):
                    body.write(total, body.multiply_add(a, w, body.read(total), "sum"))

    @property
    def _zeros(self) -> bool:
        """True if zeros are subtracted from sums."""
        return self.spec.scheme == "int4" or widen.masked(self.spec)

    def _sum_of_inputs(self, x: Value, first: Value, stop: Value) -> Value:
        """The sum of a row's inputs of a group, in all lanes. Groups of words are whole steps."""
        body, lanes = self.body, self.step
        type_ = vector(lanes, "float")
        total = body.variable(type_, body.constant(0.0, type_), "below")
        with body.loop("x", first, stop, lanes) as c:
            more = body.load(body.offset(x, "float", c), type_, align=4)
            body.write(total, body.binary("fadd", body.read(total), more))
        found = body.read(total)
        while lanes > 2:
            lanes //= 2
            halves = (range(lanes), range(lanes, 2 * lanes))
            low, high = (body.shuffle(found, found, half) for half in halves)
            found = body.binary("fadd", low, high)
        found = body.binary("fadd", body.lane(found, 0), body.lane(found, 1))
        return body.splat(found, self.spec.lanes)

    def _add_group(
        self,
        totals: list[list[Variable]],
        sums: list[list[list[Variable]]],
        below: list[Value],
        at: Value,
    ) -> None:
        """Add the sums of a group to the totals: those of all places, less zeros, times scales."""
        body, spec = self.body, self.spec
        zeros = []
        if spec.scheme == "int4":
            zeros = self.numbers("zeros", at)
        elif self._zeros:
            zeros = [body.constant(8.0, self.type)] * spec.vectors
        scales = self.numbers("scales", at) if spec.scales else []
        for i, line in enumerate(totals):
            for j, total in enumerate(line):
                found = body.read(sums[0][i][j])
                for place, more in enumerate(sums[1:], 1):
                    part = body.read(more[i][j])
                    if widen.masked(spec):
                        part = body.binary(
                            "fmul", part, body.constant(widen.NIBBLE**-place, self.type)
                        )
                    found = body.binary("fadd", found, part)
                if zeros:
                    less = body.binary("fmul", below[i], zeros[j])
                    found = body.binary("fsub", found, less)
                if scales:
                    found = body.multiply_add(found, scales[j], body.read(total))
                body.write(total, found)
