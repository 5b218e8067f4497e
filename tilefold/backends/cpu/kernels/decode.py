"""The decode kernel: few queries against many keys, the head dimension in the lanes.

    for each (batch, key heads, split of their keys):        one owner; one head, or those that
                                                             lie side by side in memory
        Q <- power Q;  O <- 0;  m <- -inf;  l <- -0  rows: all queries that share the keys
        for each tile of keys that the plan names:           read from memory once
            for each vector of keys, for each row:
                S <- K q                                     lanes are d, and keys in the end
                S <- masked where the rule says no           partial tiles only
            for each row:
                m_new <- max(m, S);  alpha <- 2^((m - m_new) c)
                P <- 2^((S - m_new) c);  l <- alpha l + P        a sum per lane;  O <- alpha O
            for each few values, for each row:
                O <- O + P V                                 lanes are d
    for each row of queries:                                 here, or where keys are split: merge
        O <- O / l;  lse <- rest m + ln l                    empty rows: 0 and -inf
    scale = power rest,  c = rest log2(e)                    see `scale`

One query leaves 15 of 16 lanes empty in the forward kernel. Here keys and values are read along d
in whole vectors as they lie in memory, which is what such a call waits for. As many sums as there
are lanes are reduced together, so the scores of as many keys stand in one vector. The keys of one
head are split among workers (Dao et al. 2023, "Flash-Decoding"). The worker that ends the last
split of a head merges all of them, in their order: a second kernel would start with cold caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tilefold.backends.cpu.kernels import dropout, pack, work
from tilefold.backends.cpu.kernels.ir import Body, Operand, Value, Variable, vector
from tilefold.backends.cpu.kernels.mask import MaskText, Place, ScoreText
from tilefold.backends.cpu.kernels.merge import Merge
from tilefold.backends.cpu.kernels.scores import is_shown
from tilefold.backends.cpu.kernels.softmax import exp2_scaled
from tilefold.backends.cpu.kernels.state import VALUES, Frame, emit
from tilefold.backends.cpu.kernels.storage import Storage
from tilefold.backends.cpu.kernels.sums import push
from tilefold.backends.cpu.spec import KernelSpec

CHUNK = 8
"""Vectors along d that are multiplied, or summed, in registers at a time."""


def decode(spec: KernelSpec) -> str:
    """The source of the decode kernel; "decode_part" is for a part of the keys of a head."""
    title = __doc__.split("\n\n")[1] if __doc__ else ""
    return emit(spec, title, lambda frame: _Decode(frame).write())


@dataclass(frozen=True)
class _Rows:
    """Keys or values of one head: the address of one row, and what lies between rows."""

    name: str
    dim: int
    address: Value
    stride: Value
    storage: Storage

    def moved(self, body: Body, rows: Value) -> _Rows:
        """The same rows from a later one on."""
        elements = body.mul(rows, self.stride)
        return replace(self, address=self.storage.at(body, self.address, elements, self.name))

    def following(self, body: Body) -> _Rows:
        """One row further."""
        return replace(self, address=self.storage.at(body, self.address, self.stride, self.name))

    def from_element(self, body: Body, d: Operand) -> _Rows:
        """The same rows from an element on."""
        return replace(self, address=self.storage.at(body, self.address, d, self.name))


class _Decode:
    """One split of the keys of one key head, for the rows of all query heads that share it."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.body, self.spec = frame, frame.body, frame.spec
        self.arguments, self.lanes = frame.arguments, frame.spec.lanes
        self.keys = self._operand("k", self.spec.dim)
        self.values = self._operand("v", self.spec.dim_v)
        self.heads_per_item = self.arguments["heads_per_item"]
        self.heads = self.body.mul(self.heads_per_item, self.arguments["group"], "heads")
        self.first_head = self.body.mul(frame.item.h, self.heads, "head")
        self.queries, self.weights = frame.region("q"), frame.region("p")

    def _operand(self, name: str, dim: int) -> _Rows:
        item, storage = self.frame.item, self.frame.storage
        first = self.body.mul(item.h, self.arguments["heads_per_item"], "h_kv")
        head = self.arguments.rows_of(name, storage.stored, item.b, first)
        return _Rows(name, dim, head, self.arguments[f"{name}_s"], storage)

    def write(self) -> None:
        body, frame, arguments = self.body, self.frame, self.arguments
        body.stage("packing")
        body.comment("Q <- power Q;  O <- 0;  m <- -inf;  l <- -0")
        factor = frame.scale.power
        with body.loop("g", 0, self.heads) as g:
            h = body.add(self.first_head, g, "h")
            array = arguments.rows_of("q", frame.storage.stored, frame.item.b, h)
            packed = self._query(body.mul(g, arguments["len_q"]))
            frame.move(pack.pack, packed, array, self.spec.dim, arguments["len_q"], "q", factor)
        with self._rows() as (h, _, row):
            frame.begin(self._state(h, row))
        item = frame.item
        work.tiles(
            body, self.spec, arguments, item.b, item.h, item.row, self._tile, whole=self.lanes
        )
        body.stage("results")
        if self.spec.kernel == "decode":
            with self._rows() as (h, i, row):
                frame.finish(self._state(h, row), h, i)
        else:
            self._merge_if_last()

    def _merge_if_last(self) -> None:
        """Merge the splits of the item's heads if all of them are done."""
        body, frame, arguments = self.body, self.frame, self.arguments
        item = frame.item
        pair = body.add(body.mul(item.b, arguments["heads"]), item.h)
        counter = arguments.counter(pair)
        before = body.result("before", "i64", f"atomicrmw add {counter.typed}, i64 1 acq_rel")
        last = body.compare("eq", body.add(before, 1), arguments["block_rows"])
        body.comment("the last split of a head: merge all")
        with body.when(last, "last"), body.loop("g", 0, self.heads) as g:
            Merge(frame, body.add(self.first_head, g, "h")).write()

    @contextmanager
    def _rows(self, h_kv: Value | None = None) -> Iterator[tuple[Value, Value, Value]]:
        """For each row, of one key head of the item or all: its query head, query and number."""
        body, arguments = self.body, self.arguments
        first, last = Value("0", "i64"), self.heads
        if h_kv:
            first = body.mul(h_kv, arguments["group"])
            last = body.add(first, arguments["group"])
        with (
            body.loop("g", first, last) as g,
            body.loop("i", 0, arguments["len_q"]) as i,
        ):
            row = body.add(body.mul(g, arguments["len_q"]), i, "row")
            yield body.add(self.first_head, g, "h"), i, row

    def _query(self, row: Value) -> Value:
        """The address of a row of Q."""
        return self.frame.at(self.queries, self.body.mul(row, self.spec.whole(self.spec.dim)), "q")

    def _state(self, h: Value, row: Value) -> Value:
        """The address of the state of a row, in scratch or in the array that the merge reads."""
        body, arguments, frame = self.body, self.arguments, self.frame
        if self.spec.kernel == "decode":
            return frame.at(frame.region("state"), body.mul(row, self.spec.state_width), "state")
        length = arguments["len_q"]
        i = body.binary("urem", row, length)
        place = body.add(body.mul(frame.item.row, length), i)
        rows = arguments.rows_of("part", frame.shape.scalar, frame.item.b, h)
        return frame.at(rows, body.mul(place, arguments["part_s"]), "state")

    def _tile(self, first: Value, count: Value, masked: bool) -> None:
        body, lanes = self.body, self.lanes
        keys, values = self.keys.moved(body, first), self.values.moved(body, first)
        body.stage("edges" if masked else "scores")
        body.comment("S <- K q, masked where the rule says no")
        with (
            body.loop("c", 0, count, lanes) as c,
            body.loop("h_kv", 0, self.heads_per_item) as h_kv,
        ):
            left = body.minimum(body.sub(count, c), lanes, "left")

            def score_rows(near: _Rows) -> None:
                with self._rows(h_kv) as (h, i, row):
                    scores = self._products(near, self._query(row))
                    if self.spec.score is not None:
                        place = self._place(body.add(first, c), h)
                        ((scores,),) = ScoreText(place, self.frame.scale.rest).row(i, [scores])
                    if masked:
                        allowed = self._allowed(self._place(body.add(first, c), h), left, i)
                        if self.spec.hides:
                            shown = is_shown(body, scores)
                            allowed = body.binary("and", allowed, shown, "allowed")
                        scores = self.frame.marks.mark(allowed, scores, "score")
                    body.store(scores, self._weight(row, c))

            rows = self._of_head(keys.moved(body, c), h_kv)
            self._near(rows, left, lanes if masked else 1, score_rows)
        body.stage("softmax")
        with self._rows() as (h, i, row):
            factors = self._factors(h, i, first, count) if self.spec.dropout else None
            self._weigh(self._state(h, row), row, count, masked, factors)
        body.stage("products")
        body.comment("O <- O + P V")
        with (
            body.loop("c", 0, count, VALUES) as c,
            body.loop("h_kv", 0, self.heads_per_item) as h_kv,
        ):
            left = body.minimum(body.sub(count, c), VALUES, "left")

            def add(near: _Rows) -> None:
                with self._rows(h_kv) as (h, _, row):
                    self._add_values(self._state(h, row), near, self._weight(row, c), left, masked)

            self._near(self._of_head(values.moved(body, c), h_kv), left, 1, add)

    def _of_head(self, rows: _Rows, h_kv: Value) -> _Rows:
        """The same rows of another key head of the item."""
        elements = self.body.mul(h_kv, self.arguments[f"{rows.name}_h"])
        address = rows.storage.at(self.body, rows.address, elements, rows.name)
        return replace(rows, address=address)

    def _near(self, rows: _Rows, count: Value, whole: int, use: Callable[[_Rows], None]) -> None:
        """`use` a few rows with d contiguous. Where they do not lie so they are copied first.

        So they are where `count` is no multiple of `whole`: past the end then follows what scratch
        happens to hold, and whatever is computed of it is not used. And where elements have to be
        widened for several rows of queries; for a single one they are widened as they are read.
        """
        body, frame, name = self.body, self.frame, rows.name
        apart = body.compare("ne", self.arguments[f"{name}_d"], Value("1", "i64"))
        if whole > 1:
            rest = body.binary("urem", count, whole)
            apart = body.binary("or", apart, body.compare("ne", rest, Value("0", "i64")))
        region = frame.region(name)
        width = Value(str(self.spec.whole(rows.dim)), "i64")
        copied = replace(rows, address=region, stride=width, storage=rows.storage.computed)
        if rows.storage.converts:
            several = body.mul(self.arguments["group"], self.arguments["len_q"])
            apart = body.binary("or", apart, body.compare("ne", several, Value("1", "i64")))
            with body.choose(apart, "copy") as branch:
                frame.move(pack.pack, region, rows.address, rows.dim, count, name)
                use(copied)
                branch.otherwise()
                use(rows)
            return
        address = body.variable("ptr", rows.address, f"{name}.near")
        stride = body.variable("i64", rows.stride, f"{name}.step")
        with body.when(apart, "copy"):
            frame.move(pack.pack, region, rows.address, rows.dim, count, name)
            body.write(address, region)
            body.write(stride, width)
        use(replace(rows, address=body.read(address, name), stride=body.read(stride, "step")))

    def _weight(self, row: Value, c: Value) -> Value:
        """The address of the weight of a key of the tile, or its score, for one row."""
        start = self.body.mul(row, self.spec.block_traverse)
        return self.frame.at(self.weights, self.body.add(start, c))

    def _place(self, key: Value, h: Value) -> Place:
        """A vector of keys, from `key` on, before query head `h`."""
        return Place(
            self.body,
            self.spec,
            self.arguments,
            parallel="k",
            block=key,
            length=self.arguments["len_k"],
            b=self.frame.item.b,
            h=h,
        )

    def _allowed(self, place: Place, left: Value, i: Value) -> Value:
        """Which keys query `i` sees: of the `left` that there are from the place on."""
        body, lanes = self.body, self.lanes
        (truth,) = MaskText(place).row(i)
        steps = ", ".join(f"i64 {lane}" for lane in range(lanes))
        inside = body.compare(
            "slt", Value(f"<{steps}>", vector(lanes, "i64")), body.splat(left, lanes)
        )
        return body.binary("and", truth, inside, "allowed")

    def _factors(self, h: Value, i: Value, first: Value, count: Value) -> Value:
        """Make the factors of dropout of query `i` of head `h`; their address."""
        return dropout.of_row(
            self.body,
            self.frame.shape,
            self.arguments,
            self.frame.region("keep"),
            query=i,
            first=first,
            count=count,
            h=h,
            b=self.frame.item.b,
        )

    def _weigh(
        self, state: Value, row: Value, count: Value, masked: bool, factors: Value | None
    ) -> None:
        """Scores of one row to weights; the row's state follows the new maximum."""
        body, frame = self.body, self.frame
        body.comment("m_new <- max(m, S);  alpha <- 2^((m - m_new) c);  O <- alpha O")
        place = frame.maximum_place(state)
        old = frame.load(place, "m.old")
        top = body.variable(frame.vector, frame.lowest, "top")
        with body.loop("c", 0, count, self.lanes) as c:
            score = frame.load(self._weight(row, c), "s")
            body.write(top, body.larger(score, body.read(top), "top"))
        highest = frame.across(body.read(top), lambda a, b: body.larger(a, b, "top"))
        new = body.larger(highest, old, "m.new")
        body.store(new, place)
        safe_m = frame.subtrahend(new)
        change = body.binary("fsub", old, safe_m)
        alpha = exp2_scaled(body, change, frame.rate, hint="alpha")
        for first in range(0, self.spec.whole(self.spec.dim_v), self.lanes):
            output = frame.at(state, first)
            body.store(body.binary("fmul", frame.load(output, "o"), alpha), output)
        body.comment("P <- 2^((S - m_new) c);  l <- alpha l + P")
        total = body.variable(frame.vector, frame.nothing, "sum")
        with body.loop("c", 0, count, self.lanes) as c:
            place = self._weight(row, c)
            score = frame.load(place, "s")
            below = body.binary("fsub", score, safe_m, "e")
            weight = exp2_scaled(body, below, frame.rate)
            if masked:
                hidden = frame.marks.marked(score, "score")
                weight = frame.marks.mark_where(hidden, weight, "weight")
            kept = weight
            if factors:
                kept = body.binary("fmul", weight, frame.load(frame.at(factors, c), "keep"), "p")
            body.store(kept, place)
            body.write(total, body.binary("fadd", body.read(total), weight, "sum"))
        place = frame.sum_place(state)
        body.store(body.multiply_add(frame.load(place), alpha, body.read(total), "l"), place)

    def _products(self, keys: _Rows, query: Value) -> Value:
        """The scores of as many keys as there are lanes.

        Row after row, as memory lies: four rows in turn cost a third of the bandwidth (Zen 4).
        """
        body, frame = self.body, self.frame
        total = body.variable(frame.vector, frame.zero, "s")

        def chunk(first: Operand, vectors: int, rest: int) -> None:
            places = [frame.at(query, body.add(first, j * self.lanes)) for j in range(vectors)]
            queries = [frame.load(place, "q") for place in places]
            sums: list[tuple[int, Value]] = []
            row = keys.from_element(body, first)
            for _ in range(self.lanes):
                push(body, sums, self._dot(row, queries, rest))
                row = row.following(body)
            ((_, found),) = sums
            body.write(total, body.binary("fadd", body.read(total), found, "s"))

        self._chunks(self.spec.dim, chunk)
        return body.read(total, "s")

    def _dot(self, row: _Rows, queries: list[Value], rest: int) -> Value:
        """The product of a row with the query, not yet summed over the lanes."""
        total: Value | None = None
        for j, query in enumerate(queries):
            numbers = self._vector(row, j, rest if j == len(queries) - 1 else 0)
            if total is None:
                total = self.body.binary("fmul", numbers, query, "dot")
            else:
                total = self.body.multiply_add(numbers, query, total, "dot")
        assert total is not None
        return total

    def _vector(self, row: _Rows, number: int, rest: int) -> Value:
        """Vector `number` of a row; where `rest` is not 0, only the first `rest` elements exist."""
        body, lanes, storage = self.body, self.lanes, row.storage
        place = storage.at(body, row.address, number * lanes)
        if not rest:
            return storage.load(body, place, lanes, "row")
        return storage.load_first(body, place, lanes, rest, "row")

    def _chunks(self, dim: int, write: Callable[[Operand, int, int], None]) -> None:
        """`write(first, vectors, rest)` over a row; `rest` elements in the last vector, 0: all."""
        size = CHUNK * self.lanes
        full = dim // size
        if full == 1:
            write(0, CHUNK, 0)
        elif full:
            with self.body.loop("d", 0, full * size, size) as d:
                write(d, CHUNK, 0)
        if left := dim - full * size:
            write(full * size, -(-left // self.lanes), left % self.lanes)

    def _add_values(
        self, state: Value, values: _Rows, weights: Value, count: Value, masked: bool
    ) -> None:
        """O <- O + P V. A forbidden value is not multiplied: 0 * NaN is NaN."""
        body, frame = self.body, self.frame
        together = 1 if masked else min(4, self.lanes)

        def chunk(first: Operand, vectors: int, rest: int) -> None:
            outputs = [frame.at(state, body.add(first, j * self.lanes)) for j in range(vectors)]
            totals = [body.variable(frame.vector, frame.load(place), "o") for place in outputs]
            with body.loop("c", 0, count, together) as c:
                row = values.moved(body, c).from_element(body, first)
                for i in range(together):
                    weight = body.load(frame.at(weights, body.add(c, i)), frame.shape.scalar, "p")
                    self._add_value(row, rest, body.splat(weight, self.lanes), totals, masked)
                    row = row.following(body)
            for place, total in zip(outputs, totals, strict=True):
                body.store(body.read(total), place)

        self._chunks(self.spec.dim_v, chunk)

    def _add_value(
        self, row: _Rows, rest: int, weight: Value, totals: list[Variable], masked: bool
    ) -> None:
        body = self.body
        for j, total in enumerate(totals):
            numbers = self._vector(row, j, rest if j == len(totals) - 1 else 0)
            old = body.read(total, "o")
            new = body.multiply_add(numbers, weight, old, "o")
            if masked:
                new = body.select(self.frame.marks.marked(weight, "weight"), old, new)
            body.write(total, new)
