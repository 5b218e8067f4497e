"""The choice of multiplier and blocks for the kernels of a problem: tuned, or by the tables."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu import tables
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.heuristics import DEFAULT, Heuristics
from tilefold.backends.cpu.spec import FMA, KERNELS, KernelSpec, Multiplier
from tilefold.backends.cpu.tables import FAMILIES, LONG, Blocks, Family, RegisterTile
from tilefold.common.computed import computed
from tilefold.common.first_use import imported
from tilefold.common.tuned_store import is_kept
from tilefold.planning.masked import MaskedProblem
from tilefold.problems.attention import ITEM_BYTES, STATISTICS, Problem

if TYPE_CHECKING:
    from tilefold.backends.cpu.tuned import Key


Heads = NDArray[np.bool_]
"""Which key heads of which batch entries."""


class Chooser:
    """Chooses for one problem on one device: what multiplies, and the blocks of each kernel.

    `extra` names operands that few calls have.
    """

    def __init__(
        self,
        problem: Problem,
        device: Device,
        heuristics: Heuristics = DEFAULT,
        extra: tuple[str, ...] = (),
    ) -> None:
        self.problem, self.device, self.heuristics = problem, device, heuristics
        self.extra = {*extra, *(("sinks",) if problem.sinks else ())}
        self.item_bytes = ITEM_BYTES[STATISTICS[problem.dtype]]
        self.lanes = FAMILIES[device.isa].lanes(self.item_bytes)
        """Elements of one vector, in the type that is computed in."""

    @computed
    def masked(self) -> MaskedProblem:
        """The problem with its mask bound to the lengths."""
        return MaskedProblem.of(self.problem)

    @computed
    def products(self) -> Multiplier:
        """The multiplier of tiles: pairs of bfloat16 where they are exact enough, and faster.

        A float16 number is exactly the sum of two, a float32 number nearly. Three products of tiles
        take 3/16 of the time of one product in float32, but to split numbers takes time too: on one
        core of Granite Rapids, 1 x 4 x 1024 tokens, 2026-11-29, "high" and float16 took this part
        of the time of "highest", forward and backward:

            dim       16          32          64          128         256
            high      1.02 1.04   0.74 0.76   0.65 0.67   0.55 0.64   0.52 0.60
            float16   0.98 1.02   0.71 0.75   0.61 0.63   0.51 0.56   0.45 0.54

        Three products of pairs would take 3/2 of the time of one in float32. So where there are
        pairs without tiles, "high" is computed as "highest".
        """
        problem, device = self.problem, self.device
        kind = problem.precision if problem.dtype == "float32" else problem.dtype
        parts = {"bfloat16": 1, "medium": 1, "float16": 2, "high": 2}.get(kind)
        if parts and device.isa == "amx":
            return Multiplier("amx", parts)
        if parts == 1 and device.has("avx512bf16"):
            return Multiplier("dot")
        return FMA

    def multiplier(self, kernel: str) -> Multiplier:
        """The multiplier of a kernel."""
        return self.products if KERNELS[kernel].tiled else FMA

    def family(self, kernel: str) -> Family:
        """The table of what multiplies in a kernel."""
        return tables.family(self.device.isa, self.multiplier(kernel).unit)

    def blocks(
        self, kernel: str, tile: RegisterTile | None = None, table: Blocks | None = None
    ) -> Blocks:
        """Blocks of a kernel: the caller's tile, else the tuned ones of this machine, else the
        table's.
        """
        if tile is not None:
            return self.usual_blocks(kernel, tile)
        table = table or self.table_blocks(kernel)
        if not is_kept(tables.TUNED, "tilefold.backends.cpu.tuned"):
            return table
        record = _tuned().find(self.device, self.key(kernel), table)
        blocks: Blocks = record.best.blocks if record else table
        return blocks

    def key(self, kernel: str) -> Key:
        """The key of the choice of blocks for one kernel, without the machine."""
        problem = self.problem
        unit, parts = self.multiplier(kernel)
        length = KERNELS[kernel].length(problem)
        key: Key = _tuned().Key(
            kernel=kernel,
            dtype=problem.dtype,
            unit=unit,
            parts=parts,
            dim=problem.dim,
            dim_v=problem.dim_v,
            mask=self.masked.skeleton.text,
            length=tables.length_class(length, self.lanes),
        )
        return key

    def table_blocks(self, kernel: str) -> Blocks:
        """Blocks of a kernel by `tables`, one choice for all heads."""
        ((blocks, _),) = self.table_blocks_of_heads(kernel, each=False)
        return blocks

    def table_blocks_of_heads(
        self, kernel: str, *, each: bool
    ) -> Iterator[tuple[Blocks, Heads | None]]:
        """Blocks of a kernel by `tables`, and the heads that take them; None where all do.

        With `each`, the choice for a key head follows from what its own queries see.
        """
        family, row = self.family(kernel), KERNELS[kernel]
        length = row.length(self.problem)
        if length <= LONG:
            yield self.usual_blocks(kernel, self._for_length(family.tiles, length)), None
        elif row.tiled:
            tiles = family.measured_tiles
            best = self._for_mask(tiles, row.parallel, each)
            for number in np.unique(best):
                heads = None if (best == number).all() else self._of_heads(best == number)
                yield self.usual_blocks(kernel, tiles[number]), heads
        else:
            yield self.usual_blocks(kernel, family.tiles[0]), None

    def _of_heads(self, planes: NDArray[np.bool_]) -> Heads:
        """What holds for each plane of the mask, for all heads."""
        return np.broadcast_to(planes, (self.problem.batch, self.problem.heads_kv))

    def usual_blocks(self, kernel: str, tile: RegisterTile) -> Blocks:
        """A register tile with as many traversed rows as the scratch of `tables` holds."""
        return Blocks(tile, self.family(kernel).block_traverse(tile, self.item_bytes))

    def specs(
        self,
        kernel: str,
        tile: RegisterTile | None = None,
        block_traverse: int | None = None,
        *,
        each: bool = False,
    ) -> Iterator[tuple[KernelSpec, Heads | None]]:
        """The specs of a tiled kernel, or of one that visits no pairs, as in
        `table_blocks_of_heads`.
        """
        for table, heads in self.table_blocks_of_heads(kernel, each=each and tile is None):
            blocks = self.blocks(kernel, tile, table)
            traversed = blocks.block_traverse if block_traverse is None else block_traverse
            sizes = {"vectors": blocks.tile.vectors, "rows": blocks.tile.rows}
            yield self.spec_of(kernel, **sizes, block_traverse=traversed), heads

    def spec_of(self, kernel: str, *, vectors: int, rows: int, block_traverse: int) -> KernelSpec:
        """The spec of a kernel in these blocks."""
        problem, device, row = self.problem, self.device, KERNELS[kernel]
        scored = self.masked.scored(row.scored) if row.visits else None
        more = tuple([name for name in row.may_take if name in self.extra])
        return KernelSpec(
            kernel=kernel,
            dtype=problem.dtype,
            dim=problem.dim,
            dim_v=problem.dim_v,
            lanes=self.lanes,
            vectors=vectors,
            rows=rows,
            block_traverse=block_traverse,
            mask=self.masked.skeleton,
            index_bits=self.masked.index_bits,
            native_half=problem.dtype == "float16" and device.converts_float16,
            multiplier=self.multiplier(kernel),
            score=scored.parts.skeleton if scored else None,
            hides=bool(scored and scored.hides),
            natural=problem.score is not None,
            dropout=problem.dropout > 0 and KERNELS[kernel].visits,
            more=more,
            sinks=problem.sinks if "sinks" in more else 0,
            clock=device.clock if "ticks" in more else "",
        )

    def _for_length(self, tiles: tuple[RegisterTile, ...], length: int) -> RegisterTile:
        """For a short axis the tile that wastes least: padded lanes, and what a product costs."""

        def cost(tile: RegisterTile) -> float:
            width = tile.vectors * self.lanes
            return -(-length // width) * width * _cost(tile)

        return min(tiles, key=cost)

    def _for_mask(
        self, tiles: tuple[RegisterTile, ...], parallel: str, each: bool
    ) -> NDArray[np.int64]:
        """The numbers of the tiles for the planes of the mask, or of one for all planes.

        It is the widest tile, or under a narrow window one whose blocks visit fewer pairs.
        """
        if self.masked.constant:
            return np.zeros((1, 1), np.int64)

        def met_by(width: int) -> NDArray[np.int64]:
            """What each block row of a plane meets; the planes of a key head are one."""
            visited = self.masked.visited_by(parallel, width)
            heads = min(visited.planes_h, self.problem.heads_kv)
            planes = (visited.planes_b, heads) if each else (1, 1)
            return visited.met.reshape(*planes, -1)

        widest, least_saved = tiles[0], self.heuristics.least_saved
        width = widest.vectors * self.lanes
        met = met_by(width)
        mean = np.maximum(met.mean(axis=2), 1e-9)
        best = np.zeros(mean.shape, np.int64)
        least = (1 - least_saved) * width * met.sum(axis=2)
        for number, tile in enumerate(tiles[1:], 1):
            narrow = tile.vectors * self.lanes
            cost = _cost(tile) / _cost(widest)
            # Where a window ends, a block reaches as much less far as it is narrower.
            worth = cost * (1 - (width - narrow) / mean) < 1 - least_saved
            if worth.any() and met.any():
                pairs = cost * narrow * met_by(narrow).sum(axis=2)
                better = worth & (pairs < least)
                best[better], least[better] = number, pairs[better]
        return best


@imported
def _tuned() -> ModuleType:
    from tilefold.backends.cpu import tuned

    return tuned


def _cost(tile: RegisterTile) -> float:
    """Cost of a product where loads bind it: three loads for four products are free."""
    return max(0.75, tile.loads_per_product)
