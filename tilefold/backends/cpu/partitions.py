"""The owners of the fused backward: how many there are, and which keys each of them takes.

An owner makes dK and dV of some block rows of keys of one key head, and sums their part of dQ. With
one owner per head that part is all of dQ, summed where the caller wants it. With more, each has a
part of its own, and a last kernel adds the parts in their order: so few heads and long sequences
feed all cores, and still nothing depends on who came first.

Where results are to be the same bits anywhere, the parts follow from the lengths alone, and one
worker makes all parts of a head in turn where there are heads enough. Else there are as many owners
as the cores ask for. These take neighbouring block rows of about equal work, counted in the queries
that the mask lets them meet: under a causal mask the first owner takes fewer keys than the last
one. Neighbours, and not every n-th block row, because under a window an owner then meets few
queries, and only these rows of its part are ever touched. All heads are dealt alike, whatever the
number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu.heuristics import DEFAULT, Heuristics
from tilefold.common.computed import computed
from tilefold.masks.runs import Runs
from tilefold.problems.attention import STATISTICS, Problem

Array = NDArray[np.int64]

FUSED_PRODUCTS = 5
SPLIT_PRODUCTS = (3, 4)
"""Products per pair of the fused kernel, and of the two kernels that are split over q and over k.

Their number decides the time, as was measured on one core of an AMD EPYC (Zen 4), float32, one
head, split / fused turn by turn, 2026-11-21: dense 2048 x 64 1.41, 8192 x 64 1.38, 2048 x 128 1.40,
8192 x 128 1.32, 4096 x 40 1.38, causal 2048 x 64 1.40; bfloat16 pairs 2048 x 64 1.37, 2048 x 128
1.38; float16 1.39, 1.37; 7 / 5 is 1.4.
"""

COLUMNS = 5
FIRST_ROW, LAST_ROW, FIRST_QUERY, LAST_QUERY, PART = range(COLUMNS)
"""The columns of a deal: block rows of keys, the queries whose rows of dQ an owner sums, and how
many rows after a query its row in the parts of a head comes: the rows of an owner lie together,
after the rows of the owner before."""


@dataclass(frozen=True, eq=False)
class KeyPartitioner:
    """A problem as its owners see it: block rows of keys with their runs, and blocks of queries.

    A row of a part takes `row_bytes`; `product` is the time of a product, in products of float32.
    """

    problem: Problem
    runs: Runs
    block_q: int
    block_k: int
    row_bytes: int
    product: float = 1.0
    heuristics: Heuristics = DEFAULT

    @property
    def heads_q(self) -> int:
        """Query heads of all batch entries."""
        return self.problem.batch * self.problem.heads_q

    @property
    def heads_kv(self) -> int:
        """Key heads of all batch entries."""
        return self.problem.batch * self.problem.heads_kv

    @property
    def group(self) -> int:
        """Query heads of one key head."""
        return self.heads_q // max(1, self.heads_kv)

    @property
    def blocks_q(self) -> int:
        """Blocks of queries in one head."""
        return -(-self.problem.len_q // self.block_q)

    @computed
    def work(self) -> NDArray[np.float64]:
        """Queries that each block row meets, the mean over the heads, and its fixed cost."""
        planes = self.runs.planes_b * self.runs.planes_h
        met = self.runs.met.reshape(planes, self.runs.block_rows).sum(axis=0)
        work: NDArray[np.float64] = met / max(1, planes) + self.heuristics.block_queries
        return work

    def cut(self, owners: int) -> Array:
        """For each owner its block rows, its queries (whole blocks) and its part, as columns.

        Of all ways to cut the block rows, the one whose cuts lie next to equal work. An owner may
        have no block row, where one of them alone is more work than most.
        """
        done = self._done
        shares = done[-1] * np.arange(1, owners) / owners
        after = np.searchsorted(done, shares)
        nearer = shares - done[after - 1] < done[after] - shares
        return self._dealt(np.concatenate([[0], after - nearer, [self.runs.block_rows]]))

    def cut_evenly(self) -> Array:
        """The deal by lengths alone: parts of about as many keys, whatever the mask.

        Their number is a power of two, to be shared by 2, 4 or 8 cores. It grows with the root of
        the keys, so that parts cost less of longer calls, and within `parts_share`.
        """
        costs, problem = self.heuristics, self.problem
        least = problem.len_k // (costs.part_keys * (1 if self.product >= 1 else 2))
        part = self.group * problem.len_q * self.row_bytes
        most = int(costs.parts_share * problem.bytes("backward")) // max(1, part * self.heads_kv)
        parts = min(least, math.isqrt(8 * least), most, self.runs.block_rows)
        parts = 1 << max(1, parts).bit_length() - 1
        return self._dealt(self.runs.block_rows * np.arange(parts + 1) // parts)

    def _dealt(self, cuts: Array) -> Array:
        """The owners between cuts."""
        dealt = np.zeros((len(cuts) - 1, COLUMNS), np.int64)
        dealt[:, FIRST_ROW], dealt[:, LAST_ROW] = cuts[:-1], cuts[1:]
        lowest, highest = self._met
        first = np.minimum.reduceat(lowest, cuts[:-1]) // self.block_q * self.block_q
        last = -(-np.maximum.reduceat(highest, cuts[:-1]) // self.block_q) * self.block_q
        some = (cuts[:-1] < cuts[1:]) & (first < last)
        dealt[some, FIRST_QUERY] = first[some]
        dealt[some, LAST_QUERY] = np.minimum(last, self.problem.len_q)[some]
        rows = dealt[:, LAST_QUERY] - dealt[:, FIRST_QUERY]
        dealt[:, PART] = np.cumsum(rows) - rows - dealt[:, FIRST_QUERY]
        return dealt

    @property
    def alone(self) -> Array:
        """The deal of a single owner that has all keys and sums all rows of dQ."""
        return np.array([[0, self.runs.block_rows, 0, self.problem.len_q, 0]])

    def shares(self, dealt: Array) -> NDArray[np.float64]:
        """The work of each owner."""
        return self._done[dealt[:, LAST_ROW]] - self._done[dealt[:, FIRST_ROW]]

    @computed
    def _done(self) -> NDArray[np.float64]:
        """The work before each block row, and of all of them."""
        return np.concatenate([[0.0], np.cumsum(self.work)])

    @computed
    def _met(self) -> tuple[Array, Array]:
        """The first query that each block row meets in any head, and one past its last one.

        The end of the sequence and 0 where it meets none; one row more, which does not exist.
        """
        runs, rows = self.runs, self.runs.rows
        some = np.flatnonzero(rows[1:] > rows[:-1])
        first = np.full(len(rows), self.problem.len_q)
        last = np.zeros(len(rows), np.int64)
        first[some] = runs.runs[rows[some], 0]
        last[some] = runs.runs[rows[some + 1] - 1, 1]
        planes = (runs.planes_b * runs.planes_h, runs.block_rows)
        lowest, highest = first[:-1].reshape(planes).min(0), last[:-1].reshape(planes).max(0)
        return np.append(lowest, first[-1]), np.append(highest, last[-1])

    @computed
    def met_of_heads(self) -> Array:
        """Queries that all block rows of a key head meet, for each plane of key heads."""
        planes_h = min(self.runs.planes_h, self.problem.heads_kv)
        met: Array = self.runs.met.reshape(self.runs.planes_b, planes_h, -1).sum(axis=2)
        return met

    @property
    def fused_heads(self) -> NDArray[np.bool_]:
        """For each plane of key heads: the fused form takes less time there, on one core.

        A single owner sums all of dQ, which has to be rounded once more in half types.
        """
        met = self.met_of_heads
        heads = max(1, self.runs.planes_h // met.shape[1])
        work = met / heads + self.heuristics.block_queries * self.runs.block_rows
        rows = self.problem.len_q / self.block_k
        if STATISTICS[self.problem.dtype] == self.problem.dtype:
            rows = 0
        rounding = self.heuristics.row_products / self.product * rows
        fused: NDArray[np.bool_] = (sum(SPLIT_PRODUCTS) - FUSED_PRODUCTS) * work >= rounding
        return fused

    def parts(self, dealt: Array) -> Runs:
        """For each block of queries the parts that hold it, as runs of owners; all heads alike."""
        first = np.arange(self.blocks_q)[:, None] * self.block_q
        held = (dealt[:, FIRST_QUERY] <= first) & (first < dealt[:, LAST_QUERY])
        edges = np.diff(np.pad(held, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        row, begin = np.nonzero(edges == 1)
        _, end = np.nonzero(edges == -1)
        rows = np.zeros(self.blocks_q + 1, np.int64)
        np.cumsum(np.bincount(row, minlength=self.blocks_q), out=rows[1:])
        return Runs(rows, np.stack((begin, end, np.zeros_like(end)), axis=1), 1, 1)


def split_time(partitioner: KeyPartitioner, cores: int) -> float:
    """Time of the split form: 3 and 4 products with every block for itself, on the busiest core."""
    counts = (
        partitioner.heads_q * partitioner.blocks_q,
        partitioner.heads_kv * partitioner.runs.block_rows,
    )
    rounds = [-(-count // cores) / max(1, count) for count in counts]
    products = sum(n * share for n, share in zip(SPLIT_PRODUCTS, rounds, strict=True))
    return products * partitioner.heads_q * float(partitioner.work.sum())


def fastest(partitioner: KeyPartitioner, cores: int, in_place: bool) -> tuple[int, float]:
    """The number of owners of each key head that takes the least time, and that time.

    Time counts products of a query with a block row of keys, on the core with the most to do: 5 for
    every query that the heaviest owner meets, as often as the cores go round for all owners, and
    the rows of the parts, spread over the cores. So on 4 cores 1 head gets 4 owners, 5 / 4 where
    split takes 7 / 4. With 3 heads one owner each takes 5, four 15 / 4.

    A single owner needs no part where it may sum dQ `in_place`. The parts of several keep to
    `parts_share`, so memory is linear in the lengths: few heads on very many cores may be served
    better by the split form.
    """
    costs = partitioner.heuristics
    most = costs.parts_share * partitioner.problem.bytes("backward")
    times: dict[int, float] = {}
    for owners in range(1, max(1, min(cores, partitioner.runs.block_rows)) + 1):
        dealt = partitioner.cut(owners)
        rows = partitioner.heads_q * rows_of_parts(dealt)
        if owners > 1 and rows * partitioner.row_bytes > most:
            break
        rounds = -(-partitioner.heads_kv * owners // cores)
        times[owners] = (
            FUSED_PRODUCTS * rounds * float(partitioner.shares(dealt).max()) * partitioner.group
        )
        if owners > 1 or not in_place:
            row = costs.row_products / partitioner.product
            times[owners] += row * rows / partitioner.block_k / cores
    owners = min(times, key=lambda count: times[count])
    return owners, times[owners]


def in_turn(partitioner: KeyPartitioner, dealt: Array, cores: int) -> bool:
    """True where a worker should make all parts of a head: results are the same bits.

    Heads that feed the cores do so. Then parts take little memory, and stay in a worker's caches.
    """
    costs, heads, parts = partitioner.heuristics, partitioner.heads_kv, len(dealt)
    shares = partitioner.shares(dealt)
    apart = max(shares.max(), -(-heads * parts // cores) * shares.mean())
    together = -(-heads // cores) * shares.sum()
    row = costs.row_products / partitioner.product
    rows = row * partitioner.heads_q * rows_of_parts(dealt) / partitioner.block_k / cores
    products = FUSED_PRODUCTS * partitioner.group
    return bool(products * together <= products * apart + rows)


def rows_of_parts(dealt: Array) -> int:
    """Rows of all parts of one query head."""
    return int((dealt[:, LAST_QUERY] - dealt[:, FIRST_QUERY]).sum())
