"""Products by tiles of Metal 4's matmul2d, through the public call, on the emulator."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from metal import TENSOR_LAYOUTS, machine
from numpy.typing import NDArray
from product_cases import assert_product, padded

import tilefold
from tilefold.metal import Matmul2d

Array = NDArray[Any]

TILE = Matmul2d(64, 64, None, "float16", "float16", "float32", simdgroups=4)
SIX = ((64, 64, 64), (64, 128, 64), (128, 64, 64), (128, 128, 64), (64, 64, 128), (256, 192, 128))
"""Rows, columns and the contraction of the products that Metal.jl tested."""


def normal(*shape: int, dtype: str = "float16") -> Array:
    return np.random.default_rng(shape).normal(size=shape).astype(dtype)


@pytest.mark.slow
@pytest.mark.feature("J05", "J07", "J08", "J09")
@pytest.mark.parametrize("layout", TENSOR_LAYOUTS)
def test_tiles_give_what_the_public_product_gives(layout: int) -> None:
    """The bound of float64 is what Metal.jl reports of a GPU, for numbers that are all positive."""
    on = machine("apple10", tensor_layout=layout)
    for rows, columns, length in SIX:
        random = np.random.default_rng(0)
        shapes = (rows, length), (length, columns)
        a, b = (random.uniform(size=shape).astype(np.float16) for shape in shapes)
        got = tilefold.metal.gemm(a, b, dtype="float32", blocks=TILE, machine=on)
        want = a.astype(np.float64) @ b
        assert abs(got - want).max() <= 3e-7 * want.max()
        public = tilefold.gemm(a, b, out_dtype="float32")
        assert abs(got - public).max() <= 1e-6 * want.max()


@pytest.mark.slow
@pytest.mark.feature("J05", "J06", "J08")
@pytest.mark.parametrize(
    ("tile", "kept", "turned"),
    [
        (TILE, "bfloat16", (True, False)),
        (replace(TILE, m=16, left="bfloat16", right="bfloat16", simdgroups=1), "float16", (0, 1)),
        (replace(TILE, k=32, left="float32", simdgroups=2), "float32", (True, True)),
    ],
    ids=["halves", "bfloat16", "known k"],
)
def test_all_that_a_product_has_is_there(
    tile: Matmul2d, kept: str, turned: tuple[bool, bool]
) -> None:
    """Edges, transposes, a batch, padded rows, a bias of rows, and C beside the result."""
    on, length = machine("apple10"), 96 if tile.k else 45
    for rows, columns in ((70, 100), (1, 3)):
        a = normal(2, rows, length, dtype=tile.left)
        b = padded(normal(length, columns, dtype=tile.right))
        one = np.ascontiguousarray(a.swapaxes(-1, -2)) if turned[0] else a
        two = padded(np.ascontiguousarray(b.T)) if turned[1] else b
        c, bias = normal(columns, dtype="float32")[None], normal(2, rows, 1, dtype=kept)
        options: dict[str, Any] = {"bias": bias, "activation": "gelu_tanh", "beta": 0.5}
        got = tilefold.metal.gemm(
            *(one, two, c),
            out=np.full((2, rows, columns), np.nan, kept),
            transpose_a=bool(turned[0]),
            transpose_b=bool(turned[1]),
            blocks=tile,
            machine=on,
            **options,
        )
        assert_product(got, a, b, c=c, activation_unit=3e-7, **options)


@pytest.mark.feature("J06", "A06")
@pytest.mark.parametrize(
    ("tile", "options", "error", "message"),
    [
        (replace(TILE, left="bfloat16"), {}, ValueError, "a must be bfloat16 for these tiles"),
        (replace(TILE, result="float16"), {}, ValueError, "must be tiles that accumulate in float"),
        (replace(TILE, mode="multiply"), {}, ValueError, "got float32 and multiply"),
        (replace(TILE, left_space="threadgroup"), {}, ValueError, "that read device memory"),
        (replace(TILE, k=32), {}, ValueError, "k must be a multiple of 32, got 40"),
        (TILE, {"gate": normal(40, 8)}, NotImplementedError, "tiles have one product"),
    ],
    ids=["types", "result", "mode", "space", "known k", "gate"],
)
def test_what_no_tile_serves_is_refused(
    tile: Matmul2d, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        tilefold.metal.gemm(
            normal(8, 40), normal(40, 8), blocks=tile, machine=machine("apple10"), **options
        )


@pytest.mark.feature("A06")
def test_columns_apart_and_codes_are_refused() -> None:
    on = machine("apple10")
    with pytest.raises(NotImplementedError, match="with adjacent elements along an axis, and a ha"):
        tilefold.metal.gemm(normal(8, 80)[:, ::2], normal(40, 8), blocks=TILE, machine=on)
    with pytest.raises(NotImplementedError, match="tiles walk forwards, and a is reversed"):
        tilefold.metal.gemm(normal(8, 40)[::-1], normal(40, 8), blocks=TILE, machine=on)
    w: Any = tilefold.quantize(normal(32, 8), "int8")
    tile: Any = TILE
    with pytest.raises(NotImplementedError, match="tiles are views of numbers, not of codes"):
        tilefold.metal.qgemm(normal(8, 32), w, blocks=tile, machine=on)
