"""The mesh axes over which arrays vary in `jax.shard_map`, which JAX checks by default.

A primitive's operands must vary over the same axes, and its results vary over them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec


def axes_of(x: Any) -> frozenset[str]:
    """The manual mesh axes over which an array, or its type, varies."""
    kind = x if hasattr(x, "str_short") else jax.typeof(x)
    found = getattr(kind, "mat", None)
    axes: frozenset[str] = getattr(kind, "vma", frozenset()) if found is None else found.varying
    return axes


def alike(arrays: Sequence[Any]) -> list[Any]:
    """The arrays as operands of one primitive: all vary over the axes over which one of them does.

    Meshes of `AxisType.Explicit` have types that are divided outside of `jax.shard_map`; there each
    device gets the whole arrays.
    """
    undivided = [whole(x) for x in arrays]
    every = frozenset().union(*map(axes_of, undivided))
    return [_over(x, every) for x in undivided]


def whole(x: Any) -> Any:
    """An array of a type that is divided among devices, with all of it on each device."""
    place = jax.typeof(x).sharding
    if not any(place.spec):
        return x
    return jax.reshard(x, NamedSharding(place.mesh, PartitionSpec(*[None] * len(place.spec))))


def _over(x: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - axes_of(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def zeros(shape: tuple[int, ...], dtype: Any, axes: frozenset[str]) -> Array:
    """Zeros that vary over axes, as sums in a loop must from the beginning."""
    made: Array = _over(jnp.zeros(shape, dtype), axes)
    return made


def typed(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """The type of a result that varies as an operand of the type `like` does."""
    sharding = like.sharding.update(spec=PartitionSpec(*[None] * len(shape)))
    return like.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)
