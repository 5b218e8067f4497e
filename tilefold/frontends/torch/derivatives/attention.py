"""Derivatives of the passes of attention as sums over tiles.

The backward pass is a function of do, dlse, q, k, v, o and lse, and counts each as an argument of
its own. So its derivatives also serve calls whose o and lse are those of more keys (`merge`), and
autograd follows o and lse to the call that they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilefold.backends.arrays.torch import dtype_of
from tilefold.common.lru import LruCache
from tilefold.frontends.torch.batched import mapped
from tilefold.frontends.torch.derivatives.modified import Modification
from tilefold.frontends.torch.derivatives.passes import Gradients, Softmax, Tangents
from tilefold.frontends.torch.derivatives.sums import tile_sum
from tilefold.frontends.torch.derivatives.walk import Walk
from tilefold.problems.attention import STATISTICS, Problem, describe
from tilefold.problems.request import LAYOUTS, Request

Some = Sequence[Tensor | None]


@mapped
def move(
    given: Sequence[Tensor], arrays: Sequence[Tensor], request: Request, tangents: Some
) -> tuple[Tensor, Tensor]:
    """The tangents of o and lse, from q, k, v, o, lse and the tangents of q, k, v and arrays."""
    q, k, v, o, lse = given
    lie = _Lie.of(q, k, v, request)
    directions = lie.ways((lie.rows, lie.keys, lie.keys), tangents)
    tile = Tangents(lie.softmax, _there(directions))
    operands = lie.rows(q), lie.shift(lse), lie.keys(k), lie.keys(v), *lie.extra(arrays)
    total, xi = tile_sum(tile, lie.walk, *operands, *_present(directions))
    return lie.as_rows(total - xi * lie.rows(o), o), lie.as_statistic(xi)


@mapped
def pull(
    given: Sequence[Tensor],
    arrays: Sequence[Tensor],
    dlse: Tensor | None,
    request: Request,
    slopes: Some,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of do, dlse, q, k, v, o and lse, and of the wanted arrays.

    They come from those of dq, dk, dv, and of what the arrays have as gradients: None for an array
    without one.
    """
    do, q, k, v, o, _ = given
    lie = _Lie.of(q, k, v, request)
    operands = (*lie.operands(given, dlse), *lie.extra(arrays))
    directions = lie.ways((lie.rows, lie.keys, lie.keys), slopes)
    asked = tuple([wanted[entry.number] for entry in lie.softmax.entries])
    seed = (False,) * (len(lie.softmax.given) - len(asked))
    first = Gradients(lie.softmax, _there(directions[3:]))
    made = _there([*directions[:3], *_present(directions[3:])])
    tile = first.pulled(made, (*[True] * 6, *asked, *seed))
    found = tile_sum(tile, lie.walk, *operands, *_present(directions))
    of_q, of_shift, of_k, of_v, of_do, of_minus, *entries = found
    return (
        lie.as_rows(of_do - of_minus * lie.rows(o), do),
        lie.as_statistic(of_minus),
        lie.as_rows(of_q, q),
        lie.as_keys(of_k, k),
        lie.as_keys(of_v, v),
        lie.as_rows(-of_minus * lie.rows(do), o),
        lie.as_statistic(of_shift),
        *lie.as_arrays(entries, asked, arrays),
    )


@mapped
def push(
    given: Sequence[Tensor],
    arrays: Sequence[Tensor],
    dlse: Tensor | None,
    request: Request,
    tangents: Some,
    moved: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The tangents of dq, dk and dv, and of the gradients of the wanted arrays.

    They come from those of do, q, k, v, o, lse and arrays, and from `moved` of dlse.
    """
    do, q, k, v, o, _ = given
    lie = _Lie.of(q, k, v, request)
    tdo, tq, tk, tv, to, tlse, *tarrays = tangents
    minus = None if moved is None else lie.statistic(moved)
    for one, other in ((tdo, o), (to, do)):
        if one is not None:
            turned = -(lie.rows(one) * lie.rows(other)).sum(-1, keepdim=True)
            minus = turned if minus is None else minus + turned
    ways = lie.rows, lie.statistic, lie.keys, lie.keys, lie.rows
    directions = lie.ways(ways, (tq, tlse, tk, tv, tdo, *tarrays))
    directions.insert(len(ways), minus)
    asked = tuple([wanted[entry.number] for entry in lie.softmax.entries])
    operands = (*lie.operands(given, dlse), *lie.extra(arrays))
    directions += [None] * (len(operands) - len(directions))
    tile = Gradients(lie.softmax, asked).pushed(_there(directions))
    dq, dk, dv, *entries = tile_sum(tile, lie.walk, *operands, *_present(directions))
    more = lie.as_arrays(entries, asked, arrays)
    return lie.as_rows(dq, q), lie.as_keys(dk, k), lie.as_keys(dv, v), *more


def _there(values: Some) -> tuple[bool, ...]:
    return tuple([value is not None for value in values])


def _present(values: Some) -> list[Tensor]:
    return [value for value in values if value is not None]


@dataclass(frozen=True, eq=False)
class _Lie:
    """How the arrays of a call lie, and how they lie in sums over tiles: see `tile_sum`."""

    problem: Problem
    axes: tuple[int, int, int, int]
    kind: torch.dtype
    walk: Walk
    softmax: Softmax

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, request: Request) -> _Lie:
        """That of a call with these tensors."""
        problem = describe(tuple(q.shape), tuple(k.shape), tuple(v.shape), dtype_of(q), request)
        axes, kind = LAYOUTS[request.layout], getattr(torch, STATISTICS[problem.dtype])
        return _Lie(problem, axes, kind, _walk(problem), _softmax(problem))

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

    def extra(self, arrays: Sequence[Tensor]) -> list[Tensor]:
        """The arguments of `Softmax`, from the arrays of a score and a seed."""
        found = self.entries(arrays)
        return [*_present(found), arrays[-1][None]] if self.problem.dropout else _present(found)

    def entries(self, arrays: Some) -> list[Tensor | None]:
        """What each entry reads, of arrays that may be None."""
        held = [
            None if x is None or not x.is_floating_point() else x.to(self.kind)[None]
            for x in arrays
        ]
        return [held[entry.number] for entry in self.softmax.entries]

    def ways(
        self, ways: Sequence[Callable[[Tensor], Tensor]], tangents: Some
    ) -> list[Tensor | None]:
        """Arrays beside the arguments, each in its way, and those of the entries."""
        usual, arrays = tangents[: len(ways)], tangents[len(ways) :]
        turned = [None if x is None else way(x) for way, x in zip(ways, usual, strict=True)]
        return [*turned, *self.entries(arrays)]

    def as_arrays(
        self, entries: Sequence[Tensor], asked: Sequence[bool], arrays: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """What arrays have, from what the entries that are asked for have: None without any."""
        found: list[Tensor | None] = [None] * len(arrays)
        left = iter(entries)
        for entry, here in zip(self.softmax.entries, asked, strict=True):
            if here:
                total, more = found[entry.number], next(left)[0]
                found[entry.number] = more if total is None else total + more
        return [
            None if total is None else total.to(x.dtype)
            for total, x in zip(found, arrays, strict=True)
        ]

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


_softmaxes: LruCache[Softmax] = LruCache(most=16, most_bytes=2**24)


def _softmax(problem: Problem) -> Softmax:
    """How the weights of a problem are made: kept, since derivatives are made of scores."""
    key = problem.scale, problem.score, problem.score_sizes, problem.dropout
    softmax = _softmaxes.get(key)
    if softmax is None:
        score = None
        if problem.score is not None:
            score = Modification(problem.score.expression(problem.score_sizes))
        softmax = _softmaxes.put(key, Softmax(problem.scale, score, problem.dropout), 0)
    return softmax
