"""Objects that NumPy can view, and one line for each kind that it cannot.

What JAX and TensorFlow trace has no values, and what they differentiate would lose its gradients:
both are refused. The frameworks are looked up among the imported modules.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.common.check import one_line

Array = NDArray[Any]

Namespace = Any
"""What `__array_namespace__` returns, most often a module."""

_DLPACK_CPU = 1


def viewed(name: str, value: Any) -> Array:
    """A plain array that views an object of another type; bfloat16 of DLPack may be copied."""
    kind = type(value).__name__
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be an array without a mask of its own, got {kind}; pass its data, and"
            " what to hide in attention as `mask`"
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


def namespaces(**arrays: Any) -> dict[str, Namespace]:
    """The functions of the libraries of the arrays, by argument; NumPy's arrays are left out.

    A library is one that follows the array API standard. Raises TypeError for two of them.
    """
    found: dict[str, Namespace] = {}
    for name, array in arrays.items():
        if isinstance(array, np.ndarray) or not hasattr(array, "__array_namespace__"):
            continue
        namespace = array.__array_namespace__()
        if namespace is np:
            continue
        first = next(iter(found), name)
        if found.setdefault(first, namespace) is not namespace:
            raise TypeError(
                f"{name} must be a NumPy array or {_called(found[first])} as {first} is, got"
                f" {_called(namespace)}"
            )
        found[name] = namespace
    return found


def _called(namespace: Namespace) -> str:
    return f"an array of {getattr(namespace, '__name__', namespace)}"


def _view(name: str, value: Any, kind: str) -> Array:
    if hasattr(value, "__array_interface__"):
        return np.asarray(value)
    if hasattr(value, "__cuda_array_interface__"):
        raise NotImplementedError(_elsewhere(name, value, "a GPU"))
    if not hasattr(value, "__dlpack__"):
        raise TypeError(
            f"{name} must be a NumPy array, a torch tensor or an object with __dlpack__ or"
            f" __array_interface__, got {kind}{_ADVICE.get(kind, '').format(name=name)}"
        )
    device, _ = value.__dlpack_device__()
    if device != _DLPACK_CPU:
        raise NotImplementedError(_elsewhere(name, value, f"DLPack device {int(device)}"))
    if "bfloat16" in str(getattr(value, "dtype", "")) and hasattr(value, "__array__"):
        return _view_of_bfloat16(name, value, kind)
    try:
        return np.from_dlpack(value)
    except TypeError as error:
        raise ValueError(error) from error


def _view_of_bfloat16(name: str, value: Any, kind: str) -> Array:
    """NumPy's DLPack knows no bfloat16: the object makes the array, or gives its bits."""
    try:
        integers = getattr(namespaces(x=value).get("x"), "uint16", None)
        if integers is not None and hasattr(value, "view"):  # as MLX has it
            return np.from_dlpack(value.view(integers)).view("bfloat16")
        return np.asarray(value)
    except TypeError:
        raise TypeError(
            f"{name} must be of a type that NumPy has, got a {kind} of bfloat16; pass it as"
            " float32, or as an array of ml_dtypes.bfloat16"
        ) from None


_ADVICE = {
    "RaggedTensor": "; pass {name}.to_tensor(), and mask=tilefold.lengths({name}.row_lengths())",
}
"""The way from a class of another framework to an array, by the name of the class."""


def _refuse_traced(name: str, value: Any) -> None:
    """Raises NotImplementedError for what JAX or TensorFlow trace or differentiate."""
    if isinstance(value, getattr(sys.modules.get("jax.core"), "Tracer", ())):
        raise NotImplementedError(
            f"{name} is traced by JAX, and other arguments are no JAX arrays: make them some with"
            " jnp.asarray, or call tilefold.jax.attention"
        )
    tensorflow = sys.modules.get("tensorflow")
    if not isinstance(value, getattr(tensorflow, "Tensor", ())):
        return
    symbolic = getattr(tensorflow, "is_symbolic_tensor", None)
    records = getattr(
        sys.modules.get("tensorflow.python.eager.record"), "should_record_backprop", None
    )
    traced = symbolic and symbolic(value)
    if traced or (records and records([value])):
        reason = "traced by tf.function" if traced else "watched by a tf.GradientTape"
        raise NotImplementedError(
            f"{name} is {reason}, so q, k and v must be TensorFlow tensors too, got other arrays"
        )


def _elsewhere(name: str, value: Any, device: str) -> str:
    kind = type(value)
    advice = _COPIES.get(
        kind.__module__.partition(".")[0],
        "copy it to the CPU first, or make it a torch tensor (torch.from_dlpack)",
    )
    return (
        f"{name} is a {kind.__name__} on {device}, where only torch tensors have kernels so far;"
        f" {advice.format(name=name)}"
    )


_COPIES = {
    "cupy": "pass torch.from_dlpack({name}), or cupy.asnumpy({name}), a copy on the CPU",
    "mlx": "pass numpy.array({name}, copy=False), which shares its memory where MLX runs on Metal",
}
"""The way from an array on a GPU to one that has kernels, by the name of the library."""
