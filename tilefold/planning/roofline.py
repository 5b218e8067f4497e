"""Lower bounds of a problem on a device: arithmetic, exponentials, bytes, and which one binds.

A pass over visible (query, key) pairs cannot take less time than its multiply-adds at the
measured peak rate, its exponentials at theirs, or its arrays through memory once (Williams,
Waterman and Patterson, "Roofline", 2009). Exponentials get a bound of their own: on every device of
the last years products became faster and exponentials did not.

`instruction_count` is the count of metal-flash-attention (Turner, 2024): a multiply-add is one
instruction, and the softmax of a pair is taken as 5. Forward makes 2 D + 5 per pair, dQ 3 D + 5,
dK/dV 4 D + 5; the fused backward, which is not in that count, 5 D + 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tilefold.masks import evaluate, runs
from tilefold.masks.rule import sized
from tilefold.planning.kernels import OPERANDS, Contractions, Work
from tilefold.problems.attention import ITEM_BYTES, STATISTICS, Problem

SOFTMAX_INSTRUCTIONS = 5


@dataclass(frozen=True)
class Rates:
    """The measured rates of a device in one type with `workers` workers.

    `measured` is the time of the newest measurement, as ISO 8601. `spread` is how much longer its
    median run took than its fastest one: 0.01 on a quiet machine, 1 on one that does other work.
    """

    device: str
    dtype: str
    workers: int
    flops_per_second: float
    exponentials_per_second: float
    bytes_per_second: float
    measured: str | None = None
    spread: float = 0.0


@dataclass(frozen=True)
class Bounds:
    """Seconds that a pass takes at least, for each of three reasons."""

    arithmetic_seconds: float
    exponential_seconds: float
    bytes_seconds: float

    @property
    def seconds(self) -> float:
        """The largest of the three: no implementation of this algorithm is faster."""
        return max(self.arithmetic_seconds, self.exponential_seconds, self.bytes_seconds)

    @property
    def binding(self) -> str:
        """Name of the largest of the three."""
        named = {
            "arithmetic": self.arithmetic_seconds,
            "exponentials": self.exponential_seconds,
            "bytes": self.bytes_seconds,
        }
        return max(named, key=lambda name: named[name])


def instruction_count(work: Work, pairs: int, dim: int, dim_v: int | None = None) -> int:
    """Instructions of an operation or a kernel over `pairs` pairs, for vectors of one element.

    >>> from tilefold.planning.kernels import WORK
    >>> instruction_count(WORK["forward"], 1024**2, 64) == (2 * 64 + 5) * 1024**2
    True
    """
    made = _contractions(work)
    width = made.dim * dim + made.dim_v * (dim if dim_v is None else dim_v)
    return (width + SOFTMAX_INSTRUCTIONS) * pairs


def bounds(problem: Problem, work: Work, pairs: int, rates: Rates) -> Bounds:
    """Lower bounds of an operation or a kernel over `pairs` pairs of all heads, at measured rates.

    Scratch counts as if keys were not split.
    """
    made = _contractions(work)
    flops = 2 * pairs * (made.dim * problem.dim + made.dim_v * problem.dim_v)
    return Bounds(
        arithmetic_seconds=flops / rates.flops_per_second,
        exponential_seconds=pairs / rates.exponentials_per_second,
        bytes_seconds=sum(_bytes(problem, name) for name in work.operands) / rates.bytes_per_second,
    )


def visible_pairs(problem: Problem, block: int = 64, tiles_at_once: int = 256) -> int:
    """How many (query, key) pairs the mask lets meet, over batch and query heads, exactly."""
    sizes = (problem.len_q, problem.len_k, problem.batch, problem.heads_q)
    expression = sized(problem.mask, *sizes).expression
    found = runs.runs(
        expression,
        parallel="q",
        batch=problem.batch,
        heads=problem.heads_q,
        len_parallel=problem.len_q,
        len_traverse=problem.len_k,
        block_parallel=block,
        block_traverse=block,
    )
    if not found.block_rows:
        return 0
    owner = np.repeat(np.arange(len(found.rows) - 1), np.diff(found.rows))
    plane, row = np.divmod(owner, found.block_rows)
    height = np.minimum(block, problem.len_q - row * block)
    first, last, masked = found.runs.T
    full = int((height * (last - first))[masked == 0].sum())

    partial = np.flatnonzero(masked)
    tiles = -(-(last - first)[partial] // block)
    which = np.repeat(partial, tiles)
    column = np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    b, h = np.divmod(plane, found.planes_h)
    inner = np.arange(block)
    for start in range(0, len(which), tiles_at_once):
        at = which[start : start + tiles_at_once]
        left = first[at] + block * column[start : start + tiles_at_once]
        q = (row[at] * block)[:, None, None] + inner[:, None]
        k = left[:, None, None] + inner
        inside = (q < problem.len_q) & (k < last[at][:, None, None])
        seen = evaluate.exact(
            expression,
            b=b[at][:, None, None],
            h=h[at][:, None, None],
            q=np.minimum(q, problem.len_q - 1),
            k=np.minimum(k, problem.len_k - 1),
        )
        full += int((seen & inside).sum())
    alike = (problem.batch // found.planes_b) * (problem.heads_q // found.planes_h)
    return full * alike


def computed_pairs(
    problem: Problem, parallel: str, found: runs.Runs, block: int, splits: int = 1
) -> int:
    """Pairs in the tiles that a plan visits, over batch and query heads: what kernels compute.

    `splits` block rows share each block of the parallel axis.
    """
    length = problem.len_q if parallel == "q" else problem.len_k
    if not found.block_rows:
        return 0
    per_row = np.add.reduceat(
        np.append(found.runs[:, 1] - found.runs[:, 0], 0),
        np.minimum(found.rows[:-1], len(found.runs)),
    ) * (np.diff(found.rows) > 0)
    row = np.arange(len(per_row)) % found.block_rows // splits
    height = np.minimum(block, length - row * block)
    alike = (problem.batch // found.planes_b) * (problem.heads_q // found.planes_h)
    return int((per_row * height).sum()) * alike


def _contractions(work: Work) -> Contractions:
    if work.contractions is None:
        raise ValueError(f"{work.name} multiplies no pairs of queries and keys")
    return work.contractions


def _bytes(problem: Problem, name: str) -> int:
    """Bytes of an operand, over batch and heads."""
    operand = OPERANDS[name]
    of_query = operand.axis == "q"
    rows = problem.len_q * problem.heads_q if of_query else problem.len_k * problem.heads_kv
    width = getattr(problem, operand.width) if operand.width else 1
    dtype = problem.dtype if operand.given else STATISTICS[problem.dtype]
    return int(problem.batch * rows * width * ITEM_BYTES[dtype])
