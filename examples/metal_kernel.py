"""Two kernels for Apple GPUs of one's own, from the pieces that tilefold's are written with.

    python examples/metal_kernel.py

`layer` is made of fragments, the 8x8 matrices of every Apple GPU since M1; `product` of Metal 4's
`matmul2d`. Both texts go to `torch.mps.compile_shader` as they are. On a machine without Metal, and
before trusting a kernel on one with it, run them on the emulator: it finds what reads out of
bounds, lacks a barrier, or counts on a place of an element that no one has promised.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tilefold.metal import Fragment, Matmul2d, Text, emulate, fragment, matmul2d


def layer(dtype: str) -> str:
    """Y = max(X W^T, 0): a simdgroup for each 8x8 block of Y, sizes multiples of 8.

    Arguments of the kernel: x (rows, k), w (columns, k), y (rows, columns), [k, columns].
    """
    text, tile, sums = Text(), Fragment(dtype), Fragment("float32")
    text("#include <metal_stdlib>", "using namespace metal;", "")
    text("kernel void layer(")
    text(f"    device const {tile.element}* x [[buffer(0)]],")
    text(f"    device const {tile.element}* w [[buffer(1)]],")
    text("    device float* y [[buffer(2)]],", "    constant long* sizes [[buffer(3)]],")
    with text.block("    uint3 place [[threadgroup_position_in_grid]])"):
        text("const int length = int(sizes[0]), columns = int(sizes[1]);")
        text("const ulong column = 8 * place.x, row = 8 * place.y;", "")
        text(tile.declare("a"), tile.declare("b"), sums.declare("sum"), sums.fill("sum"))
        with text.block("for (int k = 0; k < length; k += 8)"):
            text(tile.load("a", "x", "length", origin=("k", "row")))
            text(tile.load("b", "w + column * length + k", "length", transpose=True))
            text(fragment.multiply_accumulate("sum", "a", "b"))
        with text.loop("e", 2):
            element = fragment.at("sum", "e")
            text(f"{element} = max({element}, 0.0f);")
        text(sums.store("sum", "y", "columns", origin=("column", "row")))
    return f"{text}\n"


def product(tile: Matmul2d, step: int = 32, then: str = "x") -> str:
    """C = A B of any sizes: a threadgroup for each tile of C, a walk over k in steps.

    `then` is what becomes of an element x of A B, computed in registers before C is written.
    Arguments of the kernel: a (rows, k), b (k, columns), c (rows, columns), [rows, columns, k].
    """
    text = Text()
    types = tile.left_tile.element, tile.right_tile.element
    text(matmul2d.HEADERS)
    most = max(64, 32 * tile.simdgroups)  # see docs/metal.md: a bound of 32 is a risk
    text(f"[[max_total_threads_per_threadgroup({most})]]", "kernel void product(")
    text(f"    device {types[0]}* a [[buffer(0)]],", f"    device {types[1]}* b [[buffer(1)]],")
    text("    device float* c [[buffer(2)]],", "    constant long* sizes [[buffer(3)]],")
    with text.block("    uint3 place [[threadgroup_position_in_grid]])"):
        text("const int c_rows = int(sizes[0]), c_columns = int(sizes[1]), length = int(sizes[2]);")
        text(f"const int first_row = {tile.m} * place.y, first_column = {tile.n} * place.x;")
        text(f"const int rows = min({tile.m}, c_rows - first_row);")
        text(f"const int columns = min({tile.n}, c_columns - first_column);")
        text(f"device {types[0]}* a_rows = a + long(first_row) * length;")
        text(f"device {types[1]}* b_columns = b + first_column;", "")
        left, right = ("a_rows", "length"), ("b_columns", "c_columns")
        text.note("Views of a first step, for the types of their elements.")
        text(tile.left_tile.declare("some_a", "a_rows", (step, "rows"), stride="length"))
        text(tile.right_tile.declare("some_b", "b_columns", ("columns", step), stride="c_columns"))
        text(tile.declare("multiply"), tile.destination("sum", "multiply", "some_a", "some_b"))
        matmul2d.fill(text, "sum")
        tile.walk(
            text,
            "multiply",
            "sum",
            left=left,
            right=right,
            rows="rows",
            columns="columns",
            length="length",
            step=step,
        )
        with matmul2d.elements(text, "sum"), text.block("if (row < rows && column < columns)"):
            text("const long at = long(first_row + row) * c_columns + first_column + column;")
            text("const float x = sum[i];", f"c[at] = {then};")
    return f"{text}\n"


def multiply(library: Any, tile: Matmul2d, a: Any, b: Any) -> Any:
    """C = A B by the kernel of `product`."""
    (rows, length), columns = a.shape, b.shape[1]
    tile.check_length(length)
    c = np.full((rows, columns), np.nan, np.float32)
    across, down, threads = -(-columns // tile.n), -(-rows // tile.m), 32 * tile.simdgroups
    tile.check_threads(threads)
    library.product(
        a, b, c, [rows, columns, length], threads=(across * threads, down), group_size=(threads, 1)
    )
    return c


def main() -> None:
    """Run both on the emulator and say how far they are from float64."""
    random = np.random.default_rng(0)
    x, w = (random.normal(size=shape).astype(np.float16) for shape in ((16, 40), (24, 40)))
    y = np.empty((16, 24), np.float32)
    library = emulate.compile_shader(layer("float16"))
    library.layer(x, w, y, [40, 24], threads=(32 * 24 // 8, 16 // 8), group_size=(32, 1))
    want = np.maximum(x.astype(np.float64) @ w.astype(np.float64).T, 0)
    print(f"layer:   error {abs(y - want).max():.1e} of numbers up to {want.max():.1f}")

    tile = Matmul2d(64, 64, None, "float16", "float16", "float32", simdgroups=4)
    a, b = (random.normal(size=shape).astype(np.float16) for shape in ((70, 50), (50, 100)))
    c = multiply(emulate.compile_shader(product(tile)), tile, a, b)
    want = a.astype(np.float64) @ b.astype(np.float64)
    print(f"product: error {abs(c - want).max():.1e} of numbers up to {abs(want).max():.1f}")


if __name__ == "__main__":
    main()
