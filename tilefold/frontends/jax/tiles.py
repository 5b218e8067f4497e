"""What no kernel computes, tile by tile: forward mode, and the backward pass to be differentiated.

Tiles are blocks of queries by blocks of keys, of all heads at once. No array of len_q x len_k is
kept, not even between a function and its derivatives: each tile is computed again. Sums are in the
type of lse. With S = F(scale Q K^T, E), where F is a modified score and E are entries of its
arrays, P = exp(S - lse), and dropout's factors Z:

    backward   dS = P (Z dO V^T - delta + dlse), G = dS dF/ds:
               scale G K, scale G^T Q, (Z P)^T dO, dS dF/dE
    forward    X = dF/ds scale (tQ K^T + Q tK^T) + dF/dE tE,  xi = rowsum(P X) + sum(P_sink tsink):
               tO = (Z P X) V + (Z P) tV - xi O, tlse = xi
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tilefold.frontends.jax.scores import Modification, dropped, visible
from tilefold.frontends.jax.varying import axes_of, zeros
from tilefold.problems.attention import STATISTICS, Problem, describe
from tilefold.problems.request import LAYOUTS, Request

BLOCK = 256
"""Queries and keys of a tile. It is not tuned."""

Named = Mapping[str, Array]
Tree = Any
"""Arrays in lists, tuples and dictionaries."""


def backward(request: Request, named: Named, results: Sequence[str]) -> list[Array]:
    """The results of a backward pass, of its operands by their names."""
    call = _Call.of(request, named)
    arrays = call.inputs(named)
    wanted = [number for number in arrays if f"dinput{number}" in results]
    minus = -(call.rows(named["do"]) * call.rows(named["o"])).sum(-1)
    if "dlse" in named:
        minus = minus + call.statistic(named["dlse"])

    def tile(pairs: _Pairs, row: Tree, key: Tree) -> Tree:
        q, do, shift, minus = row
        k, v = key
        found = call.weights(pairs, q, k, shift, arrays, named)
        dp = jnp.einsum("bhgqd,bhkd->bhgqk", do, v) * found.z
        ds = found.p * (dp + minus[..., None])
        g = ds * found.slope
        own = {
            number: sum(
                _scattered(call, pairs, arrays[number], place, ds * slope)
                for place, slope in enumerate(found.slopes)
                if call.score is not None and call.number(place) == number
            )
            for number in wanted
        }
        dq = call.problem.scale * jnp.einsum("bhgqk,bhkd->bhgqd", g, k)
        dk = call.problem.scale * jnp.einsum("bhgqk,bhgqd->bhkd", g, q)
        return dq, (dk, jnp.einsum("bhgqk,bhgqd->bhkd", found.p * found.z, do)), own

    rows = call.rows(named["q"]), call.rows(named["do"]), call.shift(named), minus
    dq, (dk, dv), own = call.walk(tile, rows, (call.keys(named["k"]), call.keys(named["v"])))
    made = {
        "dq": call.as_rows(dq, named["q"]),
        "dk": call.as_keys(dk, named["k"]),
        "dv": call.as_keys(dv, named["v"]),
        **{f"dinput{n}": total.astype(named[f"input{n}"].dtype) for n, total in own.items()},
    }
    if "dsinks" in results:
        found = call.of_sinks(named) * minus[..., None]
        made["dsinks"] = found.sum((0, 3)).reshape(named["sinks"].shape)
    return [made[name] for name in results]


def forward(request: Request, named: Named, moves: Named) -> tuple[Array, Array]:
    """The tangents of o and lse, from those of operands by their names."""
    call = _Call.of(request, named)
    arrays = call.inputs(named)
    moved = {n: moves[f"input{n}"].astype(call.kind) for n in arrays if f"input{n}" in moves}

    def tile(pairs: _Pairs, row: Tree, key: Tree) -> Tree:
        q, shift, *tq = row
        k, v, tk, tv = key
        found = call.weights(pairs, q, k, shift, arrays, named)
        x = jnp.zeros_like(found.p)
        for product in tq:
            x = x + call.problem.scale * jnp.einsum("bhgqd,bhkd->bhgqk", product, k)
        for product in tk:
            x = x + call.problem.scale * jnp.einsum("bhgqd,bhkd->bhgqk", q, product)
        x = x * found.slope
        for place, slope in enumerate(found.slopes):
            if call.number(place) in moved:
                x = x + slope * call.entry(place, moved[call.number(place)], pairs)
        px = found.p * x
        o = jnp.einsum("bhgqk,bhkd->bhgqd", px * found.z, v)
        for product in tv:
            o = o + jnp.einsum("bhgqk,bhkd->bhgqd", found.p * found.z, product)
        return (o, px.sum(-1)), (), ()

    def those(name: str, way: Callable[[Array], Array]) -> list[Array]:
        return [way(moves[name])] if name in moves else []

    rows = call.rows(named["q"]), call.shift(named), *those("q", call.rows)
    values = call.keys(named["k"]), call.keys(named["v"])
    keys = *values, those("k", call.keys), those("v", call.keys)
    (total, xi), _, _ = call.walk(tile, rows, keys)
    if "sinks" in moves:
        turned = moves["sinks"].reshape(1, *call.heads, 1, -1).astype(call.kind)
        xi = xi + (call.of_sinks(named) * turned).sum(-1)
    to = total - xi[..., None] * call.rows(named["o"])
    return call.as_rows(to, named["o"]), xi.reshape(named["lse"].shape)


def whole(request: Request, named: Named) -> tuple[Array, Array, Array]:
    """o, lse and the largest score, of all pairs at once."""
    call = _Call.of(request, named)
    problem = call.problem
    pairs = call.pairs(0, 0, problem.len_q, problem.len_k)
    q, k, v = call.rows(named["q"]), call.keys(named["k"]), call.keys(named["v"])
    s, hidden, _, _ = call.scores(pairs, q, k, call.inputs(named))
    s = jnp.where(hidden, -jnp.inf, s)
    largest = s.max(-1, initial=-jnp.inf)
    if problem.sinks:
        sinks = named["sinks"].reshape(1, *call.heads, 1, -1).astype(call.kind)
        s = jnp.concatenate((s, jnp.broadcast_to(sinks, (*s.shape[:-1], problem.sinks))), -1)
    nothing = (s == -jnp.inf).all(-1)
    top = jax.lax.stop_gradient(jnp.where(nothing, 0, s.max(-1, initial=-jnp.inf)))
    p = jnp.where(s == -jnp.inf, 0, jnp.exp(jnp.where(s == -jnp.inf, 0, s - top[..., None])))
    total = jnp.where(nothing, 1, p.sum(-1))
    lse = jnp.where(nothing, -jnp.inf, top + jnp.log(total))
    p = p[..., : problem.len_k] / total[..., None]
    if problem.dropout:
        p = p * dropped(named["seed"], problem.dropout, pairs.indices, call.kind)
    o = jnp.einsum("bhgqk,bhkd->bhgqd", p, v)
    rows = problem.batch, problem.heads_q, problem.len_q
    return call.as_rows(o, named["q"]), lse.reshape(rows), largest.reshape(rows)


def shown(request: Request, named: Named) -> Array:
    """The pairs that a mask shows, (batch, heads, queries, keys)."""
    call = _Call.of(request, named)
    problem = call.problem
    hidden = call.pairs(0, 0, problem.len_q, problem.len_k).hidden
    sizes = problem.batch, *call.heads, problem.len_q, problem.len_k
    return ~jnp.broadcast_to(hidden, sizes).reshape(sizes[0], problem.heads_q, *sizes[3:])


def gradient_of_sinks(
    do: Array, o: Array, lse: Array, dlse: Array | None, sinks: Array, layout: str
) -> Array:
    """dsinks: -exp(sinks - lse) (delta - dlse), summed over batch and queries."""
    axes, kind = LAYOUTS[layout], lse.dtype
    delta = (do.transpose(axes).astype(kind) * o.transpose(axes).astype(kind)).sum(-1)
    delta = delta if dlse is None else delta - dlse
    share = jnp.exp(sinks[:, None] - _shift(lse)[..., None])
    return -(share * delta[..., None]).sum((0, 2))


def _shift(lse: Array) -> Array:
    """lse, and +inf for a query that sees no key: so all its weights are 0."""
    return jnp.where(lse == -jnp.inf, jnp.inf, lse)


class _Pairs(NamedTuple):
    """The pairs of a tile: their indices, and those that are hidden; all broadcast."""

    indices: Mapping[str, Array]
    hidden: Array


class _Weights(NamedTuple):
    """P of a tile, dropout's factors, and the derivatives of F: by s, and by each entry."""

    p: Array
    z: Any
    slope: Any
    slopes: Sequence[Array]


@dataclass(frozen=True, eq=False)
class _Call:
    """How the arrays of a call lie, and how they lie here: heads in groups that share keys."""

    problem: Problem
    axes: tuple[int, int, int, int]
    kind: Any
    score: Modification | None
    mask: Callable[[Mapping[str, Array]], Array]

    @staticmethod
    def of(request: Request, named: Named) -> _Call:
        """That of a call with these operands."""
        q, k, v = (named[name] for name in ("q", "k", "v"))
        problem = describe(q.shape, k.shape, v.shape, q.dtype.name, request)
        score = None
        if problem.score is not None:
            score = Modification(problem.score.expression(problem.score_sizes))
        mask = problem.mask.bind(problem.len_q, problem.len_k)
        kind = jnp.dtype(STATISTICS[problem.dtype])
        data = {int(name[4:]): x for name, x in named.items() if name.startswith("data")}
        return _Call(
            problem, LAYOUTS[request.layout], kind, score, lambda at: visible(mask, at, data)
        )

    @property
    def heads(self) -> tuple[int, int]:
        """Heads of keys, and heads of queries that share one."""
        problem = self.problem
        return problem.heads_kv, problem.heads_q // max(1, problem.heads_kv)

    def inputs(self, named: Named) -> dict[int, Array]:
        """The arrays of the score, by number."""
        given = self.problem.score.inputs if self.problem.score else ()
        return {each.number: named[each.name].astype(self.kind) for each in given}

    def number(self, place: int) -> int:
        """The number of the array that the score reads at a place."""
        assert self.score is not None
        table: Any = self.score.lookups[place].table
        return int(table.number)

    def entry(self, place: int, array: Array, pairs: _Pairs) -> Array:
        """What pairs read of an array at a place of the score."""
        assert self.score is not None
        return self.score.entry(place, array, pairs.indices)

    def rows(self, x: Array) -> Array:
        """An array like q."""
        x = x.transpose(self.axes).astype(self.kind)
        return x.reshape(x.shape[0], *self.heads, *x.shape[2:])

    def keys(self, x: Array) -> Array:
        """An array like k."""
        return x.transpose(self.axes).astype(self.kind)

    def statistic(self, x: Array) -> Array:
        """An array like lse."""
        return x.reshape(x.shape[0], *self.heads, x.shape[2])

    def shift(self, named: Named) -> Array:
        """What is subtracted from scores."""
        found = self.statistic(_shift(named["lse"]))
        low = named.get("lse_low")
        return found if low is None else found + self.statistic(low)

    def of_sinks(self, named: Named) -> Array:
        """The weights of sinks (batch, heads, group, queries, number)."""
        sinks = named["sinks"].reshape(1, *self.heads, 1, -1)
        return jnp.exp(sinks - self.shift(named)[..., None])

    def as_rows(self, x: Array, like: Array) -> Array:
        """The inverse of `rows`."""
        x = x.reshape(x.shape[0], self.problem.heads_q, *x.shape[3:])
        return x.transpose(self.axes).astype(like.dtype)

    def as_keys(self, x: Array, like: Array) -> Array:
        """The inverse of `keys`."""
        return x.transpose(self.axes).astype(like.dtype)

    def scores(
        self, pairs: _Pairs, q: Array, k: Array, arrays: Mapping[int, Array]
    ) -> tuple[Array, Array, Any, Sequence[Array]]:
        """The scores of pairs, which of them are hidden, and the derivatives of F."""
        s = self.problem.scale * jnp.einsum("bhgqd,bhkd->bhgqk", q, k)
        hidden = jnp.broadcast_to(pairs.hidden, s.shape)
        if self.score is None:
            return s, hidden, 1.0, []
        read = self.score.read(arrays, pairs.indices)
        plain_s, plain_read = jax.lax.stop_gradient((s, read))
        unseen = self.score.value(plain_s, plain_read, pairs.indices)
        hidden = hidden | (unseen == -jnp.inf)
        s, slope, slopes = self.score.both(s, read, pairs.indices, hidden)
        return s, hidden, slope, slopes

    def weights(
        self,
        pairs: _Pairs,
        q: Array,
        k: Array,
        shift: Array,
        arrays: Mapping[int, Array],
        named: Named,
    ) -> _Weights:
        """The weights of a tile, 0 for hidden pairs."""
        s, hidden, slope, slopes = self.scores(pairs, q, k, arrays)
        p = jnp.where(hidden, 0, jnp.exp(jnp.where(hidden, 0, s) - shift[..., None]))
        z: Any = 1.0
        if self.problem.dropout:
            z = dropped(named["seed"], self.problem.dropout, pairs.indices, self.kind)
        return _Weights(p, z, slope, slopes)

    def walk(self, tile: Callable[[_Pairs, Tree, Tree], Tree], rows: Tree, keys: Tree) -> Tree:
        """The sums of a function's results over all tiles.

        Its results are those of queries, which are summed over keys; those of keys, which are
        summed over queries; and those of arrays, which are summed over both.
        """
        len_q, len_k = self.problem.len_q, self.problem.len_k
        in_rows, in_keys = max(1, min(BLOCK, len_q)), max(1, min(BLOCK, len_k))
        cut_rows = jax.tree.map(lambda x: _cut(x, 3, in_rows), rows)
        cut_keys = jax.tree.map(lambda x: _cut(x, 2, in_keys), keys)

        def tile_of(i: Array, j: Array, row: Tree, key: Tree) -> Tree:
            return tile(self.pairs(i * in_rows, j * in_keys, in_rows, in_keys), row, key)

        one: Any = jax.checkpoint(tile_of)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        shapes = jax.eval_shape(one, number, number, _first(cut_rows), _first(cut_keys))
        varying = frozenset().union(*map(axes_of, jax.tree.leaves((rows, keys))))

        def nothing(tree: Tree, *more: int) -> Tree:
            return jax.tree.map(lambda x: zeros((*more, *x.shape), x.dtype, varying), tree)

        def column_of(j: Array, key: Tree, cut_rows: Tree) -> Tree:
            def step(total: Tree, given: Tree) -> Tree:
                i, row = given
                of_row, *others = one(i, j, row, key)
                return _sum(total, others), of_row

            return jax.lax.scan(step, nothing([*shapes[1:]]), (_count(cut_rows), cut_rows))

        column: Any = jax.checkpoint(column_of)

        def step(total: Tree, given: Tree) -> Tree:
            (of_key, of_arrays), of_rows = column(*given, cut_rows)
            return _sum(total, (of_rows, of_arrays)), of_key

        blocks = len(_count(cut_rows))
        start = nothing(shapes[0], blocks), nothing(shapes[2])
        (of_rows, of_arrays), of_keys = jax.lax.scan(step, start, (_count(cut_keys), cut_keys))
        return (
            jax.tree.map(lambda x: _joined(x, 3, len_q), of_rows),
            jax.tree.map(lambda x: _joined(x, 2, len_k), of_keys),
            of_arrays,
        )

    def pairs(self, q0: Any, k0: Any, in_rows: int, in_keys: int) -> _Pairs:
        """The pairs of a tile that begins at a query and a key."""
        problem = self.problem
        heads = jnp.arange(problem.heads_q, dtype=jnp.int32).reshape(1, *self.heads, 1, 1)
        q = (q0 + jnp.arange(in_rows, dtype=jnp.int32))[:, None]
        k = k0 + jnp.arange(in_keys, dtype=jnp.int32)
        at = {
            "b": jnp.arange(problem.batch, dtype=jnp.int32).reshape(-1, 1, 1, 1, 1),
            "h": heads,
            "q": jnp.minimum(q, problem.len_q - 1),
            "k": jnp.minimum(k, problem.len_k - 1),
        }
        return _Pairs(at, (k >= problem.len_k) | (q >= problem.len_q) | ~self.mask(at))


def _scattered(call: _Call, pairs: _Pairs, array: Array, place: int, change: Array) -> Array:
    """An array of 0 with the changes of pairs added to the entries that they read at a place."""
    read = call.entry(place, array, pairs)
    _, pull = jax.vjp(lambda x: jnp.broadcast_to(call.entry(place, x, pairs), change.shape), array)
    assert read.dtype == change.dtype
    (found,) = pull(change)
    return found


def _cut(x: Array, axis: int, size: int) -> Array:
    """Blocks of an axis, as the first axis; the last block ends with 0."""
    blocks = -(-x.shape[axis] // size)
    around = [(0, 0)] * x.ndim
    around[axis] = (0, blocks * size - x.shape[axis])
    x = jnp.pad(x, around)
    x = x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _joined(x: Array, axis: int, length: int) -> Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def _first(blocks: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), blocks)


def _count(tree: Tree) -> Array:
    return jnp.arange(len(jax.tree.leaves(tree)[0]), dtype=jnp.int32)


def _sum(left: Tree, right: Tree) -> Tree:
    return jax.tree.map(jnp.add, left, right)
