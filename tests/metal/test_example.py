"""The example of kernels of one's own: a layer on fragments, products of matrices on matmul2d."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import metal_kernel
import numpy as np
import pytest
from compare import UNITS, assert_near
from numpy.typing import NDArray

from tilefold.backends.metal.emulator.fault import Fault
from tilefold.metal import Matmul2d

pytestmark = pytest.mark.slow  # each launch is a process, each kernel a run of a C++ compiler

Array = NDArray[Any]
Compile = Callable[..., Any]

LAYOUTS = (0, 1)
TILE = Matmul2d(64, 64, None, "float16", "float16", "float32", simdgroups=4)


def operand(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float16)


def check(name: str, got: Array, a: Array, b: Array, least: float = -np.inf) -> None:
    """Within the rounding of sums in float32."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    allowed = a.shape[1] * UNITS["float32"] * (abs(a) @ abs(b))
    assert_near(name, got, np.maximum(a @ b, least), allowed)


@pytest.mark.feature("J08", "J09")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("rows", "columns", "length"),
    [(64, 64, 64), (64, 128, 64), (128, 64, 64), (128, 128, 64), (64, 64, 128), (256, 192, 128)],
)
def test_a_product_of_tiles(
    metal: Compile, rows: int, columns: int, length: int, layout: int
) -> None:
    """The bound is what Metal.jl reports of a GPU, for numbers that are all positive."""
    library = metal(metal_kernel.product(TILE), tensor_layout=layout)
    random = np.random.default_rng(0)
    shapes = (rows, length), (length, columns)
    a, b = (random.uniform(size=shape).astype(np.float16) for shape in shapes)
    c = metal_kernel.multiply(library, TILE, a, b)
    want = a.astype(np.float64) @ b.astype(np.float64)
    assert abs(c - want).max() <= 3e-7 * abs(want).max()
    # Steps give what one call over all of k does: the sum is made in the same order.
    once = metal(metal_kernel.product(TILE, step=1024), tensor_layout=layout)
    np.testing.assert_array_equal(metal_kernel.multiply(once, TILE, a, b), c)


@pytest.mark.feature("J08", "J09")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (65, 100, 31), (70, 3, 70)])
def test_sizes_that_no_tile_divides(metal: Compile, shape: tuple[int, ...], layout: int) -> None:
    library = metal(metal_kernel.product(TILE), tensor_layout=layout)
    rows, columns, length = shape
    a, b = operand((rows, length)), operand((length, columns))
    check("c", metal_kernel.multiply(library, TILE, a, b), a, b)


@pytest.mark.feature("J08")
def test_a_known_k_walks_in_whole_steps(metal: Compile) -> None:
    tile = replace(TILE, k=32)
    library = metal(metal_kernel.product(tile))
    a, b = operand((20, 96)), operand((96, 64))
    check("c", metal_kernel.multiply(library, tile, a, b), a, b)
    with pytest.raises(ValueError, match="k must be a multiple of 32, got 95"):
        metal_kernel.multiply(library, tile, a[:, :95], b[:95])


@pytest.mark.feature("J11")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_follows_a_product_is_computed_in_registers(metal: Compile, layout: int) -> None:
    text = metal_kernel.product(TILE, then="max(x, 0.0f)")
    a, b = operand((20, 40)), operand((40, 70))
    c = metal_kernel.multiply(metal(text, tensor_layout=layout), TILE, a, b)
    check("c", c, a, b, least=0)


@pytest.mark.feature("J12")
def test_another_number_of_threads_is_refused_before_the_launch(metal: Compile) -> None:
    library = metal(metal_kernel.product(TILE))
    with pytest.raises(ValueError, match="written for 4 simdgroups"):
        TILE.check_threads(64)
    a, c = operand((64, 64)), np.zeros((64, 64), np.float32)
    with pytest.raises(Fault, match="another number of simdgroups than the threadgroup has"):
        library.product(a, a, c, [64, 64, 64], threads=64, group_size=64)


@pytest.mark.feature("J04")
def test_a_layer_on_fragments(metal: Compile) -> None:
    library = metal(metal_kernel.layer("float16"))
    x, w = operand((16, 40)), operand((24, 40))
    y = np.empty((16, 24), np.float32)
    library.layer(x, w, y, [40, 24], threads=(96, 2), group_size=(32, 1))
    check("y", y, x, w.T, least=0)


def test_it_runs(metal: Compile, capsys: pytest.CaptureFixture[str]) -> None:
    metal_kernel.main()
    assert capsys.readouterr().out.count("error") == 2
