"""Results of JAX over disjoint keys, joined by its operations: of `merge`, and with sinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tilefold.problems.request import LAYOUTS


def joined(parts: Sequence[Array], lses: Sequence[Any], layout: str) -> tuple[Array, Array]:
    """o and lse of the keys of all parts, differentiable in every way.

    There may be more of `lses` than of `parts`: those belong to keys without values.
    """
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
        for part, share, hidden in zip(parts, weights / total, unseen, strict=False)
    )
    return jnp.asarray(o).transpose(axes).astype(parts[0].dtype), lse  # its own inverse


def with_sinks(o: Array, lse: Array, sinks: Array, *, layout: str) -> tuple[Array, Array]:
    """o and lse with sinks (heads, number), which are keys without values."""
    own = [sinks[None, :, None, number] for number in range(sinks.shape[1])]
    return joined([o], [lse, *own], layout)
