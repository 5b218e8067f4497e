"""Planning: the kernels that solve a Problem on a Device, their blocks, tiles and order.

Nothing here depends on how many threads will run: so results do not either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilefold import splits, tables, winners
from tilefold.blocks import Runs, runs
from tilefold.device import Device
from tilefold.expression import Boolean, Skeleton, Table, Truth, split
from tilefold.fold import index_bits
from tilefold.owners import COLUMNS, Dealer, fastest, rows_of_parts, split_time
from tilefold.problem import ITEM_BYTES, STATISTICS, Problem
from tilefold.recent import Recent
from tilefold.tables import FAMILIES, Family, RegisterTile
from tilefold.winners import Blocks, Key

OPERATIONS = ("forward", "backward")
FORMS = ("auto", "interleaved", "tiled", "decode", "fused", "split")
"""How an operation is done: forward "tiled" or "decode", backward "fused" or "split"."""

DECODE = ("decode", "decode_part", "merge")
"""Kernels whose rows hold one query each, the head dimension in the lanes."""

PARALLEL = {
    "forward": "q",
    **dict.fromkeys(DECODE, "q"),
    "delta": "q",
    "backward_dq": "q",
    "backward_dkv": "k",
    "backward": "k",
    "reduce_dq": "q",
}
"""The axis that lies in the lanes, by kernel."""


class Multiplier(NamedTuple):
    """What multiplies: "fma" numbers, "dot" pairs of bfloat16, "amx" tiles of such pairs.

    With pairs every operand is a sum of `parts` bfloat16 numbers.
    """

    unit: str
    parts: int = 1

    @property
    def terms(self) -> int:
        """Products that make one: all of two parts but that of the low ones."""
        return self.parts * (self.parts + 1) // 2


FMA = Multiplier("fma")


@dataclass(frozen=True)
class KernelSpec:
    """What changes the text of a kernel, and nothing else: no lengths, batch, heads or mask data.

    The register tile is `rows` broadcast rows by `vectors` vectors of `lanes` elements. The
    parallel axis lies in the lanes, `block_parallel` at a time; the traversed axis is walked
    `block_traverse` rows at a time. In the kernels of `DECODE`, `rows` is how many queries a worker
    holds at most. `native_half`: the machine converts float16 itself.
    """

    operation: str
    dtype: str
    dim: int
    dim_v: int
    lanes: int
    vectors: int
    rows: int
    block_traverse: int
    mask: Skeleton
    index_bits: int
    native_half: bool = False
    products: Multiplier = FMA

    @property
    def block_parallel(self) -> int:
        """Rows of the parallel axis in one block."""
        return self.lanes * self.vectors

    @property
    def state_width(self) -> int:
        """Elements that "decode_part" leaves of one query: O in whole vectors, m and l."""
        return self.whole(self.dim_v) + 2 * self.lanes

    def whole(self, dim: int) -> int:
        """A dimension rounded up to whole vectors."""
        return -(-dim // self.lanes) * self.lanes


_NO_OWNERS = np.zeros((1, COLUMNS), np.int64)


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel of a plan, and the work that its workers share.

    `order` names block rows, heaviest first: of one head where all heads are alike (and is walked
    once for each), else of all heads. Item = (b * heads + h) * item_rows + block row. In the fused
    backward an item is an owner of several block rows: item_rows and `order` count owners, and
    `owners` says what each has (see `Dealer.deal`). Where few queries are decoded an item is of
    `bundle` key heads. `buffers` names the arrays of operands that go by another name.
    """

    problem: Problem
    spec: KernelSpec
    runs: Runs
    order: NDArray[np.int64]
    heads: int
    item_rows: int
    block_rows: int
    owners: NDArray[np.int64] = field(default_factory=lambda: _NO_OWNERS)
    buffers: Mapping[str, str] = field(default_factory=dict)
    bundle: int = 1

    @property
    def items(self) -> int:
        """How many work items there are, over batch and heads."""
        return self.problem.batch * self.heads * self.item_rows

    @property
    def splits(self) -> int:
        """Block rows that share the same rows of the parallel axis: parts of the traversed one."""
        return self.block_rows if self.spec.operation in DECODE else 1

    @property
    def block_parallel(self) -> int:
        """Rows of the parallel axis in a block row: all queries where they are few."""
        return self.problem.len_q if self.spec.operation in DECODE else self.spec.block_parallel


@dataclass(frozen=True)
class Scratch:
    """An array that the kernels of a plan hand to each other: contiguous, not set beforehand."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class Plan:
    """The kernels of one operation in the order in which they run, and the data of the mask.

    `buffers` are operands that no caller gives, by their names in the kernels.
    """

    problem: Problem
    device: Device
    operation: str
    launches: tuple[Launch, ...]
    parameters: tuple[int, ...]
    tables: tuple[Table, ...]
    buffers: Mapping[str, Scratch]

    @property
    def data_bytes(self) -> int:
        """Bytes of the mask's tables and of the runs."""
        arrays = [table.array for table in self.tables]
        for launch in self.launches:
            arrays += [launch.runs.rows, launch.runs.runs, launch.order, launch.owners]
        return sum(array.nbytes for array in arrays)


_recent: Recent[Plan] = Recent(most=128, most_bytes=256 * 2**20)
winners.when_changed(_recent.clear)


def plan(
    problem: Problem,
    device: Device,
    operation: str,
    form: str = "auto",
    tile: RegisterTile | None = None,
    block_traverse: int | None = None,
    *,
    owners: int | None = None,
    in_place: bool = True,
) -> Plan:
    """The plan of an operation, "forward" or "backward".

    `form` is how it is done. Forward: "tiled" (queries in the lanes) or "decode" (few queries, the
    head dimension in the lanes, keys split among workers). Backward: "fused" (5 products per pair,
    so many `owners` to each key head) or "split" (7 products, one owner per block of queries, then
    of keys). "auto" takes what is predicted to be faster, and so does "interleaved", for keys whose
    heads lie side by side: there a worker decodes the same keys of many heads. With `in_place` the
    rows of dq are contiguous: a single owner may sum them where they lie, unless they hold a half
    type. `tile` and `block_traverse` override the tables; results depend on all of these only by
    rounding.

    Plans are kept for the next call of the same problem: the newest ones, as far as their data
    (mask tables and runs) fit 256 MiB.
    """
    key = (problem, device, operation, form, tile, block_traverse, owners, in_place)
    found = _recent.get(key)
    if found is None:
        made = _plan(*key)
        found = _recent.put(key, made, made.data_bytes)
    return found


def _plan(
    problem: Problem,
    device: Device,
    operation: str,
    form: str,
    tile: RegisterTile | None,
    block_traverse: int | None,
    owners: int | None,
    in_place: bool,
) -> Plan:
    expression = _bound(problem)
    bits = index_bits(expression, problem.batch, problem.heads_q, problem.len_q, problem.len_k)
    skeleton, parameters, tables = split(expression)

    def launch(kernel: str) -> Launch:
        spec = _spec(problem, device, kernel, skeleton, bits, tile, block_traverse)
        return _launch(problem, spec)

    buffers: dict[str, Scratch] = {}
    if operation == "backward":
        launches, buffers = _backward(problem, device, form, launch, owners, in_place)
    elif _decodes(problem, device, form, tile):
        spec = _decode_spec(problem, device, skeleton, bits, block_traverse)
        bundle = splits.bundle(problem) if form == "interleaved" else 1
        launches, buffers = _decode(problem, device, spec, expression, bundle)
    else:
        launches = [launch("forward")]
    return Plan(problem, device, operation, tuple(launches), parameters, tables, buffers)


def _backward(
    problem: Problem,
    device: Device,
    form: str,
    launch: Callable[[str], Launch],
    owners: int | None,
    in_place: bool,
) -> tuple[list[Launch], dict[str, Scratch]]:
    """The launches of the backward pass and their buffers."""
    assert form in ("auto", "fused", "split"), form
    row = (problem.batch, problem.heads_q, problem.len_q)
    computed = STATISTICS[problem.dtype]
    launches, buffers = [launch("delta")], {"delta": Scratch(row, computed)}
    fused, reduce = launch("backward"), launch("reduce_dq")
    in_place = in_place and computed == problem.dtype
    products = fused.spec.products
    line = -(-problem.dim // fused.spec.lanes) * fused.spec.lanes
    dealer = Dealer(
        problem,
        fused.runs,
        block_q=reduce.spec.block_parallel,
        block_k=fused.spec.block_parallel,
        row_bytes=line * ITEM_BYTES[computed],
        product=splits.UNIT[products.unit] * products.terms,
    )
    if owners is None and form != "split" and not problem.empty:
        owners, time = fastest(dealer, device.cores, in_place)
        if form == "auto" and split_time(dealer, device.cores) < time:
            form = "split"
    if form == "split":
        return [*launches, launch("backward_dq"), launch("backward_dkv")], buffers
    owners = max(1, min(owners or 1, fused.block_rows))
    alone = owners == 1 and in_place
    dealt = dealer.alone if alone else dealer.deal(owners)
    fused = replace(
        fused,
        order=np.argsort(-dealer.shares(dealt), kind="stable"),
        item_rows=owners,
        owners=dealt,
        buffers={"dq_parts": "dq"} if alone else {},
    )
    if alone:
        return [*launches, fused], buffers
    buffers["dq_parts"] = Scratch((*row[:2], rows_of_parts(dealt), line), computed)
    return [*launches, fused, replace(reduce, runs=dealer.parts(dealt), owners=dealt)], buffers


GRANULE = 32
"""Traversed rows that are classified together; a run is cut into tiles only inside the kernel."""


def _decodes(problem: Problem, device: Device, form: str, tile: RegisterTile | None = None) -> bool:
    """Whether the decode kernel serves: where it is predicted to be faster than the tiled one.

    Work is counted in vector multiply-adds per key, and divided by the cores that can share it. A
    register tile of queries takes all its lanes, empty or not; a row of the decode kernel takes its
    own products, the sums across lanes, and one vector of exponentials for a vector of keys.
    """
    assert form in FORMS, form  # those of the backward pass leave the choice open here
    rows = problem.heads_q // max(1, problem.heads_kv) * problem.len_q
    if form == "tiled" or tile or problem.empty:
        return False
    if form == "decode" or rows > splits.MOST_ROWS:
        if rows > splits.MOST_ROWS and form == "decode":
            most = f"at most {splits.MOST_ROWS} queries for each key head, over all query heads"
            raise ValueError(f"form 'decode' takes {most}, got {rows}")
        return form == "decode"
    lanes = _lanes(problem, device)
    tile = table_blocks(problem, device, "forward").tile
    multiplies = multiplier(problem, device, "forward")
    heads = problem.batch * problem.heads_q
    blocks = heads * -(-problem.len_q // (tile.vectors * lanes))
    product = splits.UNIT[multiplies.unit] * multiplies.terms
    products = product * (problem.dim + problem.dim_v)
    tiled = blocks * tile.vectors * (products + splits.EXP) / min(device.cores, blocks)
    work = heads * problem.len_q * splits.row_work(problem, lanes)
    owners = problem.batch * problem.heads_kv * splits.most_splits(problem, lanes, problem.len_k)
    return work / min(device.cores, owners) < tiled


def _decode_spec(
    problem: Problem, device: Device, skeleton: Skeleton, bits: int, block_traverse: int | None
) -> KernelSpec:
    """One vector of keys at a time; a tile of keys and one of values share the first cache."""
    lanes = _lanes(problem, device)
    return KernelSpec(
        operation="decode",
        dtype=problem.dtype,
        dim=problem.dim,
        dim_v=problem.dim_v,
        lanes=lanes,
        vectors=1,
        rows=splits.MOST_ROWS,
        block_traverse=-(-(block_traverse or splits.TILE) // lanes) * lanes,
        mask=skeleton,
        index_bits=bits,
        native_half=problem.dtype == "float16" and device.converts_float16,
    )


def _decode(
    problem: Problem, device: Device, spec: KernelSpec, expression: Boolean, bundle: int
) -> tuple[list[Launch], dict[str, Scratch]]:
    """One launch, or where the keys of a head are split two, and what the first leaves."""
    heads = problem.heads_kv // bundle
    visited = runs(
        expression,
        parallel="q",
        batch=problem.batch,
        heads=problem.heads_q,
        len_parallel=problem.len_q,
        len_traverse=problem.len_k,
        block_parallel=problem.len_q,
        block_traverse=GRANULE,
        group=problem.heads_q // heads,
    )
    keys = splits.keys_per_split(visited, problem, device, spec.lanes, bundle)
    visited = splits.cut(visited, keys)
    count = visited.block_rows
    order = _heaviest_first(visited, problem, heads, count)
    if count == 1:
        return [Launch(problem, spec, visited, order, heads, 1, 1, bundle=bundle)], {}
    part = replace(spec, operation="decode_part")
    merge = replace(spec, operation="merge")
    nothing = Runs(np.zeros(2, np.int64), np.zeros((0, 3), np.int64), 1, 1)
    launches = [
        Launch(problem, part, visited, order, heads, count, count, bundle=bundle),
        Launch(problem, merge, nothing, np.zeros(1, np.int64), problem.heads_q, 1, count),
    ]
    shape = (problem.batch, problem.heads_q, count * problem.len_q, spec.state_width)
    return launches, {"part": Scratch(shape, STATISTICS[problem.dtype])}


def _spec(
    problem: Problem,
    device: Device,
    kernel: str,
    skeleton: Skeleton,
    bits: int,
    tile: RegisterTile | None,
    block_traverse: int | None,
) -> KernelSpec:
    blocks = _blocks(problem, device, kernel, skeleton, tile)
    return KernelSpec(
        operation=kernel,
        dtype=problem.dtype,
        dim=problem.dim,
        dim_v=problem.dim_v,
        lanes=_lanes(problem, device),
        vectors=blocks.tile.vectors,
        rows=blocks.tile.rows,
        block_traverse=blocks.block_traverse if block_traverse is None else block_traverse,
        mask=skeleton,
        index_bits=bits,
        native_half=problem.dtype == "float16" and device.converts_float16,
        products=multiplier(problem, device, kernel),
    )


def _blocks(
    problem: Problem, device: Device, kernel: str, mask: Skeleton, tile: RegisterTile | None
) -> Blocks:
    """Those of the tile that is asked for, else what was measured here, else the table's."""
    if tile is not None:
        return usual_blocks(problem, device, kernel, tile)
    table = table_blocks(problem, device, kernel)
    winner = winners.find(device, winner_key(problem, device, kernel, mask), table)
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
        length=winners.length_class(_length(problem, kernel), _lanes(problem, device)),
    )


def table_blocks(problem: Problem, device: Device, kernel: str) -> Blocks:
    """What `tables` say of one kernel of a plan."""
    rows, lanes = family(problem, device, kernel), _lanes(problem, device)
    if _length(problem, kernel) <= winners.LONG:
        tile = _for_length(rows.tiles, lanes, _length(problem, kernel))
    elif kernel in _MASKED:
        tile = _for_mask(rows.measured_tiles, lanes, problem, PARALLEL[kernel])
    else:
        tile = rows.tiles[0]
    return usual_blocks(problem, device, kernel, tile)


def usual_blocks(problem: Problem, device: Device, kernel: str, tile: RegisterTile) -> Blocks:
    """A register tile with as many traversed rows as the scratch of `tables` holds."""
    item_bytes = ITEM_BYTES[STATISTICS[problem.dtype]]
    return Blocks(tile, family(problem, device, kernel).block_traverse(tile, item_bytes))


def _lanes(problem: Problem, device: Device) -> int:
    return FAMILIES[device.isa].lanes(ITEM_BYTES[STATISTICS[problem.dtype]])


def _length(problem: Problem, kernel: str) -> int:
    """Of the axis that lies in the lanes."""
    return problem.len_q if PARALLEL[kernel] == "q" else problem.len_k


def multiplier(problem: Problem, device: Device, kernel: str) -> Multiplier:
    """What multiplies in a kernel: pairs of bfloat16 where they are exact enough, and faster.

    A float16 number is exactly the sum of two, a float32 number nearly: three products of tiles
    take 3/16 of the time of one product in float32, but three products of pairs 3/2 of it. So
    where there are pairs without tiles, "high" is computed as "highest".
    """
    if kernel in ("delta", "reduce_dq", *DECODE):
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


_MASKED = ("forward", "backward_dq", "backward_dkv", "backward")
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
    if isinstance(_bound(problem), Truth):
        return widest
    width = widest.vectors * lanes
    met = _visited(problem, parallel, width).met
    if not met.any():
        return widest
    least = (1 - LEAST_SAVED) * width * int(met.sum())
    for tile in tiles[1:]:
        narrow = tile.vectors * lanes
        cost = _cost(tile) / _cost(widest)
        # Where a window ends, a block reaches as much less far as it is narrower.
        if cost * (1 - (width - narrow) / met.mean()) < 1 - LEAST_SAVED:
            pairs = cost * narrow * int(_visited(problem, parallel, narrow).met.sum())
            if pairs < least:
                best, least = tile, pairs
    return best


def _bound(problem: Problem) -> Boolean:
    return problem.mask.bind(problem.len_q, problem.len_k)


@functools.lru_cache(maxsize=4)  # few, since they may be large; `_launch` asks again at once
def _visited(problem: Problem, parallel: str, width: int) -> Runs:
    """The runs of blocks that are so wide."""
    length, traversed = problem.len_q, problem.len_k
    if parallel == "k":
        length, traversed = traversed, length
    return runs(
        _bound(problem),
        parallel=parallel,
        batch=problem.batch,
        heads=problem.heads_q,
        len_parallel=length,
        len_traverse=traversed,
        block_parallel=width,
        block_traverse=GRANULE,
    )


def _launch(problem: Problem, spec: KernelSpec) -> Launch:
    parallel = PARALLEL[spec.operation]
    block_rows = -(-_length(problem, spec.operation) // spec.block_parallel)
    if spec.operation in _MASKED:
        visited = _visited(problem, parallel, spec.block_parallel)
    else:
        visited = Runs(np.zeros(block_rows + 1, np.int64), np.zeros((0, 3), np.int64), 1, 1)
    heads = problem.heads_q if parallel == "q" else problem.heads_kv
    order = _heaviest_first(visited, problem, heads, block_rows)
    return Launch(problem, spec, visited, order, heads, block_rows, block_rows)


def _heaviest_first(visited: Runs, problem: Problem, heads: int, rows: int) -> NDArray[np.int64]:
    """Block rows by the traversed elements that they visit, most first; ties keep their order."""
    work: NDArray[np.int64] = visited.met.reshape(visited.planes_b, visited.planes_h, rows)
    if visited.planes_b == visited.planes_h == 1:
        work = work.reshape(rows)
    else:
        shape = (problem.batch, max(heads, visited.planes_h), rows)
        work = np.broadcast_to(work, shape).reshape(problem.batch, heads, -1, rows).sum(2).ravel()
    return np.argsort(-work, kind="stable")
