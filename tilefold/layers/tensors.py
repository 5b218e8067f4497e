"""Tensors of Keras' backend, given to `tilefold.attention`: one row for each backend.

The class of a tensor chooses tilefold's frontend, so gradients and compiled graphs are those of the
framework. This file knows what differs: on which device a tensor lies, and how a seed is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from tilefold.api import attention
from tilefold.masks.data_rules import dense
from tilefold.masks.position_rules import Rule
from tilefold.problems.attention import STATISTICS
from tilefold.scores.modifications import bias
from tilefold.scores.score import Score

LAYOUT = "bnhd"
"""Keras' order of axes: (batch, sequence, heads, dim)."""


@dataclass(frozen=True)
class Hidden:
    """What hides pairs: a rule, and arrays of bool that broadcast to (batch, heads, q, k)."""

    rule: Rule | None = None
    masks: tuple[Any, ...] = ()


def attend(
    query: Any,
    key: Any,
    value: Any,
    hidden: Hidden,
    scores: Sequence[Score],
    **options: Any,
) -> Any:
    """Attention of (batch, sequence, heads, dim) tensors; further options as in `attention`."""
    rule, scores = hidden.rule, list(scores)
    for mask in hidden.masks:
        if _compiled_by_torch():  # rules with arrays are made outside of its graphs
            hide = ops.where(mask, 0.0, float("-inf"))
            scores.append(bias(ops.cast(hide, STATISTICS[dtype_of(query)])))
        else:
            seen = dense(mask)
            rule = seen if rule is None else rule & seen
    options = {name: option for name, option in options.items() if option is not None}
    score = scores or None
    return attention(query, key, value, mask=rule, score=score, layout=LAYOUT, **options)


def tensor_of(value: Any) -> Any:
    """A tensor of the backend, of an array or of a variable of Keras."""
    tensor = ops.convert_to_tensor(value)
    if isinstance(tensor, keras.Variable):  # TensorFlow takes it for a tensor
        import tensorflow

        tensor = tensorflow.convert_to_tensor(tensor.value)
    return tensor


def obstacle(*tensors: Any) -> str | None:
    """Why tilefold cannot compute on these tensors of the backend; None where it can.

    The reason is empty for tensors without numbers, by which a backend finds out shapes.
    """
    for tensor in tensors:
        if len(tensor.shape) != 4:
            return f"it takes tensors of 4 axes, got {len(tensor.shape)}"
        if dtype_of(tensor) not in STATISTICS:
            return f"it computes on {', '.join(STATISTICS)}, got {dtype_of(tensor)}"
        device = _DEVICES[keras.backend.backend()](tensor)
        if device == "meta":
            return ""
        if device != "cpu":
            return f"it serves Keras on processors, got a tensor on {device}"
    return None


def dtype_of(tensor: Any) -> str:
    """The name of the type of a tensor."""
    name: str = keras.backend.standardize_dtype(tensor.dtype)
    return name


def _torch_device(tensor: Any) -> str:
    kind: str = tensor.device.type
    return kind


def _jax_device(tensor: Any) -> str:
    import jax

    platform: str = jax.default_backend()  # a traced array does not say where it will be
    return platform


def _tensorflow_device(tensor: Any) -> str:
    import tensorflow

    if name := getattr(tensor, "device", ""):
        return tensorflow.DeviceSpec.from_string(name).device_type.lower()  # type: ignore[no-any-return]
    return "gpu" if tensorflow.config.list_logical_devices("GPU") else "cpu"


_DEVICES = {"torch": _torch_device, "jax": _jax_device, "tensorflow": _tensorflow_device}


def _compiled_by_torch() -> bool:
    if keras.backend.backend() != "torch":
        return False
    import torch

    return torch.compiler.is_compiling()


def drawn(generator: Any) -> Any:
    """The next seed of Keras' generator, an integer as the frontend of the backend takes it."""
    words = generator.next()  # of 32 bits: the seed, and how often it was drawn
    high, low = words[0], words[1]
    if keras.backend.backend() == "jax":  # it has integers of 32 bits: an odd factor tells draws
        return high + low * ops.cast(0x9E3779B1, low.dtype)
    if keras.backend.backend() == "torch":
        high, low = int(high), int(low)
    return high * 2**32 + low
