"""Metal 4's tensor operations: their typed description, and the texts made of them on the executor.

The executor's stand-in for Apple's headers lays the elements of a cooperative tensor out in two
different ways, and the tests of texts run both: the layout on a GPU is not defined.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tilefold.backends.metal.matmul2d import ELEMENTS, PRODUCTS, Matmul2d, Tile

PLAIN = Matmul2d(64, 32, None, "float16", "float16", "float32")


@pytest.mark.feature("J05")
@pytest.mark.parametrize("name", ["m", "n"])
@pytest.mark.parametrize("value", [0, -8, 12, 264])
def test_a_tile_of_another_size_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {value}"):
        replace(PLAIN, **{name: value})


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
    other = replace(PLAIN, k=64, transpose_left=True, relaxed_precision=True, mode="multiply")
    other = replace(other, simdgroups=4)
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
    with pytest.raises(ValueError, match="has 48 threads"):
        PLAIN.check_threads(48)
    with pytest.raises(ValueError, match="simdgroups must be a whole number from 1 to 32, got 33"):
        replace(PLAIN, simdgroups=33)


@pytest.mark.feature("J07")
def test_a_tile_has_one_number_for_each_axis() -> None:
    with pytest.raises(ValueError, match="extents must have 3 numbers, one for each axis, got 2"):
        Tile("float32", 3).declare("a", "q", (4, 5))
    with pytest.raises(ValueError, match="strides must begin with 1, got 2"):
        Tile("float32").declare("a", "q", (4, 5), strides=(2, 4))
    with pytest.raises(ValueError, match="rank must be a whole number from 1 to 8, got 9"):
        Tile("float32", 9)
    with pytest.raises(ValueError, match="origin must have 2 numbers"):
        Tile("float32").slice("b", "a", (0,))
    with pytest.raises(ValueError, match="space must be 'device' or 'threadgroup'"):
        Tile("float32", space="constant")
