"""A plain flash-attention forward pass in Triton, as a tutorial would write it: the measure of what
the language gives without a planner.

FlashAttention-2 (Dao, 2023) in one kernel: a program for each block of queries, one loop over the
tiles before the diagonal and one over those on it. Whole tiles, contiguous operands and powers of
two only; no lse. Its blocks are the fastest of a few, for each dim, type and mask.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from gpu_parts.section import Stage
from gpu_parts.timing import Call, quickest
from tilefold.masks.position_rules import causal, full
from tilefold.problems.attention import Problem

if TYPE_CHECKING:
    from torch import Tensor


class Config(NamedTuple):
    """Rows of a block of queries, keys of a tile, warps, stages, and who moves tiles of keys."""

    rows: int
    keys: int
    warps: int
    stages: int
    described: bool


CONFIGS = tuple(
    Config(*sizes, described)
    for sizes in (
        (128, 64, 4, 3),
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 128, 8, 2),
        (64, 64, 4, 3),
    )
    for described in (True, False)
)
"""Those that tutorials try; what does not fit the GPU is left out."""


@triton.jit
def tile_of(source, row, ROWS: tl.constexpr, DIM: tl.constexpr, DESCRIBED: tl.constexpr):
    """Some rows of an array of (rows, dim)."""
    if DESCRIBED:
        tile = source.load([row.to(tl.int32), 0])
    else:
        rows = row + tl.arange(0, ROWS)
        tile = tl.load(source + rows[:, None] * DIM + tl.arange(0, DIM)[None, :])
    return tile


@triton.jit
def folded(
    queries, k, v, top, weight, total, row, seen, factor,
    DIM: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One tile of keys folded into the maximum, the sum of weights and the sums of a block."""
    scores = tl.dot(queries, tl.trans(tile_of(k, row, KEYS, DIM, DESCRIBED))) * factor
    if MASKED:
        scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(top - higher)
    values = tile_of(v, row, KEYS, DIM, DESCRIBED)
    total = tl.dot(p.to(values.dtype), values, total * shrink[:, None])
    return higher, weight * shrink + tl.sum(p, 1), total


@triton.jit
def plain_forward(
    q, k, v, o, factor, length,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head; `factor` is the scale times log2 e."""
    block, plane = tl.program_id(0), tl.program_id(1)
    if CAUSAL:
        block = tl.num_programs(0) - 1 - block
    first = plane.to(tl.int64) * length
    begin = block * ROWS
    at = begin + tl.arange(0, ROWS)
    queries = tile_of(q, first + begin, ROWS, DIM, False)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, DIM], tl.float32)
    whole = begin // KEYS * KEYS if CAUSAL else length
    for start in range(0, whole, KEYS):
        top, weight, total = folded(
            queries, k, v, top, weight, total, first + start, None, factor,
            DIM, KEYS, False, DESCRIBED,
        )  # fmt: skip
    if CAUSAL:
        for start in range(whole, begin + ROWS, KEYS):
            seen = at[:, None] >= start + tl.arange(0, KEYS)[None, :]
            top, weight, total = folded(
                queries, k, v, top, weight, total, first + start, seen, factor,
                DIM, KEYS, True, DESCRIBED,
            )  # fmt: skip
    place = o + (first + at)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tl.store(place, (total / weight[:, None]).to(queries.dtype))


def launcher(problem: Problem, given: dict[str, Any], config: Config) -> Call:
    """The kernel in some blocks. Raises NotImplementedError for what it is not written for."""
    import torch

    p = problem
    square = p.len_q == p.len_k and p.heads_q == p.heads_kv and p.dim == p.dim_v
    if not square or p.mask not in (full(), causal()) or p.dim & (p.dim - 1):
        raise NotImplementedError("the plain kernel takes square problems, full or causal")
    if p.len_q % max(config.rows, config.keys):
        raise NotImplementedError(f"{p.len_q} queries are no whole blocks of {config.rows}")
    q, k, v = (given[name].view(-1, p.dim) for name in ("q", "k", "v"))
    if config.described:
        from triton.tools.tensor_descriptor import TensorDescriptor

        block = [config.keys, p.dim]
        k, v = (TensorDescriptor(x, list(x.shape), list(x.stride()), block) for x in (k, v))
    o = torch.empty_like(given["q"])

    def call() -> tuple[Tensor]:
        grid = (p.len_q // config.rows, p.batch * p.heads_q)
        plain_forward[grid](
            q,
            k,
            v,
            o,
            p.scale * math.log2(math.e),
            p.len_q,
            DIM=p.dim,
            ROWS=config.rows,
            KEYS=config.keys,
            CAUSAL=p.mask == causal(),
            DESCRIBED=config.described,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        return (o,)

    return call


def fastest(stage: Stage, problem: Problem, given: dict[str, Any]) -> Call:
    """The kernel in the best of its blocks. Raises RuntimeError where none can run."""
    calls: dict[str, Call] = {}
    configs: dict[str, Config] = {}
    reason = ""
    key = (problem.dtype, problem.dim, str(problem.mask))
    for config in [_best[key]] if key in _best else CONFIGS:
        if not stage.on_gpu and config.rows > problem.len_q:
            config = config._replace(rows=32, keys=32)  # tiny problems of the interpreter
        try:
            call = launcher(problem, given, config)
            with stage.machine.active():
                call()
        except Exception as error:  # too large for this GPU or this problem, or no descriptors
            reason = " ".join(str(error).split())[:200]
            continue
        calls[repr(config)] = functools.partial(_active, stage, call)
        configs[repr(config)] = config
    if not calls:
        raise RuntimeError(f"no blocks of the plain kernel run: {reason}")
    best = quickest(stage, calls) if len(calls) > 1 else next(iter(calls))
    _best.setdefault(key, configs[best])
    return calls[best]


_best: dict[tuple[object, ...], Config] = {}
"""What was the fastest in this process: at the first length, the longest but one."""


def _active(stage: Stage, call: Call) -> Any:
    with stage.machine.active():
        return call()
