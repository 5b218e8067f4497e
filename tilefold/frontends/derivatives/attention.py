"""Derivatives of the passes of attention as sums over tiles.

The backward pass is a function of do, dlse, q, k, v, o and lse, and counts each as an argument of
its own. So its derivatives also serve calls whose o and lse are those of more keys (`merge`), and
autograd follows o and lse to the call that they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilefold.backends.arrays.torch import dtype_of
from tilefold.common.lru import LruCache
from tilefold.frontends.derivatives.modified import Modification
from tilefold.frontends.derivatives.sums import tile_sum
from tilefold.frontends.derivatives.tiles import Gradients, Tangents
from tilefold.frontends.derivatives.walk import Walk
from tilefold.problems.attention import STATISTICS, Problem, describe
from tilefold.problems.request import LAYOUTS, Request

Some = Sequence[Tensor | None]


def move(given: Sequence[Tensor], request: Request, tangents: Some) -> tuple[Tensor, Tensor]:
    """The tangents of o and lse, from q, k, v, o, lse and the tangents of q, k and v."""
    q, k, v, o, lse = given
    lie = _Lie.of(q, k, v, request)
    tile = Tangents(lie.problem.scale, lie.score)
    operands = lie.rows(q), lie.shift(lse), lie.keys(k), lie.keys(v)
    directions = [
        lie.rows(torch.zeros_like(x) if tangent is None else tangent)
        if x is q
        else lie.keys(torch.zeros_like(x) if tangent is None else tangent)
        for x, tangent in zip((q, k, v), tangents, strict=True)
    ]
    total, xi = tile_sum(tile, lie.walk, *operands, *directions)
    return lie.as_rows(total - xi * lie.rows(o), o), lie.as_statistic(xi)


def pull(
    given: Sequence[Tensor], dlse: Tensor | None, request: Request, slopes: Some
) -> tuple[Tensor, ...]:
    """The gradients of do, dlse, q, k, v, o and lse, from those of dq, dk and dv."""
    do, q, k, v, o, _ = given
    lie = _Lie.of(q, k, v, request)
    operands = lie.operands(given, dlse)
    there = tuple([slope is not None for slope in slopes])
    ways = lie.rows, lie.keys, lie.keys
    seen = [way(slope) for way, slope in zip(ways, slopes, strict=True) if slope is not None]
    tile = Gradients(lie.problem.scale, lie.score).pulled(there, (True,) * len(operands))
    of_q, of_shift, of_k, of_v, of_do, of_minus = tile_sum(tile, lie.walk, *operands, *seen)
    return (
        lie.as_rows(of_do - of_minus * lie.rows(o), do),
        lie.as_statistic(of_minus),
        lie.as_rows(of_q, q),
        lie.as_keys(of_k, k),
        lie.as_keys(of_v, v),
        lie.as_rows(-of_minus * lie.rows(do), o),
        lie.as_statistic(of_shift),
    )


def push(
    given: Sequence[Tensor],
    dlse: Tensor | None,
    request: Request,
    tangents: Some,
    moved: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tangents of dq, dk and dv, from those of do, q, k, v, o and lse, and `moved` of dlse."""
    do, q, k, v, o, _ = given
    lie = _Lie.of(q, k, v, request)
    operands = lie.operands(given, dlse)
    tdo, tq, tk, tv, to, tlse = tangents
    minus = None if moved is None else lie.statistic(moved)
    for one, other in ((tdo, o), (to, do)):
        if one is not None:
            turned = -(lie.rows(one) * lie.rows(other)).sum(-1, keepdim=True)
            minus = turned if minus is None else minus + turned
    directions = [
        None if tangent is None else way(tangent)
        for way, tangent in (
            (lie.rows, tq),
            (lie.statistic, tlse),
            (lie.keys, tk),
            (lie.keys, tv),
            (lie.rows, tdo),
        )
    ]
    directions.append(minus)
    there = tuple([direction is not None for direction in directions])
    seen = [direction for direction in directions if direction is not None]
    tile = Gradients(lie.problem.scale, lie.score).pushed(there)
    dq, dk, dv = tile_sum(tile, lie.walk, *operands, *seen)
    return lie.as_rows(dq, q), lie.as_keys(dk, k), lie.as_keys(dv, v)


@dataclass(frozen=True, eq=False)
class _Lie:
    """How the arrays of a call lie, and how they lie in sums over tiles: see `tile_sum`."""

    problem: Problem
    axes: tuple[int, int, int, int]
    kind: torch.dtype
    walk: Walk
    score: Modification | None

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, request: Request) -> _Lie:
        """That of a call with these tensors."""
        problem = describe(tuple(q.shape), tuple(k.shape), tuple(v.shape), dtype_of(q), request)
        kind = getattr(torch, STATISTICS[problem.dtype])
        refuse(request)
        score = None
        if problem.score is not None:
            score = Modification(problem.score.expression(problem.score_sizes))
        return _Lie(problem, LAYOUTS[request.layout], kind, _walk(problem), score)

    @property
    def _heads(self) -> tuple[int, int, int, int]:
        problem = self.problem
        group = problem.heads_q // max(1, problem.heads_kv)
        return 1, problem.batch, problem.heads_kv, group

    def operands(self, given: Sequence[Tensor], dlse: Tensor | None) -> tuple[Tensor, ...]:
        """The arguments of `Gradients`, from do, q, k, v, o and lse."""
        do, q, k, v, o, lse = given
        minus = -(self.rows(do) * self.rows(o)).sum(-1, keepdim=True)
        if dlse is not None:
            minus = minus + self.statistic(dlse)
        return self.rows(q), self.shift(lse), self.keys(k), self.keys(v), self.rows(do), minus

    def rows(self, x: Tensor) -> Tensor:
        """An array like q."""
        x = x.permute(self.axes).to(self.kind)
        return x.reshape(*self._heads, *x.shape[2:])

    def keys(self, x: Tensor) -> Tensor:
        """An array like k."""
        return x.permute(self.axes).to(self.kind)[None, :, :, None]

    def statistic(self, x: Tensor) -> Tensor:
        """An array like lse."""
        return x.reshape(*self._heads, x.shape[2], 1)

    def shift(self, lse: Tensor) -> Tensor:
        """lse, and +inf for a query that sees no key: so all its weights are 0."""
        return self.statistic(lse.masked_fill(lse == -torch.inf, torch.inf))

    def as_rows(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of `rows`."""
        return x[0].flatten(1, 2).permute(self.axes).to(like.dtype).contiguous()

    def as_keys(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of `keys`."""
        return x[0, :, :, 0].permute(self.axes).to(like.dtype).contiguous()

    def as_statistic(self, x: Tensor) -> Tensor:
        """The inverse of `statistic`."""
        return x[0, ..., 0].flatten(1, 2)


def refuse(request: Request) -> None:
    """Raises NotImplementedError for calls whose derivatives are not here."""
    if request.sinks or request.dropout:
        raise NotImplementedError(
            "second derivatives and forward mode of attention with sinks or dropout are not"
            " implemented: use torch's own operations where you need them"
        )


_walks: LruCache[Walk] = LruCache(most=16, most_bytes=2**24)


def _walk(problem: Problem) -> Walk:
    sizes = problem.batch, problem.heads_kv, problem.heads_q // max(1, problem.heads_kv)
    lengths = problem.len_q, problem.len_k
    key = (problem.mask, *sizes, *lengths)
    walk = _walks.get(key)
    if walk is None:
        walk = Walk(problem.mask.bind(*lengths), *sizes, *lengths)
        walk = _walks.put(key, walk, walk.runs.runs.nbytes + walk.runs.rows.nbytes)
    return walk
