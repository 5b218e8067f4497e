"""Results over disjoint keys, joined by TensorFlow's operations."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tilefold.problems.request import LAYOUTS

Tensor = Any


def joined(
    o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor, layout: str
) -> tuple[Tensor, Tensor]:
    """o and lse of the keys of both parts, differentiable in every way."""
    nowhere = tf.constant(float("-inf"), lse1.dtype)
    every = tf.stack((lse1, lse2))
    unseen = every == nowhere
    nothing = tf.reduce_all(unseen, axis=0)
    top = tf.where(nothing, 0.0, tf.stop_gradient(tf.reduce_max(every, axis=0)))
    weights = tf.exp(every - top)
    total = tf.where(nothing, 1.0, tf.reduce_sum(weights, axis=0))
    lse = tf.where(nothing, nowhere, top + tf.math.log(total))
    axes = LAYOUTS[layout]
    shares = [
        share[..., None]
        * tf.where(hidden[..., None], 0.0, tf.cast(tf.transpose(o, axes), lse.dtype))
        for o, share, hidden in zip(
            (o1, o2), tf.unstack(weights / total), tf.unstack(unseen), strict=True
        )
    ]
    return tf.cast(tf.transpose(shares[0] + shares[1], axes), o1.dtype), lse
