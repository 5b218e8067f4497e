"""The tiles of a call in operations of JAX: blocks of queries by blocks of keys, of all heads.

No array of len_q x len_k is kept, not even between a function and its derivatives: each tile is
computed again. Tiles that the mask hides are skipped. Sums are in the type of lse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from tilefold.frontends.jax.scores import Modification, dropped, visible
from tilefold.frontends.jax.varying import axes_of, zeros
from tilefold.masks.expression import Boolean
from tilefold.masks.runs import runs
from tilefold.problems.attention import STATISTICS, Problem, describe
from tilefold.problems.request import LAYOUTS, Request

BLOCK = 256
"""Queries and keys of a tile. With 128, 256 and 512 the second derivative of causal attention
(1, 8, 2048, 64) in float32 took 0.61, 0.51 and 1.08 s in forward over reverse mode, and 0.62, 0.54
and 0.55 s in reverse over reverse mode (two busy cores of a Xeon).
"""

Named = Mapping[str, Array]
Tree = Any
"""Arrays in lists, tuples and dictionaries."""


class Pairs(NamedTuple):
    """The pairs of a tile: their indices, and those that are hidden; all broadcast."""

    indices: Mapping[str, Array]
    hidden: Array


class Weights(NamedTuple):
    """P of a tile, dropout's factors, and the derivatives of F: by s, and by each entry."""

    p: Array
    z: Any
    slope: Any
    slopes: Sequence[Array]


@dataclass(frozen=True, eq=False)
class Call:
    """How the arrays of a call lie, and how they lie here: heads in groups that share keys."""

    problem: Problem
    axes: tuple[int, int, int, int]
    kind: Any
    score: Modification | None
    mask: Boolean
    data: Mapping[int, Array]

    @staticmethod
    def of(request: Request, named: Named) -> Call:
        """That of a call with these operands."""
        q, k, v = (named[name] for name in ("q", "k", "v"))
        problem = describe(q.shape, k.shape, v.shape, q.dtype.name, request)
        score = None
        if problem.score is not None:
            score = Modification(problem.score.expression(problem.score_sizes))
        mask = problem.mask.bind(problem.len_q, problem.len_k)
        kind = jnp.dtype(STATISTICS[problem.dtype])
        data = {int(name[4:]): x for name, x in named.items() if name.startswith("data")}
        return Call(problem, LAYOUTS[request.layout], kind, score, mask, data)

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

    def entry(self, place: int, array: Array, pairs: Pairs) -> Array:
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
        found = self.statistic(shift_of(named["lse"]))
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
        self, pairs: Pairs, q: Array, k: Array, arrays: Mapping[int, Array]
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
        pairs: Pairs,
        q: Array,
        k: Array,
        shift: Array,
        arrays: Mapping[int, Array],
        named: Named,
    ) -> Weights:
        """The weights of a tile, 0 for hidden pairs."""
        s, hidden, slope, slopes = self.scores(pairs, q, k, arrays)
        p = jnp.where(hidden, 0, jnp.exp(jnp.where(hidden, 0, s) - shift[..., None]))
        z: Any = 1.0
        if self.problem.dropout:
            z = dropped(named["seed"], self.problem.dropout, pairs.indices, self.kind)
        return Weights(p, z, slope, slopes)

    def walk(self, tile: Callable[[Pairs, Tree, Tree], Tree], rows: Tree, keys: Tree) -> Tree:
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
        seen = jnp.asarray(self._seen(in_rows, in_keys))
        number = jax.ShapeDtypeStruct((), jnp.int32)
        shapes = jax.eval_shape(one, number, number, _first(cut_rows), _first(cut_keys))
        varying = frozenset().union(*map(axes_of, jax.tree.leaves((rows, keys))))

        def nothing(tree: Tree, *more: int) -> Tree:
            return jax.tree.map(lambda x: zeros((*more, *x.shape), x.dtype, varying), tree)

        def column_of(j: Array, key: Tree, cut_rows: Tree) -> Tree:
            def step(total: Tree, given: Tree) -> Tree:
                i, row = given
                of_row, *others = jax.lax.cond(
                    seen[i, j], lambda: one(i, j, row, key), lambda: nothing(shapes)
                )
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

    def _seen(self, in_rows: int, in_keys: int) -> NDArray[np.bool_]:
        """The tiles of which a pair may be visible, in any head."""
        problem = self.problem
        found = runs(
            self.mask,
            parallel="q",
            batch=problem.batch,
            heads=problem.heads_q,
            len_parallel=problem.len_q,
            len_traverse=problem.len_k,
            block_parallel=in_rows,
            block_traverse=in_keys,
        )
        seen = np.zeros((max(1, found.block_rows), -(-problem.len_k // in_keys)), np.bool_)
        for row, (start, end) in enumerate(zip(found.rows, found.rows[1:], strict=False)):
            for first, last, _ in found.runs[start:end].tolist():
                seen[row % found.block_rows, first // in_keys : -(-last // in_keys)] = True
        return seen

    def pairs(self, q0: Any, k0: Any, in_rows: int, in_keys: int) -> Pairs:
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
        return Pairs(
            at, (k >= problem.len_k) | (q >= problem.len_q) | ~visible(self.mask, at, self.data)
        )


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


def shift_of(lse: Array) -> Array:
    """lse, and +inf for a query that sees no key: so all its weights are 0."""
    return jnp.where(lse == -jnp.inf, jnp.inf, lse)
