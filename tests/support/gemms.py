"""The product of `tilefold.gemm` in float64, and how near to it a result must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from compare import UNITS, assert_near
from numpy.typing import NDArray
from product_cases import activate

import tilefold
from tilefold.problems.matmul import INTEGERS

Array = NDArray[Any]

SLOPE = 1.13
"""The largest factor by which an activation increases an error."""

RANDOM = np.random.default_rng(7)


def sigmoid(x: Array) -> Array:
    """The logistic function, without overflow."""
    return np.array(0.5 * (1 + np.tanh(0.5 * x)))


ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: activate("gelu", x),
    "gelu_tanh": lambda x: x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "silu": lambda x: x * sigmoid(x),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
}


def normal(*shape: int, dtype: str = "float32") -> Array:
    """Random numbers; whole ones of all sizes for types of integers."""
    if dtype in INTEGERS or dtype == "int32":
        lowest, highest = (0, 256) if dtype == "uint8" else (-128, 128)
        return RANDOM.integers(lowest, highest, shape).astype(dtype)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return RANDOM.normal(size=shape).astype(kind)


def turned(array: Array, yes: bool) -> Array:
    """The transposed matrices of an array of at least two axes."""
    return array.swapaxes(-1, -2) if yes and array.ndim > 1 else array


def exact(
    a: Array,
    b: Array,
    c: Array | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: Array | None = None,
    activation: str | None = None,
    gate: Array | None = None,
) -> tuple[Array, Array]:
    """The result in float64, and the sum of the sizes of its terms."""
    left, right = turned(a.astype("d"), transpose_a), turned(b.astype("d"), transpose_b)
    x, terms = alpha * (left @ right), abs(alpha) * (abs(left) @ abs(right))
    if beta and c is not None:
        x, terms = x + beta * c.astype("d"), terms + abs(beta * c.astype("d"))
    if bias is not None:
        x, terms = x + bias.astype("d"), terms + abs(bias.astype("d"))
    y = ACTIVATIONS[activation](np.asarray(x))
    if gate is not None:
        factor = turned(gate.astype("d"), transpose_b)
        other, sizes = alpha * (left @ factor), abs(alpha) * (abs(left) @ abs(factor))
        y, terms = y * other, terms * abs(other) + abs(y) * sizes
    return np.asarray(y), np.asarray(terms)


def check(
    a: Array, b: Array, c: Array | None = None, *, bias: Array | None = None, **options: Any
) -> Array:
    """The result of `tilefold.gemm`. Raises unless it is as near as rounding allows.

    A sum of k rounded products, in any order, is off by at most k units of the sum of their sizes.
    alpha, the bias, beta C and their sums are five more roundings. An activation is off by a few
    units of its argument. The result is rounded once.
    """
    got: Array = tilefold.gemm(a, b, c, bias=bias, **options)
    for name in ("out", "out_dtype", "precision"):
        options.pop(name, None)
    vector = b.ndim == 1 and bias is not None  # (m,) beside a vector b
    want, terms = exact(a, b, c, bias=bias if not vector else bias.reshape(-1), **options)
    kept = got.dtype.name
    if kept == "int32":
        assert (got == want.astype(np.int64).astype(np.int32)).all()
        return got
    k = a.shape[-2 if options.get("transpose_a") and a.ndim > 1 else -1]
    unit = 2 * UNITS["float64"] if "float64" in (a.dtype, b.dtype) else UNITS["float32"]
    allowed = SLOPE * (k + 5) * unit * terms + (options.get("activation") is not None) * (
        4 * unit * (abs(want) + terms)
    )
    allowed += 1.01 * UNITS[kept] * (abs(want) + allowed)
    allowed += float(ml_dtypes.finfo(kept).smallest_subnormal)
    assert_near("gemm", np.atleast_1d(got), np.atleast_1d(want), np.atleast_1d(allowed))
    return got
