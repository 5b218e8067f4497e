"""NumPy arrays, and whatever shares its memory with them, to Buffers and back.

An array is read where it lies, whatever its strides (negative and zero ones too), when it is in
native byte order, aligned to its items, and its strides are multiples of the item size. Any other
array is copied once. Objects that are not arrays but offer `__array_interface__` or `__dlpack__`
are viewed as arrays; results are NumPy arrays, contiguous in the layout of the call.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu import dispatch
from tilefold.masks.position_rules import Rule
from tilefold.problems.attention import (
    ITEM_BYTES,
    STATISTICS,
    check_layout,
    check_lse,
    check_parts,
    check_precision,
    check_shape,
    common_dtype,
    describe,
    shape_lse,
    shape_o,
)

Array = NDArray[Any]

PLAIN = (np.ndarray,)
"""Types of arrays that are of this frontend, whatever else they are."""

# bfloat16 is no type of NumPy's own: `common_dtype` knows that of ml_dtypes by its name.
_NAMES = {np.dtype(name): name for name in ITEM_BYTES if name != "bfloat16"}
_DLPACK_CPU = 1


def attention(
    q: Any, k: Any, v: Any, mask: Rule, scale: float | None, layout: str, precision: str
) -> tuple[Array, Array]:
    """Return o and lse; see `tilefold.attention`."""
    check_layout(layout)
    check_precision(precision)
    q, k, v = as_array("q", q), as_array("k", k), as_array("v", v)
    key = (
        "numpy forward",
        mask,
        scale,
        layout,
        precision,
        *_array_key(q),
        *_array_key(k),
        *_array_key(v),
    )
    call = dispatch.recent(key)
    if call is None:
        dtype = element_name(q=q, k=k, v=v)
        problem = describe(q.shape, k.shape, v.shape, dtype, scale, mask, layout, precision)
        if problem.empty:
            o = np.zeros(shape_o(problem, layout), q.dtype)
            return o, np.full(shape_lse(problem), -np.inf, STATISTICS[dtype])
        call = dispatch.keep(key, dispatch.forward(problem, layout, *map(_strides, (q, k, v))))
    shape, rows = call.results
    o, lse = np.empty(shape, q.dtype), np.empty(rows, STATISTICS[call.plan.problem.dtype])
    call.run(_pointer(q), _pointer(k), _pointer(v), _pointer(o), _pointer(lse))
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
    precision: str,
) -> tuple[Array, Array, Array]:
    """Return dq, dk and dv; see `tilefold.attention_backward`."""
    check_layout(layout)
    check_precision(precision)
    do, q, k, v = as_array("do", do), as_array("q", q), as_array("k", k), as_array("v", v)
    o, lse = as_array("o", o), as_array("lse", lse)
    given = do, q, k, v, o, lse
    key = (
        "numpy backward",
        mask,
        scale,
        layout,
        precision,
        *[_array_key(array) for array in given],
    )
    call = dispatch.recent(key)
    if call is None:
        dtype = element_name(q=q, k=k, v=v, do=do, o=o)
        check_lse(lse.dtype.name, dtype)
        problem = describe(q.shape, k.shape, v.shape, dtype, scale, mask, layout, precision)
        check_shape("do", do.shape, shape_o(problem, layout))
        check_shape("o", o.shape, shape_o(problem, layout))
        check_shape("lse", lse.shape, shape_lse(problem))
        if problem.empty:
            dq, dk, dv = (np.zeros(array.shape, q.dtype) for array in (q, k, v))
            return dq, dk, dv
        call = dispatch.keep(key, dispatch.backward(problem, layout, *map(_strides, given)))
    dq, dk, dv = (np.empty(shape, q.dtype) for shape in call.results)
    call.run(*[_pointer(array) for array in (*given, dq, dk, dv)])
    return dq, dk, dv


def merge(o1: Any, lse1: Any, o2: Any, lse2: Any, layout: str) -> tuple[Array, Array]:
    """Return o and lse; see `tilefold.merge`."""
    given = {"o1": o1, "lse1": lse1, "o2": o2, "lse2": lse2}
    arrays = {name: as_array(name, value) for name, value in given.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    dtypes = {name: array.dtype.name for name, array in arrays.items()}
    axes = check_parts(shapes, dtypes, layout)
    lses = np.stack((arrays["lse1"], arrays["lse2"]))
    unseen = lses == -np.inf
    nothing = unseen.all(axis=0)
    with np.errstate(invalid="ignore", under="ignore"):
        top = lses.max(axis=0)
        weights = np.exp(lses - np.where(nothing, 0, top))
        total = np.where(nothing, 1, weights.sum(axis=0))
        lse = np.where(nothing, -np.inf, top + np.log(total)).astype(lses.dtype)
        o = np.zeros(arrays["o1"].transpose(axes).shape, lses.dtype)
        for number, name in enumerate(("o1", "o2")):
            part = arrays[name].transpose(axes).astype(lses.dtype)
            share = (weights[number] / total)[..., None]
            o += np.where(unseen[number][..., None], 0, share * part)
    merged = np.ascontiguousarray(o.transpose(axes))  # each layout is its own inverse
    return merged.astype(arrays["o1"].dtype), lse


def as_array(name: str, value: Any) -> Array:
    """An argument as an array whose items are aligned and in native byte order."""
    array: Array = value if type(value) is np.ndarray else _viewed(name, value)
    if array.flags.aligned and array.dtype.isnative:
        return array
    return np.array(array, array.dtype.newbyteorder("="), order="C")


def _viewed(name: str, value: Any) -> Array:
    """What is no plain array as one, without a copy."""
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
        f"{name} is a {kind} on {device}, where only torch tensors have kernels so far; copy it to"
        " the CPU first, or make it a torch tensor (torch.from_dlpack)"
    )


def element_name(**arrays: Array) -> str:
    """The one element type of all arrays. Raises TypeError."""
    dtypes = [array.dtype for array in arrays.values()]
    name = _NAMES.get(dtypes[0])
    if name is not None and dtypes.count(dtypes[0]) == len(dtypes):
        return name
    names = {name: array.dtype.name for name, array in arrays.items()}
    for name, found in names.items():
        if found == "void16":
            raise TypeError(
                f"{name} must be an array whose type has a name, got two bytes without one; if they"
                " are bfloat16 numbers, pass array.view(ml_dtypes.bfloat16)"
            )
    return common_dtype(names)


def _array_key(array: Array) -> tuple[Any, ...]:
    """All of an array that a prepared call depends on."""
    return array.shape, array.strides, array.dtype


def _strides(array: Array) -> tuple[int, ...]:
    """In elements."""
    return tuple([stride // array.itemsize for stride in array.strides])


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


def _pointer(array: Array) -> int:
    """Where an array's first item lies; half the time of `array.ctypes.data`."""
    capsule = array.__array_struct__
    pointer: int = _Interface.from_address(_described_at(capsule, None)).data
    return pointer
