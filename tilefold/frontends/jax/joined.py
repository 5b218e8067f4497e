"""Results of JAX over disjoint keys, joined by its operations: of `merge`, and with sinks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tilefold.problems.request import LAYOUTS


def joined(parts: Sequence[Array], lses: Sequence[Any], layout: str) -> tuple[Array, Array]:
    """o and lse of the keys of all parts, differentiable in every way."""
    every = jnp.stack(jnp.broadcast_arrays(*lses))
    unseen = every == -jnp.inf
    nothing = unseen.all(0)
    top = jax.lax.stop_gradient(jnp.where(nothing, 0, every.max(0)))
    weights = jnp.where(unseen, 0, jnp.exp(jnp.where(unseen, top, every) - top))
    total = jnp.where(nothing, 1, weights.sum(0))
    lse = jnp.where(nothing, -jnp.inf, top + jnp.log(total))
    axes = LAYOUTS[layout]
    o = sum(
        jnp.where(hidden[..., None], 0, share[..., None] * part.transpose(axes).astype(lse.dtype))
        for part, share, hidden in zip(parts, weights / total, unseen, strict=True)
    )
    return jnp.asarray(o).transpose(axes).astype(parts[0].dtype), lse  # its own inverse


def with_sinks(
    o: Array, lse: Array, low: Array, sinks: Array, *, layout: str
) -> tuple[Array, Array, Array]:
    """o and lse with sinks (heads, number), which are keys without values.

    lse + low is the logarithm of a sum, in two floats; so are the second and the third result.
    Weights of large scores are exact by this: one float32 at 3e4 is off by 1e-3.
    """
    nothing = lse == -jnp.inf
    own = [sinks[None, :, None, number] for number in range(sinks.shape[1])]
    top = functools.reduce(jnp.maximum, own, lse)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    # Where nothing is seen, lse has no derivative: -inf - top would make it NaN.
    kept = jnp.where(nothing, 0, jnp.exp(jnp.where(nothing, top, lse) - top + low))
    total = functools.reduce(jnp.add, [jnp.exp(each - top) for each in own], kept)
    unseen = total == 0
    more = jnp.log(jnp.where(unseen, 1, total))
    sum_ = top + more
    axes = LAYOUTS[layout]
    share = (kept / jnp.where(unseen, 1, total))[..., None]
    o = (share * o.transpose(axes).astype(lse.dtype)).transpose(axes).astype(o.dtype)
    rest = jnp.where(unseen, 0, _rounded(top, more, sum_))
    return o, jnp.where(unseen, -jnp.inf, sum_), jax.lax.stop_gradient(rest)


def _rounded(x: Array, y: Array, total: Array) -> Array:
    """What rounding took from total = x + y, exactly; either may be the larger one."""
    part = total - x
    return (x - (total - part)) + (y - part)
