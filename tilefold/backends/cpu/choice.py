"""What multiplies in a kernel of a problem, and in which blocks: tuned here, or by the tables."""

from __future__ import annotations

from tilefold.backends.cpu import tables, tuned
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.spec import FMA, KERNELS, Multiplier
from tilefold.backends.cpu.tables import FAMILIES, Family, RegisterTile
from tilefold.backends.cpu.tuned import Blocks, Key
from tilefold.masks.expression import Skeleton, Truth
from tilefold.planning.visited import bound, visited_by
from tilefold.problems.attention import ITEM_BYTES, STATISTICS, Problem


def blocks_for(
    problem: Problem, device: Device, kernel: str, mask: Skeleton, tile: RegisterTile | None
) -> Blocks:
    """Those of the tile that is asked for, else what was measured here, else the table's."""
    if tile is not None:
        return usual_blocks(problem, device, kernel, tile)
    table = table_blocks(problem, device, kernel)
    winner = tuned.find(device, winner_key(problem, device, kernel, mask), table)
    return winner.best.blocks if winner else table


def winner_key(problem: Problem, device: Device, kernel: str, mask: Skeleton) -> Key:
    """What a choice of blocks for one kernel of a plan depends on, beside the machine."""
    unit, parts = multiplier(problem, device, kernel)
    return Key(
        kernel=kernel,
        dtype=problem.dtype,
        unit=unit,
        parts=parts,
        dim=problem.dim,
        dim_v=problem.dim_v,
        mask=mask.text,
        length=tuned.length_class(parallel_length(problem, kernel), lanes_of(problem, device)),
    )


def table_blocks(problem: Problem, device: Device, kernel: str) -> Blocks:
    """What `tables` say of one kernel of a plan."""
    rows, lanes = family(problem, device, kernel), lanes_of(problem, device)
    if parallel_length(problem, kernel) <= tuned.LONG:
        tile = _for_length(rows.tiles, lanes, parallel_length(problem, kernel))
    elif KERNELS[kernel].tiled:
        tile = _for_mask(rows.measured_tiles, lanes, problem, KERNELS[kernel].parallel)
    else:
        tile = rows.tiles[0]
    return usual_blocks(problem, device, kernel, tile)


def usual_blocks(problem: Problem, device: Device, kernel: str, tile: RegisterTile) -> Blocks:
    """A register tile with as many traversed rows as the scratch of `tables` holds."""
    item_bytes = ITEM_BYTES[STATISTICS[problem.dtype]]
    return Blocks(tile, family(problem, device, kernel).block_traverse(tile, item_bytes))


def lanes_of(problem: Problem, device: Device) -> int:
    """Numbers of one vector, in the type that is computed in."""
    return FAMILIES[device.isa].lanes(ITEM_BYTES[STATISTICS[problem.dtype]])


def parallel_length(problem: Problem, kernel: str) -> int:
    """Of the axis that lies in the lanes."""
    return problem.len_q if KERNELS[kernel].parallel == "q" else problem.len_k


def multiplier(problem: Problem, device: Device, kernel: str) -> Multiplier:
    """What multiplies in a kernel: pairs of bfloat16 where they are exact enough, and faster.

    A float16 number is exactly the sum of two, a float32 number nearly. Three products of tiles
    take 3/16 of the time of one product in float32, but to split numbers takes time too: on one
    core of Granite Rapids, 1 x 4 x 1024 tokens, 2026-11-29, "high" and float16 took this part of
    the time of "highest", forward and backward:

        dim       16          32          64          128         256
        high      1.02 1.04   0.74 0.76   0.65 0.67   0.55 0.64   0.52 0.60
        float16   0.98 1.02   0.71 0.75   0.61 0.63   0.51 0.56   0.45 0.54

    Three products of pairs would take 3/2 of the time of one in float32. So where there are pairs
    without tiles, "high" is computed as "highest".
    """
    if not KERNELS[kernel].tiled:
        return FMA
    kind = problem.precision if problem.dtype == "float32" else problem.dtype
    parts = {"bfloat16": 1, "medium": 1, "float16": 2, "high": 2}.get(kind)
    if parts and device.isa == "amx":
        return Multiplier("amx", parts)
    if parts == 1 and device.has("avx512bf16"):
        return Multiplier("dot")
    return FMA


def family(problem: Problem, device: Device, kernel: str) -> Family:
    """The table of a kernel of a plan: that of what multiplies in it."""
    return tables.family(device.isa, multiplier(problem, device, kernel).unit)


def _cost(tile: RegisterTile) -> float:
    """Of a product, as far as loads bind it: those of three loads for four products are free."""
    return max(0.75, tile.loads_per_product)


def _for_length(tiles: tuple[RegisterTile, ...], lanes: int, length: int) -> RegisterTile:
    """For a short axis the tile that wastes least: padded lanes, and what a product costs."""

    def cost(tile: RegisterTile) -> float:
        width = tile.vectors * lanes
        return -(-length // width) * width * _cost(tile)

    return min(tiles, key=cost)


LEAST_SAVED = 0.05
"""Of the visited pairs: a narrower block must save so many to be taken. float32, 1 x 1 x 4096 x 64,
10x2 beside 6x4 on one core of an AMD EPYC (Zen 4), forward and backward, 2026-11-21:
`causal() & local(64)` saves 25 % of the pairs and took 18 % and 9 % less time, `local(256)` 10 %
and 6 % and 5 %, `local(1024)` 3 % and 2 % and 0 %; `causal()` at 512 tokens 6 % and 5 % and 4 %.
"""


def _for_mask(
    tiles: tuple[RegisterTile, ...], lanes: int, problem: Problem, parallel: str
) -> RegisterTile:
    """The widest tile, or under a narrow window one whose blocks visit fewer pairs."""
    widest = best = tiles[0]
    if isinstance(bound(problem), Truth):
        return widest
    width = widest.vectors * lanes
    met = visited_by(problem, parallel, width).met
    if not met.any():
        return widest
    least = (1 - LEAST_SAVED) * width * int(met.sum())
    for tile in tiles[1:]:
        narrow = tile.vectors * lanes
        cost = _cost(tile) / _cost(widest)
        # Where a window ends, a block reaches as much less far as it is narrower.
        if cost * (1 - (width - narrow) / met.mean()) < 1 - LEAST_SAVED:
            pairs = cost * narrow * int(visited_by(problem, parallel, narrow).met.sum())
            if pairs < least:
                best, least = tile, pairs
    return best
