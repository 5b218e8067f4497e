"""Attention for JAX on the CPU: in `jit`, `grad`, `vmap`, `scan`, `shard_map`, and exported.

>>> import jax
>>> import tilefold.jax
>>> from tilefold import causal
>>> q = k = v = jax.random.normal(jax.random.key(0), (1, 4, 128, 64))
>>> step = jax.jit(lambda q, k, v: tilefold.jax.attention(q, k, v, mask=causal()))
>>> step(q, k, v).shape
(1, 4, 128, 64)

XLA calls the kernels without Python. What is computed stands in the compiled program as text, so
programs may be exported, and kept in JAX's cache on disk. A process that loads one must import this
module first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from jax import Array
from jax.export import DisabledSafetyCheck

from tilefold import api
from tilefold.frontends import xla
from tilefold.frontends.jax import handler, nn
from tilefold.frontends.jax.calls import as_jax
from tilefold.implementations import KERNEL
from tilefold.masks.position_rules import Rule, full
from tilefold.problems.keywords import without_unknown
from tilefold.scores.score import Score

__all__ = ["EXPORT_CHECKS", "attention", "attention_fn", "dot_product_attention"]

EXPORT_CHECKS = (DisabledSafetyCheck.custom_call(xla.TARGET),)
"""What `jax.export.export(..., disabled_checks=EXPORT_CHECKS)` must not check: it knows only XLA's
own calls. tilefold reads the text of a call of its own version, and refuses others in one line."""

handler.register()


@without_unknown
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Rule | None = None,
    scale: float | None = None,
    score: Score | Sequence[Score] | None = None,
    sinks: Any = None,
    dropout: float = api.NO_DROPOUT,
    seed: Any = None,
    layout: str = "bhnd",
    precision: str = "highest",
    return_lse: bool = False,
    return_max: bool = False,
    impl: str = KERNEL,
    **unknown: NoReturn,
) -> Any:
    """Exact attention of JAX arrays: `tilefold.attention`, whose arguments these are.

    >>> import jax, jax.numpy as jnp
    >>> import tilefold.jax
    >>> from tilefold import lengths
    >>> q = k = v = jnp.ones((2, 1, 3, 4))
    >>> padded = jax.jit(lambda n: tilefold.jax.attention(q, k, v, mask=lengths(n)))
    >>> padded(jnp.array([3, 1])).shape
    (2, 1, 3, 4)

    Arguments:
        q, k, v: JAX arrays, traced or not, or arrays that `jnp.asarray` takes; their axes are those
            of `tilefold.attention`
        mask: a rule. Its arrays may be traced: `lengths(n)`, `causal(lengths=n)` and
            `documents(ids)` of int32, and `dense(mask)` of bool. Tiles are then skipped for the
            positions alone
        score, sinks: their arrays may be traced, and have gradients
        scale: a number; it cannot be traced. Multiply q instead
        seed: an integer for dropout, which may be traced: `jax.random.bits(key)` makes one of a key
        impl: "kernel"; "composed", which is written in operations of JAX; or "native", which is
            `jax.nn.dot_product_attention`
        dropout, layout, precision, return_lse, return_max: see `tilefold.attention`

    Returns:
        JAX arrays: o, or (o, lse, max) as asked for. o and lse are differentiable any number of
        times, in forward and reverse mode. max has no gradient.

    Raises:
        TypeError, ValueError: see `tilefold.attention`
        NotImplementedError: the arrays are not on the CPU, or scale is traced

    In `jax.vmap` the mapped axis joins the batch, and one call computes all of it. With dropout
    there is a call for each entry, in a loop of XLA. In `jax.jit` arrays that are divided among
    devices are gathered first: `jax.shard_map` over batch or heads computes each part in its place.
    """
    q, k, v = (as_jax(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    return api.attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        score=score,
        sinks=sinks,
        dropout=dropout,
        seed=seed,
        layout=layout,
        precision=precision,
        return_lse=return_lse,
        return_max=return_max,
        impl=impl,
        **unknown,
    )


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: Any = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention` by tilefold's kernels: the same arguments and results.

    >>> import jax.numpy as jnp
    >>> import tilefold.jax
    >>> q = k = v = jnp.ones((2, 8, 4, 16))  # batch, length, heads, dim
    >>> tilefold.jax.dot_product_attention(q, k, v, is_causal=True).shape
    (2, 8, 4, 16)

    Arguments:
        query: (batch, queries, heads, dim), or without batch
        key, value: (batch, keys, key heads, dim); heads is a multiple of key heads
        bias: floats that broadcast to (batch, heads, queries, keys); it has a gradient
        mask: bool that broadcasts to the same; True is seen. It is read in each call, and its tiles
            are not skipped: `tilefold.jax.attention` takes rules, which say more
        scale: the factor of the scores; None means 1 / sqrt(dim)
        is_causal: query i sees the keys up to i
        query_seq_lengths, key_value_seq_lengths: int32 (batch,); later queries get 0, and later
            keys are hidden
        local_window_size: (left, right), or one number for both: query i sees the keys from
            i - left to i + right. What the window hides is skipped, unless it is traced
        implementation: None; "xla" and "cudnn" are those of jax.nn, which then computes the call
        return_residual: also return the log-sum-exp of each query's scores, (batch, queries, heads)

    Returns:
        o, of the shape and type of query. A query that sees no key gets the mean of all values, as
        in jax.nn.

    Raises:
        TypeError: the arrays are of no type of floats; jax.nn takes integers too
        ValueError: the arrays do not fit together
        NotImplementedError: the arrays are not on the CPU
    """
    options = {
        "scale": scale,
        "is_causal": is_causal,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "local_window_size": local_window_size,
        "return_residual": return_residual,
    }
    if implementation is not None:
        theirs: Any = jax.nn.dot_product_attention
        return theirs(query, key, value, bias, mask, implementation=implementation, **options)
    return nn.dot_product_attention(query, key, value, bias, mask, **options)


def attention_fn(
    mask: Rule | None = None, score: Score | Sequence[Score] | None = None
) -> Callable[..., Array]:
    """A function for the argument `attention_fn` of Flax's layers, of NNX and of Linen.

    >>> import tilefold.jax
    >>> from tilefold import causal, local
    >>> attend = tilefold.jax.attention_fn(mask=causal() & local(256))

    `nnx.MultiHeadAttention(..., attention_fn=attend)` then has this mask in every call, and tiles
    that it hides are skipped. What a layer passes itself is respected too: `mask`, `bias`,
    `is_causal`, and dropout with its key.

    Arguments:
        mask: a rule beside the layer's own mask; None means `full()`
        score: what becomes of the scaled scores before the softmax

    Each weight is dropped for itself: `broadcast_dropout` has no effect.
    """
    rules = full() if mask is None else mask

    def attend(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        is_causal: bool = False,
        module: Any = None,
        **others: Any,
    ) -> Array:
        if module is not None:
            raise NotImplementedError(
                "the weights are never stored, so there are none to sow: use sow_weights=False"
            )
        if dtype is not None:
            query, key, value = (x.astype(dtype) for x in (query, key, value))
        dropout = 0.0 if deterministic else dropout_rate
        return nn.layered(
            query, key, value, rules, score, bias, mask, is_causal, dropout, dropout_rng
        )

    return attend
