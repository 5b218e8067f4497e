"""Blocks of Triton kernels: tables in order, checks of what is asked for, and what shrinks."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilefold.backends.triton import choice, resources, tables
from tilefold.backends.triton.architectures import ARCHITECTURES, architecture
from tilefold.backends.triton.choice import choose
from tilefold.backends.triton.spec import KERNELS, Blocks

DTYPES = ("float16", "bfloat16", "float32", "float64")
NAMES = sorted(ARCHITECTURES)
VISITING = [name for name, row in KERNELS.items() if row.visits]


@pytest.mark.feature("M07")
@pytest.mark.parametrize("module", [choice, tables])
def test_examples(module: object) -> None:
    failed, tried = doctest.testmod(module)
    assert tried and not failed


@pytest.mark.feature("M07")
def test_tables_are_in_the_order_of_their_dims() -> None:
    for name in {made.table for made in ARCHITECTURES.values()}:
        for kernel in VISITING:
            for kind in tables.KINDS:
                rows = tables.table(name, kernel, kind)
                dims = [row.dim for row in rows]
                assert dims == sorted(set(dims)) and rows[0].blocks.warps
                if kernel == "decode":
                    assert all(row.blocks.parallel == 16 for row in rows)
            half = tables.table(name, kernel, "half")
            compiled = kernel != "backward_inputs"  # it has the blocks of another kernel
            assert half[0].dim <= 128
            assert all((row.spills is not None) == compiled for row in half)


@pytest.mark.slow
@pytest.mark.feature("M06", "M07")
@settings(deadline=None)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(sorted(KERNELS)),
    st.sampled_from(DTYPES),
    st.sampled_from(("ieee", "tf32x3", "tf32")),
    st.integers(1, 512),
    st.integers(1, 512),
)
def test_every_choice_fits(
    name: str, kernel: str, dtype: str, float32_mode: str, dim: int, dim_v: int
) -> None:
    device = architecture(name)
    made = choose(device, kernel, dtype, dim, dim_v, float32_mode=float32_mode)
    kind = resources.kind(dtype, float32_mode)
    assert made.shared_bytes <= device.shared_bytes
    assert made.registers <= resources.room(device, kind, made.blocks)
    assert not made.descriptors or (device.descriptors and made.blocks.parallel >= 64)
    if made.blocks != tables_blocks(name, kernel, kind, max(dim, dim_v)):
        assert any(" shrink to " in why or " at most" in why for why in made.reasons)


def tables_blocks(name: str, kernel: str, kind: str, dim: int) -> Blocks:
    """The blocks of the table, or of a kernel that has none."""
    if kernel in VISITING:
        return tables.row(architecture(name).table, kernel, kind, dim).blocks
    return choose(architecture(name), kernel, "float16", dim, dim).blocks


@pytest.mark.feature("M07")
def test_what_is_asked_for_is_taken_or_refused_in_a_line() -> None:
    device = architecture("sm_90")
    asked = Blocks(32, 16, 2, 2)
    made = choose(device, "forward", "bfloat16", 128, 128, blocks=asked)
    assert made.blocks == asked and made.explain()[1] == "  blocks that were asked for"
    with pytest.raises(ValueError) as raised:
        choose(device, "forward", "bfloat16", 128, 128, blocks=Blocks(128, 128, 8, 4))
    assert str(raised.value) == (
        "forward of bfloat16, dim 128, dim_v 128, 128 x 128, 8 warps, 4 stages: about 295424 bytes"
        " of shared memory, and sm_90 has 232448"
    )
    with pytest.raises(ValueError, match="320 registers of a thread for sums and scores, of 255"):
        choose(device, "backward_dkv", "bfloat16", 64, 64, blocks=Blocks(128, 16, 2, 1))


@pytest.mark.feature("M07")
def test_more_rows_to_decode_shrink_what_does_not_fit() -> None:
    usual = choose(architecture("sm_80"), "decode", "float16", 128, 128)
    made = choose(architecture("sm_80"), "decode", "float16", 128, 128, rows=64)
    assert made.blocks.parallel == 64 and made.blocks.traverse <= usual.blocks.traverse
    assert "64 rows of queries are decoded together" in made.reasons
    wide = choose(architecture("sm_120"), "decode", "float16", 512, 512, rows=64)
    assert any(" shrink to " in why and "shared memory" in why for why in wide.reasons)


@pytest.mark.feature("A06")
def test_what_no_blocks_can_hold_is_refused_with_the_reason() -> None:
    small = replace(architecture("sm_80"), shared_bytes=8192)
    with pytest.raises(NotImplementedError, match=r"shared memory, and sm_80 has 8192: use the"):
        choose(small, "backward_dkv", "float64", 450, 450)


@pytest.mark.feature("M06", "M07")
@pytest.mark.parametrize("name", NAMES)
def test_wide_heads_are_streamed_where_they_do_not_fit(name: str) -> None:
    wide = choose(architecture(name), "backward_dkv", "float64", 512, 512)
    assert wide.blocks.streamed and not wide.descriptors
    usual = choose(architecture(name), "backward_dkv", "bfloat16", 128, 128)
    assert not usual.blocks.streamed


@pytest.mark.feature("M07")
def test_float64_has_no_more_rows_than_triton_compiles() -> None:
    device = architecture("sm_100")
    assert choose(device, "forward", "float64", 64, 64).blocks.parallel == 32
    assert choose(device, "decode", "float64", 64, 64, rows=64).blocks.parallel == 32
    with pytest.raises(ValueError, match="sm_100 multiplies 32 rows of float64 at most"):
        choose(device, "forward", "float64", 64, 64, blocks=Blocks(64, 16, 4, 1))
