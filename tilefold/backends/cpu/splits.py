"""Decoding, planned: what it costs, and how the keys of few queries are split.

A split is a block row of the plan: the runs of one head are cut where enough keys have been
visited, so each split of a window or of a padded batch has its share of what is really read. How
many there are follows from what the queries of one key head visit, so that its results depend
neither on other heads nor on the machine: as many as are worth a merge. Or it follows from the
whole problem and the cores. It never follows from the threads that are set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu.heuristics import DEFAULT, Heuristics
from tilefold.masks.runs import Runs
from tilefold.problems.attention import ITEM_BYTES, Problem


@dataclass(frozen=True)
class KeySplitter:
    """A problem of few queries on `cores` cores, whose vectors have `lanes` elements.

    Without `cores` the splits depend neither on the machine nor on other heads.
    """

    problem: Problem
    cores: int | None
    lanes: int
    heuristics: Heuristics = DEFAULT

    @property
    def rows(self) -> int:
        """Queries of one key head, over all its query heads."""
        return self.problem.heads_q // max(1, self.problem.heads_kv) * self.problem.len_q

    @property
    def row_work(self) -> float:
        """Time of one query and one key, in multiply-adds of the tiled kernel."""
        problem, costs = self.problem, self.heuristics
        vectors = -(-problem.dim // self.lanes) - (-problem.dim_v // self.lanes)
        return costs.decode_product * vectors + costs.decode_sum + costs.exponential / self.lanes

    @property
    def key_seconds(self) -> float:
        """Time of one key and its value, for all queries of its head."""
        problem, costs = self.problem, self.heuristics
        key_bytes = (problem.dim + problem.dim_v) * ITEM_BYTES[problem.dtype]
        reading = key_bytes / costs.bytes_per_second
        computing = self.rows * self.row_work / costs.multiply_adds_per_second
        return max(reading, computing)

    def most_splits(self, keys: int) -> int:
        """Parts into which `keys` keys of a head may be split, none of them too small."""
        return max(1, int(keys * self.key_seconds / self.heuristics.least_split_seconds))

    @property
    def heads_per_item(self) -> int:
        """Key heads that one worker reads in turn where they lie side by side: all it can hold.

        A head alone would take a few lines of memory out of every row; with its neighbours rows are
        read whole. Layout bnhd, 8 heads of dim 64, one core of a busy EPYC (Zen 4), float32: 44 %
        of the bandwidth of plain reading instead of 23 %.
        """
        return self._heads_together[-1]

    def heads_that_feed(self, cores: int, splits: int) -> int:
        """As many of them as leave an item for each core, given the splits of a head."""
        lists = self.problem.batch * self.problem.heads_kv * splits
        return max((n for n in self._heads_together if lists // n >= cores), default=1)

    @property
    def _heads_together(self) -> list[int]:
        """The numbers of key heads that an item may have, ascending."""
        fitting = range(1, self.heuristics.most_rows // self.rows + 1)
        return [heads for heads in fitting if self.problem.heads_kv % heads == 0]

    def keys_per_split(self, visited: Runs, heads_per_item: int = 1) -> int | NDArray[np.int64]:
        """Keys that a split visits, of each block row or of all: whole tiles.

        A split is of `heads_per_item` heads, which has no influence where `cores` have none.
        """
        met = visited.met
        if self.cores is None:
            return np.array([self.fixed_keys(keys) for keys in met.tolist()], np.int64)
        return self._for_cores(met, heads_per_item, self.cores)

    def fixed_keys(self, met: int) -> int:
        """Keys that a split visits where its head visits `met` of them, whatever the machine."""
        costs = self.heuristics
        splits = int(met * self.key_seconds / costs.fixed_split_seconds)
        keys = -(-met // max(1, min(splits, costs.most_fixed_splits)))
        return max(1, -(-keys // costs.decode_tile)) * costs.decode_tile

    def _for_cores(self, met: NDArray[np.int64], heads_per_item: int, cores: int) -> int:
        """A few splits for each core, none small."""
        most = max(1, int(met.max(initial=0)))
        owners = self.problem.batch * self.problem.heads_kv // heads_per_item
        items = self.heuristics.items_per_core * cores
        if owners >= items or cores == 1:
            return most
        total = int(met.sum()) * (owners // max(1, len(met)))
        splits = self.most_splits(most * heads_per_item)
        keys = max(-(-total // items), -(-most // splits))
        tile = self.heuristics.decode_tile
        return max(1, -(-keys // tile)) * tile
