"""The functions of `protocols.Arrays` for NumPy arrays.

The items of the arrays are aligned and in native byte order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.problems import attention
from tilefold.problems.attention import ITEM_BYTES, Shape

Array = NDArray[Any]

# NumPy has no bfloat16: `attention.common_dtype` knows the type of ml_dtypes by its name.
NAMES = {np.dtype(name): name for name in ITEM_BYTES if name != "bfloat16"}


def layout_key(given: Sequence[Array]) -> tuple[Any, ...]:
    """Shapes, strides in bytes, and types."""
    return tuple([(array.shape, array.strides, array.dtype) for array in given])


def strides(name: str, array: Array) -> tuple[int, ...]:
    """The strides of an argument in elements.

    Raises ValueError if a stride is no multiple of the item size.

    >>> strides("q", np.zeros((2, 3), np.float32).T)
    (1, 3)
    """
    size = array.itemsize
    if any(
        step % size and length > 1 for length, step in zip(array.shape, array.strides, strict=True)
    ):
        raise ValueError(f"{name} must have strides of whole elements, got {array.strides} bytes")
    return tuple([step // size for step in array.strides])


def dtype_of(array: Array) -> str:
    """The name of an array's type."""
    name: str = array.dtype.name
    return name


def common_dtype(arrays: Mapping[str, Array]) -> str:
    """The one element type of all arrays. Raises TypeError."""
    dtypes = [array.dtype for array in arrays.values()]
    name = NAMES.get(dtypes[0])
    if name is not None and dtypes.count(dtypes[0]) == len(dtypes):
        return name
    names = {name: array.dtype.name for name, array in arrays.items()}
    for name, found in names.items():
        if found == "void16":
            raise TypeError(
                f"{name} must be an array whose type has a name, got two bytes without one; if they"
                " are bfloat16 elements, pass array.view(ml_dtypes.bfloat16)"
            )
    return attention.common_dtype(names)


def check_held(name: str, array: Array) -> None:
    """Nothing can be checked: an array of NumPy holds what it shows."""


def native_dtype(like: Array, dtype: str) -> np.dtype[Any]:
    """The type with this name; the array's own type if it has this name, such as bfloat16."""
    return like.dtype if like.dtype.name == dtype else np.dtype(dtype)


def empty(like: Array, wanted: Sequence[tuple[Shape, np.dtype[Any]]]) -> tuple[Array, ...]:
    """Arrays of shapes and types, whose elements are not set."""
    return tuple([np.empty(shape, dtype) for shape, dtype in wanted])


def packed(array: Array) -> Array:
    """The array if it is contiguous, else a contiguous copy."""
    return np.ascontiguousarray(array)


def is_packed(array: Array) -> bool:
    """True for a contiguous array."""
    return array.flags.c_contiguous


def is_writable(array: Array) -> bool:
    """False for an array that is read-only."""
    return array.flags.writeable


class _Interface(ctypes.Structure):
    """NumPy's description of an array for C, version 3 of its array interface."""

    _fields_ = (
        ("two", ctypes.c_int),
        ("nd", ctypes.c_int),
        ("typekind", ctypes.c_char),
        ("itemsize", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("data", ctypes.c_size_t),
    )


_described_at = ctypes.pythonapi.PyCapsule_GetPointer
_described_at.restype = ctypes.c_void_p
_described_at.argtypes = [ctypes.py_object, ctypes.c_void_p]


def pointer(array: Array) -> int:
    """The address of the first element, in half the time of `array.ctypes.data`."""
    capsule = array.__array_struct__
    found: int = _Interface.from_address(_described_at(capsule, None)).data
    return found
