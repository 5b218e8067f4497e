"""Metal 4's tensor operations: their typed description, and products made of them on the emulator.

The emulator's stand-in for Apple's headers lays the elements of a cooperative tensor out in two
different ways, and the tests of texts run both: the layout on a GPU is not defined.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from compare import UNITS, assert_near
from numpy.typing import NDArray

from tilefold.backends.metal.emulator.fault import Fault
from tilefold.backends.metal.kernels.matmul2d import (
    ELEMENTS,
    HEADERS,
    PRODUCTS,
    Matmul2d,
    Tile,
    elements,
    fill,
)
from tilefold.backends.metal.kernels.msl import Text

pytestmark = pytest.mark.slow  # each launch is a process, each kernel a run of a C++ compiler

Array = NDArray[Any]
Compile = Callable[..., Any]

LAYOUTS = (0, 1)

TYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int8": np.int8,
    "uint8": np.uint8,
    "int32": np.int32,
}

PLAIN = Matmul2d(64, 32, None, "float16", "float16", "float32")


@pytest.mark.feature("J05")
@pytest.mark.parametrize("name", ["m", "n"])
@pytest.mark.parametrize("value", [0, -8, 12, 264])
def test_a_tile_of_another_size_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
        replace(PLAIN, **{name: value})


@pytest.mark.feature("J05")
def test_m_or_n_is_a_multiple_of_16() -> None:
    for m, n in ((8, 8), (24, 8), (40, 56)):
        message = f"^m or n must be a multiple of 16, got m = {m} and n = {n}$"
        with pytest.raises(ValueError, match=message):
            replace(PLAIN, m=m, n=n)
    for m, n in ((8, 16), (16, 24), (64, 8)):
        replace(PLAIN, m=m, n=n)


@pytest.mark.feature("J05", "J08")
def test_a_known_k_is_a_multiple_of_32_and_made_of_whole_steps() -> None:
    with pytest.raises(ValueError, match="k must be a multiple of 32, got 16; None reads it"):
        replace(PLAIN, k=16)
    with pytest.raises(ValueError, match="k must be a multiple of 32, got 70"):
        replace(PLAIN, k=32).check_length(70)
    replace(PLAIN, k=32).check_length(96)
    PLAIN.check_length(70)


@pytest.mark.feature("J05")
def test_the_descriptor_says_every_field() -> None:
    assert PLAIN.declare("product") == (
        "constexpr auto product_descriptor = matmul2d_descriptor(\n"
        "    64, 32, static_cast<int>(dynamic_extent), false, false, false,\n"
        "    matmul2d_descriptor::mode::multiply_accumulate);\n"
        "matmul2d<product_descriptor, execution_simdgroups<1>> product;"
    )
    other = replace(PLAIN, k=64, transpose_left=True, relaxed_precision=True, simdgroups=4)
    other = replace(other, mode="multiply")
    assert other.declare("product") == (
        "constexpr auto product_descriptor = matmul2d_descriptor(\n"
        "    64, 32, 64, true, false, true,\n"
        "    matmul2d_descriptor::mode::multiply);\n"
        "matmul2d<product_descriptor, execution_simdgroups<4>> product;"
    )


@pytest.mark.feature("J06")
def test_types_that_metal_does_not_multiply_are_refused_with_those_that_it_does() -> None:
    for left in ELEMENTS:
        for right in ELEMENTS:
            for result in ELEMENTS:
                if result in PRODUCTS.get((left, right), ()):
                    replace(PLAIN, left=left, right=right, result=result)
                else:
                    with pytest.raises(TypeError, match=r"is one of|must be"):
                        replace(PLAIN, left=left, right=right, result=result)
    with pytest.raises(
        TypeError, match="with int8 on the left it is one of float16, bfloat16, flo"
    ):
        replace(PLAIN, left="int8", right="uint8")
    with pytest.raises(TypeError, match="result must be int32 for int8 by int8, got float32"):
        replace(PLAIN, left="int8", right="int8")
    with pytest.raises(TypeError, match=r"left must be one of float32, .* got int4"):
        replace(PLAIN, left="int4")


@pytest.mark.feature("J12")
def test_another_number_of_simdgroups_is_another_text_and_is_refused_by_a_launch() -> None:
    four = replace(PLAIN, simdgroups=4)
    assert PLAIN.declare("product") != four.declare("product")
    four.check_threads(128)
    PLAIN.check_threads(96)  # each simdgroup runs a product of its own
    with pytest.raises(ValueError, match=r"for 4 simdgroups, 32 threads each, but .* has 256"):
        four.check_threads(256)
    with pytest.raises(ValueError, match="simdgroups must be an integer from 1 to 32, got 33"):
        replace(PLAIN, simdgroups=33)


@pytest.mark.feature("J07")
def test_a_tile_has_one_number_for_each_axis() -> None:
    with pytest.raises(ValueError, match="extents must have 3 numbers, one for each axis, got 2"):
        Tile("float32", 3).declare("a", "q", (4, 5))
    with pytest.raises(ValueError, match="strides must begin with 1, got 2"):
        Tile("float32").declare("a", "q", (4, 5), strides=(2, 4))
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 8, got 9"):
        Tile("float32", 9)
    with pytest.raises(ValueError, match="origin must have 2 numbers"):
        Tile("float32").slice("b", "a", (0,))
    with pytest.raises(ValueError, match="space must be 'device' or 'threadgroup'"):
        Tile("float32", space="constant")
    with pytest.raises(ValueError, match="left_space must be 'device' or 'threadgroup'"):
        replace(PLAIN, left_space="thread")


def kernel(name: str, product: Matmul2d, *body: str) -> str:
    """A kernel with the operands a, b, c of a product and integers; one threadgroup."""
    kinds = [ELEMENTS[dtype] for dtype in (product.left, product.right, product.result)]
    given = [
        f"device {kind}* {x} [[buffer({i})]]"
        for i, (x, kind) in enumerate(zip("abc", kinds, strict=True))
    ]
    given += ["constant long* sizes [[buffer(3)]]"]
    given += ["ushort simdgroup [[simdgroup_index_in_threadgroup]]"]
    text = Text()
    text(f"kernel void {name}(")
    text(*(f"    {parameter}," for parameter in given[:-1]))
    with text.block(f"    {given[-1]})"):
        text("const int m = int(sizes[0]), n = int(sizes[1]), k = int(sizes[2]);")
        text(*body)
    return f"{text}\n"


def views(product: Matmul2d) -> list[str]:
    """The packed operands and the result as views `left`, `right` and `whole`."""
    left = ("m", "k") if product.transpose_left else ("k", "m")
    right = ("k", "n") if product.transpose_right else ("n", "k")
    return [
        product.left_tile.declare("left", "a", left),
        product.right_tile.declare("right", "b", right),
        Tile(product.result).declare("whole", "c", ("n", "m")),
    ]


def run_product(
    library: Any, name: str, product: Matmul2d, a: Array, b: Array, c: Array, option: int = 0
) -> Array:
    """What a kernel of `kernel` leaves in c: the operands are given untransposed."""
    (m, k), n = a.shape, b.shape[1]
    a = np.ascontiguousarray(a.T if product.transpose_left else a)
    b = np.ascontiguousarray(b.T if product.transpose_right else b)
    c, threads = c.copy(), 32 * product.simdgroups
    getattr(library, name)(a, b, c, [m, n, k, option], threads=threads, group_size=threads)
    return c


def operand(dtype: str, shape: tuple[int, int]) -> Array:
    random = np.random.default_rng(shape)
    if dtype in ("int8", "uint8"):
        limits = np.iinfo(dtype)
        return random.integers(limits.min, limits.max + 1, shape).astype(dtype)
    return random.normal(size=shape).astype(TYPES[dtype])


def check_product(
    product: Matmul2d, got: Array, a: Array, b: Array, c: Array | None = None
) -> None:
    """Within the rounding of sums in float32, and one of the result."""
    kind = np.int64 if product.result == "int32" else np.float64
    a, b = a.astype(kind), b.astype(kind)
    start = np.zeros((), kind) if c is None else c.astype(kind)
    want = start + a @ b
    if product.result == "int32":
        np.testing.assert_array_equal(got, want)
    else:
        terms = abs(start) + abs(a) @ abs(b)
        allowed = a.shape[1] * UNITS["float32"] * terms + UNITS[product.result] * abs(want)
        assert_near(str(product), got.astype(np.float64), want, allowed)


PAIRS = [
    Matmul2d(16, 24, None, left, right, result, mode="multiply")
    for (left, right), results in PRODUCTS.items()
    for result in results
]


@pytest.mark.slow
@pytest.mark.feature("J06")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pair_of_types_is_multiplied(metal: Compile, layout: int) -> None:
    """To memory in one layout, to registers and from there to memory in the other."""
    text = HEADERS
    for number, product in enumerate(PAIRS):
        body = Text()
        body(*views(product), product.declare("multiply"))
        with body.either("sizes[3] == 0") as otherwise:
            body(product.run("multiply", "left", "right", "whole"))
            otherwise()
            body(product.destination("sum", "multiply", "left", "right"))
            body(product.run("multiply", "left", "right", "sum"))
            with elements(body, "sum"), body.block("if (row < m && column < n)"):
                body("c[row * n + column] = sum[i];")
        text += kernel(f"product{number}", product, str(body))
    library = metal(text, tensor_layout=layout)
    for number, product in enumerate(PAIRS):
        a, b = operand(product.left, (13, 20)), operand(product.right, (20, 21))
        c = np.zeros((13, 21), TYPES[product.result])
        got = run_product(library, f"product{number}", product, a, b, c, layout)
        check_product(product, got, a, b)


FORMS = [
    replace(
        PLAIN,
        m=16,
        transpose_left=left,
        transpose_right=right,
        mode=mode,
        simdgroups=simdgroups,
    )
    for left, right in itertools.product((False, True), repeat=2)
    for mode, simdgroups in (("multiply", 4), ("multiply_accumulate", 1))
]


def form_name(product: Matmul2d) -> str:
    sides = "".join("nt"[side] for side in (product.transpose_left, product.transpose_right))
    return f"{sides}_{product.mode}"


def through_registers(product: Matmul2d) -> str:
    """Adds a product to c through a cooperative tensor, element by element."""
    text = Text()
    text(*views(product), product.declare("multiply"))
    text(product.destination("sum", "multiply", "left", "right"))
    fill(text, "sum", "1000.0f")
    text(product.run("multiply", "left", "right", "sum"))
    with elements(text, "sum"), text.block("if (row < m && column < n)"):
        text("c[row * n + column] += sum[i];")
    return kernel(f"{form_name(product)}_registers", product, str(text))


@pytest.mark.slow
@pytest.mark.feature("J05", "J07")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transposes_modes_and_where_the_result_goes(metal: Compile, layout: int) -> None:
    text = HEADERS
    for product in FORMS:
        run = [*views(product), product.declare("multiply")]
        run += [product.run("multiply", "left", "right", "whole")]
        text += kernel(f"{form_name(product)}_memory", product, *run) + through_registers(product)
    library = metal(text, tensor_layout=layout)
    a, b = operand("float16", (13, 20)), operand("float16", (20, 29))
    c = np.random.default_rng(0).normal(size=(13, 29)).astype(np.float32)
    for product in FORMS:
        name, adds = form_name(product), product.mode == "multiply_accumulate"
        got = run_product(library, f"{name}_memory", product, a, b, c)
        check_product(product, got, a, b, c if adds else None)
        got = run_product(library, f"{name}_registers", product, a, b, c)
        # `multiply` sets the element, whatever it held; the rest adds to the 1000 it was filled by.
        check_product(product, got, a, b, c + np.float32(1000 if adds else 0))


VIEWS = """
kernel void shapes(device float* a [[buffer(0)]], device int* found [[buffer(1)]]) {
    REPORTS
}
"""


@pytest.mark.feature("J07")
def test_views_of_any_rank_keep_their_extents(metal: Compile) -> None:
    reports = []
    for rank in range(1, 9):
        tile, name = Tile("float32", rank), f"view{rank}"
        extents = tuple(range(2, 2 + rank))
        reports.append(tile.declare(name, "a", extents))
        reports += [
            f"found[{8 * (rank - 1) + i}] = {name}.extents().extent({i});" for i in range(rank)
        ]
    found = np.zeros((8, 8), np.int32)
    text = HEADERS + VIEWS.replace("REPORTS", "\n    ".join(reports))
    metal(text).shapes(np.zeros(4, np.float32), found, threads=1, group_size=1)
    for rank in range(1, 9):
        assert found[rank - 1].tolist() == [*range(2, 2 + rank), *[0] * (8 - rank)]


def strided() -> str:
    """C = A B where A lies in threadgroup memory, and B and C are slices of wider matrices."""
    product = replace(PLAIN, m=16, n=24, left_space="threadgroup", mode="multiply", simdgroups=4)
    text = Text()
    text("threadgroup half stage[16 * 40];")
    with text.block("for (int i = thread_index; i < 16 * 20; i += 128)"):
        text("stage[i / 20 * 40 + i % 20] = a[i];")
    text("threadgroup_barrier(mem_flags::mem_threadgroup);")
    text(product.left_tile.declare("left", "stage", (20, 16), stride=40))
    text(product.right_tile.declare("wide_b", "b", (50, 20), strides=(1, 60)))
    text(Tile("float32").declare("wide_c", "c", (70, 40)))
    text(product.right_tile.slice("right", "wide_b", (26, 0)))
    text(Tile("float32").slice("corner", "wide_c", (46, 24)))
    text(product.declare("multiply"), product.run("multiply", "left", "right", "corner"))
    return HEADERS + kernel("strided", product, str(text)).replace(
        "ushort simdgroup [[simdgroup_index", "ushort thread_index [[thread_index"
    )


@pytest.mark.feature("J07")
def test_operands_in_threadgroup_memory_and_slices_of_strided_views(metal: Compile) -> None:
    a, b, c = operand("float16", (16, 20)), operand("float16", (20, 60)), np.zeros((40, 70))
    c = c.astype(np.float32)
    metal(strided()).strided(a, b, c, [0, 0, 0], threads=128, group_size=128)
    check_product(PLAIN, c[24:, 46:], a, b[:, 26:50])
    c[24:, 46:] = 0
    assert not c.any()


def planted(product: Matmul2d, *body: str) -> str:
    return HEADERS + kernel("planted", product, *views(product), product.declare("multiply"), *body)


FAULTS = {
    "simdgroups": (
        replace(PLAIN, simdgroups=2),
        ["multiply.run(left, right, whole);"],
        "another number of simdgroups",
    ),
    "part": (PLAIN, ["if (simdgroup == 0) { multiply.run(left, right, whole); }"], ""),
    "scope": (
        replace(PLAIN, simdgroups=4),
        ["if (simdgroup == 0) { multiply.run(left, right, whole); }"],
        "part of the threadgroup only",
    ),
    "k": (replace(PLAIN, k=64), ["multiply.run(left, right, whole);"], "k is not the descriptor's"),
    "stride": (
        PLAIN,
        ["tensor odd(a, dextents<int, 2>(1, 1), array<int, 2>{2, 1});"],
        "innermost axis must lie side by side",
    ),
    "index": (
        PLAIN,
        [
            PLAIN.destination("sum", "multiply", "left", "right"),
            "c[0] = sum.get_multidimensional_index(0)[0];",
        ],
        "not a valid one",
    ),
}


@pytest.mark.feature("J12")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_finds_misuse(metal: Compile, fault: str) -> None:
    product, body, message = FAULTS[fault]
    library = metal(planted(product, *body), tensor_layout=1)
    a, b = operand("float16", (16, 20)), operand("float16", (20, 8))
    c = np.zeros((16, 8), np.float32)
    launch = {"threads": 128, "group_size": 128}
    if message:
        with pytest.raises(Fault, match=message):
            library.planted(a, b, c, [16, 8, 20], **launch)
    else:  # the healthy twin: a simdgroup may run a product of its own
        library.planted(a, b, c, [16, 8, 20], **launch)
        check_product(PLAIN, c, a, b)


@pytest.mark.feature("J06", "J07")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("device const half* x = a; tensor y(x, dextents<int, 1>(4));", "const memory"),
        ("Matmul", "does not multiply these types"),
        ("tensor y(a, dextents<int, 9>(1, 1, 1, 1, 1, 1, 1, 1, 1));", "1 to 8 axes"),
    ],
)
def test_what_metal_does_not_compile_the_emulator_does_not(
    metal: Compile, line: str, message: str
) -> None:
    if line == "Matmul":
        other = Tile("int8").declare("bytes", "(device int8_t*)a", (4, 4))
        line = f"{other} multiply.run(left, bytes, bytes);"
    with pytest.raises(SyntaxError, match=message):
        metal(planted(PLAIN, line))


@pytest.mark.feature("J05")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_that_counts_on_a_layout_is_found(metal: Compile, layout: int) -> None:
    body = Text()
    body(PLAIN.destination("sum", "multiply", "left", "right"), "const uint lane = simdgroup;")
    fill(body, "sum")
    body(PLAIN.run("multiply", "left", "right", "sum"))
    with body.block("for (ushort i = 0; i < 64; ++i)"):
        body("c[i * 32 + lane] = sum[i];")
    text = planted(PLAIN, str(body)).replace("simdgroup_index_in_", "thread_index_in_")
    a, b = operand("float16", (64, 20)), operand("float16", (20, 32))
    c = np.zeros((64, 32), np.float32)
    metal(text, tensor_layout=layout).planted(a, b, c, [64, 32, 20], threads=32, group_size=32)
    if layout == 0:
        check_product(PLAIN, c, a, b)
    else:
        with pytest.raises(AssertionError, match="elements differ"):
            check_product(PLAIN, c, a, b)
