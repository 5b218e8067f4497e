"""Planning: the kernels that solve a Problem on a Device, their blocks, tiles and order.

Nothing here depends on how many threads will run: so results do not either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu.choice import Chooser
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.heuristics import DEFAULT, Heuristics
from tilefold.backends.cpu.partitions import (
    COLUMNS,
    KeyPartitioner,
    fastest,
    rows_of_parts,
    split_time,
)
from tilefold.backends.cpu.spec import KERNELS, KernelSpec
from tilefold.backends.cpu.splits import KeySplitter
from tilefold.backends.cpu.tables import RegisterTile
from tilefold.common import generation
from tilefold.common.lru import LruCache
from tilefold.masks.runs import Runs
from tilefold.planning.plan import Plan, Scratch
from tilefold.planning.visited import cut, nothing
from tilefold.problems.attention import ITEM_BYTES, STATISTICS, Problem

FORMS = ("auto", "interleaved", "tiled", "decode", "fused", "split")
"""Forms of an operation: forward "tiled" or "decode", backward "fused" or "split"."""

UNIT = {"fma": 1.0, "dot": 0.5, "amx": 1 / 16}
"""Time of a product by what multiplies in the tiled kernel, as the units are made."""

_NO_OWNERS = np.zeros((1, COLUMNS), np.int64)


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel of a plan, and the work that its workers share.

    `order` names block rows, heaviest first: of one head where all heads are alike (and is walked
    once for each), else of all heads. Item = (b * heads + h) * item_rows + block row. In the fused
    backward an item is an owner of several block rows: item_rows and `order` count owners, and
    `owners` says what each has (see `KeyPartitioner.cut`). Where few queries are decoded, an item
    is of `heads_per_item` key heads. `buffers` names the arrays of operands that go by another
    name.
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
    def arrays(self) -> tuple[NDArray[np.int64], ...]:
        """The arrays that say where its workers work."""
        return (self.runs.rows, self.runs.runs, self.order, self.owners)

    @property
    def items(self) -> int:
        """How many work items there are, over batch and heads."""
        return self.problem.batch * self.heads * self.item_rows

    @property
    def splits(self) -> int:
        """Block rows that share the same rows of the parallel axis: parts of the traversed one."""
        return self.block_rows if self.spec.row.by_query else 1

    @property
    def block_parallel(self) -> int:
        """Rows of the parallel axis in a block row: all queries where they are few."""
        return self.problem.len_q if self.spec.row.by_query else self.spec.block_parallel


@dataclass(frozen=True, eq=False, kw_only=True)
class CpuPlan(Plan[Launch]):
    """The kernels of one operation on a processor."""

    device: Device


_recent: LruCache[CpuPlan] = LruCache(most=128, most_bytes=256 * 2**20)


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
    heuristics: Heuristics = DEFAULT,
) -> CpuPlan:
    """The plan of an operation, "forward" or "backward".

    `form` is how it is done. Forward: "tiled" (queries in the lanes) or "decode" (few queries, the
    head dimension in the lanes, keys split among workers). Backward: "fused" (5 products per pair,
    `owners` of each key head) or "split" (7 products, one owner per block of queries, then
    of keys). "auto" takes what is predicted to be faster, and so does "interleaved", for keys whose
    heads lie side by side: there a worker decodes the same keys of many heads. With `in_place` the
    rows of dq are contiguous: a single owner may sum them where they lie, unless they hold a half
    type. `tile` and `block_traverse` override the tables, and `heuristics` the constants by which
    forms, owners and splits are chosen; results depend on all of these only by rounding.

    Plans are kept for the next call of the same problem: the newest ones, up to 256 MiB of data
    (mask tables and runs).
    """
    blocks = (tile, block_traverse)
    asked = (problem, device, operation, form, *blocks, owners, in_place, heuristics)
    key = (generation.number, asked)
    found = _recent.get(key)
    if found is None:
        planner = _Planner(Chooser(problem, device, heuristics), *blocks)
        made = planner.plan(operation, form, owners, in_place)
        found = _recent.put(key, made, made.data_bytes)
    return found


class _Planner:
    """One problem on one device; `tile` and `block_traverse` override the chooser."""

    def __init__(
        self, chooser: Chooser, tile: RegisterTile | None, block_traverse: int | None
    ) -> None:
        self._chooser, self._tile, self._block_traverse = chooser, tile, block_traverse
        self._problem, self._device = chooser.problem, chooser.device
        self._masked = chooser.masked
        self._heuristics = chooser.heuristics
        self._computed = STATISTICS[chooser.problem.dtype]
        self._splitter = KeySplitter(
            chooser.problem, chooser.device.cores, chooser.lanes, chooser.heuristics
        )

    def plan(self, operation: str, form: str, owners: int | None, in_place: bool) -> CpuPlan:
        """The plan of an operation in a form."""
        buffers: dict[str, Scratch] = {}
        if operation == "backward":
            launches, buffers = self._backward(form, owners, in_place)
        elif self._decodes(form):
            launches, buffers = self._decode(form)
        else:
            launches = [self._launch("forward")]
        return CpuPlan(
            problem=self._problem,
            device=self._device,
            operation=operation,
            launches=tuple(launches),
            parameters=self._masked.parameters,
            tables=self._masked.tables,
            buffers=buffers,
        )

    def _launch(self, kernel: str) -> Launch:
        """A kernel whose items are a block row each."""
        problem, row = self._problem, KERNELS[kernel]
        spec = self._chooser.spec(kernel, self._tile, self._block_traverse)
        block_rows = -(-row.length(problem) // spec.block_parallel)
        if row.tiled:
            visited = self._masked.visited_by(row.parallel, spec.block_parallel)
        else:
            visited = nothing(block_rows)
        heads = row.heads(problem)
        order = _heaviest_first(visited, problem, heads, block_rows)
        return Launch(problem, spec, visited, order, heads, block_rows, block_rows)

    def _backward(
        self, form: str, owners: int | None, in_place: bool
    ) -> tuple[list[Launch], dict[str, Scratch]]:
        """The launches of the backward pass and their buffers."""
        assert form in ("auto", "fused", "split"), form
        problem, cores, computed = self._problem, self._device.cores, self._computed
        row = (problem.batch, problem.heads_q, problem.len_q)
        launches, buffers = [self._launch("delta")], {"delta": Scratch(row, computed)}
        fused, reduce = self._launch("backward"), self._launch("reduce_dq")
        in_place = in_place and computed == problem.dtype
        partitioner = self._partitioner(fused, reduce)
        if owners is None and form != "split" and not problem.empty:
            owners, time = fastest(partitioner, cores, in_place)
            if form == "auto" and split_time(partitioner, cores) < time:
                form = "split"
        if form == "split":
            return [*launches, self._launch("backward_dq"), self._launch("backward_dkv")], buffers
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
        line = fused.spec.whole(problem.dim)
        buffers["dq_parts"] = Scratch((*row[:2], rows_of_parts(dealt), line), computed)
        reduce = replace(reduce, runs=partitioner.parts(dealt), owners=dealt)
        return [*launches, fused, reduce], buffers

    def _partitioner(self, fused: Launch, reduce: Launch) -> KeyPartitioner:
        """The problem as the owners of the fused backward see it."""
        products = fused.spec.multiplier
        return KeyPartitioner(
            self._problem,
            fused.runs,
            block_q=reduce.spec.block_parallel,
            block_k=fused.spec.block_parallel,
            row_bytes=fused.spec.whole(self._problem.dim) * ITEM_BYTES[self._computed],
            product=UNIT[products.unit] * products.terms,
            heuristics=self._heuristics,
        )

    def _decodes(self, form: str) -> bool:
        """True if the decode kernel serves: where it is predicted to be faster than the tiled one.

        Work is counted in vector multiply-adds per key, and divided by the cores that can share it.
        A register tile of queries takes all its lanes, empty or not; a row of the decode kernel
        takes its own products, the sums across lanes, and one vector of exponentials for a vector
        of keys.
        """
        assert form in FORMS, form  # forms of the backward pass leave the choice open here
        problem, cores, lanes = self._problem, self._device.cores, self._chooser.lanes
        rows, most_rows = self._splitter.rows, self._heuristics.most_rows
        if form == "tiled" or self._tile or problem.empty:
            return False
        if form == "decode" or rows > most_rows:
            if rows > most_rows and form == "decode":
                most = f"at most {most_rows} queries for each key head, over all query heads"
                raise ValueError(f"form 'decode' takes {most}, got {rows}")
            return form == "decode"
        tile = self._chooser.table_blocks("forward").tile
        multiplies = self._chooser.products
        heads = problem.batch * problem.heads_q
        blocks = heads * -(-problem.len_q // (tile.vectors * lanes))
        product = UNIT[multiplies.unit] * multiplies.terms
        products = product * (problem.dim + problem.dim_v)
        products += self._heuristics.exponential
        tiled = blocks * tile.vectors * products / min(cores, blocks)
        work = heads * problem.len_q * self._splitter.row_work
        most_splits = self._splitter.most_splits(problem.len_k)
        return work / min(cores, problem.batch * problem.heads_kv * most_splits) < tiled

    def _decode(self, form: str) -> tuple[list[Launch], dict[str, Scratch]]:
        """One launch, or where the keys of a head are split two, and what the first leaves."""
        problem, lanes = self._problem, self._chooser.lanes
        keys = self._block_traverse or self._heuristics.decode_tile
        # One vector of keys at a time; a tile of keys and one of values share the first cache.
        spec = self._chooser.spec_of(
            "decode",
            vectors=1,
            rows=self._heuristics.most_rows,
            block_traverse=-(-keys // lanes) * lanes,
        )
        heads_per_item = self._splitter.heads_per_item if form == "interleaved" else 1
        heads = problem.heads_kv // heads_per_item
        visited = self._masked.visited_together(heads)
        visited = cut(visited, self._splitter.keys_per_split(visited, heads_per_item))
        count = visited.block_rows
        order = _heaviest_first(visited, problem, heads, count)
        name = "decode" if count == 1 else "decode_part"
        spec = replace(spec, kernel=name)
        first = Launch(
            problem, spec, visited, order, heads, count, count, heads_per_item=heads_per_item
        )
        if count == 1:
            return [first], {}
        merge = replace(spec, kernel="merge")
        last = Launch(problem, merge, nothing(1), np.zeros(1, np.int64), problem.heads_q, 1, count)
        shape = (problem.batch, problem.heads_q, count * problem.len_q, spec.state_width)
        return [first, last], {"part": Scratch(shape, self._computed)}


def _heaviest_first(visited: Runs, problem: Problem, heads: int, rows: int) -> NDArray[np.int64]:
    """Block rows by the traversed elements that they visit, most first; ties keep their order."""
    work: NDArray[np.int64] = visited.met.reshape(visited.planes_b, visited.planes_h, rows)
    if visited.planes_b == visited.planes_h == 1:
        work = work.reshape(rows)
    else:
        shape = (problem.batch, max(heads, visited.planes_h), rows)
        work = np.broadcast_to(work, shape).reshape(problem.batch, heads, -1, rows).sum(2).ravel()
    return np.argsort(-work, kind="stable")
