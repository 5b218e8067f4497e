"""Attention maps of JAX arrays that have values, by NumPy's; they have no gradients."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from tilefold.common.foreign_arrays import is_traced
from tilefold.maps import numpy
from tilefold.maps.region import Asked


def key_mass(q: Any, k: Any, lse: Any, asked: Asked) -> Array:
    """See `tilefold.key_mass`."""
    _check("key_mass", q, k, lse, asked)
    return jnp.asarray(numpy.key_mass(q, k, lse, asked))


def weights(q: Any, k: Any, lse: Any, rows: Any, columns: Any, asked: Asked) -> Array:
    """See `tilefold.weights`."""
    _check("weights", q, k, lse, asked)
    return jnp.asarray(numpy.weights(q, k, lse, rows, columns, asked))


def _check(what: str, *values: Any) -> None:
    """Raises NotImplementedError for arrays that are traced."""
    *arrays, asked = values
    if any(map(is_traced, (*arrays, *asked.extra.arrays))):
        raise NotImplementedError(
            f"{what} of arrays that JAX traces is not implemented: call it outside of jit, grad and"
            " vmap"
        )
