"""Planning: the kernels that solve a Problem on a Device, their blocks, tiles and order.

Nothing here depends on how many threads will run: so results do not either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu import splits
from tilefold.backends.cpu.choice import (
    MASKED,
    blocks_for,
    lanes_of,
    multiplier,
    parallel_length,
    table_blocks,
)
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.partitions import (
    COLUMNS,
    KeyPartitioner,
    fastest,
    rows_of_parts,
    split_time,
)
from tilefold.backends.cpu.spec import DECODE, PARALLEL, KernelSpec
from tilefold.backends.cpu.tables import RegisterTile
from tilefold.common import generation
from tilefold.common.lru import LruCache
from tilefold.masks.evaluate import index_bits
from tilefold.masks.expression import Boolean, Declared, Skeleton, Table, split
from tilefold.masks.runs import Runs, runs
from tilefold.planning.plan import Scratch
from tilefold.planning.visited import MASK_STEP, bound, cut, visited_by
from tilefold.problems.attention import ITEM_BYTES, STATISTICS, Problem

FORMS = ("auto", "interleaved", "tiled", "decode", "fused", "split")
"""How an operation is done: forward "tiled" or "decode", backward "fused" or "split"."""

_NO_OWNERS = np.zeros((1, COLUMNS), np.int64)


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel of a plan, and the work that its workers share.

    `order` names block rows, heaviest first: of one head where all heads are alike (and is walked
    once for each), else of all heads. Item = (b * heads + h) * item_rows + block row. In the fused
    backward an item is an owner of several block rows: item_rows and `order` count owners, and
    `owners` says what each has (see `Dealer.deal`). Where few queries are decoded an item is of
    `heads_per_item` key heads. `buffers` names the arrays of operands that go by another name.
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
    heads_per_item: int = 1

    @property
    def items(self) -> int:
        """How many work items there are, over batch and heads."""
        return self.problem.batch * self.heads * self.item_rows

    @property
    def splits(self) -> int:
        """Block rows that share the same rows of the parallel axis: parts of the traversed one."""
        return self.block_rows if self.spec.kernel in DECODE else 1

    @property
    def block_parallel(self) -> int:
        """Rows of the parallel axis in a block row: all queries where they are few."""
        return self.problem.len_q if self.spec.kernel in DECODE else self.spec.block_parallel


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
    tables: tuple[Table | Declared, ...]
    buffers: Mapping[str, Scratch]

    @property
    def data_bytes(self) -> int:
        """Bytes of the mask's tables and of the runs."""
        arrays = [table.array for table in self.tables]
        for launch in self.launches:
            arrays += [launch.runs.rows, launch.runs.runs, launch.order, launch.owners]
        return sum(array.nbytes for array in arrays)


_recent: LruCache[Plan] = LruCache(most=128, most_bytes=256 * 2**20)


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
    asked = (problem, device, operation, form, tile, block_traverse, owners, in_place)
    key = (generation.number, asked)
    found = _recent.get(key)
    if found is None:
        made = _plan(*asked)
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
    expression = bound(problem)
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
        heads_per_item = splits.heads_per_item(problem) if form == "interleaved" else 1
        launches, buffers = _decode(problem, device, spec, expression, heads_per_item)
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
    products = fused.spec.multiplier
    line = fused.spec.whole(problem.dim)
    partitioner = KeyPartitioner(
        problem,
        fused.runs,
        block_q=reduce.spec.block_parallel,
        block_k=fused.spec.block_parallel,
        row_bytes=line * ITEM_BYTES[computed],
        product=splits.UNIT[products.unit] * products.terms,
    )
    if owners is None and form != "split" and not problem.empty:
        owners, time = fastest(partitioner, device.cores, in_place)
        if form == "auto" and split_time(partitioner, device.cores) < time:
            form = "split"
    if form == "split":
        return [*launches, launch("backward_dq"), launch("backward_dkv")], buffers
    owners = max(1, min(owners or 1, fused.block_rows))
    alone = owners == 1 and in_place
    dealt = partitioner.alone if alone else partitioner.cut(owners)
    fused = replace(
        fused,
        order=np.argsort(-partitioner.shares(dealt), kind="stable"),
        item_rows=owners,
        owners=dealt,
        buffers={"dq_parts": "dq"} if alone else {},
    )
    if alone:
        return [*launches, fused], buffers
    buffers["dq_parts"] = Scratch((*row[:2], rows_of_parts(dealt), line), computed)
    return [*launches, fused, replace(reduce, runs=partitioner.parts(dealt), owners=dealt)], buffers


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
    lanes = lanes_of(problem, device)
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
    lanes = lanes_of(problem, device)
    return KernelSpec(
        kernel="decode",
        dtype=problem.dtype,
        dim=problem.dim,
        dim_v=problem.dim_v,
        lanes=lanes,
        vectors=1,
        rows=splits.MOST_ROWS,
        block_traverse=-(-(block_traverse or splits.TILE) // lanes) * lanes,
        mask=skeleton,
        index_bits=bits,
        native_half=_native_half(problem, device),
    )


def _decode(
    problem: Problem, device: Device, spec: KernelSpec, expression: Boolean, heads_per_item: int
) -> tuple[list[Launch], dict[str, Scratch]]:
    """One launch, or where the keys of a head are split two, and what the first leaves."""
    heads = problem.heads_kv // heads_per_item
    visited = runs(
        expression,
        parallel="q",
        batch=problem.batch,
        heads=problem.heads_q,
        len_parallel=problem.len_q,
        len_traverse=problem.len_k,
        block_parallel=problem.len_q,
        block_traverse=MASK_STEP,
        group=problem.heads_q // heads,
    )
    keys = splits.keys_per_split(visited, problem, device, spec.lanes, heads_per_item)
    visited = cut(visited, keys)
    count = visited.block_rows
    order = _heaviest_first(visited, problem, heads, count)
    if count == 1:
        return [
            Launch(problem, spec, visited, order, heads, 1, 1, heads_per_item=heads_per_item)
        ], {}
    part = replace(spec, kernel="decode_part")
    merge = replace(spec, kernel="merge")
    nothing = Runs(np.zeros(2, np.int64), np.zeros((0, 3), np.int64), 1, 1)
    launches = [
        Launch(problem, part, visited, order, heads, count, count, heads_per_item=heads_per_item),
        Launch(problem, merge, nothing, np.zeros(1, np.int64), problem.heads_q, 1, count),
    ]
    shape = (problem.batch, problem.heads_q, count * problem.len_q, spec.state_width)
    return launches, {"part": Scratch(shape, STATISTICS[problem.dtype])}


def _native_half(problem: Problem, device: Device) -> bool:
    """Whether there are float16 numbers, and the machine converts them itself."""
    return problem.dtype == "float16" and device.converts_float16


def _spec(
    problem: Problem,
    device: Device,
    kernel: str,
    skeleton: Skeleton,
    bits: int,
    tile: RegisterTile | None,
    block_traverse: int | None,
) -> KernelSpec:
    blocks = blocks_for(problem, device, kernel, skeleton, tile)
    return KernelSpec(
        kernel=kernel,
        dtype=problem.dtype,
        dim=problem.dim,
        dim_v=problem.dim_v,
        lanes=lanes_of(problem, device),
        vectors=blocks.tile.vectors,
        rows=blocks.tile.rows,
        block_traverse=blocks.block_traverse if block_traverse is None else block_traverse,
        mask=skeleton,
        index_bits=bits,
        native_half=_native_half(problem, device),
        multiplier=multiplier(problem, device, kernel),
    )


def _launch(problem: Problem, spec: KernelSpec) -> Launch:
    parallel = PARALLEL[spec.kernel]
    block_rows = -(-parallel_length(problem, spec.kernel) // spec.block_parallel)
    if spec.kernel in MASKED:
        visited = visited_by(problem, parallel, spec.block_parallel)
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
