"""What tests of TensorFlow share: the framework, imported late, and calls with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("tensorflow") is None, reason="TensorFlow is not installed"),
]
"""The marks of a file of such tests. The import of TensorFlow takes 5 s, so no file does it."""

Array = NDArray[Any]
Tensor = Any


def framework() -> ModuleType:
    """TensorFlow."""
    import tensorflow as tf

    module: ModuleType = tf
    return module


def with_gradients(
    call: Callable[..., Any], given: Sequence[Tensor], slopes: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Results of a call, and the gradients of sum(result * slope) with respect to what is given."""
    tf = framework()
    with tf.GradientTape() as tape:
        tape.watch(given)
        results = call(*given)
        every = results if isinstance(results, tuple) else (results,)
        loss = tf.add_n(
            [
                tf.reduce_sum(tf.cast(result * slope, tf.float64))
                for result, slope in zip(every, slopes, strict=False)
            ]
        )
    return list(every), tape.gradient(loss, given)


def arrays(*tensors: Tensor) -> list[Array]:
    """Tensors as arrays of float64."""
    return [np.asarray(tensor).astype(np.float64) for tensor in tensors]
