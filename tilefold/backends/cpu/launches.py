"""One kernel of a plan, with the work that its workers share, and the order of that work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu.choice import Heads
from tilefold.backends.cpu.partitions import COLUMNS
from tilefold.backends.cpu.spec import KernelSpec
from tilefold.masks.runs import Runs
from tilefold.problems.attention import Problem, Shape

_NO_OWNERS = np.zeros((1, COLUMNS), np.int64)


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel of a plan, and the work that its workers share.

    `order` names block rows, heaviest first: of one head where all heads are alike (and is walked
    once for each), else of all heads. Item = (b * heads + h) * item_rows + block row. In the fused
    backward an item is an owner of several block rows: item_rows and `order` count owners, and
    `owners` says what each has (see `KeyPartitioner.cut`). Where few queries are decoded, an item
    is of `heads_per_item` key heads. `buffers` names the arrays of operands that go by another
    name. Where only `some` heads take this kernel, `order` names all of its items. Where an item
    sums over the batch, `block_rows` counts its entries. `scratch_bytes` are a worker's own, beside
    those of its kernel. `shapes` are those of targets: see `backends.cpu.inputs`.
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
    some: bool = False
    scratch_bytes: int = 0
    shapes: tuple[Shape, ...] = ()

    @property
    def arrays(self) -> tuple[NDArray[np.int64], ...]:
        """The arrays that say where its workers work."""
        return (self.runs.rows, self.runs.runs, self.order, self.owners)

    @property
    def items(self) -> int:
        """How many work items there are, over batch and heads."""
        if self.some or self.spec.row.owned:
            return len(self.order)
        return self.problem.batch * self.heads * self.item_rows

    @property
    def share(self) -> float:
        """The share of what all heads visit that its heads visit."""
        if self.spec.row.owned:
            return 1.0
        work = visited_work(self.runs, self.problem, self.heads)
        if not self.some or not work.any():
            return 1.0
        work = work.reshape(-1, self.item_rows, work.shape[2] // self.item_rows).sum(axis=2)
        return float(work.ravel()[self.order].sum() / work.sum())

    @property
    def counters(self) -> int:
        """How many counters of finished splits there are: one for the heads of an item."""
        return self.problem.batch * self.heads if self.spec.kernel == "decode_part" else 0

    @property
    def splits(self) -> int:
        """Block rows that share the same rows of the parallel axis: parts of the traversed one."""
        return self.block_rows if self.spec.row.by_query else 1

    @property
    def block_parallel(self) -> int:
        """Rows of the parallel axis in a block row: all queries where they are few."""
        return self.problem.len_q if self.spec.row.by_query else self.spec.block_parallel


def heaviest_first(
    visited: Runs, problem: Problem, heads: int, some: Heads | None = None
) -> NDArray[np.int64]:
    """Block rows by the traversed elements that they visit, most first; ties keep their order.

    Those of `some` key heads alone, or of all.
    """
    if some is None and visited.planes_b == visited.planes_h == 1:
        return np.argsort(-visited.met, kind="stable")
    order = np.argsort(-visited_work(visited, problem, heads).ravel(), kind="stable")
    if some is None:
        return order
    each = heads // problem.heads_kv * visited.block_rows
    taken = np.repeat(some, each, axis=1).ravel()
    return order[taken[order]]


def visited_work(visited: Runs, problem: Problem, heads: int | None = None) -> NDArray[np.int64]:
    """What each block row of each batch entry and head visits; of a query head without `heads`."""
    heads, rows = heads or problem.heads_q, visited.block_rows
    work: NDArray[np.int64] = visited.met.reshape(visited.planes_b, visited.planes_h, rows)
    shape = (problem.batch, max(heads, visited.planes_h), rows)
    work = np.broadcast_to(work, shape).reshape(problem.batch, heads, -1, rows)
    total: NDArray[np.int64] = work.sum(axis=2)
    return total
