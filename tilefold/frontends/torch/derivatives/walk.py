"""The walk over the tiles of a mask: blocks of queries by blocks of keys, hidden tiles left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tilefold.masks.evaluate import exact
from tilefold.masks.expression import Boolean, names
from tilefold.masks.runs import Runs, runs

BLOCK = 256
"""Queries and keys of a tile. 128, 256 and 512 were measured with (8, 2048, 64) in float32 on two
cores of a Xeon with 2 MiB of L2 each: 0.25, 0.22 and 0.24 s for a second derivative.
"""

PAIRS = 2 * BLOCK * BLOCK
"""Pairs that are computed at a time: two such tiles in float32 take 512 KiB for each intermediate
value. One head or two at a time were equally fast, and eight 6 % slower.
"""

Slices = tuple[slice, slice, slice]


class Pairs(NamedTuple):
    """The pairs of a tile: those that the mask hides, and the indices of all.

    `hidden` is (1, group * queries, keys), or None. The indices b, h, q and k, and the numbers of
    the copies, broadcast to (heads, group * queries, keys); without indices nothing asks for them.
    """

    hidden: Tensor | None
    indices: Mapping[str, Tensor]
    copies: Tensor | None = None


class Step(NamedTuple):
    """One tile of some heads: slices of copies, batch and key heads, of queries, and of keys."""

    heads: Slices
    queries: slice
    keys: slice
    hidden: Tensor | None


@dataclass(frozen=True, eq=False)
class Walk:
    """The tiles of an expression over the pairs of a problem; `group` query heads share a key head.

    >>> from tilefold.masks.expression import (Index)
    >>> walk = Walk(Index("q") >= Index("k"), 1, 1, 1, 300, 300)
    >>> [(step.queries.start, step.keys.start) for step in walk.steps(1, "cpu")]
    [(0, 0), (256, 0), (256, 256)]
    """

    expression: Boolean
    batch: int
    heads: int
    group: int
    len_q: int
    len_k: int
    block: int = field(default=BLOCK)

    @cached_property
    def block_q(self) -> int:
        """Queries of one head in a tile: the heads of a group share its rows."""
        return max(1, self.block // max(1, self.group))

    @cached_property
    def runs(self) -> Runs:
        """The runs of blocks of keys that each block of queries meets."""
        return runs(
            self.expression,
            parallel="q",
            batch=self.batch,
            heads=self.heads * self.group,
            len_parallel=self.len_q,
            len_traverse=self.len_k,
            block_parallel=self.block_q,
            block_traverse=self.block,
            group=max(1, self.group),
        )

    def steps(self, copies: int, device: torch.device | str) -> Iterator[Step]:
        """All tiles in order, each for as many heads as are computed at a time."""
        found = self.runs
        for row, (first_run, last_run) in enumerate(zip(found.rows, found.rows[1:], strict=False)):
            plane, block = divmod(row, found.block_rows)
            b, h = divmod(plane, found.planes_h)
            batch = slice(b, b + 1) if found.planes_b > 1 else slice(0, self.batch)
            heads = slice(h, h + 1) if found.planes_h > 1 else slice(0, self.heads)
            start = block * self.block_q
            queries = slice(start, min(start + self.block_q, self.len_q))
            for first, last, masked in found.runs[first_run:last_run].tolist():
                for key in range(first, last, self.block):
                    keys = slice(key, min(key + self.block, last))
                    hidden = self._hidden(b, h, queries, keys) if masked else None
                    if hidden is not None:
                        if hidden.all():
                            continue
                        hidden = hidden.to(device)
                    pairs = self.group * (queries.stop - start) * (keys.stop - key)
                    for part in _parts(slice(0, copies), batch, heads, max(1, PAIRS // pairs)):
                        yield Step(part, queries, keys, hidden)

    def pairs(self, step: Step, device: torch.device | str, *, indexed: bool) -> Pairs:
        """The pairs of a tile; their indices where they are asked for."""
        if not indexed:
            return Pairs(step.hidden, {})

        def count(span: slice) -> Tensor:
            return torch.arange(span.start, span.stop, device=device)

        copies, batch, heads = (count(span) for span in step.heads)
        shape = len(copies), len(batch), len(heads)
        group = torch.arange(self.group, device=device)
        b = batch[None, :, None].expand(shape).reshape(-1, 1, 1)
        first = (heads * self.group)[None, None].expand(shape).reshape(-1, 1, 1)
        queries = step.queries.stop - step.queries.start
        h = first + group.repeat_interleave(queries)[None, :, None]
        q = count(step.queries).repeat(self.group)[None, :, None]
        k = count(step.keys)[None, None]
        copy = copies[:, None, None].expand(shape).reshape(-1, 1, 1)
        return Pairs(step.hidden, {"b": b, "h": h, "q": q, "k": k}, copy)

    def _hidden(self, b: int, h: int, queries: slice, keys: slice) -> Tensor:
        by_head = "h" in names(self.expression)
        visible = exact(
            self.expression,
            b=b,
            h=h * self.group + np.arange(self.group if by_head else 1)[:, None, None],
            q=np.arange(queries.start, queries.stop)[:, None],
            k=np.arange(keys.start, keys.stop),
        )
        hidden = torch.from_numpy(~visible)
        return hidden.expand(self.group, -1, -1).reshape(1, -1, hidden.shape[2])


def _parts(copies: slice, batch: slice, heads: slice, most: int) -> Iterator[Slices]:
    """The heads of all copies in parts of at most `most` heads."""
    for_heads = min(most, heads.stop - heads.start)
    for_batch = min(max(1, most // for_heads), batch.stop - batch.start) if for_heads else 1
    whole = for_heads * (batch.stop - batch.start)
    for_copies = max(1, most // whole) if whole else 1
    for copy in _cut(copies, for_copies):
        for entry in _cut(batch, for_batch):
            for head in _cut(heads, for_heads):
                yield copy, entry, head


def _cut(whole: slice, length: int) -> Iterator[slice]:
    for start in range(whole.start, whole.stop, max(1, length)):
        yield slice(start, min(start + length, whole.stop))
