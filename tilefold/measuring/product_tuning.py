"""The fastest register tiles and blocks of products on this machine, measured turn by turn.

For each product, on random data:

    the tallest register tile of each width, with the blocks that the planner gives it
    the best three of these tiles, with other numbers of terms
    the best two of all, with other numbers of rows and columns of an item
    the best four of all

The usual blocks run in every round; `tuning` says how figures are taken, and what wins.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tilefold.backends.arrays import numpy as arrays
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.matmul import calls, tuned
from tilefold.backends.cpu.matmul.blocks import GemmBlocks, usual
from tilefold.backends.cpu.matmul.plan import GemmPlan, plan
from tilefold.backends.cpu.matmul.spec import VNNI, lanes_of
from tilefold.backends.cpu.matmul.tuned import Key
from tilefold.backends.cpu.tuned import Processor
from tilefold.measuring import product_timing
from tilefold.measuring.environment import environment
from tilefold.measuring.product_timing import Given
from tilefold.measuring.products import ProductCase
from tilefold.measuring.timing import using_threads
from tilefold.measuring.tuning import KEPT_BLOCKS, KEPT_TILES, Measured, Note, Stages, Turns
from tilefold.measuring.workload import Call

STAGES = 4
KEPT_TERMS = 2
"""The number of candidates whose rows and columns are varied."""

MOST_ROWS, MOST_VECTORS = 14, 6
"""The largest register tiles that are tried."""

PANEL_SHARES, BLOCK_SHARES = (0.35, 0.5, 0.75, 1.0, 1.45, 2.0, 3.0), (0.125, 0.25, 0.5)
"""Shares of the first cache for a panel of B, and of the second for a block of A."""

PANELS = (8, 16, 64)
"""Panels of B of an item."""


@dataclass(frozen=True)
class TunedProduct:
    """A product, and the measurements of its blocks."""

    case: ProductCase
    key: Key
    measured: Measured[GemmBlocks]


def tune(
    case: ProductCase, *, seconds: float, note: Note = lambda _: None, turns: Turns | None = None
) -> TunedProduct:
    """Measure the candidates of a product for about `seconds`; compiling takes additional time.

    `note` is called with a description of each step, `STAGES` times. `turns` times the calls.
    Raises ValueError for a product without blocks to choose.
    """
    race = _Race(case)
    with using_threads(case.threads):
        given = product_timing.arrays(case)
        stages = Stages(race.usual, lambda blocks: race.call(blocks, given), case.threads, turns)
        share = seconds / STAGES
        note(f"{case.label}: tiles")
        stages.run(race.tiles(), share)
        note(f"{case.label}: terms")
        tiles = dict.fromkeys((best.rows, best.vectors) for best in stages.fastest())
        found = (blocks for tile in [*tiles][:KEPT_TILES] for blocks in race.terms(*tile))
        stages.run([blocks for blocks in found if blocks not in stages.trials], share)
        note(f"{case.label}: rows and columns")
        found = (other for best in stages.fastest()[:KEPT_TERMS] for other in race.blocks(best))
        stages.run([blocks for blocks in found if blocks not in stages.trials], share)
        note(f"{case.label}: the best")
        stages.run(stages.fastest()[:KEPT_BLOCKS], share, last=True)
    return TunedProduct(case, race.key, stages.measured())


def keep(found: Iterable[TunedProduct]) -> None:
    """Store the tuned blocks for the planner, also of this process. Raises OSError."""
    now, machine = environment(), Processor.of(host())
    made = now["date"], now["versions"]
    new = {
        (machine, one.key): one.measured.tuned_blocks(one.case.size, one.case.threads, *made)
        for one in found
    }
    tuned.STORE.keep(new)


class _Race:
    """The candidates of a product, as its plans have them on all cores of this machine."""

    def __init__(self, case: ProductCase) -> None:
        self._product, _, self._out = case.described
        made = plan(self._product, self._out, host())
        if not isinstance(made, GemmPlan):
            raise ValueError(
                f"{case.size} has few rows, or columns: its kernel reads the matrix where it lies,"
                " and has no blocks to choose"
            )
        self._made, self._unit = made.product, made.spec.unit  # turned, if the plan is
        self.key = Key.of(self._made, self._unit)
        self.usual = self._planned(usual(self._made, self._unit, host()))

    def tiles(self) -> list[GemmBlocks]:
        """The tallest register tile of each width, if it has nearly half of the registers."""
        if self._unit.tiles:
            return []
        registers, found = host().vector_registers, []
        for vectors in range(1, MOST_VECTORS + 1):
            rows = min(MOST_ROWS, (registers - 1) // vectors - 1)
            if 2 * rows * vectors >= registers - 4:
                found.append(self._usual((rows, vectors)))
        return found

    def terms(self, rows: int, vectors: int) -> list[GemmBlocks]:
        """The blocks of a tile with other numbers of terms."""
        shares = () if self._unit == VNNI else PANEL_SHARES
        return [self._usual((rows, vectors), share) for share in shares]

    def blocks(self, best: GemmBlocks) -> list[GemmBlocks]:
        """The same tile and terms with other rows and columns."""
        sums, unit = self._made.sums, self._unit
        line = best.block_k * unit.step_bytes(sums) / unit.depth
        width = best.vectors * lanes_of(host(), sums)
        heights = [int(share * (host().l2_bytes or 2**19) / line) for share in BLOCK_SHARES]
        return [
            self._shared(replace(best, block_m=max(1, block_m), block_n=panels * width))
            for block_m in (*heights, self._made.m)
            for panels in PANELS
        ]

    def call(self, blocks: GemmBlocks, given: Given) -> Call:
        """A call with these blocks; it compiles when it first runs."""
        a, b, out = (arrays.pointer(x) for x in (given.a, given.b, given.out))
        gate = 0 if given.gate is None else arrays.pointer(given.gate)

        @functools.cache
        def prepared() -> calls.Prepared:
            return calls.prepare(self._product, self._out, blocks=blocks)

        return lambda: prepared().run(a, b, out, gate=gate)

    def _usual(self, tile: tuple[int, int], share: float | None = None) -> GemmBlocks:
        return self._shared(usual(self._made, self._unit, host(), tile, share))

    def _shared(self, blocks: GemmBlocks) -> GemmBlocks:
        return self._planned(tuned.shared(blocks, self._made, self._unit, host()))

    def _planned(self, blocks: GemmBlocks) -> GemmBlocks:
        """The blocks that a plan makes of others: a small product is one item."""
        made = plan(self._product, self._out, host(), blocks=blocks)
        assert isinstance(made, GemmPlan)
        sizes = made.block_m, made.block_n, made.block_k
        return GemmBlocks(made.spec.rows, made.spec.vectors, *sizes)
