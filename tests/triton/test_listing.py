"""What is read from machine code: spills in loops over tiles, whatever a compiler did with them."""

from __future__ import annotations

import pytest

from tilefold.backends.triton.listing import instructions, spills

HELD = """def kernel():
    visited = 0
    for start in tl.range(first, last):
        o = tl.dot(p, v, o)
    visited = 1
    for start in tl.range(first, last):
        o = tl.dot(p, v, o)
"""
STREAMED = HELD.replace("        o =", "        for first_d in tl.range(0, 512, 64):\n        o =")

PIPELINED = """
    .loc 1 4 0
    v_mfma_f32_16x16x16_bf16 a, b, c
    scratch_store_dword off, v0
    v_mfma_f32_16x16x16_bf16 a, b, c
.L1:
    v_mfma_f32_16x16x16_bf16 a, b, c
    scratch_load_dword v0, off
    s_cbranch_scc0 .L1
    .loc 1 7 0
.L2:
    v_mfma_f32_16x16x16_bf16 a, b, c
    s_cbranch_scc0 .L2
"""
"""Two products stand before the loop over whole tiles; what spills beside them is not hot."""

NESTED = """
    scratch_store_dword off, v9
    .loc 1 5 0
.L1:
    scratch_load_dword v0, off
.L2:
    v_mfma_f32_16x16x16_bf16 a, b, c
    s_cbranch_scc0 .L2
    v_mfma_f32_16x16x16_bf16 a, b, c
    v_mfma_f32_16x16x16_bf16 a, b, c
    scratch_store_dword off, v0
    s_cbranch_scc0 .L1
    .loc 1 9 0
.L3:
    v_mfma_f32_16x16x16_bf16 a, b, c
    v_mfma_f32_16x16x16_bf16 a, b, c
    scratch_store_dword off, v0
    s_cbranch_scc0 .L3
"""
"""A loop over pieces within the one over whole tiles; that of tiles at an edge was unrolled."""


@pytest.mark.feature("M07")
@pytest.mark.parametrize(
    ("code", "text", "found"),
    [
        (PIPELINED, HELD, {"whole": 1, "edge": 0}),
        (NESTED, STREAMED, {"whole": 2, "edge": 1}),
    ],
)
def test_spills_are_those_of_the_loops_over_tiles(
    code: str, text: str, found: dict[str, int]
) -> None:
    assert spills(code, text) == found


def test_instructions_are_counted_by_kind() -> None:
    assert instructions(NESTED) == {"mfma": 5}
    assert instructions("v_fma_f64 v0\nv_pk_fma_f32 v1\nv_fmac_f64_e32 v2\n") == {"fma": 3}
