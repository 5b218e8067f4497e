"""NumPy arrays, and whatever shares its memory with them, to Buffers and back.

An array is read where it lies, whatever its strides (negative and zero ones too), when it is in
native byte order, aligned to its items, and its strides are multiples of the item size. Any other
array is copied once. Objects that are not arrays but offer `__array_interface__` or `__dlpack__`
are viewed as arrays; results are NumPy arrays, contiguous in the layout of the call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold import engine
from tilefold.buffer import Buffer
from tilefold.mask import Rule
from tilefold.problem import (
    ITEM_BYTES,
    LAYOUTS,
    STATISTICS,
    check_layout,
    check_lse,
    check_shape,
    common_dtype,
    describe,
    shape_lse,
    shape_o,
)

Array = NDArray[Any]

# bfloat16 is no type of NumPy's own: `common_dtype` knows that of ml_dtypes by its name.
_NAMES = {np.dtype(name): name for name in ITEM_BYTES if name != "bfloat16"}
_DLPACK_CPU = 1


def attention(
    q: Any, k: Any, v: Any, mask: Rule, scale: float | None, layout: str
) -> tuple[Array, Array]:
    """Return o and lse; see `tilefold.attention`."""
    check_layout(layout)
    q, k, v = _array("q", q), _array("k", k), _array("v", v)
    dtype = _dtype(q=q, k=k, v=v)
    problem = describe(q.shape, k.shape, v.shape, dtype, scale, mask, layout)
    o = np.empty(shape_o(problem, layout), q.dtype.newbyteorder("="))
    lse = np.empty(shape_lse(problem), STATISTICS[dtype])
    if problem.empty:
        o.fill(0)
        lse.fill(-np.inf)
    else:
        axes = LAYOUTS[layout]
        q, k, v, into = (_buffer(array, dtype, axes) for array in (q, k, v, o))
        engine.forward(problem, q, k, v, into, _buffer(lse, STATISTICS[dtype], _LSE_AXES))
    return o, lse


def attention_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    mask: Rule,
    scale: float | None,
    layout: str,
) -> tuple[Array, Array, Array]:
    """Return dq, dk and dv; see `tilefold.attention_backward`."""
    check_layout(layout)
    do, q, k, v = _array("do", do), _array("q", q), _array("k", k), _array("v", v)
    o, lse = _array("o", o), _array("lse", lse)
    dtype = _dtype(q=q, k=k, v=v, do=do, o=o)
    check_lse(lse.dtype.name, dtype)
    problem = describe(q.shape, k.shape, v.shape, dtype, scale, mask, layout)
    check_shape("do", do.shape, shape_o(problem, layout))
    check_shape("o", o.shape, shape_o(problem, layout))
    check_shape("lse", lse.shape, shape_lse(problem))
    dq, dk, dv = (np.empty(array.shape, q.dtype.newbyteorder("=")) for array in (q, k, v))
    if problem.empty:
        for gradient in (dq, dk, dv):
            gradient.fill(0)
    else:
        axes = LAYOUTS[layout]
        do, q, k, v, o = (_buffer(array, dtype, axes) for array in (do, q, k, v, o))
        into = (_buffer(gradient, dtype, axes) for gradient in (dq, dk, dv))
        statistics = _buffer(lse, STATISTICS[dtype], _LSE_AXES)
        engine.backward(problem, do, q, k, v, o, statistics, *into)
    return dq, dk, dv


_LSE_AXES = (0, 1, 2)


def _array(name: str, value: Any) -> Array:
    """An argument as an array, without a copy."""
    if type(value) is np.ndarray:
        return value
    kind = type(value).__name__
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be an array without a mask of its own, got {kind}; pass its data, and"
            " what to hide as `mask`"
        )
    if hasattr(value, "__array_interface__"):
        return np.asarray(value)
    if hasattr(value, "__cuda_array_interface__"):
        raise NotImplementedError(_elsewhere(name, kind, "a GPU"))
    if not hasattr(value, "__dlpack__"):
        raise TypeError(
            f"{name} must be a NumPy array, a torch tensor or an object with __dlpack__ or"
            f" __array_interface__, got {kind}"
        )
    device, _ = value.__dlpack_device__()
    if device != _DLPACK_CPU:
        raise NotImplementedError(_elsewhere(name, kind, f"DLPack device {int(device)}"))
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be an array that NumPy can view, got {kind}: {error}"
        ) from error


def _elsewhere(name: str, kind: str, device: str) -> str:
    return (
        f"{name} is a {kind} on {device}, and only the CPU is implemented so far; copy it there"
        " first"
    )


def _dtype(**arrays: Array) -> str:
    """The one element type of all arrays. Raises TypeError."""
    dtypes = [array.dtype for array in arrays.values()]
    name = _NAMES.get(dtypes[0])
    if name is not None and dtypes.count(dtypes[0]) == len(dtypes):
        return name
    return common_dtype({name: array.dtype.name for name, array in arrays.items()})


def _buffer(array: Array, dtype: str, axes: tuple[int, ...]) -> Buffer:
    """An array's memory, or that of a copy; `axes` say where the canonical axes stand."""
    item = ITEM_BYTES[dtype]
    pointer = array.__array_interface__["data"][0]
    crooked = pointer
    for stride in array.strides:
        crooked |= stride
    if crooked & (item - 1) or not array.dtype.isnative:
        array = np.array(array, array.dtype.newbyteorder("="), order="C")
        pointer = array.__array_interface__["data"][0]
    shape, strides = array.shape, array.strides
    return Buffer(
        pointer,
        tuple([shape[axis] for axis in axes]),
        tuple([strides[axis] // item for axis in axes]),
        dtype,
        array,
    )
