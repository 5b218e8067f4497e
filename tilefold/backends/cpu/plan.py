"""Planning: the kernels that solve a Problem on a Device, their blocks, tiles and order.

Nothing here depends on how many threads will run: so results do not either. Where results are to be
the same bits anywhere, all that decides them (forms, blocks, splits of keys, parts of dQ) follows
from one key head with its query heads, in one batch entry, and not from other heads or the cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu.choice import Chooser, Heads
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.heuristics import DEFAULT, Heuristics
from tilefold.backends.cpu.inputs import sums
from tilefold.backends.cpu.kernels.arguments import OF_QUERY
from tilefold.backends.cpu.launches import Launch, heaviest_first
from tilefold.backends.cpu.partitions import (
    FIRST_QUERY,
    LAST_QUERY,
    KeyPartitioner,
    fastest,
    in_turn,
    rows_of_parts,
    split_time,
)
from tilefold.backends.cpu.spec import KernelSpec
from tilefold.backends.cpu.splits import KeySplitter
from tilefold.backends.cpu.tables import LONG, RegisterTile
from tilefold.common import generation, reproducible
from tilefold.common.lru import LruCache
from tilefold.planning.plan import Plan, Scratch
from tilefold.planning.visited import cut, nothing
from tilefold.problems.attention import ITEM_BYTES, STATISTICS, Problem

FORMS = {
    "forward": ("auto", "interleaved", "tiled", "decode"),
    "backward": ("auto", "fused", "split"),
}
"""Forms of an operation: forward "tiled" or "decode", backward "fused" or "split"."""

UNIT = {"fma": 1.0, "dot": 0.5, "amx": 1 / 16}
"""Time of a product by what multiplies in the tiled kernel, as the units are made."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CpuPlan(Plan[Launch]):
    """The kernels of one operation on a processor."""

    device: Device
    anywhere: bool
    """Whether all that decides bits follows from one key head alone: see `set_reproducible`."""


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
    extra: tuple[str, ...] = (),
    heuristics: Heuristics = DEFAULT,
    scope: str | None = None,
    inputs: tuple[int, ...] = (),
) -> CpuPlan:
    """The plan of an operation, "forward", "backward" or "key_mass".

    `form` is how it is done. Forward: "tiled" (queries in the lanes) or "decode" (few queries, the
    head dimension in the lanes, keys split among workers). Backward: "fused" (5 products per pair,
    `owners` of each key head) or "split" (7 products, one owner per block of queries, then
    of keys). "auto" takes what is predicted to be faster, and so does "interleaved", for keys whose
    heads lie side by side: there a worker decodes the same keys of many heads. With `in_place` the
    rows of dq are contiguous: a single owner may sum them where they lie, unless they hold a half
    type. `extra` names operands that few calls have: "max", the largest score of each query,
    "dlse", and "dsinks". `tile` and `block_traverse` override the tables, and `heuristics` the
    constants by which forms, owners and splits are chosen; results depend on all of these only by
    rounding. `scope` is "anywhere" or "machine", as set by `set_reproducible` where it is None.
    `inputs` are the numbers of the arrays of the score whose gradients are written too, to
    contiguous "dinput0" ...

    Plans are kept for the next call of the same problem: the newest ones, up to 256 MiB of data
    (mask tables and runs).
    """
    blocks, scope = (tile, block_traverse), scope or reproducible.get_reproducible()
    options = (owners, in_place, extra, heuristics, scope, inputs)
    asked = (problem, device, operation, form, *blocks, *options)
    key = (generation.number, asked)
    found = _recent.get(key)
    if found is None:
        chooser = Chooser(problem, device, heuristics, extra)
        planner = _Planner(chooser, *blocks, anywhere=scope == "anywhere" and owners is None)
        made = planner.plan(operation, form, owners, in_place, inputs)
        found = _recent.put(key, made, made.data_bytes)
    return found


class _Planner:
    """One problem on one device; `tile` and `block_traverse` override the chooser.

    `anywhere`: what decides bits follows from one key head alone, not from others or the cores.
    """

    def __init__(
        self,
        chooser: Chooser,
        tile: RegisterTile | None,
        block_traverse: int | None,
        *,
        anywhere: bool,
    ) -> None:
        self._anywhere = anywhere
        self._chooser, self._tile, self._block_traverse = chooser, tile, block_traverse
        self._problem, self._device = chooser.problem, chooser.device
        self._masked = chooser.masked
        self._heuristics = chooser.heuristics
        self._computed = STATISTICS[chooser.problem.dtype]
        self._splitter = KeySplitter(
            chooser.problem,
            None if anywhere else chooser.device.cores,
            chooser.lanes,
            chooser.heuristics,
        )

    def plan(
        self,
        operation: str,
        form: str,
        owners: int | None,
        in_place: bool,
        inputs: tuple[int, ...],
    ) -> CpuPlan:
        """The plan of an operation in a form."""
        buffers: dict[str, Scratch] = {}
        if operation == "backward":
            launches, buffers = self._backward(form, owners, in_place)
            if inputs:
                more = sums(self._chooser, self._spec_of_inputs(), inputs)
                launches, buffers = launches + more.launches, buffers | more.buffers
        elif operation == "key_mass":
            launches = self._launches("key_mass")
        elif self._decodes(form):
            launches, buffers = self._decode(form)
        else:
            launches = self._launches("forward")
        return CpuPlan(
            problem=self._problem,
            device=self._device,
            operation=operation,
            launches=tuple(launches),
            parameters=self._masked.parameters,
            tables=self._masked.tables,
            buffers=buffers,
            anywhere=self._anywhere,
            scores=self._masked.score_parts,
        )

    def _launches(self, kernel: str) -> list[Launch]:
        """A kernel whose items are a block row each; once for the heads of each choice of blocks.

        Choices differ where the mask of one batch entry or head is much narrower than of others.
        """
        specs = self._specs(kernel)
        return [self._launch_of(spec, some) for spec, some in specs]

    def _specs(self, kernel: str) -> Iterator[tuple[KernelSpec, Heads | None]]:
        options = (kernel, self._tile, self._block_traverse)
        return self._chooser.specs(*options, each=self._anywhere)

    def _spec_of_inputs(self) -> KernelSpec:
        """The blocks of the gradients of a score's arrays: anywhere they follow from the lengths.

        Heads add to the same arrays, so all take the same blocks.
        """
        kernel, tile = "backward_inputs", self._tile
        if tile is None and self._anywhere and self._problem.len_q > LONG:
            tile = self._chooser.family(kernel).tiles[0]
        ((spec, _),) = self._chooser.specs(kernel, tile, self._block_traverse)
        return spec

    def _launch(self, kernel: str) -> Launch:
        """The same for a kernel whose blocks do not depend on the mask."""
        (launch,) = self._launches(kernel)
        return launch

    def _launch_of(self, spec: KernelSpec, some: Heads | None) -> Launch:
        problem, row = self._problem, spec.row
        block_rows = -(-row.length(problem) // spec.block_parallel)
        if row.tiled:
            visited = self._masked.visited_by(row.parallel, spec.block_parallel)
        else:
            visited = nothing(block_rows)
        heads = row.heads(problem)
        order = heaviest_first(visited, problem, heads, some)
        sizes = (heads, block_rows, block_rows)
        return Launch(problem, spec, visited, order, *sizes, some=some is not None)

    def _sink_gradients(self) -> Launch:
        """An item for each query head, which goes through all batch entries."""
        problem = self._problem
        order = np.arange(problem.heads_q)
        return replace(
            self._launch("sink_gradients"),
            order=order,
            item_rows=1,
            block_rows=problem.batch,
            some=True,
        )

    def _backward(
        self, form: str, owners: int | None, in_place: bool
    ) -> tuple[list[Launch], dict[str, Scratch]]:
        """The launches of the backward pass and their buffers."""
        assert form in FORMS["backward"], form
        problem, cores, computed = self._problem, self._device.cores, self._computed
        row = (problem.batch, problem.heads_q, problem.len_q)
        statistics = Scratch((*row[:2], len(OF_QUERY) * problem.len_q), computed)
        launches, buffers = [self._launch("delta")], {"statistics": statistics}
        if "dsinks" in self._chooser.extra:
            launches.append(self._sink_gradients())
        if self._anywhere:
            more, parts = self._backward_anywhere(form, in_place)
            return launches + more, buffers | parts
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
        buffers["dq_parts"] = self._parts(fused.spec, rows_of_parts(dealt))
        reduce = replace(reduce, runs=partitioner.parts(dealt), owners=dealt)
        return [*launches, fused, reduce], buffers

    def _parts(self, spec: KernelSpec, rows: int) -> Scratch:
        """Memory for the rows of all parts of a head."""
        problem = self._problem
        shape = (problem.batch, problem.heads_q, rows, spec.whole(problem.dim))
        return Scratch(shape, self._computed)

    def _backward_anywhere(
        self, form: str, in_place: bool
    ) -> tuple[list[Launch], dict[str, Scratch]]:
        """The launches after delta, by the problem of each key head alone, and memory for parts.

        Where several workers share a head they leave its parts to the reduction; elsewhere one
        makes them in turn. The bits are the same.
        """
        problem, everyone = self._problem, (self._problem.batch, self._problem.heads_kv)
        reduce = self._launch("reduce_dq")
        in_place = in_place and self._computed == problem.dtype
        launches, fused_heads = [], np.zeros(everyone, np.bool_)
        for spec, some in self._specs("backward"):
            fused = self._launch_of(spec, None)
            partitioner = self._partitioner(fused, reduce)
            dealt = partitioner.cut_evenly()
            taken = np.ones(everyone, np.bool_) if some is None else some
            if form != "fused":
                taken = taken & (form == "auto") & partitioner.fused_heads
            if taken.all() and not in_turn(partitioner, dealt, self._device.cores):
                order = np.argsort(-partitioner.shares(dealt), kind="stable")
                fused = replace(fused, order=order, item_rows=len(dealt), owners=dealt)
                reduce = replace(reduce, runs=partitioner.parts(dealt), owners=dealt)
                return [fused, reduce], {"dq_parts": self._parts(spec, rows_of_parts(dealt))}
            if taken.any():
                in_turns = self._in_turn(fused, partitioner, dealt, taken)
                launches.append(replace(in_turns, buffers={"dq_parts": "dq"} if in_place else {}))
                fused_heads |= taken
        buffers = {}
        if launches and not in_place:
            buffers["dq_parts"] = self._parts(launches[0].spec, problem.len_q)
            launches.append(_of_heads(reduce, fused_heads, partitioner))
        for kernel in ("backward_dq", "backward_dkv") if not fused_heads.all() else ():
            for spec, some in self._specs(kernel):
                taken = ~fused_heads if some is None else ~fused_heads & some
                if taken.any():
                    launches.append(self._launch_of(spec, None if taken.all() else taken))
        return launches, buffers

    def _in_turn(
        self,
        fused: Launch,
        partitioner: KeyPartitioner,
        dealt: NDArray[np.int64],
        taken: Heads,
    ) -> Launch:
        """A worker for each of the key heads `taken`, which makes all parts of dQ."""
        met = np.broadcast_to(partitioner.met_of_heads, taken.shape)
        order = np.argsort(-met.ravel(), kind="stable")
        fused = replace(fused, order=order[taken.ravel()[order]], item_rows=1, some=True)
        if len(dealt) == 1:
            return replace(fused, owners=partitioner.alone)
        rows = int((dealt[:, LAST_QUERY] - dealt[:, FIRST_QUERY]).max())
        elements = partitioner.group * rows * fused.spec.whole(self._problem.dim)
        return replace(
            fused,
            spec=replace(fused.spec, in_turn=True),
            owners=dealt,
            scratch_bytes=-(-elements * ITEM_BYTES[self._computed] // 64) * 64,
        )

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
        Anywhere it is the work of one key head on one core.
        A register tile of queries takes all its lanes, empty or not; a row of the decode kernel
        takes its own products, the sums across lanes, and one vector of exponentials for a vector
        of keys.
        """
        # forms of the backward pass leave the choice open here
        assert any(form in forms for forms in FORMS.values()), form
        problem, cores, lanes = self._problem, self._device.cores, self._chooser.lanes
        heads, key_heads = problem.batch * problem.heads_q, problem.batch * problem.heads_kv
        if self._anywhere:
            heads, key_heads, cores = heads // max(1, key_heads), 1, 1
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
        blocks = heads * -(-problem.len_q // (tile.vectors * lanes))
        product = UNIT[multiplies.unit] * multiplies.terms
        products = product * (problem.dim + problem.dim_v)
        products += self._heuristics.exponential
        tiled = blocks * tile.vectors * products / min(cores, blocks)
        work = heads * problem.len_q * self._splitter.row_work
        most_splits = self._splitter.most_splits(problem.len_k)
        return work / min(cores, key_heads * most_splits) < tiled

    def _decode(self, form: str) -> tuple[list[Launch], dict[str, Scratch]]:
        """The launch, and where the keys of a head are split, what is merged."""
        problem, lanes = self._problem, self._chooser.lanes
        keys = self._block_traverse or self._heuristics.decode_tile
        # One vector of keys at a time; a tile of keys and one of values share the first cache.
        spec = self._chooser.spec_of(
            "decode",
            vectors=1,
            rows=self._heuristics.most_rows,
            block_traverse=-(-keys // lanes) * lanes,
        )
        splitter, heads_per_item = self._splitter, 1
        if form == "interleaved" and not self._anywhere:
            heads_per_item = splitter.heads_per_item
        visited = self._masked.visited_together(problem.heads_kv // heads_per_item)
        visited = cut(visited, splitter.keys_per_split(visited, heads_per_item))
        count = visited.block_rows
        if form == "interleaved" and self._anywhere and not self._masked.by_head:
            # Of the same keys. What a neighbour sees beside them would cut the tiles of a head.
            heads_per_item = splitter.heads_that_feed(self._device.cores, count)
        heads = problem.heads_kv // heads_per_item
        order = heaviest_first(visited, problem, heads)
        name = "decode" if count == 1 else "decode_part"
        spec = replace(spec, kernel=name)
        launch = Launch(
            problem, spec, visited, order, heads, count, count, heads_per_item=heads_per_item
        )
        if count == 1:
            return [launch], {}
        shape = (problem.batch, problem.heads_q, count * problem.len_q, spec.state_width)
        return [launch], {"part": Scratch(shape, self._computed)}


def _of_heads(reduce: Launch, taken: Heads, partitioner: KeyPartitioner) -> Launch:
    """The reduction of what one worker summed for each of the key heads `taken`."""
    alone = partitioner.alone
    reduce = replace(reduce, runs=partitioner.parts(alone), owners=alone)
    if taken.all():
        return reduce
    rows = np.repeat(taken, partitioner.group * reduce.block_rows, axis=1)
    return replace(reduce, order=np.flatnonzero(rows), some=True)
