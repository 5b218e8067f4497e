"""Attention maps of TensorFlow tensors that have values, by NumPy's; they have no gradients."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tilefold.frontends.tensorflow.tensors import without_value
from tilefold.maps import numpy
from tilefold.maps.region import Asked

Tensor = Any


def key_mass(q: Any, k: Any, lse: Any, asked: Asked) -> Tensor:
    """See `tilefold.key_mass`."""
    q, k, lse = _values("key_mass", q, k, lse, asked)
    return tf.constant(numpy.key_mass(q, k, lse, asked))


def weights(q: Any, k: Any, lse: Any, rows: Any, columns: Any, asked: Asked) -> Tensor:
    """See `tilefold.weights`."""
    q, k, lse = _values("weights", q, k, lse, asked)
    return tf.constant(numpy.weights(q, k, lse, rows, columns, asked))


def _values(what: str, q: Any, k: Any, lse: Any, asked: Asked) -> list[Any]:
    """The tensors as arrays. Raises NotImplementedError where they have no values or a tape."""
    given = [None if x is None else tf.convert_to_tensor(x) for x in (q, k, lse)]
    every = [x for x in (*given, *asked.extra.arrays) if isinstance(x, tf.Tensor)]
    if without_value(*every):
        raise NotImplementedError(
            f"{what} has no derivatives, and is no part of a graph of TensorFlow: call it outside"
            " of tf.function, on tensors that no tf.GradientTape watches (tf.stop_gradient)"
        )
    return [None if x is None else x.numpy() for x in given]
