"""Owners of the fused backward: how many, which keys and queries each has, where its part lies."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from cases import RULES, Sizes
from compare import assert_same
from operands import backward, forward, inputs
from trial import Trial, numbers, run

from tilefold import Rule, causal, full, lengths, local, prefix
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.heuristics import DEFAULT
from tilefold.backends.cpu.partitions import (
    FIRST_QUERY,
    FIRST_ROW,
    LAST_QUERY,
    LAST_ROW,
    PART,
    KeyPartitioner,
    fastest,
    rows_of_parts,
)
from tilefold.backends.cpu.plan import CpuPlan
from tilefold.backends.cpu.plan import plan as plan_of
from tilefold.problems.attention import Problem

plan = partial(plan_of, scope="machine")
"""Plans whose owners follow from the cores; `test_reproducible` has the others."""

MACHINE = Device("cpu", "described", "avx512", "", "", cores=4)
SPLIT = 0


def problem(
    heads: int | tuple[int, int],
    length: int | tuple[int, int],
    mask: Rule | None = None,
    **changes: Any,
) -> Problem:
    """One batch entry of float32 with dim 64, unless changed."""
    heads_q, heads_kv = heads if isinstance(heads, tuple) else (heads, heads)
    len_q, len_k = length if isinstance(length, tuple) else (length, length)
    sizes: dict[str, Any] = {"batch": 1, "dim": 64, "dim_v": 64, "dtype": "float32", "scale": 0.1}
    sizes |= {"heads_q": heads_q, "heads_kv": heads_kv, "len_q": len_q, "len_k": len_k}
    return Problem(**sizes | changes, mask=full() if mask is None else mask)


def chosen(made: CpuPlan) -> int:
    """How many owners each key head got; 0 where the form is split."""
    owners = {launch.spec.kernel: launch.item_rows for launch in made.launches}
    return owners.get("backward", SPLIT)


def partitioner_of(sizes: Problem) -> KeyPartitioner:
    """The partitioner of a problem's keys on the described machine."""
    of_q, of_k = plan(sizes, MACHINE, "backward", "split").launches[1:]
    return KeyPartitioner(sizes, of_k.runs, of_q.spec.block_parallel, of_k.spec.block_parallel, 256)


# How many --------------------------------------------------------------------------------------


@pytest.mark.feature("M05")
@pytest.mark.parametrize(
    ("heads", "length", "on_4", "on_8", "on_64"),
    [
        (8, 2048, 1, 1, 8),
        (4, 2048, 1, 2, 16),
        (3, 2048, 4, 8, 16),  # 12 owners of a quarter: 3 rounds instead of 4 quarters of one
        (2, 8192, 2, 4, SPLIT),
        (1, 8192, 4, 8, SPLIT),  # 64 parts would be larger than all arrays allow: 5 / 16 > 7 / 64
        (1, 32, 1, 1, 1),  # one block of keys has one owner
        ((32, 8), 4096, 1, 1, 8),
    ],
)
def test_few_heads_get_owners_enough_for_the_cores(
    heads: int | tuple[int, int], length: int, on_4: int, on_8: int, on_64: int
) -> None:
    found = [
        chosen(plan(problem(heads, length), replace(MACHINE, cores=cores), "backward"))
        for cores in (4, 8, 64)
    ]
    assert found == [on_4, on_8, on_64]


@pytest.mark.feature("M02", "M05", "T08")
def test_parts_anywhere_follow_from_the_length() -> None:
    """A power of two, and about the root of the length; one worker makes them for many heads."""

    def parts(length: int, heads: int | tuple[int, int] = 1, **changes: Any) -> tuple[int, bool]:
        sizes = problem(heads, length, **changes)
        (launch,) = (
            launch
            for launch in plan_of(sizes, MACHINE, "backward", scope="anywhere").launches
            if launch.spec.kernel == "backward"
        )
        return len(launch.owners), launch.spec.in_turn

    lengths_ = (500, 512, 1024, 2048, 4096, 8192, 65536)
    assert [parts(length)[0] for length in lengths_] == [1, 2, 4, 8, 8, 16, 16]
    assert [parts(length, mask=causal())[0] for length in lengths_] == [1, 2, 4, 8, 8, 16, 16]
    assert parts(8192, (8, 1))[0] == 8, "the parts of eight heads within `parts_share`"
    assert [parts(2048, heads)[1] for heads in (1, 2, 4, 8)] == [False, False, True, True]
    assert parts(2048, 8, dtype="bfloat16") == (8, True), "without pairs"


@pytest.mark.feature("M05")
def test_parts_of_a_window_are_small_so_it_feeds_many_cores() -> None:
    window = causal() & local(256)
    made = plan(problem(2, 8192, window), replace(MACHINE, cores=64), "backward")
    assert chosen(made) == 32


@pytest.mark.feature("M05")
def test_faster_products_make_parts_dearer() -> None:
    sizes = problem(1, 2048)
    slow = replace(partitioner_of(sizes), row_bytes=0)
    fast = replace(slow, product=1 / 32)
    assert fastest(slow, 32, True)[0] == 32
    assert 4 < fastest(fast, 32, True)[0] < 32


@pytest.mark.feature("M05")
def test_what_needs_a_part() -> None:
    """One owner of contiguous rows in the type that is computed in sums dq where it lies."""

    def kernels(sizes: Problem, **options: Any) -> list[str]:
        made = plan(sizes, MACHINE, "backward", **options)
        assert ("dq_parts" in made.buffers) == (made.launches[-1].spec.kernel == "reduce_dq")
        return [launch.spec.kernel for launch in made.launches]

    sizes = problem(8, 2048)
    assert kernels(sizes) == ["delta", "backward"]
    assert kernels(replace(sizes, dtype="float64")) == ["delta", "backward"]
    with_parts = ["delta", "backward", "reduce_dq"]
    assert kernels(sizes, in_place=False) == with_parts
    assert kernels(sizes, form="fused", owners=2) == with_parts
    assert kernels(replace(sizes, dtype="bfloat16")) == with_parts
    assert kernels(sizes, form="split") == ["delta", "backward_dq", "backward_dkv"]


@pytest.mark.feature("M01", "M05")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("cores", [1, 4, 64])
def test_parts_are_bounded_by_the_arrays_of_the_call(cores: int, dtype: str) -> None:
    for heads in (1, 3, (8, 1)):
        for dim in (3, 40, 128):
            for length in (100, 1000, 30000):
                sizes = problem(heads, length, dtype=dtype, dim=dim, dim_v=dim)
                made = plan(sizes, replace(MACHINE, cores=cores), "backward")
                if "dq_parts" not in made.buffers or chosen(made) == 1:
                    continue
                shape, kept = made.buffers["dq_parts"].shape, made.buffers["dq_parts"].dtype
                assert kept == ("float64" if dtype == "float64" else "float32")
                size = math.prod(shape) * np.dtype(kept).itemsize
                assert size <= DEFAULT.parts_share * sizes.bytes("backward"), (sizes, shape)


# Which keys and queries ------------------------------------------------------------------------

MASKS: dict[str, Rule] = {
    "full": full(),
    "causal": causal(),
    "window": causal() & local(60),
    "first keys": prefix(70),
    "lengths": lengths([900, 10]),
    "heads differ": RULES["heads-differ"](Sizes(2, 2, 700, 900)),
    "nothing": ~full(),
}


@pytest.mark.slow
@pytest.mark.feature("M05", "T07")
@pytest.mark.parametrize("owners", [1, 2, 3, 8, 15])
@pytest.mark.parametrize("mask", MASKS)
def test_owners_share_all_keys_and_hold_the_queries_that_these_meet(mask: str, owners: int) -> None:
    sizes = problem(2, (700, 900), MASKS[mask], batch=2)
    partitioner = partitioner_of(sizes)
    dealt = partitioner.cut(owners)
    assert len(dealt) == owners
    assert dealt[0, FIRST_ROW] == 0 and dealt[-1, LAST_ROW] == partitioner.runs.block_rows
    np.testing.assert_array_equal(dealt[1:, FIRST_ROW], dealt[:-1, LAST_ROW])
    seen = sizes.mask.to_dense(700, 900, batch=2, heads=2)
    by_any = np.broadcast_to(seen, (2, 2, 700, 900)).any(axis=(0, 1))
    for owner in dealt:
        keys = slice(owner[FIRST_ROW] * partitioner.block_k, owner[LAST_ROW] * partitioner.block_k)
        queries = np.flatnonzero(by_any[:, keys].any(axis=1))
        held = range(owner[FIRST_QUERY], owner[LAST_QUERY])
        assert all(query in held for query in queries)
        assert owner[FIRST_QUERY] % partitioner.block_q == 0
        assert owner[LAST_QUERY] % partitioner.block_q == 0 or owner[LAST_QUERY] == 700
    heaviest = partitioner.shares(dealt).max()
    assert heaviest <= partitioner.work.sum() / owners + partitioner.work.max()


@pytest.mark.feature("M05")
@pytest.mark.parametrize("mask", MASKS)
def test_parts_lie_one_after_another_and_every_block_of_queries_finds_its_own(mask: str) -> None:
    sizes = problem(2, (700, 900), MASKS[mask], batch=2)
    partitioner = partitioner_of(sizes)
    dealt = partitioner.cut(5)
    rows = [range(owner[FIRST_QUERY], owner[LAST_QUERY]) for owner in dealt]
    places = [
        query + int(owner[PART]) for owner, held in zip(dealt, rows, strict=True) for query in held
    ]
    assert places == list(range(rows_of_parts(dealt)))
    parts = partitioner.parts(dealt)
    for block in range(partitioner.blocks_q):
        found = parts.runs[parts.rows[block] : parts.rows[block + 1]]
        owners = [owner for first, last, _ in found for owner in range(first, last)]
        assert owners == [n for n, held in enumerate(rows) if block * partitioner.block_q in held]


@pytest.mark.feature("M01", "M05")
def test_parts_of_a_window_hold_each_query_about_once() -> None:
    sizes = problem(1, 30000, causal() & local(256))
    partitioner = partitioner_of(sizes)
    for owners in (2, 8, 60):
        rows = rows_of_parts(partitioner.cut(owners))
        assert rows <= 30000 + (owners - 1) * (256 + partitioner.block_q + 2 * partitioner.block_k)


# Results ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.feature("M04", "M05", "T08")
@pytest.mark.parametrize("mask", ["causal", "window", "lengths", "heads differ"])
@pytest.mark.parametrize("cores", [4, 8, 64])
def test_plans_for_more_cores_give_right_results_here(cores: int, mask: str) -> None:
    sizes = problem(2, (700, 900), MASKS[mask], batch=2, dim=24, dim_v=24)
    this = Trial(sizes, "bhdn")
    device = replace(host(), cores=cores)
    run(this, numbers(this), "backward", "auto", device=device)


@pytest.mark.slow
@pytest.mark.feature("T08")
def test_owners_change_results_only_by_rounding_and_one_part_not_at_all() -> None:
    sizes = problem((2, 1), (300, 420), causal(), dim=24, dim_v=16)
    operands = inputs(sizes, "bhnd", "packed")
    operands |= forward(sizes, operands)
    alone = backward(sizes, operands, "fused")
    for owners in (1, 2, 6, 1000):
        found = backward(sizes, operands, "fused", owners=owners, in_place=False)
        for name in ("dk", "dv"):
            assert_same(name, found[name], alone[name])
        if owners == 1:
            assert_same("dq", found["dq"], alone["dq"])
        np.testing.assert_allclose(found["dq"], alone["dq"], rtol=0, atol=2e-6)
