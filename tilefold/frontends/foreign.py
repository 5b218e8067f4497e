"""Objects that NumPy can view, and one line for each kind that it cannot.

JAX and TensorFlow have no frontend yet, so their arrays are viewed as any other object. What they
trace has no values, and what they differentiate would lose its gradients: both are refused. The
frameworks are looked up among the imported modules.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.common.check import one_line

Array = NDArray[Any]

_DLPACK_CPU = 1


def viewed(name: str, value: Any) -> Array:
    """A plain array that views an object of another type; bfloat16 of DLPack may be copied."""
    kind = type(value).__name__
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be an array without a mask of its own, got {kind}; pass its data, and"
            " what to hide as `mask`"
        )
    _refuse_traced(name, value)
    try:
        return _view(name, value, kind)
    except (NotImplementedError, TypeError):
        raise
    except Exception as error:  # of the object's own code
        raise TypeError(
            f"{name} must be an array that NumPy can view, got {kind}:"
            f" {one_line(error) or type(error).__name__}"
        ) from error


def _view(name: str, value: Any, kind: str) -> Array:
    if hasattr(value, "__array_interface__"):
        return np.asarray(value)
    if hasattr(value, "__cuda_array_interface__"):
        raise NotImplementedError(_elsewhere(name, kind, "a GPU"))
    if not hasattr(value, "__dlpack__"):
        raise TypeError(
            f"{name} must be a NumPy array, a torch tensor or an object with __dlpack__ or"
            f" __array_interface__, got {kind}{_ADVICE.get(kind, '').format(name=name)}"
        )
    device, _ = value.__dlpack_device__()
    if device != _DLPACK_CPU:
        raise NotImplementedError(_elsewhere(name, kind, f"DLPack device {int(device)}"))
    if "bfloat16" in str(getattr(value, "dtype", "")) and hasattr(value, "__array__"):
        try:
            return np.asarray(value)  # NumPy's DLPack knows no bfloat16, but the object does
        except TypeError:
            raise TypeError(
                f"{name} must be of a type that NumPy has, got a {kind} of bfloat16; pass it as"
                " float32, or as an array of ml_dtypes.bfloat16"
            ) from None
    try:
        return np.from_dlpack(value)
    except TypeError as error:
        raise ValueError(error) from error


_ADVICE = {
    "ResourceVariable": "; pass {name}.value()",
    "RaggedTensor": "; pass {name}.to_tensor(), and mask=tilefold.lengths({name}.row_lengths())",
}
"""The way from a class of another framework to an array, by the name of the class."""


def _refuse_traced(name: str, value: Any) -> None:
    """Raises NotImplementedError for what JAX or TensorFlow trace or differentiate."""
    if isinstance(value, getattr(sys.modules.get("jax.core"), "Tracer", ())):
        raise NotImplementedError(
            f"{name} is traced by JAX (jit, grad or vmap), and tilefold has no frontend for JAX"
            " yet: call it on arrays outside of the transformation, or in jax.pure_callback"
        )
    tensorflow = sys.modules.get("tensorflow")
    if not isinstance(value, getattr(tensorflow, "Tensor", ())):
        return
    symbolic = getattr(tensorflow, "is_symbolic_tensor", None)
    if symbolic and symbolic(value):
        raise NotImplementedError(
            f"{name} is traced by tf.function, and tilefold has no frontend for TensorFlow yet:"
            " call it on tensors outside of the function, or in tf.numpy_function"
        )
    records = getattr(
        sys.modules.get("tensorflow.python.eager.record"), "should_record_backprop", None
    )
    if records and records([value]):
        raise NotImplementedError(
            f"{name} is watched by a tf.GradientTape, and tilefold has no frontend for TensorFlow"
            f" yet: pass {name}.numpy(), and for its gradient wrap attention and attention_backward"
            " in tf.custom_gradient"
        )


def _elsewhere(name: str, kind: str, device: str) -> str:
    return (
        f"{name} is a {kind} on {device}, where only torch tensors have kernels so far; copy it to"
        " the CPU first, or make it a torch tensor (torch.from_dlpack)"
    )
