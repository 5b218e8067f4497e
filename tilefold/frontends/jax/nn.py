"""Attention with the meaning of `jax.nn.dot_product_attention`, whose masks are arrays.

A pair that is masked has there a large negative score, and not -inf. So a query that sees no key
has the mean of all values as its result, and this function gives it the same.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tilefold.backends.extra import taken_apart
from tilefold.common.check import shown
from tilefold.common.foreign_arrays import is_traced
from tilefold.frontends.jax import calls
from tilefold.frontends.jax.calls import as_jax
from tilefold.masks.data_rules import Dense, Lengths
from tilefold.masks.position_rules import Rule, causal, full, rule
from tilefold.masks.tables import given_table
from tilefold.scores.modifications import bias as bias_of
from tilefold.scores.score import Score, as_score

LARGE_NEGATIVE = -0.7 * float(np.finfo(np.float32).max)
"""The score of a masked pair in jax.nn."""


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    *,
    scale: Any,
    is_causal: bool,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
    local_window_size: int | tuple[int, int] | None,
    return_residual: bool,
) -> Any:
    """See `tilefold.jax.dot_product_attention`."""
    named = {"query": query, "key": key, "value": value}
    q, k, v = (_four(name, as_jax(name, x)) for name, x in named.items())
    shape = jnp.shape(query)
    _check(q, k, v)
    if bias is not None:
        bias = _fitting("bias", bias, q, k)
    if mask is not None:
        mask = _fitting("mask", mask, q, k)
        if mask.dtype != jnp.bool_:
            raise ValueError(f"mask dtype should be bool, but got {mask.dtype}")
    length_q = _lengths("query_seq_lengths", query_seq_lengths, k.shape[0])
    length_k = _lengths("key_value_seq_lengths", key_value_seq_lengths, k.shape[0])
    rules = full() if not is_causal else causal("start")
    if local_window_size is not None:
        sides = _sides(local_window_size)
        if any(map(is_traced, sides)):
            seen = _window(sides, jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1]))
            mask = seen[None, None] if mask is None else mask & seen
        else:
            rules = rules & window(sides)
    o, lse = attend(
        q, k, v, rules=rules, mask=mask, lengths=length_k, score=None, bias=bias, scale=scale
    )
    if length_q is not None:
        there = (jnp.arange(q.shape[1]) < length_q[:, None])[:, :, None]
        o = jnp.where(there[..., None], o, 0)
        lse = jnp.where(there, lse, LARGE_NEGATIVE)
    if not return_residual:
        return o.reshape(shape)
    return o.reshape(shape), jax.lax.stop_gradient(lse.astype(k.dtype)).reshape(shape[:-1])


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    rules: Rule,
    mask: Array | None = None,
    lengths: Array | None = None,
    score: Any = None,
    bias: Array | None = None,
    scale: Any = None,
    sinks: Any = None,
    dropout: float = 0.0,
    seed: Any = None,
) -> tuple[Array, Array]:
    """o and lse of arrays (batch, length, heads, dim); lse is (batch, length, heads).

    The mask and the numbers of keys are operands of the call. What they hide, and what the rules
    hide beside them, is masked as jax.nn does it.
    """
    if isinstance(scale, jax.Array):
        q, scale = (q * scale).astype(q.dtype), 1.0
    softly = mask is not None or lengths is not None or rules not in (full(), causal("start"))
    if mask is not None:
        rules = rules & Dense(given_table("mask", mask, "bool"))
    if lengths is not None:
        rules = rules & Lengths(given_table("lengths", lengths, "int32"))
    scores: list[Score | None] = [as_score(score)]
    if bias is not None:
        scores.append(bias_of(bias))
    request: Any = calls.request_of(rules, scale, "bnhd", "highest")
    drawn = calls.seed_of(seed, q) if dropout and not _is_words(seed) else seed
    extend: Any = calls.extended_request  # what holds a request passes as one does
    asked = [each for each in scores if each is not None] or None
    made, extra = taken_apart(request, asked, sinks, dropout, drawn, extend)
    o, lse = calls.attention(q, k, v, made, extra)
    lse = lse.swapaxes(1, 2)
    if softly and sinks is None:
        nothing = lse == -jnp.inf
        mean = v.mean(axis=1, keepdims=True, dtype=lse.dtype).astype(v.dtype)
        mean = jnp.repeat(mean, q.shape[2] // v.shape[2], axis=2)
        o = jnp.where(nothing[..., None], mean, o)
        lse = jnp.where(nothing, LARGE_NEGATIVE + math.log(max(1, k.shape[1])), lse)
    return o, lse


def words_of_key(key: Any) -> Array:
    """The seed of dropout of a key of `jax.random`, as two words. Raises ValueError for None."""
    if key is None:
        raise ValueError(
            "dropout_rng must be a key of jax.random where dropout_rate is above 0, got None"
        )
    return jax.random.bits(key, (2,), jnp.uint32)


def _is_words(seed: Any) -> bool:
    return getattr(seed, "shape", ()) == (2,)


def window(sides: tuple[Any, Any]) -> Rule:
    """The keys from `left` before a query to `right` after it, counted from the start of both."""
    left, right = map(operator.index, sides)
    return rule(lambda q, k: _window((left, right), q, k))


def _window(sides: tuple[Any, Any], q: Any, k: Any) -> Any:
    return (q - k <= sides[0]) & (k - q <= sides[1])


def _sides(size: Any) -> tuple[Any, Any]:
    """`left` and `right`, which may be traced. Raises TypeError for what is no integer."""
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(map(_is_integer, sides)):
        raise TypeError(
            f"local_window_size must be an integer, or two for left and right, got {shown(size)}"
        )
    return sides


def _is_integer(x: Any) -> bool:
    return isinstance(x, int) or (
        getattr(x, "shape", None) == () and jnp.issubdtype(x.dtype, jnp.integer)
    )


def _four(name: str, x: Array) -> Array:
    if x.ndim not in (3, 4):
        raise ValueError(
            f"{name} must have the axes (batch, length, heads, dim) or (length, heads, dim), got"
            f" shape {x.shape}"
        )
    return x[None] if x.ndim == 3 else x


def _check(q: Array, k: Array, v: Array) -> None:
    """Raises ValueError unless the arrays fit together as jax.nn asks for."""
    batch, _, heads, dim = k.shape
    if v.shape != k.shape:
        raise ValueError(f"value must have the shape of key, {k.shape}, got {v.shape}")
    if (q.shape[0], q.shape[3]) != (batch, dim):
        raise ValueError(
            f"query must have a batch of {batch} and a dim of {dim} as key has, got {q.shape}"
        )
    for name, x in (("query", q), ("value", v)):
        if x.dtype != k.dtype:
            raise ValueError(f"{name} must be of {k.dtype} as key is, got {x.dtype}")
    if q.shape[2] % max(1, heads):
        raise ValueError(
            f"the heads of query must be a multiple of those of key, {heads}, got {q.shape[2]}"
        )


def _fitting(name: str, x: Any, q: Array, k: Array) -> Array:
    """A bias or a mask with four axes. Raises ValueError unless it broadcasts to the pairs."""
    x = as_jax(name, x)
    x = x.reshape((1,) * (4 - x.ndim) + x.shape) if x.ndim < 4 else x
    wanted = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    if x.ndim != 4 or any(a not in (1, b) for a, b in zip(x.shape, wanted, strict=True)):
        raise ValueError(
            f"{name} must broadcast to (batch, heads, queries, keys) {wanted}, got {x.shape}"
        )
    return x


def _lengths(name: str, x: Any, batch: int) -> Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.shape != (batch,) or x.dtype != jnp.int32:
        raise ValueError(
            f"{name} must be int32 of shape ({batch},), one for each entry of the batch, got"
            f" {x.dtype} of shape {x.shape}: {shown(x)}"
        )
    return x


def layered(
    q: Array,
    k: Array,
    v: Array,
    rules: Rule,
    score: Any,
    bias: Array | None,
    mask: Array | None,
    is_causal: bool,
    dropout: float,
    key: Any,
) -> Array:
    """o of arrays (..., length, heads, dim) with any number of batch axes, as layers pass them."""
    batch = q.shape[:-3]
    q, k, v = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (q, k, v))
    pairs = q.shape[2], q.shape[1], k.shape[1]
    bias, mask = (None if x is None else _flat(x, batch, pairs) for x in (bias, mask))
    dropout = calls.chance_of(dropout)
    seed = words_of_key(key) if dropout else None
    o, _ = attend(
        q,
        k,
        v,
        rules=rules & causal("start") if is_causal else rules,
        mask=None if mask is None else mask.astype(bool),
        bias=bias,
        score=score,
        dropout=dropout,
        seed=seed,
    )
    return o.reshape(*batch, *o.shape[1:])


def _flat(x: Array, batch: tuple[int, ...], pairs: tuple[int, ...]) -> Array:
    """A mask or bias that broadcasts to (*batch, *pairs), with one axis for the batch."""
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    if all(size == 1 for size in x.shape[:-3]):
        return x.reshape(1, *x.shape[-3:])
    x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return x.reshape(math.prod(batch), *x.shape[-3:])
