"""The public product of matrices, and how it takes NumPy arrays."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.arrays import numpy as arrays
from tilefold.common.check import flag
from tilefold.common.first_use import imported
from tilefold.common.foreign_arrays import type_name
from tilefold.frontends import registry
from tilefold.frontends.numpy import as_array
from tilefold.frontends.standard import given_back
from tilefold.products import plans, repeated
from tilefold.products.packed import PackedMatrix, packed
from tilefold.products.places import Form
from tilefold.products.plans import Options, Plan

Array = NDArray[Any]


@imported
def first(name: str) -> None:
    """Import a file of this folder; `torch.compile`, which traces it, keeps None as a constant."""
    import_module(f"tilefold.products.{name}")


def _torch() -> ModuleType:
    first("torch")
    from tilefold.products import torch

    return torch


def gemm(
    a: Any,
    b: Any,
    c: Any = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: Any = None,
    activation: str | None = None,
    gate: Any = None,
    out: Any = None,
    out_dtype: Any = None,
    precision: str = "highest",
) -> Any:
    """The matrix product activation(alpha op(a) op(b) + beta c + bias), in batches.

    >>> import numpy as np
    >>> import tilefold
    >>> x, w = np.ones((2, 3), np.float32), np.full((3, 4), 2, np.float32)
    >>> tilefold.gemm(x, w, bias=np.array([-9, 0, 1, 2], np.float32), activation="relu")
    array([[0., 6., 7., 8.],
           [0., 6., 7., 8.]], dtype=float32)

    Bias, activation and conversions of types cost no pass of their own. Nothing is copied for its
    strides or its type.

    Arguments:
        a: (..., m, k), or (..., k, m) with `transpose_a`; or a vector, (k,)
        b: (..., k, n), or (..., n, k) with `transpose_b`; or a vector, (k,); or what `pack` returns
            float32, float64, float16, bfloat16, int8 or uint8 each. Any axes of a batch come first,
            and broadcast as in NumPy. Axes of a vector are not in the result. Lengths may be 0
        c: an array that broadcasts to the result, of the type of the result or of the sums. It is
            read only where beta is not 0, and never written
        alpha, beta: numbers; whole ones where the result is int32
        transpose_a, transpose_b: True to transpose the last two axes; a vector has but one
        bias: (n,) or (..., 1, n) for columns, (..., m, 1) for rows, of the type of the result or of
            the sums. It is added as it is, not times alpha. Beside a vector b it is (m,)
        activation: None, "relu", "gelu" (by the distribution function), "gelu_tanh", "silu",
            "sigmoid" or "tanh"
        gate: of the shape and type of b, where beta is 0: the result is then
            activation(alpha op(a) op(b) + bias) * (alpha op(a) op(gate))
        out: an array for the result, which is returned. It may be c itself, and shares no memory
            with other operands
        out_dtype: the type of the result, by name or as the framework's own. None is the type of
            out, or of c, or the one that holds both a and b: float32 for two different halves, that
            of the floats beside integers, int32 for two types of integers
        precision: the least precision of products of float32 arrays, "highest", "high" or "medium";
            on processors all are computed as "highest"

    Returns:
        The result, (..., m, n): `out`, or a new array of the framework of the arguments. Sums are
        made in float32; in float64 if a or b is float64; in int32, which wraps around, if both are
        integers. The bits of a result do not depend on the number of threads

    Raises:
        TypeError: types that do not fit together, or arrays of different frameworks
        ValueError: shapes that do not fit together, options that are not allowed, or a result that
            overlaps an operand
        NotImplementedError: arrays that no kernel takes
    """
    asked = alpha, beta, transpose_a, transpose_b, activation, out_dtype, precision
    again = repeated.REPEATED.get(type(a))
    if again is not None and type(transpose_a) is type(transpose_b) is bool:  # 1 is refused
        found = again(repeated.WAYS, a, b, c, bias, gate, out, asked)
        if found is not None:
            return found
    more = {"c": c, "bias": bias, "gate": gate, "out": out}
    given = {"a": a, "b": b} | {name: x for name, x in more.items() if x is not None}
    dtype = None if out_dtype is None else type_name(out_dtype)
    options = Options.of(alpha, beta, transpose_a, transpose_b, activation, dtype, precision)
    frontend = _frontend({name: x for name, x in given.items() if type(x) is not PackedMatrix})
    if frontend == "numpy":
        return _multiply(given, options, repeated.key(a, b, c, bias, gate, out, asked))
    if frontend == "standard":
        return given_back((multiply(given, options),), **given)[0]
    return _torch().multiply(given, options, asked)


def _frontend(given: Mapping[str, Any]) -> str:
    """The name of the frontend of arrays. Raises NotImplementedError for one without products."""
    found = registry.find(**given).__name__.split(".")[2]
    if found not in ("numpy", "standard", "torch"):
        raise NotImplementedError(
            f"gemm has kernels for NumPy arrays and torch tensors, got a {found} array: pass"
            f" numpy.asarray({next(iter(given))})"
        )
    return found


def pack(w: Any, *, transpose: bool = False, a_dtype: Any = None) -> PackedMatrix:
    """A matrix in the order in which products read it, for many products with it as `b`.

    >>> import numpy as np
    >>> import tilefold
    >>> w = tilefold.pack(np.eye(3, dtype=np.float32))
    >>> w
    PackedMatrix(3 x 3, float32, 384 bytes)
    >>> tilefold.gemm(np.ones((2, 3), np.float32), w)
    array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)

    A product packs its `b` in each call, which takes long beside a product of few rows. For a
    matrix that stays, such as the weights of a layer, this is done once here.

    Arguments:
        w: (k, n), or (n, k) with `transpose`, of a type of `tilefold.gemm`; a NumPy array, or a
            torch tensor on the CPU, whose gradient is not wanted
        transpose: True for the transposed matrix
        a_dtype: the type of the `a` of these products, by name or as the framework's own; None is
            that of w. A matrix of integers for an `a` of floats is widened here

    Returns:
        packed: for `b` of `tilefold.gemm`, and for `gate` beside a packed `b`, of both frameworks.
            Later changes of w do not reach it. It is for products with an `a` of `a_dtype`, and of
            those types that are multiplied in the same way. It carries no gradients

    Raises:
        TypeError: a type that has no products
        ValueError: other than two axes, another `a_dtype`, or a tensor that wants a gradient
        NotImplementedError: a tensor that is not on the CPU
    """
    turned = flag("transpose", transpose)
    kind = None if a_dtype is None else type_name(a_dtype, "a_dtype")
    frontend = _frontend({"w": w})
    if frontend == "torch":
        form, address = _torch().matrix_of("w", w)
        return packed(form, address, turned, kind)
    array = as_array("w", w)
    return packed(_form("w", array), arrays.pointer(array), turned, kind)


def multiply(given: Mapping[str, Any], options: Options) -> Array:
    """The product of NumPy arrays, by the names of the arguments."""
    return _multiply(given, options, None)


def _multiply(given: Mapping[str, Any], options: Options, key: Hashable) -> Array:
    """The same; a call that a key describes is kept under it."""
    if "out" in given:
        _check_written(given["out"])
    held: dict[str, Any] = {}
    for name, x in given.items():
        held[name] = x if type(x) is PackedMatrix else as_array(name, x)
    forms = {name: _form(name, x) for name, x in held.items()}
    plan = plans.kept(tuple(forms.items()), options, lambda: forms)
    result = _run(plan, held)
    # `as_array` returns nothing but plain arrays as they are: a key never has another object.
    if key is not None and all(held[name] is x for name, x in given.items()):
        repeated.remember(key, plan, result.dtype)
    written: Array | None = given.get("out")
    return result if written is None else written


def _run(plan: Plan, held: Mapping[str, Any]) -> Array:
    """Run a plan on arrays that it fits."""
    at = {n: x.address if type(x) is PackedMatrix else arrays.pointer(x) for n, x in held.items()}
    out: Array | None = held.get("out")
    if out is None:
        out = np.empty(plan.shape, _native(plan.dtype, held))
        at["out"] = arrays.pointer(out)
    plan.run(at, at["out"])
    return out


def _arrays(given: Mapping[str, Any]) -> list[Array]:
    return [x for x in given.values() if isinstance(x, np.ndarray)]


def _check_written(out: Any) -> None:
    """Raises unless kernels can write an array."""
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out must be a NumPy array, got {type(out).__name__}")
    if not out.flags.writeable:
        raise ValueError("out is written, so it must not be read-only")
    odd = any(step % out.itemsize for step in out.strides)
    if odd or not out.flags.aligned or not out.dtype.isnative:
        raise ValueError(
            "out must be aligned, in native byte order, and with strides of whole elements"
        )


def _form(name: str, array: Any) -> Form:
    if isinstance(array, PackedMatrix):
        return array.form
    return Form(array.dtype.name, array.shape, arrays.strides(name, array))


_NATIVE = {name: np.dtype(name) for name in ("float32", "float64", "float16", "int32")}


def _native(dtype: str, held: Mapping[str, Any]) -> np.dtype[Any]:
    """NumPy's type with this name; bfloat16 is that of ml_dtypes, if the program has it."""
    if dtype in _NATIVE:
        return _NATIVE[dtype]
    for array in _arrays(held):
        if array.dtype.name == dtype:
            return array.dtype
    try:
        return np.dtype(dtype)
    except TypeError:
        raise TypeError(
            f"out_dtype is {dtype}, which NumPy has not by itself: import ml_dtypes before the call"
        ) from None
