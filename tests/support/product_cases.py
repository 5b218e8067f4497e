"""Matrix products: the cases and the comparison that the suites of Metal and Triton share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from compare import UNITS, assert_near
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

Array = NDArray[Any]

SLOPES = {
    None: 1.0,
    "relu": 1.0,
    "gelu": 1.13,
    "gelu_tanh": 1.13,
    "silu": 1.1,
    "sigmoid": 0.25,
    "tanh": 1.0,
}
"""The largest factor by which an activation can increase an error."""


class Variant(NamedTuple):
    """Options of a product that make one kernel on each device."""

    a: str = "float32"
    b: str = "float32"
    c: str = "float32"
    transpose_a: bool = False
    transpose_b: bool = False
    bias: str | None = None
    activation: str | None = None
    every: int = 1
    """The stride from one element of a row to the next, in elements."""

    def __str__(self) -> str:
        turned = "".join("NT"[each] for each in (self.transpose_a, self.transpose_b))
        return "-".join(str(each) for each in (*self[:3], turned, *self[5:]))


VARIANTS = (
    Variant(),
    Variant("float16", "float16", "float16", False, True, "column", "relu"),
    Variant("bfloat16", "bfloat16", "bfloat16", True, False, "row", "gelu"),
    Variant("float16", "float32", "bfloat16", True, True, "row", "silu"),
    Variant("bfloat16", "float16", "float32", False, False, "column", "tanh"),
    Variant("float32", "bfloat16", "bfloat16", True, False, every=3),
)

SHAPES = (
    *((1, 1, 1), (2, 20, 3), (20, 2, 9), (99, 3, 257), (3, 257, 99), (1, 130, 8), (130, 1, 24)),
    *((64, 96, 40), (33, 95, 7), (35, 6, 1)),
)
"""Sizes (m, n, k): single elements, very long or very narrow matrices, and several blocks."""

BATCHES = (
    ((2, 3, 9, 5), (5, 11)),
    ((9, 5), (3, 5, 11)),
    ((2, 1, 9, 5), (3, 5, 11)),
    ((2, 1, 9, 5), (1, 3, 5, 11)),
)
"""Shapes of a and b whose batches broadcast as in NumPy."""


class Given(NamedTuple):
    """Random arrays of a product, as a call takes them and as they multiply."""

    a: Array
    b: Array
    c: Array
    bias: Array
    left: Array
    right: Array
    added: Array | float
    scalars: dict[str, float]


def given(variant: Variant, shape: tuple[int, int, int]) -> Given:
    """Random arrays for a variant; they depend on its shape alone."""
    m, n, k = shape
    rng = np.random.default_rng(shape)

    def matrix(rows: int, columns: int, dtype: str, turned: bool) -> tuple[Array, Array]:
        lengths = (columns, rows) if turned else (rows, columns)
        wide = rng.normal(size=(lengths[0], lengths[1] * variant.every)).astype(dtype)
        found = wide[:, :: variant.every]
        return found, found.T if turned else found

    a, left = matrix(m, k, variant.a, variant.transpose_a)
    b, right = matrix(k, n, variant.b, variant.transpose_b)
    c = rng.normal(size=(m, n)).astype(variant.c)
    bias = rng.normal(size={"column": n, "row": m, None: 0}[variant.bias]).astype(variant.c)
    scalars = {"alpha": float(np.float32(rng.normal())), "beta": float(np.float32(rng.normal()))}
    if variant.a == "float64":
        scalars = {"alpha": 1 / 3, "beta": -math.pi}
    added = {"column": bias, "row": bias[:, None], None: 0.0}[variant.bias]
    return Given(a, b, c, bias, left, right, added, scalars)


def activate(name: str | None, x: Array) -> Array:
    """An activation in float64."""
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu":
        return np.array(x * 0.5 * (1 + np.vectorize(math.erf, otypes=["d"])(x / math.sqrt(2))))
    if name == "gelu_tanh":
        return np.array(x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    if name in ("silu", "sigmoid"):
        with np.errstate(over="ignore"):
            return np.array((x if name == "silu" else 1) / (1 + np.exp(-x)))
    return np.tanh(x) if name == "tanh" else x


def assert_product(
    got: Array,
    a: Array,
    b: Array,
    *,
    alpha: float = 1,
    beta: float = 0,
    c: Array | float = 0,
    bias: Array | float = 0,
    activation: str | None = None,
    activation_unit: float = 0,
) -> None:
    """Raises unless a product is as near to the float64 product as rounding allows.

    `a` and `b` are the factors, and `bias` the added elements. A sum of k rounded products, in any
    order, is off by at most k units of the sum of their sizes. alpha, the bias, beta C and their
    sums are five more roundings. In float64 the definition has as many itself. An activation
    multiplies the error by its slope, and adds an error of `activation_unit` of its argument (or
    its value, if larger), or of 4 units of its sums if that is 0. The result is rounded once.
    """
    left, right, old, added = (np.asarray(x, np.float64) for x in (a, b, c, bias))
    terms = abs(alpha) * (abs(left) @ abs(right)) + abs(beta * old) + abs(added)
    sums = alpha * (left @ right) + beta * old + added
    want = activate(activation, sums)
    kept = str(got.dtype)
    unit = 2 * UNITS["float64"] if a.dtype == np.float64 else UNITS["float32"]
    allowed = SLOPES[activation] * (a.shape[-1] + 5) * unit * terms
    sizes = np.maximum(abs(sums), abs(want))
    allowed += (activation_unit or 4 * unit) * sizes * (activation is not None)
    allowed += 1.01 * UNITS[kept] * (abs(want) + allowed)
    allowed += float(ml_dtypes.finfo(kept).smallest_subnormal)
    assert_near("c", got, want, allowed)


def assert_gated(
    got: Array, a: Array, b: Array, gate: Array, *, alpha: float, bias: Array, name: str | None
) -> None:
    """Raises unless a gated product is as near to that in float64 as rounding allows.

    Each of the two sums is off as in `assert_product`, and an error of one is multiplied by the
    other; the product of the two is one rounding more.
    """
    left, right, beside, added = (np.asarray(x, np.float64) for x in (a, b, gate, bias))
    unit = (a.shape[-1] + 6) * UNITS["float32"]
    sums, gates = alpha * (left @ right) + added, alpha * (left @ beside)
    off = unit * (abs(alpha) * (abs(left) @ abs(right)) + abs(added))
    off_gate = unit * abs(alpha) * (abs(left) @ abs(beside))
    value = activate(name, sums)
    off = SLOPES[name] * off + 3e-7 * abs(sums)
    want = value * gates
    allowed = off * (abs(gates) + off_gate) + abs(value) * off_gate
    allowed += 1.01 * (UNITS[str(got.dtype)] + UNITS["float32"]) * (abs(want) + allowed)
    least = float(ml_dtypes.finfo(str(got.dtype)).smallest_subnormal)
    assert_near("gated", got, want, allowed + least)


def padded(array: Array) -> Array:
    """The same elements with a gap after each row except the last."""
    rows, columns = array.shape
    memory = np.full((rows - 1) * (columns + 5) + columns, np.nan, array.dtype)
    size = array.itemsize
    found = as_strided(memory, array.shape, ((columns + 5) * size, size))
    found[...] = array
    return found
