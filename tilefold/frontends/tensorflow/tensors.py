"""Calls of kernels on TensorFlow's tensors: eager, in tf.function, and in what XLA compiles.

Variables, and what TensorFlow converts to tensors, are read as tensors. What is known of shapes and
types while a function is traced is checked there; the rest when the graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import tensorflow as tf

from tilefold.backends.extra import NOTHING, Extra, rows_of
from tilefold.backends.protocols import BACKWARD, FORWARD_LOW, Pass, spoken
from tilefold.frontends import operation
from tilefold.frontends.numpy import as_array
from tilefold.frontends.operation import Holding, Operation, extended_request, taken
from tilefold.frontends.tensorflow import compiled, joined, library, operators, outside
from tilefold.frontends.tensorflow.pairs import statistics
from tilefold.problems.attention import STATISTICS, check_parts, common_dtype
from tilefold.problems.dropout import check_probability, check_seed
from tilefold.problems.request import Request

__all__ = [
    "PLAIN",
    "attention",
    "attention_backward",
    "chance_of",
    "extended_request",
    "merge",
    "request_of",
    "seed_of",
]

Tensor = Any

try:
    from tensorflow.python.framework.ops import EagerTensor

    PLAIN: tuple[type, ...] = (EagerTensor,)
except ImportError:  # TensorFlow has no public name for it, and a tensor would start its devices
    PLAIN = ()
"""Array types that always belong to this frontend."""

chance_of = check_probability
"""Makes a probability of an argument."""


def request_of(mask: Any, scale: Any, layout: Any, precision: Any) -> Request | Holding:
    """The request of a call, from its options. Raises for a scale that is traced or watched."""
    if isinstance(scale, (tf.Tensor, tf.Variable)) and without_value(tf.convert_to_tensor(scale)):
        raise NotImplementedError(
            "scale is traced or watched by TensorFlow, and a kernel holds it: multiply q by it and"
            " pass scale=1.0"
        )
    return operation.request_of(mask, scale, layout, precision)


def without_value(*tensors: Tensor) -> bool:
    """True if one of the tensors is traced by a graph or watched by a tape."""
    from tensorflow.python.eager import record

    traced = any(map(tf.is_symbolic_tensor, tensors))
    return traced or bool(record.should_record_backprop(tensors))


def seed_of(seed: Any, q: Tensor) -> Tensor:
    """The seed of dropout as kernels read it; one from TensorFlow's generator where it is None."""
    if seed is None:
        return tf.random.uniform((1,), maxval=tf.int64.max, dtype=tf.int64)
    if isinstance(seed, (tf.Tensor, tf.Variable)):
        shape = seed.shape
        if not seed.dtype.is_integer or (shape.is_fully_defined() and shape.num_elements() != 1):
            raise TypeError(
                f"seed must be one integer, got a tensor of {seed.dtype.name} of shape {shape}"
            )
        return tf.reshape(tf.cast(seed, tf.int64), (1,))
    return tf.constant([check_seed(seed)], tf.int64)


def attention(
    q: Any,
    k: Any,
    v: Any,
    request: Request | Holding,
    extra: Extra = NOTHING,
    further: tuple[str, ...] = (),
) -> tuple[Tensor, ...]:
    """Return o and lse, and `further` results of the pass; see `tilefold.attention`."""
    request, extra = taken(request, extra)
    given = tensors_of(q=q, k=k, v=v)
    wanted = FORWARD_LOW.plus(extra.names, further)
    given += extra_tensors(extra, given[0])
    o, lse, _, *more = run(wanted, request, given)
    return (o, lse, *[tf.stop_gradient(it) for it in more])


def attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    request: Request | Holding,
    dlse: Any = None,
    extra: Extra = NOTHING,
) -> tuple[Tensor, ...]:
    """Return dq, dk, dv, and the gradients of extra arrays; see `tilefold.attention_backward`."""
    request, extra = taken(request, extra)
    do, q, k, v, o = tensors_of(do=do, q=q, k=k, v=v, o=o)
    given = do, q, k, v, o, tf.convert_to_tensor(lse), *extra_tensors(extra, q)
    wanted = BACKWARD.plus(extra.names, extra.gradients)
    if dlse is not None:
        wanted, given = wanted.plus(("dlse",)), (*given, tf.convert_to_tensor(dlse))
    return extra.fitted(wanted, run(wanted, request, given), _like_sinks)


def _like_sinks(gradient: Tensor, sinks: Any) -> Tensor:
    return tf.cast(tf.reshape(gradient, sinks.shape), sinks.dtype)


def merge(o1: Any, lse1: Any, o2: Any, lse2: Any, layout: str) -> tuple[Tensor, Tensor]:
    """Return o and lse; see `tilefold.merge`."""
    given = {"o1": o1, "lse1": lse1, "o2": o2, "lse2": lse2}
    parts = {name: tf.convert_to_tensor(value) for name, value in given.items()}
    if all(tensor.shape.is_fully_defined() for tensor in parts.values()):
        shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
        check_parts(shapes, {name: it.dtype.name for name, it in parts.items()}, layout)
    o1, lse1, o2, lse2 = parts.values()
    return joined.joined(o1, lse1, o2, lse2, layout)


_FLOATS = frozenset(map(tf.as_dtype, STATISTICS))


def tensors_of(**given: Any) -> tuple[Tensor, ...]:
    """Arguments as tensors of one type of floats. Raises TypeError, and NotImplementedError."""
    tensors = tuple(
        [x if isinstance(x, tf.Tensor) else tf.convert_to_tensor(x) for x in given.values()]
    )
    kinds = [tensor.dtype for tensor in tensors]
    if kinds[0] not in _FLOATS or any(kind is not kinds[0] for kind in kinds):
        common_dtype({name: kind.name for name, kind in zip(given, kinds, strict=True)})
    if _has_gpu() and tf.executing_eagerly():
        for name, tensor in zip(given, tensors, strict=True):
            if "CPU" not in tensor.device:
                raise NotImplementedError(
                    f"{name} is on {tensor.device}, and there are kernels for TensorFlow's tensors"
                    f" on the CPU alone: call it with tf.device('CPU'), on tf.identity({name})"
                )
    return tensors


@lru_cache(maxsize=1)
def _has_gpu() -> bool:
    return bool(tf.config.list_physical_devices("GPU"))


def extra_tensors(extra: Extra, q: Tensor) -> tuple[Tensor, ...]:
    """The extra arrays as kernels read them: sinks are rows, in the type of lse.

    Nothing asks for the gradient of an array that is no tensor. A constant of a graph may be a
    small tensor that a tape watches: TensorFlow copies it into the graph.
    """
    found = []
    for name, array in zip(extra.names, extra.arrays, strict=True):
        is_tensor = isinstance(array, (tf.Tensor, tf.Variable))
        tensor = tf.convert_to_tensor(array if is_tensor else as_array(spoken(name), array))
        if name == "sinks":
            tensor = tf.cast(rows_of(tensor), statistics(q))
        found.append(tensor if is_tensor else tf.stop_gradient(tensor))
    return tuple(found)


def takes_operators() -> bool:
    """True where TensorFlow takes operators of ours: not in what XLA compiles."""
    return library.missing() is None and not compiled.is_compiled()


def run(wanted: Pass, request: Request, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of a pass: by an operator, by XLA, or by Python."""
    if not tf.executing_eagerly():
        _check(wanted, request, given)
    if compiled.is_compiled():
        return compiled.run(wanted, request, given)
    if library.missing():
        return outside.called(wanted, request, given)
    if wanted.operation == "forward":
        return operators.attention(wanted, request, given)
    return operators.backward(wanted, request, given)


def _check(wanted: Pass, request: Request, given: Sequence[Tensor]) -> None:
    """Raises TypeError or ValueError for tensors of a graph whose shapes are known."""
    if all(tensor.shape.is_fully_defined() for tensor in given):
        described = [(tuple(tensor.shape), tensor.dtype.name) for tensor in given]
        Operation(wanted, request).results(described)
