"""The attention mass of keys: the sums of the columns of P, by query head.

    for each block of keys:                                  one owner
        for each query head of the group:
            mass <- 0
            for each tile of queries that the plan names:
                S <- Q K^T                                   rows are queries, lanes are keys
                P <- 2^((S - m) c + r);  mass <- mass + sum of the rows of P
    m, r: lse in scores, as `scale` says

The first product of dK and dV alone. Sums of tiles are added in ascending order.
"""

from __future__ import annotations

from dataclasses import replace

from tilefold.backends.cpu.kernels import microkernel, work
from tilefold.backends.cpu.kernels.block import Block, emit
from tilefold.backends.cpu.kernels.ir import Value
from tilefold.backends.cpu.kernels.products import products
from tilefold.backends.cpu.kernels.scores import is_shown, score_tile
from tilefold.backends.cpu.kernels.softmax import exp2_cut
from tilefold.backends.cpu.kernels.tile import Tile
from tilefold.backends.cpu.spec import KernelSpec


def mass(spec: KernelSpec) -> str:
    """The source of the kernel that sums the weights of each key."""
    title = __doc__.split("\n\n")[1] if __doc__ else ""
    return emit(spec, title, lambda block: _Mass(block).write())


class _Mass:
    """One block of keys."""

    def __init__(self, block: Block) -> None:
        self.block, self.body = block, block.body
        self.shape, self.spec = block.shape, block.spec
        self.products = products(block)
        self.scores = block.region("p")

    def write(self) -> None:
        body, block, shape, spec = self.body, self.block, self.shape, self.spec
        body.comment("K^T <- power K^T")
        self.packed = self.products.pack("k", spec.dim, block.scale.power)
        group = block.arguments["group"]
        first = body.mul(block.h, group)
        with body.loop("g", 0, group) as g:
            block.h = body.add(first, g, "h_q")
            self.queries = block.matrix("q", block.h)
            self.lse = block.arguments.rows_of("lse", shape.scalar, block.b, block.h)
            zero = block.splat(0.0)
            self.mass = [body.variable(shape.vector, zero, "mass") for _ in range(shape.vectors)]
            work.tiles(body, spec, block.arguments, block.b, block.h, block.row, self.tile)
            for j, total in enumerate(self.mass):
                body.store(body.read(total), block.at(block.region("mass"), 0, j))
            block.unpack("mass", block.region("mass"), 1, block.scalar(1.0))

    def tile(self, first: Value, count: Value, masked: bool) -> None:
        """Add one tile of queries."""
        body, shape, block = self.body, self.shape, self.block
        tile = Tile(body, shape, first, count)
        mask = block.mask(block.h) if masked else None
        queries = self.products.sides(
            tile, self.queries, "left", self.spec.dim, rows=True, columns=False
        )
        body.comment("S <- Q K^T")

        def keep(row: Value, scores: microkernel.Accumulators) -> None:
            if mask is not None:
                lines = zip(tile.allowed_rows(mask, row), scores, strict=True)
                scores = [self._marked(tile, truths, line) for truths, line in lines]
            for i, line in enumerate(scores):
                for j, score in enumerate(line):
                    body.store(score, tile.at(self.scores, body.add(row, i), j))

        modified = block.score(block.h, tile)
        score_tile(self.products, tile, queries.rows, self.packed, keep, modified)
        body.comment("P <- 2^((S - m) c + r);  mass <- mass + sum of the rows of P")
        sums = [body.variable(shape.vector, block.splat(0.0), "sum") for _ in self.mass]
        with body.loop("r", 0, count) as row:
            m, r = self._statistics(body.add(first, row))
            for j, total in enumerate(sums):
                score = body.load(tile.at(self.scores, row, j), shape.vector, "s")
                below = body.binary("fsub", score, m, "e")
                exponent = body.multiply_add(below, block.rate.factor, r, "e")
                weight = exp2_cut(body, exponent, terms=self.products.exp2_terms)
                if masked:
                    hidden = tile.marked(score, "score")
                    weight = body.select(hidden, block.splat(0.0), weight, "p")
                body.write(total, body.binary("fadd", body.read(total), weight, "sum"))
        for mass_, total in zip(self.mass, sums, strict=True):
            body.write(mass_, body.binary("fadd", body.read(mass_), body.read(total), "mass"))

    def _marked(self, tile: Tile, truths: tuple[Value, ...], line: list[Value]) -> list[Value]:
        """One row of scores, marked where the rule or the score itself hides the pair."""
        if self.spec.hides:
            truths = tuple(
                self.body.binary("and", truth, is_shown(self.body, score), "shown")
                for truth, score in zip(truths, line, strict=True)
            )
        return [tile.mark(*pair, "score") for pair in zip(truths, line, strict=True)]

    def _statistics(self, query: Value) -> tuple[Value, Value]:
        """m and r of one query, in all lanes."""
        body, block, scalar = self.body, self.block, self.shape.scalar
        index = body.mul(query, block.arguments["lse_s"])
        lse = body.load(body.offset(self.lse, scalar, index), scalar, "lse")
        alone = replace(block.scale, lanes=1)
        m, r = alone.shift(lse, block.scalar(0.0))
        return body.splat(m, self.shape.lanes, "m"), body.splat(r, self.shape.lanes, "r")
