"""The forward kernel: queries in the lanes, keys walked tile by tile, softmax folded as it goes.

    for each block of queries:                               one owner
        Q^T <- power Q^T;  O^T <- 0;  m <- -inf;  l <- 0
        for each tile of keys that the plan names:
            S^T <- K Q^T                                     rows are keys, lanes are queries
            S^T <- masked where the rule says no             partial tiles only
            m_new <- max(m, rows of S^T);  alpha <- 2^((m - m_new) c)
            P^T <- 2^((S^T - m_new) c);  l <- alpha l + sum of rows
            O^T <- alpha O^T + V^T P^T
        O <- O / l;  lse <- rest m + ln l                    empty rows: 0 and -inf
    scale = power rest,  c = rest log2(e)                    see `scale`

All statistics are vertical: one register per vector of queries, no reduction across lanes (Dao et
al. 2022, Algorithm 1, turned by a quarter). A pair that the rule forbids contributes nothing,
whatever its numbers are: its score becomes a marker that no arithmetic produces, its weight -0.0.
"""

from __future__ import annotations

from collections.abc import Callable

from tilefold.backends.cpu.kernels import sinks, work
from tilefold.backends.cpu.kernels.block import Block, emit
from tilefold.backends.cpu.kernels.dropout import Factors
from tilefold.backends.cpu.kernels.ir import Value, Variable, vector
from tilefold.backends.cpu.kernels.mask import MaskText
from tilefold.backends.cpu.kernels.microkernel import Accumulators
from tilefold.backends.cpu.kernels.products import products
from tilefold.backends.cpu.kernels.scores import is_shown, score_tile
from tilefold.backends.cpu.kernels.softmax import exp2_scaled
from tilefold.backends.cpu.kernels.tile import Tile
from tilefold.backends.cpu.spec import KernelSpec


def forward(spec: KernelSpec) -> str:
    """The source of the forward kernel."""
    title = __doc__.split("\n\n")[1] if __doc__ else ""
    return emit(spec, title, lambda block: _Forward(block).write())


class _Forward:
    """One block of queries, from the first tile to the outputs."""

    def __init__(self, block: Block) -> None:
        self.block, self.body = block, block.body
        self.shape, self.spec = block.shape, block.spec
        self.products = products(block)
        h_kv = self.body.binary("udiv", block.h, block.arguments["group"], "h_kv")
        self.keys = block.matrix("k", h_kv)
        self.values = block.matrix("v", h_kv)
        self._lowest = block.splat(float("-inf"))
        self.o_total, self.weights = block.region("o"), block.region("p")

    def write(self) -> None:
        body, shape, spec, block = self.body, self.shape, self.spec, self.block
        body.stage("packing")
        body.comment("Q^T <- power Q^T;  O^T <- 0;  m <- -inf;  l <- 0")
        self.q_packed = self.products.pack("q", spec.dim, block.scale.power)
        block.zero("o", spec.dim_v)
        never = body.constant(0, vector(shape.lanes, "i1"))
        columns = range(shape.vectors)
        self.m = [body.variable(shape.vector, self._lowest, "m") for _ in columns]
        self.highest = self.m
        if "max" in spec.more and self.products.slack:
            self.highest = [body.variable(shape.vector, self._lowest, "highest") for _ in columns]
        self.l = [body.variable(shape.vector, block.splat(0.0), "l") for _ in columns]
        self.seen = [body.variable(never.type, never, "seen") for _ in columns]
        work.tiles(body, spec, block.arguments, block.b, block.h, block.row, self._tile)
        self._finish()

    def _tile(self, first: Value, count: Value, masked: bool) -> None:
        body, spec = self.body, self.spec
        tile = Tile(body, self.shape, first, count)
        tops = [body.variable(self.shape.vector, self._lowest, "top") for _ in self.m]
        body.stage("packing")
        keys = self.products.sides(tile, self.keys, "left", spec.dim, rows=True, columns=False)
        body.stage("edges" if masked else "scores")
        body.comment("S^T <- K Q^T, and the largest of each lane")
        modified = self.block.score(self.block.h, tile)
        if masked:
            mask = self.block.mask(self.block.h)
            score_tile(
                self.products,
                tile,
                keys.rows,
                self.q_packed,
                lambda row, scores: self._keep_visible(tile, mask, tops, row, scores),
                modified,
            )
        else:
            score_tile(
                self.products,
                tile,
                keys.rows,
                self.q_packed,
                lambda row, scores: self._keep(tile, tops, row, scores, scores),
                modified,
            )
            every = body.constant(-1, vector(self.shape.lanes, "i1"))
            for place in self.seen:
                body.write(place, every)
        body.stage("softmax")
        safe_m, alphas = self._raise_maximum(tops)
        factors = self.block.factors(tile, self.block.h)
        self._weigh(tile, safe_m, alphas, masked, factors)
        body.stage("packing")
        body.comment("O^T <- alpha O^T + V^T P^T")
        values = self.products.sides(
            tile, self.values, "left", spec.dim_v, rows=False, columns=True
        )
        body.stage("products")
        self.products.accumulate_safely(
            masked, tile, self.values, values.columns, "p", self.o_total, spec.dim_v, alphas
        )

    def _keep_visible(
        self,
        tile: Tile,
        mask: MaskText,
        tops: list[Variable],
        row: Value,
        scores: Accumulators,
    ) -> None:
        """Keep a block of scores, marked where the rule says no, and note which lanes saw a key."""
        body = self.body
        body.comment("S^T <- marked where the rule says no")
        marked, candidates = [], []
        for truths, line in zip(tile.allowed_rows(mask, row), scores, strict=True):
            if self.spec.hides:
                truths = tuple(
                    body.binary("and", truth, is_shown(body, score), "shown")
                    for truth, score in zip(truths, line, strict=True)
                )
            pairs = list(zip(truths, line, strict=True))
            marked.append([tile.mark(truth, score, "score") for truth, score in pairs])
            candidates.append([body.select(truth, score, self._lowest) for truth, score in pairs])
            for place, truth in zip(self.seen, truths, strict=True):
                body.write(place, body.binary("or", body.read(place), truth, "seen"))
        self._keep(tile, tops, row, marked, candidates)

    def _keep(
        self,
        tile: Tile,
        tops: list[Variable],
        row: Value,
        scores: Accumulators,
        candidates: Accumulators,
    ) -> None:
        """Store a block of scores and fold the candidates into the maximum of the tile."""
        body = self.body
        for i, line in enumerate(scores):
            for j, score in enumerate(line):
                body.store(score, tile.at(self.weights, body.add(row, i), j))
        for place, column in zip(tops, zip(*candidates, strict=True), strict=True):
            top = _fold_pairs(list(column), lambda a, b: body.larger(a, b, "top"))
            body.write(place, body.larger(top, body.read(place), "top"))

    def _raise_maximum(self, tops: list[Variable]) -> tuple[list[Value], list[Value]]:
        """Update m; give what to subtract from scores (0 while m is -inf) and alpha, by vector.

        Where it costs much to rescale O, m stays while the largest score exceeds it by little, as
        in FlashAttention-4: any m gives the same result, as long as no weight overflows.
        """
        body = self.body
        body.comment("m_new <- max(m, rows of S^T);  alpha <- 2^((m - m_new) c)")
        slack = self.products.slack and self.block.scale.difference(self.products.slack)
        safe_m, alphas = [], []
        for m, highest, top in zip(self.m, self.highest, tops, strict=True):
            old = body.read(m, "m.old")
            new = body.larger(body.read(top), old, "m.new")
            if highest is not m:
                body.write(highest, body.larger(new, body.read(highest), "highest"))
            if slack:
                limit = body.binary("fadd", old, slack)
                new = body.select(body.compare("ogt", new, limit), new, old, "m.new")
            body.write(m, new)
            nothing = body.compare("oeq", new, self._lowest)
            safe_m.append(body.select(nothing, self.block.splat(0.0), new, "m.safe"))
            change = body.binary("fsub", old, safe_m[-1])
            alphas.append(exp2_scaled(body, change, self.block.rate, hint="alpha"))
        return safe_m, alphas

    def _weigh(
        self,
        tile: Tile,
        safe_m: list[Value],
        alphas: list[Value],
        masked: bool,
        factors: Factors | None,
    ) -> None:
        body = self.body
        body.comment("P^T <- 2^((S^T - m_new) c);  l <- alpha l + sum of rows")
        sums = [body.variable(self.shape.vector, self.block.splat(0.0), "sum") for _ in self.l]
        self.products.pad(tile, self.weights)
        with body.loop("r", 0, tile.count, self.products.step) as row:
            lines = []
            for i in range(self.products.step):
                line = []
                for j, (m, total) in enumerate(zip(safe_m, sums, strict=True)):
                    place = tile.at(self.weights, body.add(row, i), j)
                    score = body.load(place, self.shape.vector, "s")
                    below = body.binary("fsub", score, m, "e")
                    terms = self.products.exp2_terms
                    weight = exp2_scaled(body, below, self.block.rate, terms=terms)
                    if masked:
                        weight = tile.mark_where(tile.marked(score, "score"), weight, "weight")
                    body.write(total, body.binary("fadd", body.read(total), weight, "sum"))
                    if factors:
                        keep = factors.at(body.add(row, i), j)
                        weight = body.binary("fmul", weight, keep, "p")
                    line.append(weight)
                lines.append(line)
            self.products.keep(tile, "p", row, lines, masked)
        for running, alpha, total in zip(self.l, alphas, sums, strict=True):
            new = body.multiply_add(body.read(running), alpha, body.read(total), "l")
            body.write(running, new)

    def _finish(self) -> None:
        body, block, spec = self.body, self.block, self.spec
        body.stage("results")
        body.comment("O <- O / l;  empty rows: 0")
        tops = self._maxima() if "max" in spec.more else []
        one = block.splat(1.0)
        ones = self._take_sinks() if spec.sinks else [one] * len(self.l)
        inverses = [
            body.binary("fdiv", kept, body.read(place), "inverse")
            for kept, place in zip(ones, self.l, strict=True)
        ]
        seen = [body.read(place, "seen") for place in self.seen]
        with body.loop("d", 0, spec.dim_v) as d:
            for j, inverse in enumerate(inverses):
                place = block.at(self.o_total, d, j)
                value = body.binary("fmul", body.load(place, self.shape.vector), inverse)
                body.store(body.select(seen[j], value, block.splat(0.0)), place)
        block.unpack("o", self.o_total, spec.dim_v, block.scalar(1.0))
        body.comment("lse <- rest m + ln l;  empty rows: -inf")
        lows = []
        for j, (m, total) in enumerate(zip(self.m, self.l, strict=True)):
            lse, low = self._lse(body.read(m), body.read(total))
            lse = body.select(seen[j], lse, self._of_nothing(lse, total), "lse")
            body.store(lse, block.at(self.weights, 0, j))
            lows.append(body.select(seen[j], low, block.splat(0.0), "low"))
        block.unpack("lse", self.weights, 1, block.scalar(1.0))
        with body.when(body.given(block.arguments["lse_low"]), "low"):
            for j, low in enumerate(lows):
                body.store(low, block.at(self.weights, 0, j))
            block.unpack("lse_low", self.weights, 1, block.scalar(1.0))
        for j, top in enumerate(tops):
            body.store(top, block.at(self.weights, 0, j))
        if tops:
            block.unpack("max", self.weights, 1, block.scalar(1.0))

    def _take_sinks(self) -> list[Value]:
        """Add the sinks to l, and give the factors of what was summed before."""
        body, block = self.body, self.block
        alphas = []
        for m, total in zip(self.m, self.l, strict=True):
            own = body.read(m), body.read(total)
            new, summed, alpha = sinks.take(
                body, self.spec, block.arguments, block.scale, block.h, *own
            )
            body.write(m, new)
            body.write(total, summed)
            alphas.append(alpha)
        return alphas

    def _of_nothing(self, lse: Value, total: Variable) -> Value:
        """lse of queries that saw no key: -inf, or that of sinks that are not -inf themselves."""
        if not self.spec.sinks:
            return self._lowest
        none = self.body.compare("oeq", self.body.read(total), self.block.splat(0.0))
        return self.body.select(none, self._lowest, lse)

    def _maxima(self) -> list[Value]:
        """The largest scores, on the natural scale; NaN where a score is NaN."""
        body = self.body
        return [
            self.block.scale.maximum(body.read(m), body.read(total))
            for m, total in zip(self.highest, self.l, strict=True)
        ]

    def _lse(self, m: Value, total: Value) -> tuple[Value, Value]:
        """NaN where l is 0 or NaN although keys were seen: all scores were -inf, or one was NaN."""
        body, block = self.body, self.block
        zero = block.splat(0.0)
        some = body.compare("ogt", total, zero)
        lse, low = block.scale.log_sum(m, total)
        lse = body.select(some, lse, block.splat(float("nan")))
        return lse, body.select(some, low, zero)


def _fold_pairs(values: list[Value], operation: Callable[[Value, Value], Value]) -> Value:
    """Fold values as a balanced tree, so that the chain of dependent instructions stays short."""
    while len(values) > 1:
        rest = values[-1:] if len(values) % 2 else []
        pairs = zip(values[::2], values[1::2], strict=False)
        values = [operation(a, b) for a, b in pairs] + rest
    return values[0]
