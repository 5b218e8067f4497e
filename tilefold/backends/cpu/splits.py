"""Decoding, planned: what it costs, and how the keys of few queries are split.

A split is a block row of the plan: the runs of one head are cut where enough keys have been
visited, so each split of a window or of a padded batch has its share of what is really read. How
many there are follows from the problem and the device, never from the threads that are set.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.backends.cpu.heuristics import DEFAULT, Heuristics
from tilefold.masks.runs import Runs
from tilefold.problems.attention import ITEM_BYTES, Problem


@dataclass(frozen=True)
class KeySplitter:
    """A problem of few queries on `cores` cores, whose vectors have `lanes` elements."""

    problem: Problem
    cores: int
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

    def most_splits(self, keys: int) -> int:
        """Parts into which `keys` keys of a head may be split, none of them too small."""
        problem, costs = self.problem, self.heuristics
        key_bytes = (problem.dim + problem.dim_v) * ITEM_BYTES[problem.dtype]
        reading = key_bytes / costs.bytes_per_second
        computing = self.rows * self.row_work / costs.multiply_adds_per_second
        return max(1, int(keys * max(reading, computing) / costs.least_split_seconds))

    @property
    def heads_per_item(self) -> int:
        """Key heads that one worker reads in turn where they lie side by side: all it can hold.

        A head alone would take a few lines of memory out of every row; with its neighbours rows are
        read whole. Layout bnhd, 8 heads of dim 64, one core of a busy EPYC (Zen 4), float32: 44 %
        of the bandwidth of plain reading instead of 23 %.
        """
        fitting = range(1, self.heuristics.most_rows // self.rows + 1)
        return max(heads for heads in fitting if self.problem.heads_kv % heads == 0)

    def keys_per_split(self, visited: Runs, heads_per_item: int = 1) -> int:
        """Keys that a split visits: a few splits per core, none small, all of whole tiles.

        A split is of `heads_per_item` heads.
        """
        met = visited.met
        most = max(1, int(met.max(initial=0)))
        owners = self.problem.batch * self.problem.heads_kv // heads_per_item
        items = self.heuristics.items_per_core * self.cores
        if owners >= items or self.cores == 1:
            return most
        total = int(met.sum()) * (owners // max(1, len(met)))
        splits = self.most_splits(most * heads_per_item)
        keys = max(-(-total // items), -(-most // splits))
        tile = self.heuristics.decode_tile
        return max(1, -(-keys // tile)) * tile
