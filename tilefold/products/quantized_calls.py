"""The public product with a quantised matrix, and how it takes NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.ma import MaskedArray
from numpy.typing import NDArray

from tilefold.backends.arrays.numpy import pointer, strides
from tilefold.backends.cpu import threads
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.guard import HERE
from tilefold.backends.cpu.matmul import quantized_calls as kernels
from tilefold.backends.cpu.matmul.quantized_calls import Matrix, Sizes
from tilefold.backends.cpu.matmul.quantized_integers import LONGEST, STEP
from tilefold.common.array_files import element_type
from tilefold.common.check import choice, flag
from tilefold.common.first_use import imported
from tilefold.common.foreign_arrays import compiled_by_torch, dtype_name, type_name
from tilefold.frontends import registry
from tilefold.frontends.numpy import as_array
from tilefold.problems.matmul import ACTIVATIONS
from tilefold.products.calls import first
from tilefold.products.places import Form, OverlapError, Place, check_single, overlap
from tilefold.products.plans import guard_of
from tilefold.products.quantized import QuantizedMatrix
from tilefold.products.repeated import REPEATED, Asked, Way
from tilefold.products.repeated import key as key_of_arrays

Array = NDArray[Any]

FLOATS = ("float32", "float16", "bfloat16")


_module = imported(import_module)


class Rows(NamedTuple):
    """An array without its elements, as kernels see it: type, address, two strides in elements."""

    dtype: str
    address: int
    down: int
    across: int


def qgemm(
    x: Any,
    w: QuantizedMatrix,
    *,
    bias: Any = None,
    activation: str | None = None,
    out: Any = None,
    out_dtype: Any = None,
    dynamic: bool = False,
) -> Any:
    """The product activation(x w + bias) with a quantised matrix, whose codes are read once.

    >>> import numpy as np
    >>> import tilefold
    >>> w = tilefold.quantize(np.eye(64, dtype=np.float32), "int8")
    >>> x = np.arange(128, dtype=np.float16).reshape(2, 64)
    >>> bool((tilefold.qgemm(x, w) == x).all())
    True

    The matrix is never made whole: codes are widened in registers. A product with few rows takes
    the time in which the codes are read.

    Arguments:
        x: (..., k), float32, float16 or bfloat16, of any strides. A NumPy array or a torch tensor
            where there are kernels, whose gradient is computed with the widened matrix
        w: a matrix of k inputs and n outputs, by `tilefold.quantize`
        bias: (n,), of the type of the result or float32
        activation: None, "relu", "gelu", "gelu_tanh", "silu", "sigmoid" or "tanh"
        out: an array (..., n) for the result, which is returned. It shares no memory with x or bias
        out_dtype: the type of the result: "float32", "float16" or "bfloat16", or the framework's
            own. None is the type of out, or of x
        dynamic: True rounds each row of x to 8 bits, -127 to 127 times a scale of its own, and sums
            integers exactly. w is "int8" without groups, of k a multiple of 16 up to 65536. Where
            torch wants a gradient, and in transforms of `torch.func`, x is not rounded

    Returns:
        The result, (..., n): `out`, or a new array of the framework of x. Sums are made in float32.
        The bits of a result do not depend on the number of threads

    Raises:
        TypeError: w is not quantised, or types do not fit together
        ValueError: shapes do not fit together, an unknown activation, out overlaps x or bias, or a
            matrix that no `dynamic` product takes
        NotImplementedError: arrays that no kernel takes
    """
    asked = dynamic, activation, out_dtype
    if (again := REPEATED.get(type(x))) is not None and type(w) is QuantizedMatrix:
        found = again(w.kept, x, None, None, bias, None, out, asked)
        if found is not None:
            return found
    if not isinstance(w, QuantizedMatrix):
        raise TypeError(f"w must be made by tilefold.quantize, got {type(w).__name__}")
    if activation is not None:
        choice("activation", activation, ACTIVATIONS)
    if flag("dynamic", dynamic):
        check_dynamic(w)
    given = {"x": x}
    if bias is not None:
        given["bias"] = bias
    if out is not None:
        given["out"] = out
    frontend = registry.find(**given).__name__.split(".")[2]
    wanted = None if out_dtype is None else type_name(out_dtype)
    if frontend == "torch":
        arguments = x, w, bias, activation, out, wanted, dynamic, asked
        if compiled_by_torch():
            first("quantized_torch")
            from tilefold.frontends.torch import outside

            return outside.quantized(*arguments)
        return _module("tilefold.products.quantized_torch").multiply(*arguments)
    if frontend != "numpy":
        raise NotImplementedError(
            f"qgemm has kernels for NumPy arrays and torch tensors, got a {frontend} array: pass"
            " numpy.asarray(x)"
        )
    return _multiply(x, w, bias, activation, out, wanted, dynamic, asked)


def check_dynamic(w: QuantizedMatrix) -> None:
    """Raises ValueError unless rows of integers can be multiplied with a matrix."""
    if not takes_integers(w.scheme, w.shape[0], w.group_size):
        raise ValueError(
            f"dynamic needs w of int8, without groups, of k a multiple of {STEP} up to {LONGEST},"
            f" got {w}"
        )


def takes_integers(scheme: str, k: int, group_size: int) -> bool:
    """True if rows of integers can be multiplied with such a matrix."""
    return scheme == "int8" and group_size == k and k % STEP == 0 and k <= LONGEST


def result_type(
    w: QuantizedMatrix, x: Any, bias: Any, out: Any, out_dtype: str | None
) -> tuple[tuple[int, ...], str]:
    """The shape and the type of a result. Raises unless the arrays fit together."""
    k, n = w.shape
    if dtype_name(x) not in FLOATS:
        raise TypeError(f"x must be one of {', '.join(FLOATS)}, got {dtype_name(x)}")
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be (..., {k}) for w of {k} x {n}, got {tuple(x.shape)}")
    shape = (*x.shape[:-1], n)
    dtype = out_dtype or (dtype_name(x) if out is None else dtype_name(out))
    choice("out_dtype" if out is None else "the type of out", dtype, FLOATS)
    if out is not None and (tuple(out.shape) != shape or dtype_name(out) != dtype):
        raise ValueError(
            f"out must be {dtype} of shape {shape}, got {dtype_name(out)} of {tuple(out.shape)}"
        )
    if bias is not None:
        if tuple(bias.shape) != (n,):
            raise ValueError(f"bias must be ({n},), got {tuple(bias.shape)}")
        if dtype_name(bias) not in ("float32", dtype):
            known = " or ".join(dict.fromkeys(("float32", dtype)))
            raise TypeError(f"bias must be {known}, got {dtype_name(bias)}")
    return shape, dtype


def prepared(
    w: QuantizedMatrix,
    m: int,
    bias: Rows | None,
    activation: str | None,
    out: Rows,
    dynamic: bool = False,
) -> kernels.Prepared:
    """The kernel of a product of m rows, made ready for a matrix and for such arrays."""
    lines = (out.dtype, out.down, out.across)
    added: tuple[str | None, int] = (bias.dtype, bias.across) if bias else (None, 0)
    device, workers = host(), threads.number()
    key = (m, *lines, *added, activation, dynamic, device, workers)
    found: kernels.Prepared | None = w.kept.get(key)
    if found is None:
        scales = None if w.scales is None else w.scales.dtype.name
        (k, n), group = w.shape, w.group_size
        sizes = Sizes(w.scheme, m, n, k, group, scales, *lines, *added, activation, dynamic)
        arrays = (w.codes, w.scales, w.zeros, w.table)
        places = Matrix(*[0 if array is None else pointer(array) for array in arrays])
        found = w.kept.put(key, kernels.prepare(sizes, places, device, workers), 0)
    return found


def product(
    x: Array,
    w: QuantizedMatrix,
    bias: Rows | None,
    activation: str | None,
    out: Rows,
    dynamic: bool = False,
) -> kernels.Prepared:
    """The product of float32 rows (m, k), written to `out`, which lies apart from all others.

    Returns what computed it.
    """
    ready = prepared(w, len(x), bias, activation, out, dynamic)
    rows = ready.arranged(x)
    ready.run(pointer(rows), out.address, bias.address if bias else 0)
    return ready


def remember(
    w: QuantizedMatrix,
    key: Hashable,
    ready: kernels.Prepared,
    shape: tuple[int, ...],
    dtype: Any,
    bias: Rows | None,
    out: Form | None,
    arrange: Callable[[Any], Any] | None,
) -> None:
    """Keep the way to a product under the key of its call, where this interpreter has ways.

    `shape` and `dtype` are those of the result, and `out` says how it lies if the caller gives it.
    `arrange` makes what kernels read of an x that they do not read where it lies.
    """
    if not HERE or (arrange is not None and out is not None):  # x might overlap it
        return
    k, n = w.shape
    forms = {"a": Form("float32", (math.prod(shape) // n, k), (k, 1))}
    if bias is not None:
        forms["bias"] = Form(bias.dtype, (n,), (bias.across,))
    if out is not None:
        forms["out"] = out
    guard = guard_of(ready.recorded, {name: Place.of(form) for name, form in forms.items()})
    w.kept.put(key, Way(guard, ready.recorded, shape, dtype, arrange), 0)


def _multiply(
    given: Any,
    w: QuantizedMatrix,
    bias: Any,
    activation: str | None,
    out: Any,
    wanted: str | None,
    dynamic: bool,
    asked: Asked,
) -> Array:
    """The product of NumPy arrays."""
    x = as_array("x", given)
    lines = None if bias is None else as_array("bias", bias)
    if out is not None and (not isinstance(out, np.ndarray) or isinstance(out, MaskedArray)):
        raise TypeError(f"out must be a NumPy array, got {type(out).__name__}")
    shape, dtype = result_type(w, x, lines, out, wanted)
    if out is not None:
        _check_written(out, {"x": x, "bias": lines})
    native = x.dtype if dtype == x.dtype.name else element_type(dtype)
    target = _lines(out, shape)
    made = np.empty((x.size // w.shape[0], w.shape[1]), native) if target is None else target
    if made.size:
        size = made.itemsize
        down, across = (step // size for step in made.strides)
        added = None
        if lines is not None:
            lines = np.ascontiguousarray(lines)
            added = Rows(lines.dtype.name, pointer(lines), 0, 1)
        written = Rows(dtype, pointer(made), down, across)
        ready = product(_rows(x, w.shape[0]), w, added, activation, written, dynamic)
        if x is given and lines is bias and (out is None or target is not None):
            form = None if out is None else Form(dtype, shape, strides("out", out))
            reads = ready.reads_rows and x.dtype == np.float32 and x.flags.c_contiguous
            arrange = None if reads else _arranging(ready)
            key = key_of_arrays(x, None, None, bias, None, out, asked)
            remember(w, key, ready, shape, native, added, form, arrange)
    if out is None:
        return made.reshape(shape)
    if target is None:
        out[...] = made.reshape(shape)
    return out


def _arranging(ready: kernels.Prepared) -> Callable[[Array], Array]:
    """What makes rows for kernels of an array."""
    return lambda x: ready.arranged(_rows(x, ready.k))


def _rows(x: Array, k: int) -> Array:
    """The rows of x, float32."""
    return x.reshape(-1, k).astype(np.float32, copy=False)


def _lines(out: Array | None, shape: tuple[int, ...]) -> Array | None:
    """A result as a view (rows, n); None where its strides do not allow one, or there is none."""
    if out is None or 0 in shape or any(step % out.itemsize for step in out.strides):
        return None
    if not out.flags.aligned or not out.dtype.isnative:
        return None
    view = out.reshape(-1, shape[-1])
    return view if np.shares_memory(view, out) else None


def _check_written(out: Array, read: dict[str, Array | None]) -> None:
    """Raises ValueError unless the result may be written, and lies apart from what is read."""
    if not out.flags.writeable:
        raise ValueError("out is written, so it must not be read-only")
    check_single(out.shape, out.strides, out.itemsize)
    for name, array in read.items():
        if array is not None and overlap(out, array):
            raise OverlapError(f"out must not overlap {name}")
