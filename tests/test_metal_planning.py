"""Plans for Apple GPUs can be asked, overridden and read; every one fits its GPU."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilefold.backends.metal import choice, families, tables
from tilefold.backends.metal.choice import LEAVING, choose
from tilefold.backends.metal.families import FAMILIES, family
from tilefold.backends.metal.spec import HELD, SUMS, Blocks, whole

DTYPES = ("float32", "float16", "bfloat16")
KERNELS = ("forward", "backward_dq", "backward_dkv")


@pytest.mark.feature("M07")
@pytest.mark.parametrize("module", [choice, families, tables])
def test_examples(module: object) -> None:
    failed, tried = doctest.testmod(module)  # type: ignore[arg-type]
    assert tried and not failed


@pytest.mark.feature("M07")
def test_there_are_twelve_tables_in_the_order_of_their_dims() -> None:
    count = 0
    for gpu in ("apple7", "apple9"):
        for kernel in KERNELS:
            for dtype in ("float32", "float16"):
                rows = tables.table(gpu, kernel, dtype)
                dims = [row.dim for row in rows]
                assert dims == sorted(set(dims)) and dims[-1] == 384
                assert all(set(row.cached) <= set(HELD[kernel]) for row in rows)
                assert all(row.blocks.parallel == (32 if gpu == "apple7" else 16) for row in rows)
                assert not rows[-1].cached
                count += 1
    assert count == 12 == len(tables._TABLES)
    assert tables.table("apple9", "forward", "bfloat16") == tables.table(
        "apple9", "forward", "float16"
    )
    assert {made.table for made in FAMILIES.values()} == {gpu for gpu, _, _ in tables._TABLES}


@pytest.mark.feature("M06", "M07")
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from(sorted(HELD)),
    st.sampled_from(DTYPES),
    st.integers(1, 1024),
    st.integers(1, 1024),
)
def test_every_choice_fits_its_gpu(
    name: str, kernel: str, dtype: str, dim: int, dim_v: int
) -> None:
    gpu = family(name)
    for width in {dim, dim_v}:
        made = choose(gpu, kernel, dtype, dim, width)
        assert made.register_bytes <= gpu.register_bytes
        assert made.threadgroup_bytes <= gpu.threadgroup_bytes
        assert made.blocks.parallel * 4 <= gpu.threads
        assert made.blocks.head <= whole(max(dim, width))
        assert not {operand for operand, _ in made.evicted} & set(made.cached)
        held = dict(made.registers)
        for operand in made.cached:
            columns = whole(width if operand in ("v", "o", "do", "dv") else dim)
            narrow = operand not in SUMS and dtype != "float32" and (gpu.bfloat or "b" not in dtype)
            assert held[operand] == columns // 4 * (2 if narrow else 4)
        assert ("page" in held) == (not {*HELD[kernel]} & {*SUMS} <= {*made.cached})


@pytest.mark.feature("M07")
def test_what_leaves_the_registers_leaves_in_order_and_says_why() -> None:
    found = []
    for dim in (96, 192, 400):
        for kernel in KERNELS:
            made = choose(family("apple7"), kernel, "bfloat16", dim, dim)
            gone = [operand for operand, _ in made.evicted]
            assert gone == [operand for operand in LEAVING[kernel] if operand in gone]
            for operand, reason in made.evicted:
                assert f"  {operand} leaves the registers: {reason}" in made.explain()
                found.append((dim, kernel, operand))
    assert (96, "forward", "q") in found and (96, "backward_dkv", "dv") in found
    narrow = Blocks(16, 112, 16)
    made = choose(family("apple9"), "backward_dkv", "float32", 128, 128, blocks=narrow)
    assert made.blocks == narrow and made.cached == ("dv",)
    assert made.evicted == (("dk", "with it 16 x 112 x 16 takes 592 bytes of registers"),)


@pytest.mark.feature("M07")
def test_a_choice_is_overridden_as_a_whole_or_in_parts() -> None:
    gpu = family("apple9")
    usual = choose(gpu, "forward", "float32", 64, 64)
    assert (usual.blocks, usual.cached) == (Blocks(16, 64, 16), ("o",))
    blocks = Blocks(32, 24, 8)
    assert choose(gpu, "forward", "float32", 64, 64, blocks=blocks).cached == ("o",)
    made = choose(gpu, "forward", "float32", 64, 64, cached=("o", "q"))
    assert (made.blocks, made.cached) == (usual.blocks, ("q", "o"))
    made = choose(gpu, "forward", "float32", 64, 64, blocks=blocks, cached=())
    assert (made.blocks, made.cached, made.evicted) == (blocks, (), ())
    # What is given stays cached: the traverse block gives way.
    made = choose(gpu, "backward_dq", "float32", 240, 240, cached=("dq", "do"))
    assert made.blocks.traverse == 16 and made.cached == ("do", "dq")


@pytest.mark.feature("M07")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": Blocks(264, 32, 16)}, "blocks 264 x 32 x 16 take 1056 threads.*has 1024"),
        ({"blocks": Blocks(16, 128, 64)}, "take 34816 bytes of threadgroup memory.*has 32768"),
        ({"blocks": Blocks(16, 520, 8)}, "nothing cached: 16 x 520 x 8 takes 528 bytes.*has 512"),
        ({"cached": ("q", "o")}, "q o cached: .* bytes of registers per thread; apple9 has 512"),
        ({"cached": ("q", "dq")}, "forward keeps any of q, o in registers, got dq"),
    ],
)
def test_what_cannot_fit_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(family("apple9"), "forward", "float32", 300, 300, **options)  # type: ignore[arg-type]


def test_float64_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="float64 is not a type of Apple's GPUs"):
        choose(family("apple9"), "forward", "float64", 64, 64)
    with pytest.raises(ValueError, match="family must be"):
        family("apple6")
