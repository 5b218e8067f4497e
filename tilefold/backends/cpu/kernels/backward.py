"""The backward kernels: the probabilities are made again from lse, a tile at a time.

    P = 2^((S - m) c + r)    dP = dO V^T    dS = P (dP - delta)    delta = rowsum(dO O) - dlse

    delta         parallel over queries:  delta <- rowsum(dO O) - dlse;  m, r <- lse in scores
    backward_dq   parallel over queries:  dQ += dS K                      3 products per pair
    backward_dkv  parallel over keys:     dV += P^T dO;  dK += dS^T Q     4 products
    backward      parallel over heads:    all three from the same dS      5 products, not 7

Every output tile has one owner and is summed in ascending order: no atomics, bit-identical from
run to run, and no scratch but one element per query (Dao et al. 2022, Algorithm 4, in two passes or
in one). Each pass is the forward pass with other operands: what is parallel lies in the lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tilefold.backends.cpu.kernels import microkernel, work
from tilefold.backends.cpu.kernels.block import Block, emit
from tilefold.backends.cpu.kernels.dropout import Factors
from tilefold.backends.cpu.kernels.ir import Value
from tilefold.backends.cpu.kernels.mask import MaskText, ScoreText
from tilefold.backends.cpu.kernels.multiply import Products, Right
from tilefold.backends.cpu.kernels.products import products
from tilefold.backends.cpu.kernels.scores import is_hidden, score_gradient, score_tile
from tilefold.backends.cpu.kernels.softmax import LEAST, exp2_cut
from tilefold.backends.cpu.kernels.tile import Matrix, Tile
from tilefold.backends.cpu.spec import KernelSpec


class Statistics(NamedTuple):
    """What the kernel "delta" leaves of the queries of one row of a block, by vector."""

    m: list[Value]
    r: list[Value]
    delta: list[Value]


StatisticsOf = Callable[[int], Statistics]
"""Reads the statistics of a row, just before they are used: few registers are free there."""


def delta(spec: KernelSpec) -> str:
    """The source of the kernel that writes delta, and lse in scores."""
    total = "rowsum(dO O) - dlse" if "dlse" in spec.more else "rowsum(dO O)"
    title = f"""
delta <- {total}
m <- lse / rest, rounded;  r <- (rest m - lse - lse_low) log2(e)"""
    return emit(spec, title.strip(), _write_delta)


def dq(spec: KernelSpec) -> str:
    """The source of the kernel that is parallel over queries."""
    title = """
for each block of queries:                               one owner
    for each tile of keys that the plan names:
        S^T <- K Q^T;  P^T <- 2^((S^T - m) c + r)        rows are keys, lanes are queries
        dP^T <- V dO^T;  dS^T <- P^T (dP^T - delta)
        dQ^T += K^T dS^T
    dQ <- scale dQ"""
    return emit(spec, title.strip(), lambda block: _QueryGradient(block).write())


def dkv(spec: KernelSpec) -> str:
    """The source of the kernel that is parallel over keys."""
    title = """
for each block of keys:                                  one owner
    for each query head of the group, for each tile of queries that the plan names:
        S <- Q K^T;  P <- 2^((S - m) c + r)              rows are queries, lanes are keys
        dP <- dO V^T;  dS <- P (dP - delta)
        dV^T += dO^T P;  dK^T += Q^T dS
    dK <- scale dK"""
    return emit(spec, title.strip(), lambda block: KeyGradients(block).write())


def _write_delta(block: Block) -> None:
    body, shape, spec = block.body, block.shape, block.spec
    one = block.scalar(1.0)
    o, do = block.pack("o", spec.dim_v, one), block.pack("do", spec.dim_v, one)
    totals = [body.variable(shape.vector, block.splat(0.0)) for _ in range(shape.vectors)]
    with body.loop("d", 0, spec.dim_v) as d:
        for j, total in enumerate(totals):
            left = body.load(block.at(o, d, j), shape.vector)
            right = body.load(block.at(do, d, j), shape.vector)
            body.write(total, body.multiply_add(left, right, body.read(total)))
    lse, low = block.pack("lse", 1, one), block.region("lse_low")
    block.zero("lse_low", 1)
    with body.when(body.given(block.arguments["lse_low"]), "low"):
        block.pack("lse_low", 1, one)
    if "dlse" in spec.more:
        dlse = block.pack("dlse", 1, one)
        for j, total in enumerate(totals):
            share = body.load(block.at(dlse, 0, j), shape.vector)
            body.write(total, body.binary("fsub", body.read(total), share))
    for j, total in enumerate(totals):
        both = [body.load(block.at(region, 0, j), shape.vector) for region in (lse, low)]
        for name, value in zip(
            Statistics._fields, (*block.scale.shift(*both), body.read(total)), strict=True
        ):
            body.store(value, block.at(block.region(name), 0, j))
    for name in Statistics._fields:
        block.unpack(name, block.region(name), 1, one)


class _QueryGradient:
    """One block of queries."""

    def __init__(self, block: Block) -> None:
        self.block, self.body = block, block.body
        self.shape, self.spec = block.shape, block.spec
        self.products = products(block)
        h_kv = self.body.binary("udiv", block.h, block.arguments["group"], "h_kv")
        self.keys, self.values = block.matrix("k", h_kv), block.matrix("v", h_kv)
        self.p, self.ds, self.dq = block.region("p"), block.region("ds"), block.region("dq")

    def write(self) -> None:
        body, block, spec = self.body, self.block, self.spec
        body.stage("packing")
        body.comment("Q^T <- power Q^T;  dO^T;  m, r, delta;  dQ^T <- 0")
        self.q_packed = self.products.pack("q", spec.dim, block.scale.power)
        self.do_packed = self.products.pack("do", spec.dim_v)
        self.statistics = Statistics(*(self._statistic(name) for name in Statistics._fields))
        block.zero("dq", spec.dim)
        work.tiles(body, spec, block.arguments, block.b, block.h, block.row, self.tile)
        body.stage("results")
        block.unpack_gradient("dq", self.dq, spec.dim)

    def _statistic(self, name: str) -> list[Value]:
        """A statistic of the block's queries, by vector."""
        block, shape = self.block, self.shape
        region = block.pack(name, 1, block.scalar(1.0))
        places = [block.at(region, 0, j) for j in range(shape.vectors)]
        return [self.body.load(place, shape.vector, name) for place in places]

    def tile(self, first: Value, count: Value, masked: bool) -> None:
        body, spec = self.body, self.spec
        tile = Tile(body, self.shape, first, count)
        mask = self.block.mask(self.block.h) if masked else None
        modified = self.block.score(self.block.h, tile)
        made = self.products.sides
        body.stage("packing")
        keys = made(tile, self.keys, "left", spec.dim, rows=True, columns=True)
        values = made(tile, self.values, "left_v", spec.dim_v, rows=True, columns=False)
        body.stage("edges" if masked else "scores")
        body.comment("S^T <- K Q^T")
        store_scores(self.products, tile, keys.rows, self.q_packed, self.p, mask)
        factors = self.block.factors(tile, self.block.h)
        body.stage("slopes")
        body.comment("dP^T <- V dO^T;  P^T <- 2^((S^T - m) c + r);  dS^T <- P^T (dP^T - delta)")

        def use(row: Value, dp: microkernel.Accumulators) -> None:
            statistics = self.statistics
            of_row: StatisticsOf = lambda i: statistics  # noqa: E731  # the same for all rows
            _keep_differences(
                self.products, tile, row, dp, of_row, masked, ("ds",), modified, factors
            )

        self.products.scores(tile, values.rows, self.do_packed, spec.dim_v, use)
        body.stage("products")
        body.comment("dQ^T += K^T dS^T")
        self.products.accumulate_safely(
            masked, tile, self.keys, keys.columns, "ds", self.dq, spec.dim
        )


class KeyGradients:
    """One block of keys; the fused kernel adds dQ to it."""

    def __init__(self, block: Block) -> None:
        self.block, self.body = block, block.body
        self.shape, self.spec = block.shape, block.spec
        self.products = products(block)
        self.p, self.ds = block.region("p"), block.region("ds")
        self.dk, self.dv = block.region("dk"), block.region("dv")

    def write(self) -> None:
        """Write the block's dk and dv."""
        body, block, spec = self.body, self.block, self.spec
        body.stage("packing")
        body.comment("K^T <- power K^T;  V^T;  dK^T <- 0;  dV^T <- 0")
        self.k_packed = self.products.pack("k", spec.dim, block.scale.power)
        self.v_packed = self.products.pack("v", spec.dim_v)
        block.zero("dk", spec.dim)
        block.zero("dv", spec.dim_v)
        group = block.arguments["group"]
        with body.loop("g", 0, group) as g:
            h = body.add(body.mul(block.h, group), g, "h_q")
            self.take_head(h)
            work.tiles(body, spec, block.arguments, block.b, h, block.row, self.tile)
        body.stage("results")
        block.unpack_gradient("dk", self.dk, spec.dim)
        block.unpack("dv", self.dv, spec.dim_v, block.scalar(1.0))

    def take_head(self, h: Value) -> None:
        """Turn to the operands of one query head."""
        block, arguments = self.block, self.block.arguments
        self.h_q = h
        self.queries, self.do = block.matrix("q", h), block.matrix("do", h)
        self.heads = {
            name: arguments.rows_of(name, self.shape.scalar, block.b, h)
            for name in Statistics._fields
        }

    def tile(self, first: Value, count: Value, masked: bool) -> None:
        """Add one tile of queries."""
        body, spec = self.body, self.spec
        tile = Tile(body, self.shape, first, count)
        mask = self.block.mask(self.h_q) if masked else None
        self.modified = self.block.score(self.h_q, tile)
        made = self.products.sides
        body.stage("packing")
        queries = made(tile, self.queries, "left", spec.dim, rows=True, columns=True)
        do = made(tile, self.do, "left_v", spec.dim_v, rows=True, columns=True)
        body.stage("edges" if masked else "scores")
        body.comment("S <- Q K^T")
        store_scores(self.products, tile, queries.rows, self.k_packed, self.p, mask)
        self.factors = self.block.factors(tile, self.h_q)
        body.stage("slopes")
        body.comment("dP <- dO V^T;  P <- 2^((S - m) c + r);  dS <- P (dP - delta)")

        def use(row: Value, dp: microkernel.Accumulators) -> None:
            def of_row(i: int) -> Statistics:
                there = tile.inside(body.add(row, i))
                numbers = [self._of_query(name, there) for name in Statistics._fields]
                return Statistics(*([one] * self.shape.vectors for one in numbers))

            self.keep(tile, row, dp, of_row, masked)

        self.products.scores(tile, do.rows, self.v_packed, spec.dim_v, use)
        body.stage("products")
        body.comment("dV^T += dO^T P;  dK^T += Q^T dS")
        accumulate = self.products.accumulate_safely
        accumulate(masked, tile, self.do, do.columns, "p", self.dv, spec.dim_v)
        accumulate(masked, tile, self.queries, queries.columns, "ds", self.dk, spec.dim)

    def keep(
        self,
        tile: Tile,
        row: Value,
        dp: microkernel.Accumulators,
        statistics: StatisticsOf,
        masked: bool,
    ) -> microkernel.Accumulators:
        """Keep rows of P and of dS for the products that follow; return the rows of dS."""
        kept, also = ("p", "ds"), (self.modified, self.factors)
        return _keep_differences(self.products, tile, row, dp, statistics, masked, kept, *also)

    def _of_query(self, name: str, query: Value) -> Value:
        """The statistic of one query in all lanes."""
        body, scalar = self.body, self.shape.scalar
        index = body.mul(query, self.block.arguments[f"{name}_s"])
        number = body.load(body.offset(self.heads[name], scalar, index), scalar, name)
        return body.splat(number, self.shape.lanes, name)


def store_scores(
    products: Products,
    tile: Tile,
    left: Sequence[Matrix],
    right: Right,
    scores: Value,
    mask: MaskText | None,
) -> None:
    """Scores of a tile into scratch, marked where the rule says no.

    Of modified scores it is the products that are kept.
    """
    body = tile.body

    def use(row: Value, block: microkernel.Accumulators) -> None:
        if mask is not None:
            block = [
                [tile.mark(truth, score, "score") for truth, score in zip(*lines, strict=True)]
                for lines in zip(tile.allowed_rows(mask, row), block, strict=True)
            ]
        for i, line in enumerate(block):
            for j, score in enumerate(line):
                body.store(score, tile.at(scores, body.add(row, i), j))

    score_tile(products, tile, left, right, use)


def _keep_differences(
    products: Products,
    tile: Tile,
    row: Value,
    dp: microkernel.Accumulators,
    statistics: StatisticsOf,
    masked: bool,
    kept: tuple[str, ...],
    modified: ScoreText | None,
    factors: Factors | None,
) -> microkernel.Accumulators:
    """Rows of P over their scores, where "p" is to be kept, and of dS = P (dP - delta).

    `factors` of dropout are multiplied into P, as it is kept, and dP.
    """
    body = tile.body
    found = []
    for start in range(0, len(dp), products.step):
        rows = range(start, start + products.step)
        lines = [
            differences(
                products, tile, body.add(row, i), dp[i], statistics(i), masked, modified, factors
            )
            for i in rows
        ]
        first = body.add(row, start)
        weights, changes = ([line[k] for line in lines] for k in (0, 1))
        if "p" in kept:
            products.keep(tile, "p", first, weights, masked)
        elif masked:
            products.mark(tile, first, weights)
        products.keep(tile, "ds", first, changes, masked)
        found += changes
    return found


def differences(
    products: Products,
    tile: Tile,
    row: Value,
    dp: list[Value],
    statistics: Statistics,
    masked: bool,
    modified: ScoreText | None,
    factors: Factors | None,
) -> tuple[list[Value], list[Value]]:
    """One row of P, made again from its scores, and of dS."""
    body, vector_ = tile.body, tile.shape.vector
    scores, rate = products.block.region("p"), products.block.rate
    weights, changes = [], []
    places = [tile.at(scores, row, j) for j in range(len(dp))] if modified else []
    kept = [body.load(place, vector_, "s") for place in places]
    made = modified.row(tile.inside(row), kept) if modified else ()
    for j, (gradient, m, r, delta) in enumerate(zip(dp, *statistics, strict=True)):
        slope = None
        if modified is None:
            product = score = body.load(tile.at(scores, row, j), vector_, "s")
        else:
            product, score, slope = kept[j], *[values[j] for values in made]
        exponent = body.multiply_add(body.binary("fsub", score, m, "e"), rate.factor, r, "e")
        least = LEAST[exponent.element] if modified else None
        weight = exp2_cut(body, exponent, terms=products.exp2_terms, least=least)
        keep = factors.at(row, j) if factors else None
        change = score_gradient(body, weight, gradient, delta, slope, keep)
        if masked:
            forbidden = tile.marked(product, "score")
            if products.spec.hides:
                forbidden = body.binary("or", forbidden, is_hidden(body, score), "hidden")
            weight = tile.mark_where(forbidden, weight, "weight")
            change = body.select(forbidden, body.constant(0.0, vector_), change, "ds")
        if keep:
            weight = body.binary("fmul", weight, keep, "p")
        weights.append(weight)
        changes.append(change)
    return weights, changes
