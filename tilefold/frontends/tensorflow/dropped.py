"""The factors of dropout in TensorFlow's operations: `problems.dropout` is their definition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import tensorflow as tf

from tilefold.problems.dropout import MULTIPLIERS, ROUNDS, WEYL, factor, threshold

Tensor = Any

_WORD = 0xFFFFFFFF


def factors(seed: Tensor, chance: float, indices: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The factors of pairs whose indices broadcast to the shape of `like`, in its type.

    The seed has shape (1,).
    """
    b, h, q, k = (tf.cast(indices[name], tf.uint64) for name in "bhqk")
    words = _philox((q, _high(k, 2), h, b), tf.bitcast(seed[0], tf.uint64), like.shape)
    place = tf.bitwise.bitwise_and(k, _number(3))
    word = reduce(
        lambda found, n: tf.where(place == _number(n), words[n], found), range(1, 4), words[0]
    )
    kept = word >= _number(threshold(chance))
    return tf.where(kept, tf.constant(factor(chance), like.dtype), tf.zeros((), like.dtype))


def _philox(counter: Sequence[Tensor], key: Tensor, sizes: Any) -> list[Tensor]:
    """The four words of a counter; a word of 32 bits lies in an integer of 64."""
    c0, c1, c2, c3 = (tf.broadcast_to(word, sizes) for word in counter)
    xor = tf.bitwise.bitwise_xor
    for number in range(ROUNDS):
        parts = zip((key, _high(key, 32)), WEYL, strict=True)
        k0, k1 = (_low(part + _number(number * step)) for part, step in parts)
        first, second = (x * _number(by) for x, by in zip((c0, c2), MULTIPLIERS, strict=True))
        c0, c1 = xor(xor(_high(second, 32), c1), k0), _low(second)
        c2, c3 = xor(xor(_high(first, 32), c3), k1), _low(first)
    return [c0, c1, c2, c3]


def _number(value: int) -> Tensor:
    return tf.constant(value, tf.uint64)


def _low(x: Tensor) -> Tensor:
    return tf.bitwise.bitwise_and(x, _number(_WORD))


def _high(x: Tensor, bits: int) -> Tensor:
    return tf.bitwise.right_shift(x, _number(bits))
