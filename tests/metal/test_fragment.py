"""The 8x8 fragment on the emulator: what each of its statements does, exactly.

Numbers are small and whole, so that every product and sum is exact in every type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tilefold.backends.metal.kernels.fragment import (
    TYPES,
    Fragment,
    at,
    multiply,
    multiply_accumulate,
)
from tilefold.backends.metal.kernels.msl import Text

pytestmark = pytest.mark.slow  # each launch is a process, each kernel a run of a C++ compiler

Array = NDArray[Any]

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

WIDE = 20
"""Numbers in a row of the arrays that fragments are moved out of and into."""


def kernels(dtype: str) -> str:
    """A kernel for each statement: a and b in, c (of the type) and d (float) out."""
    text = Text()
    tile, wide = Fragment(dtype), Fragment("float32")
    rows = f"threadgroup {tile.element} stage[{8 * WIDE}];"

    def kernel(name: str, *body: str) -> None:
        heads = [f"device const {tile.element}* {x} [[buffer({i})]]" for i, x in enumerate("ab")]
        heads += [f"device {tile.element}* c [[buffer(2)]]", "device float* d [[buffer(3)]]"]
        heads.append("ushort lane [[thread_index_in_simdgroup]]")
        with text.block(f"kernel void {name}_{dtype}({', '.join(heads)})"):
            text(*body)

    kernel(
        "move",
        tile.declare("x"),
        tile.load("x", "a", WIDE, origin=(4, 2)),
        tile.store("x", "c", WIDE, origin=(3, 5)),
    )
    kernel(
        "transpose",
        tile.declare("x"),
        tile.load("x", "a", WIDE, origin=(4, 2), transpose=True),
        tile.store("x", "c", WIDE),
        tile.load("x", "a", WIDE, origin=(4, 2)),
        tile.store("x", "c", WIDE, origin=(8, 0), transpose=True),
    )
    kernel(
        "stage",
        rows,
        tile.declare("x"),
        tile.load("x", "a", WIDE),
        tile.store("x", "stage + 2", WIDE),
        "simdgroup_barrier(mem_flags::mem_threadgroup);",
        tile.load("x", "stage + 2", WIDE, transpose=True),
        tile.store("x", "c", WIDE),
    )
    kernel(
        "fill",
        tile.declare("x", 2),
        tile.fill("x[0]", "3.5f"),
        tile.fill("x[1]"),
        tile.store("x[0]", "c", WIDE),
        tile.store("x[1]", "c", WIDE, origin=(8, 0)),
    )
    kernel(
        "product",
        *(tile.declare(x) for x in "xyz"),
        *(wide.declare(x) for x in ("s", "t")),
        tile.load("x", "a", WIDE),
        tile.load("y", "b", WIDE),
        multiply("z", "x", "y"),
        tile.store("z", "c", WIDE),
        multiply_accumulate("z", "x", "y", "x"),
        tile.store("z", "c", WIDE, origin=(8, 0)),
        multiply("s", "x", "y"),
        wide.store("s", "d", WIDE),
        multiply_accumulate("t", "x", "x", "s"),
        wide.store("t", "d", WIDE, origin=(8, 0)),
    )
    kernel(
        "sum",  # a is 8 x 32, b is 32 x 8
        *(tile.declare(x) for x in "xy"),
        wide.declare("s"),
        wide.fill("s"),
        "for (ushort k = 0; k < 32; k += 8) {",
        tile.load("x", "a", 32, origin=("k", 0)),
        tile.load("y", "b", 8, origin=(0, "k")),
        multiply_accumulate("s", "x", "y"),
        "}",
        wide.store("s", "d", WIDE),
    )
    kernel(
        "places",
        tile.declare("x"),
        tile.load("x", "a", WIDE),
        f"c[2 * lane] = {at('x', 0)};",
        f"c[2 * lane + 1] = {at('x', 1)};",
        f"{at('x', 1)} = {tile.element}(7);",
        tile.store("x", "c", WIDE, origin=(0, 7)),
    )
    return str(text)


@pytest.fixture(scope="module")
def run(metal: Callable[[str], Any]) -> Callable[..., tuple[Array, Array]]:
    """Runs one of `kernels` on a and b: what it leaves in c and d, both of 15 rows."""
    text = "#include <metal_stdlib>\nusing namespace metal;\n\n" + "\n".join(map(kernels, TYPES))
    library = metal(text)

    def run(name: str, dtype: str, a: Array, b: Array) -> tuple[Array, Array]:
        c, d = np.zeros((15, WIDE), DTYPES[dtype]), np.zeros((15, WIDE), np.float32)
        given = [array.astype(DTYPES[dtype]) for array in (a, b)]
        getattr(library, f"{name}_{dtype}")(*given, c, d, threads=32, group_size=32)
        return c.astype(np.float64), d.astype(np.float64)

    return run


def numbers(*shape: int) -> Array:
    return np.random.default_rng(shape).integers(-4, 5, shape).astype(np.float64)


DATA = numbers(15, WIDE), numbers(15, WIDE + 1)[:, :WIDE]


@pytest.mark.feature("J04")
@pytest.mark.parametrize("dtype", TYPES)
def test_loads_and_stores_at_an_origin(run: Any, dtype: str) -> None:
    c, _ = run("move", dtype, *DATA)
    want = np.zeros((15, WIDE))
    want[5:13, 3:11] = DATA[0][2:10, 4:12]
    np.testing.assert_array_equal(c, want)


@pytest.mark.feature("J04")
@pytest.mark.parametrize("dtype", TYPES)
def test_transposes_in_either_direction(run: Any, dtype: str) -> None:
    c, _ = run("transpose", dtype, *DATA)
    want = np.zeros((15, WIDE))
    # Of a transposed source the origin stays (column, row) of the array that it lies in.
    want[:8, :8] = want[:8, 8:16] = DATA[0][2:10, 4:12].T
    np.testing.assert_array_equal(c, want)


@pytest.mark.feature("J04")
@pytest.mark.parametrize("dtype", TYPES)
def test_goes_through_threadgroup_memory(run: Any, dtype: str) -> None:
    c, _ = run("stage", dtype, *DATA)
    np.testing.assert_array_equal(c[:8, :8], DATA[0][:8, :8].T)


@pytest.mark.feature("J04")
@pytest.mark.parametrize("dtype", TYPES)
def test_fills(run: Any, dtype: str) -> None:
    c, _ = run("fill", dtype, *DATA)
    np.testing.assert_array_equal(c[:8, :8], np.full((8, 8), 3.5))
    np.testing.assert_array_equal(c[:8, 8:16], np.zeros((8, 8)))


@pytest.mark.feature("J04")
@pytest.mark.parametrize("dtype", TYPES)
def test_multiplies_and_adds(run: Any, dtype: str) -> None:
    c, d = run("product", dtype, *DATA)
    a, b = (array[:8, :8] for array in DATA)
    np.testing.assert_array_equal(c[:8, :8], a @ b)
    np.testing.assert_array_equal(c[:8, 8:16], a @ b + a)
    np.testing.assert_array_equal(d[:8, :8], a @ b)
    np.testing.assert_array_equal(d[:8, 8:16], a @ a + a @ b)


@pytest.mark.feature("J04")
@pytest.mark.parametrize("dtype", TYPES)
def test_sums_over_k_in_four_steps(run: Any, dtype: str) -> None:
    a, b = numbers(8, 32), numbers(32, 8)
    _, d = run("sum", dtype, a, b)
    np.testing.assert_array_equal(d[:8, :8], a @ b)


@pytest.mark.feature("J04")
@pytest.mark.parametrize("dtype", TYPES)
def test_a_lane_holds_two_neighbours_of_a_row(run: Any, dtype: str) -> None:
    c, _ = run("places", dtype, *DATA)
    lane = np.arange(32)
    row, column = lane // 2 % 4 + 4 * (lane // 16), 2 * (lane % 2) + 4 * (lane // 8 % 2)
    held = c.reshape(-1)[:64].reshape(32, 2)
    np.testing.assert_array_equal(held, np.stack([DATA[0][row, column + e] for e in (0, 1)], 1))
    stored = c[7:15, :8]
    assert (stored[:, 1::2] == 7).all()
    np.testing.assert_array_equal(stored[:, ::2], DATA[0][:8, :8:2])


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype must be 'float32', 'float16' or 'bfloat16', got"):
        Fragment("float64")
