"""Attention and its gradients in plain NumPy: the definition that everything is tested against.

It is dense and computes one (batch, head) at a time, in float64 by default. With `dtype=np.float32`
it is attention in basic operations, the baseline of accuracy and speed. `tiled` is the forward pass
of FlashAttention (Dao et al., 2022, arXiv:2205.14135, Algorithm 1): it reads one tile of keys after
the other and updates a running maximum and a running sum of each query.

The values of a masked pair never matter: products run over the visible keys of each query, so a NaN
in a key reaches exactly the queries that see it. Visible pairs follow IEEE arithmetic: a query gets
NaN if all of its scores are -inf or one of them is +inf. A query that sees no key has o = 0,
lse = -inf and gradients 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from tilefold.masks.derivative import derivatives
from tilefold.masks.evaluate import exact_real
from tilefold.masks.expression import FromInteger
from tilefold.masks.position_rules import Rule
from tilefold.masks.tables import Input
from tilefold.problems.attention import default_scale
from tilefold.scores.score import Sizes, as_score

Array = NDArray[Any]


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    mask: Rule | None = None,
    scale: float | None = None,
    score: Any = None,
    sinks: ArrayLike | None = None,
    keep: ArrayLike | None = None,
    dtype: DTypeLike = np.float64,
) -> tuple[Array, Array]:
    """Dense attention: o = softmax(scale q k^T) v over the visible keys, and lse, its log-sum-exp.

    >>> o, lse = attention(np.zeros((1, 1, 2, 3)), np.zeros((1, 1, 4, 3)), np.ones((1, 1, 4, 5)))
    >>> o.shape, lse.round(3).tolist()
    ((1, 1, 2, 5), [[[1.386, 1.386]]])

    q is (batch, heads_q, len_q, dim), k (batch, heads_kv, len_k, dim), v (batch, heads_kv, len_k,
    dim_v); o comes back as (batch, heads_q, len_q, dim_v) and lse as (batch, heads_q, len_q), both
    of type `dtype`. All computations are done in `dtype`. `score` is as in `tilefold.attention`; a
    modification is computed in float64. `sinks` are (heads_q, number of sinks). `keep`, (batch,
    heads_q, len_q, len_k), is the factor of each weight after its row was normalised: with dropout
    it is 0 or 1 / (1 - p).
    """
    q, k, v = (np.asarray(array, dtype) for array in (q, k, v))
    scale = default_scale(q.shape[3]) if scale is None else scale
    modified = Modified(score, q, k)
    o = np.zeros((*q.shape[:3], v.shape[3]), dtype)
    lse = np.zeros(q.shape[:3], dtype)
    with np.errstate(all="ignore"):
        for at, at_kv, visible in _heads(q, k, mask):
            s = modified.scores(at, scale * (q[at] @ k[at_kv].T))
            visible = visible & modified.shown(s)
            s = np.where(visible, s, -np.inf)
            m = _row_max(s)
            sunk = np.zeros(0, dtype) if sinks is None else np.asarray(sinks, dtype)[at[1]]
            m = _shift(np.maximum(m, sunk.max(initial=-np.inf)))
            p = np.where(visible, np.exp(s - m[:, None]), 0)
            total = p.sum(axis=1) + np.exp(sunk - m[:, None]).sum(axis=1)
            seen = np.count_nonzero(visible, axis=1) > 0
            total[seen & (total == 0)] = np.nan  # only scores of -inf: 0 / 0
            weights = p if keep is None else p * np.asarray(keep, dtype)[at]
            mean = _product(weights, visible, v[at_kv]) / total[:, None]
            o[at] = np.where(seen[:, None], mean, 0)
            lse[at] = m + np.log(total)
    return o, lse


def largest(
    q: ArrayLike,
    k: ArrayLike,
    mask: Rule | None = None,
    scale: float | None = None,
    score: Any = None,
) -> Array:
    """The largest score of each query, (batch, heads_q, len_q): -inf where it sees no key.

    >>> largest(np.ones((1, 1, 2, 4)), np.ones((1, 1, 3, 4)))
    array([[[2., 2.]]])
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    scale = default_scale(q.shape[3]) if scale is None else scale
    modified = Modified(score, q, k)
    found = np.zeros(q.shape[:3])
    with np.errstate(all="ignore"):
        for at, at_kv, visible in _heads(q, k, mask):
            s = modified.scores(at, scale * (q[at] @ k[at_kv].T))
            found[at] = _row_max(np.where(visible, s, -np.inf))
    return found


def attention_backward(
    do: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    o: ArrayLike,
    lse: ArrayLike,
    *,
    mask: Rule | None = None,
    scale: float | None = None,
    score: Any = None,
    sinks: ArrayLike | None = None,
    keep: ArrayLike | None = None,
    dlse: ArrayLike | None = None,
    dtype: DTypeLike = np.float64,
) -> tuple[Array, ...]:
    """The gradients dq, dk, dv of sum(do * o), from the inputs and results of the forward pass.

    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 1, 4, 8))
    >>> dq, dk, dv = attention_backward(np.ones_like(v), q, k, v, *attention(q, k, v))
    >>> dq.shape, bool(np.isclose(dv.sum(), 4 * 8))
    ((1, 1, 4, 8), True)

    Each gradient has the shape of its input. The shapes are as in `attention`. The gradients of the
    arrays that a score reads follow, in order of appearance, and then that of sinks. With `dlse`
    they are the gradients of sum(do * o) + sum(dlse * lse).
    """
    do, q, k, v, o, lse = (np.asarray(array, dtype) for array in (do, q, k, v, o, lse))
    scale = default_scale(q.shape[3]) if scale is None else scale
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    modified = Modified(score, q, k)
    dsinks = None if sinks is None else np.zeros_like(np.asarray(sinks, dtype))
    with np.errstate(all="ignore"):
        for at, at_kv, visible in _heads(q, k, mask):
            natural = scale * (q[at] @ k[at_kv].T)
            s = modified.scores(at, natural)
            visible = visible & modified.shown(s)
            p = np.where(visible, np.exp(s - lse[at][:, None]), 0)
            kept = np.ones_like(p) if keep is None else np.asarray(keep, dtype)[at]
            dp = kept * (do[at] @ v[at_kv].T)
            delta = (do[at] * o[at]).sum(axis=1)
            if dlse is not None:
                delta = delta - np.asarray(dlse, dtype)[at]
            ds = np.where(visible, p * (dp - delta[:, None]), 0)
            modified.add(at, natural, ds)
            ds = np.where(visible, ds * modified.slopes(at, natural), 0)
            dq[at] = scale * _product(ds, visible, k[at_kv])
            dk[at_kv] += scale * _product(ds.T, visible.T, q[at])
            dv[at_kv] += _product((p * kept).T, visible.T, do[at])
            if dsinks is not None:
                sunk = np.exp(np.asarray(sinks, dtype)[at[1]] - lse[at][:, None])
                dsinks[at[1]] -= (sunk * delta[:, None]).sum(axis=0)
    more = [] if dsinks is None else [dsinks]
    return (dq, dk, dv, *modified.gradients, *more)


class Modified:
    """A score at the sizes of a problem: its values, slopes, and the gradients of its arrays."""

    def __init__(self, score: Any, q: Array, k: Array) -> None:
        given = as_score(score)
        batch, heads, len_q, _ = q.shape
        self._sizes = Sizes(batch, heads, len_q, k.shape[2])
        self._score = None if given is None else given.form.score.expression(self._sizes)
        arrays = () if given is None else given.form.arrays
        self._arrays = {
            number: np.asarray(array.detach() if hasattr(array, "detach") else array)
            for number, array in enumerate(arrays)
        }
        self.gradients = [np.zeros(array.shape) for array in self._arrays.values()]

    def scores(self, at: tuple[int, int], natural: Array) -> Array:
        """The modified scores of a head, from scaled products."""
        return natural if self._score is None else self._exact(self._score, at, natural)

    def shown(self, s: Array) -> Any:
        """Which scores do not hide their pair; all where nothing is modified."""
        return True if self._score is None else s != -np.inf

    def slopes(self, at: tuple[int, int], natural: Array) -> Any:
        """The derivatives of the scores of a head."""
        if self._score is None:
            return 1
        return self._exact(derivatives(self._score).score, at, natural)

    def add(self, at: tuple[int, int], natural: Array, ds: Array) -> None:
        """Add the gradients of a head to those of the arrays."""
        for entry, slope in () if self._score is None else derivatives(self._score).entries:
            if isinstance(entry.table, Input):
                change = np.where(ds == 0, 0, ds * self._exact(slope, at, natural))
                places = [self._exact(FromInteger(i), at, natural) for i in entry.indices]
                gradient = self.gradients[entry.table.number]
                at_least_one_axis = gradient.reshape(gradient.shape or (1,))
                index = tuple([place.astype(int) for place in places]) or np.zeros_like(change, int)
                np.add.at(at_least_one_axis, index, change)

    def _exact(self, expression: Any, at: tuple[int, int], natural: Array) -> Array:
        q, k = np.ogrid[: natural.shape[0], : natural.shape[1]]
        made = exact_real(expression, natural, b=at[0], h=at[1], q=q, k=k, inputs=self._arrays)
        return made.astype(natural.dtype)


def tiled(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    mask: Rule | None = None,
    scale: float | None = None,
    memory: int = 16384,
    dtype: DTypeLike = np.float64,
) -> tuple[Array, Array, Array]:
    """FlashAttention's forward pass: o, the normaliser l and the row maximum m; lse = m + log(l).

    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 40, 8))
    >>> o, normaliser, m = tiled(q, k, v, memory=512)
    >>> expected_o, expected_lse = attention(q, k, v)
    >>> np.allclose(o, expected_o), np.allclose(m + np.log(normaliser), expected_lse)
    (True, True)

    The arguments are as in `attention`. l and m are (batch, heads_q, len_q). `memory` is the
    paper's M, the number of elements that fast memory holds: a block of keys has ceil(M / 4 dim)
    rows, and a block of queries has as many, but at most dim.
    """
    q, k, v = (np.asarray(array, dtype) for array in (q, k, v))
    scale = default_scale(q.shape[3]) if scale is None else scale
    block_k = math.ceil(memory / (4 * q.shape[3]))
    block_q = min(block_k, q.shape[3])
    o = np.zeros((*q.shape[:3], v.shape[3]), dtype)
    total = np.zeros(q.shape[:3], dtype)
    m = np.full(q.shape[:3], -np.inf, dtype)
    with np.errstate(all="ignore"):
        for at, at_kv, visible in _heads(q, k, mask):
            for first_k in range(0, k.shape[2], block_k):
                keys = slice(first_k, first_k + block_k)
                for first_q in range(0, q.shape[2], block_q):
                    rows = slice(first_q, first_q + block_q)
                    tile = visible[rows, keys]
                    s = np.where(tile, scale * (q[at][rows] @ k[at_kv][keys].T), -np.inf)
                    old = o[at][rows], total[at][rows], m[at][rows]
                    new = _fold_tile(*old, s, tile, v[at_kv][keys])
                    o[at][rows], total[at][rows], m[at][rows] = new
            lost = (np.count_nonzero(visible, axis=1) > 0) & (
                total[at] == 0
            )  # only scores of -inf: 0 / 0
            o[at][lost] = total[at][lost] = np.nan
    return o, total, m


def _fold_tile(
    o: Array, total: Array, m: Array, s: Array, visible: Array, v: Array
) -> tuple[Array, Array, Array]:
    """The running output, normaliser and maximum after one more tile of scores."""
    m_new = np.maximum(m, _row_max(s))
    p = np.where(visible, np.exp(s - _shift(m_new)[:, None]), 0)
    kept = total * np.exp(m - _shift(m_new))
    total_new = kept + p.sum(axis=1)
    o_new = (kept[:, None] * o + _product(p, visible, v)) / total_new[:, None]
    return np.where(total_new[:, None] == 0, o, o_new), total_new, m_new


def _heads(
    q: Array, k: Array, mask: Rule | None
) -> Iterator[tuple[tuple[int, int], tuple[int, int], Array]]:
    """The index of every query head, the index of its key head, and its visible pairs."""
    batch, heads_q, len_q, _ = q.shape
    heads_kv, len_k = k.shape[1:3]
    visible = np.ones((1, 1), bool) if mask is None else mask.to_dense(len_q, len_k, batch, heads_q)
    visible = np.broadcast_to(visible, (batch, heads_q, len_q, len_k))
    for b in range(batch):
        for h in range(heads_q):
            yield (b, h), (b, h // (heads_q // heads_kv)), visible[b, h]


def _row_max(s: Array) -> Array:
    maximum: Array = np.max(s, axis=1, initial=-np.inf)
    return maximum


def _shift(m: Array) -> Array:
    """The value that is subtracted from a row's scores: its maximum, or 0 if all are -inf."""
    return np.where(m == -np.inf, np.zeros_like(m), m)


def _product(weights: Array, visible: Array, values: Array) -> Array:
    """`weights @ values` over visible pairs only: other weights are 0, but 0 * NaN is NaN."""
    if np.isfinite(values).all():
        return weights @ values
    result = np.zeros((weights.shape[0], values.shape[1]), weights.dtype)
    for i, seen in enumerate(visible):
        result[i] = weights[i, seen] @ values[seen]
    return result
