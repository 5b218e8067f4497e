"""Checks of Keras on the backend that KERAS_BACKEND names. Importing it imports Keras."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from numpy.typing import NDArray

from tilefold.layers import exchange, tensors

Array = NDArray[Any]
RANDOM = np.random.default_rng(0)
BACKEND = keras.backend.backend()

MARKS = [
    pytest.mark.slow,
    # Keras 3.15 on torch asks NumPy 2 for arrays in the old way.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def normal(*shape: int, dtype: str = "float32") -> Array:
    return RANDOM.standard_normal(shape).astype(dtype)


def gradients(function: Callable[..., Any], *given: Array) -> list[Array]:
    """The value of a function of tensors, and the gradients of the sum of its squares."""
    if BACKEND == "torch":
        import torch

        leaves = [torch.tensor(x, requires_grad=True) for x in given]
        value = function(*leaves)
        found = torch.autograd.grad((value**2).sum(), leaves)
    elif BACKEND == "jax":
        import jax

        def loss(*leaves: Any) -> Any:
            value = function(*leaves)
            return (value**2).sum(), value

        arguments = tuple(range(len(given)))
        found, value = jax.jit(jax.grad(loss, arguments, has_aux=True))(*given)
    else:
        import tensorflow as tf

        leaves = [tf.constant(x) for x in given]
        with tf.GradientTape() as tape:
            tape.watch(leaves)
            value = function(*leaves)
            loss = tf.reduce_sum(value**2)
        found = tape.gradient(loss, leaves)
    return [ops.convert_to_numpy(x) for x in (value, *found)]


def assert_close(found: list[Array], wanted: list[Array], tolerance: float = 2e-5) -> None:
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == np.float32 and got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


class Seen(list[tensors.Hidden]):
    """What hides pairs in each call of Keras' function that runs here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr(exchange, "attend", self.attend)

    def attend(
        self, q: Any, k: Any, v: Any, hidden: tensors.Hidden, *more: Any, **options: Any
    ) -> Any:
        self.append(hidden)
        return tensors.attend(q, k, v, hidden, *more, **options)
