"""Calls where TensorFlow takes no operator of ours: Python runs them, by `tf.numpy_function`.

Such a call takes the interpreter lock, and a graph with it cannot be saved.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import tensorflow as tf

from tilefold.backends.cpu import native
from tilefold.backends.protocols import Pass
from tilefold.frontends.operation import Operation
from tilefold.frontends.tensorflow.library import missing
from tilefold.frontends.tensorflow.pairs import statistics
from tilefold.frontends.tensorflow.passes import differentiable
from tilefold.problems.request import Request

Tensor = Any

_RUN = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)


def called(wanted: Pass, request: Request, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of a pass that Python runs; they are differentiable."""
    _warn()
    return differentiable(_called, wanted, request, given)


@lru_cache(maxsize=1)
def _warn() -> None:
    warnings.warn(
        f"TensorFlow {tf.__version__} takes no operator of tilefold, so its calls go through Python"
        f" (tf.numpy_function), and graphs with them cannot be saved: {missing()}",
        RuntimeWarning,
        stacklevel=5,
    )


def _called(wanted: Pass, request: Request, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    operation = Operation(wanted, request)

    def run(*views: Any) -> list[Any]:
        arrays = [np.ascontiguousarray(view) for view in views]
        described = [(array.shape, array.dtype.name) for array in arrays]
        call = operation.native(described)
        arrays += [np.empty(shape, dtype) for shape, dtype in operation.results(described)]
        addresses = (ctypes.c_int64 * len(arrays))(*[array.ctypes.data for array in arrays])
        if _RUN(native.runner())(call.address, ctypes.addressof(addresses)):
            raise MemoryError("no memory is left for this call")
        return arrays[len(views) :]

    kinds = _kinds(wanted, given)
    results: list[Tensor] = tf.numpy_function(run, list(given), kinds, stateful=False)
    return tuple(results)


def _kinds(wanted: Pass, given: Sequence[Tensor]) -> list[tf.DType]:
    """The types of the results: those of q, of extra arrays, and of lse and the like."""
    named = dict(zip(wanted.given, given, strict=True))
    q = named["q"]
    known = {"lse": statistics(q), "lse_low": statistics(q), "max": statistics(q)}
    known |= {f"d{name}": tensor.dtype for name, tensor in named.items()}
    return [known.get(name, q.dtype) for name in wanted.results]
