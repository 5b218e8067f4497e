"""Products for the suites of kernels: cases, their operands, and what they must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # NumPy knows bfloat16 by it
import numpy as np
from numpy.typing import NDArray

from tilefold.problems.matmul import Accepted, Operand, Product

Array = NDArray[Any]

TYPES = ("float32", "float64", "float16", "bfloat16", "int32", "int8", "uint8")
ACCEPTED = Accepted(TYPES, empty=True, most=8)


class Case(NamedTuple):
    """A product: its sizes, its types, how A and B lie, and what follows the sums."""

    sizes: tuple[int, int, int]
    a: str = "float32"
    b: str = "float32"
    out: str = "float32"
    turned: str = ""
    """Letters of the operands that are stored transposed: "a", "b", "o"."""
    bias: str | None = None
    activation: str | None = None
    gate: bool = False
    c: str | None = None
    batch: tuple[int, ...] = ()


CASES = [
    # several blocks of the contraction, of rows and of columns; tails of all of them
    Case((37, 101, 1200)),
    # the result itself: in several blocks, and with A and B where they lie
    Case((187, 181, 1500)),
    Case((43, 91, 45), "float64", "float64", "float64"),
    Case((131, 67, 45), turned="ab", bias="float32", activation="gelu"),
    Case((29, 70, 33), "float64", "float64", "float64", "a", bias="float64"),
    Case((45, 35, 90), "float16", "float32", "bfloat16", "b", c="float32"),
    Case((17, 40, 31), turned="o", bias="float32", batch=(3,)),
    Case((33, 50, 77), "bfloat16", "bfloat16", "float32", activation="silu", gate=True),
    Case((50, 33, 1300), "bfloat16", "bfloat16", "bfloat16", "a", bias="bfloat16"),
    # few sums of many terms: chunks of the contraction
    Case((40, 70, 3000), bias="float32", activation="relu"),
    Case((33, 20, 2100), "bfloat16", "bfloat16", "float32", gate=True),
    Case((35, 33, 1100), "int8", "int8", "int32"),
    # integers, at their ends
    Case((35, 66, 203), "int8", "int8", "int32"),
    Case((18, 33, 65), "uint8", "int8", "int32", "ab", c="int32"),
    Case((18, 40, 65), "int8", "int8", "float32", "a", bias="float32", activation="relu"),
    Case((35, 50, 203), "uint8", "uint8", "int32", "b"),
    Case((37, 18, 90), "int8", "uint8", "float32", c="int32"),
    # integers beside floats
    Case((45, 35, 90), "float32", "int8", "float32", bias="float32", gate=True),
    Case((33, 50, 77), "uint8", "bfloat16", "bfloat16", "ab"),
    Case((35, 50, 130), "bfloat16", "int8", "float32", activation="relu"),
    # few rows: long lines, chunks of the contraction, neighbours along the contraction, two tiles
    Case((1, 333, 700)),
    Case((15, 130, 515), "float32", "float16", "float16", bias="float16", gate=True),
    Case((3, 70, 301), turned="b", activation="tanh", bias="float32"),
    Case((16, 65, 701), "bfloat16", "bfloat16", "float32", "b", c="float32"),
    Case((5, 333, 300), "float16", "int8", "float16", bias="float16"),
    Case((2, 70, 301), "float64", "uint8", "float64", "b"),
    Case((300, 3, 101), turned="a"),
    Case((9, 1024, 40)),  # lines that share a set of the first cache
]


def arrays(case: Case) -> dict[str, Array]:
    """Random operands, as they lie in memory."""
    m, n, k = case.sizes
    draw = np.random.default_rng(m * n)
    shapes = {"a": (*case.batch, m, k), "b": (k, n)}
    if case.gate:
        shapes["gate"] = (k, n)
    made = {}
    for name, shape in shapes.items():
        dtype = case.a if name == "a" else case.b
        if name in case.turned:
            shape = (*shape[:-2], shape[-1], shape[-2])
        if "int" in dtype:
            low, high = (0, 256) if dtype == "uint8" else (-128, 128)
            ends = np.array([low, high - 1])
            made[name] = np.where(
                draw.random(shape) < 0.2, draw.choice(ends, shape), draw.integers(low, high, shape)
            ).astype(dtype)
        else:
            made[name] = draw.standard_normal(shape).astype(dtype)
    if case.bias:
        made["bias"] = draw.standard_normal(n).astype(case.bias)
    if case.c:
        made["c"] = (10 * draw.standard_normal((*case.batch, m, n))).astype(case.c)
    return made


def expected(case: Case, given: dict[str, Array]) -> Array:
    """The product in float64."""

    def wide(name: str) -> Array:
        array = given[name].astype(np.float64)
        return np.swapaxes(array, -1, -2) if name in case.turned else array

    x = wide("a") @ wide("b")
    if case.c:
        x = x + given["c"].astype(np.float64)
    if case.bias:
        x = x + given["bias"].astype(np.float64)
    x = by_numpy(case.activation, x)
    if case.gate:
        x = x * (wide("a") @ wide("gate"))
    return x


def by_numpy(name: str | None, x: Array) -> Array:
    """Activations by NumPy."""
    from math import erf

    return {
        None: lambda: x,
        "relu": lambda: np.maximum(x, 0),
        "silu": lambda: x / (1 + np.exp(-x)),
        "tanh": lambda: np.tanh(x),
        "gelu": lambda: x * (0.5 + 0.5 * np.vectorize(erf)(x * 0.5**0.5)),
    }[name]()


def operand(name: str, array: Array, axes: int) -> Operand:
    strides = [step // array.itemsize for step in array.strides]
    made = ACCEPTED.operand(name, array.dtype.name, array.shape, strides, 1)
    return made.padded(axes)


def described(case: Case, operands: dict[str, Operand]) -> Product:
    """The description of a case whose operands lie like these."""
    return Product.of(
        operands,
        alpha=1.0,
        beta=1.0 if case.c else 0.0,
        transpose_a="a" in case.turned,
        transpose_b="b" in case.turned,
        bias_axis=None,
        activation=case.activation,
        dtype=case.out,
        biases=TYPES,
    )


def laid_out(
    case: Case, given: dict[str, Array], empty: Callable[..., Array] = np.zeros
) -> tuple[Product, Operand, Array, Array]:
    """What `prepare` takes for arrays of a case; the memory of the result, and the result in it."""
    axes, (m, n, _) = 2 + len(case.batch), case.sizes
    stored = (*case.batch, n, m) if "o" in case.turned else (*case.batch, m, n)
    out = empty(stored, case.out)
    result = np.swapaxes(out, -1, -2) if "o" in case.turned else out
    product = described(case, {name: operand(name, x, axes) for name, x in given.items()})
    return product, operand("out", result, len(product.batch) + 2), out, result


def assert_right(case: Case, given: dict[str, Array], found: Array) -> None:
    """Raise AssertionError unless a result is as exact as its type."""
    want, got = expected(case, given), found.astype(np.float64)
    if case.out == "int32":
        np.testing.assert_array_equal(got, want)
    else:
        unit = {"float64": 1e-13, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
        np.testing.assert_allclose(got, want, rtol=0, atol=unit[case.out] * np.abs(want).max())
