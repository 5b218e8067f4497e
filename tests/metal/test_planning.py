"""Plans for Apple GPUs can be asked, overridden and read; every one fits its GPU."""

from __future__ import annotations

import doctest
import itertools
import re

import numpy as np
import pytest
from cases import RULES
from cases import Sizes as Lengths
from hypothesis import given, settings
from hypothesis import strategies as st

from tilefold import causal, documents, full, lengths, local
from tilefold.backends.metal import choice, families, tables
from tilefold.backends.metal.choice import choose
from tilefold.backends.metal.dispatch import Emulated
from tilefold.backends.metal.families import FAMILIES, family
from tilefold.backends.metal.heuristics import DEFAULT, Heuristics
from tilefold.backends.metal.kernels.storage import BYTES
from tilefold.backends.metal.plan import Launch, Planner, plan
from tilefold.backends.metal.source import emit
from tilefold.backends.metal.spec import KERNELS, SUMS, Blocks, whole
from tilefold.masks.runs import Runs
from tilefold.planning import tiles as visits
from tilefold.planning.tiles import runs_to_tiles
from tilefold.problems.attention import Problem

DTYPES = ("float32", "float16", "bfloat16")
TILED = ("forward", "backward_dq", "backward_dkv")


@pytest.mark.feature("M07")
@pytest.mark.parametrize("module", [choice, families, tables, visits])
def test_examples(module: object) -> None:
    failed, tried = doctest.testmod(module)
    assert tried and not failed


@pytest.mark.feature("M07")
def test_there_are_twelve_tables_in_the_order_of_their_dims() -> None:
    count = 0
    for gpu in ("apple7", "apple9"):
        for kernel in TILED:
            for dtype in ("float32", "float16"):
                rows = tables.table(gpu, kernel, dtype)
                dims = [row.dim for row in rows]
                assert dims == sorted(set(dims)) and dims[-1] == 384
                assert all(set(row.cached) <= set(KERNELS[kernel].resident) for row in rows)
                assert all(row.blocks.parallel == (32 if gpu == "apple7" else 16) for row in rows)
                assert not rows[-1].cached
                count += 1
    assert count == 12 == len(tables._TABLES)
    assert tables.table("apple9", "forward", "bfloat16") == tables.table(
        "apple9", "forward", "float16"
    )
    assert {made.table for made in FAMILIES.values()} == {gpu for gpu, _, _ in tables._TABLES}


@pytest.mark.slow
@pytest.mark.feature("M06", "M07")
@settings(deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from(sorted(KERNELS)),
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
        assert ("spill" in held) == (not {*KERNELS[kernel].resident} & {*SUMS} <= {*made.cached})


@pytest.mark.slow
@pytest.mark.feature("M07")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["apple7", "apple9"])
def test_the_text_declares_what_the_choice_counted(name: str, dtype: str) -> None:
    """Held operands, sums, pages, and the arrays in threadgroup memory."""
    for dim, dim_v in ((13, 40), (96, 64), (160, 200), (300, 300)):
        shapes = {"q": (1, 1, 5, dim), "k": (1, 1, 600, dim), "v": (1, 1, 600, dim_v)}
        asked = problem(causal(), dtype=dtype, **shapes)
        forms = plan(asked, name, "forward", form="tiled").launches
        for launch in (*forms, *all_launches(asked, name)):
            text, made = emit(launch.spec), launch.choice
            declared = re.findall(r"simdgroup_matrix<(\w+), 8, 8> (\w+)\[(\d+)\];", text)
            sizes = {array: 2 * int(count) * BYTES[kind] for kind, array, count in declared}
            counted = dict(made.registers)
            for operand in made.cached:
                suffix = "sum" if operand in SUMS else "held"
                assert sizes[f"{operand}_{suffix}"] == counted[operand], launch.spec
            assert sizes.get("spill", 0) <= counted.get("spill", 0)
            assert ("spill" in sizes) == ("spill" in counted)
            assert max(sizes.get("s", 0), sizes.get("dp", 0)) <= counted.get("tiles", 0)
            arrays = re.findall(r"threadgroup (\w+) \w+\[(\d+)\];", text)
            shared = sum({"bool": 1, **BYTES}[kind] * int(count) for kind, count in arrays)
            assert shared == made.threadgroup_bytes <= 32768


@pytest.mark.feature("M07")
def test_what_leaves_the_registers_leaves_in_order_and_says_why() -> None:
    found = []
    for dim in (96, 128, 192, 400):
        for kernel in TILED:
            made = choose(family("apple7"), kernel, "bfloat16", dim, dim)
            gone = [operand for operand, _ in made.evicted]
            assert gone == [operand for operand in KERNELS[kernel].leaving if operand in gone]
            for operand, reason in made.evicted:
                assert f"  {operand} leaves the registers: {reason}" in made.explain()
                found.append((dim, kernel, operand))
    assert {(96, "forward", "q"), (128, "forward", "q")} <= {*found}
    narrow = Blocks(16, 144, 16)
    made = choose(family("apple9"), "backward_dkv", "float32", 128, 128, blocks=narrow)
    assert made.blocks == narrow and made.cached == ("dv",)
    assert made.evicted == (("dk", "with it 16 x 144 x 16 takes 544 bytes of registers"),)


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
        ({"blocks": Blocks(16, 128, 64)}, "take 34818 bytes of threadgroup memory.*has 32768"),
        ({"blocks": Blocks(16, 520, 8)}, "nothing cached: 16 x 520 x 8 takes 528 bytes.*has 512"),
        ({"cached": ("q", "o")}, "q o cached: .* bytes of registers per thread; apple9 has 512"),
        ({"cached": ("q", "dq")}, "forward keeps any of q, o in registers, got dq"),
    ],
)
def test_what_cannot_fit_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(family("apple9"), "forward", "float32", 300, 300, **options)


def test_float64_and_other_families_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="float64 is not a type of Apple's GPUs"):
        choose(family("apple9"), "forward", "float64", 64, 64)
    for named in (family, Emulated):
        with pytest.raises(ValueError, match=r"^family must be .*, got 'apple6'$"):
            named("apple6")


def problem(mask: object = None, **options: object) -> Problem:
    """Batch 2, 4 query heads on 2 key heads, 300 queries and 420 keys."""
    shapes = {"q": (2, 4, 300, 24), "k": (2, 2, 420, 24), "v": (2, 2, 420, 40)}
    return Problem.of(**{**shapes, "mask": mask, **options})


def all_launches(asked: Problem, name: str) -> list[Launch]:
    return [x for op in ("forward", "backward") for x in plan(asked, name, op).launches]


@pytest.mark.feature("M05")
@pytest.mark.parametrize("name", ["apple7", "apple9"])
def test_every_block_row_has_one_threadgroup_in_each_head(name: str) -> None:
    kernels = []
    for launch in all_launches(problem(causal() & local(100)), name):
        spec = launch.spec
        length, heads = (300, 4) if spec.row.parallel == "q" else (420, 2)
        rows = -(-length // spec.blocks.parallel)
        assert launch.grid == (rows, heads, 2)
        assert launch.threads == (rows * spec.threads, heads, 2)
        assert sorted(launch.order) == list(range(rows))
        assert np.all(np.diff(launch.runs.met[launch.order]) <= 0)
        kernels.append(spec.kernel)
    assert kernels == list(TILED)


@pytest.mark.slow
@pytest.mark.feature("M15")
@pytest.mark.parametrize("rule", sorted(RULES))
def test_block_rows_visit_what_the_rule_shows_and_little_else(rule: str) -> None:
    mask = RULES[rule](Lengths(2, 4, 300, 420))
    asked = problem(mask)
    visible = mask.to_dense(300, 420, 2, 4)
    for launch in all_launches(asked, "apple9"):
        over_q = launch.spec.row.parallel == "q"
        seen = visible if over_q else visible.swapaxes(2, 3)
        runs, width = launch.runs, launch.spec.blocks.parallel
        for b in range(runs.planes_b):
            for h in range(runs.planes_h):
                for row in range(runs.block_rows):
                    index = (b * runs.planes_h + h) * runs.block_rows + row
                    visits = np.zeros(seen.shape[3], np.int64)
                    block = seen[b, h, row * width : (row + 1) * width]
                    for first, last, masked in runs.runs[runs.rows[index] : runs.rows[index + 1]]:
                        visits[first:last] += 1
                        assert masked or block[:, first:last].all()
                    assert visits.max(initial=0) <= 1
                    assert visits[block.any(0)].all()
    if rule in ("local", "causal", "chunked"):
        assert 0 < plan(asked, "apple9", "forward").launches[0].runs.met.sum() < 0.75 * 19 * 420


@pytest.mark.slow
@pytest.mark.feature("M15")
@settings(deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 9), st.sampled_from((0, 1, 2))), max_size=8)),
    st.integers(1, 12),
)
def test_runs_become_as_few_tiles_as_cover_them(
    rows: list[list[tuple[int, int]]], step: int
) -> None:
    """Rows of pieces, each skipped, full or masked; nothing seen is lost or seen twice."""
    ends, found = [0], []
    for pieces in rows:
        at = 0
        for length, kind in pieces:
            if kind < 2:
                found.append((at, at + length, kind))
            at += length
        ends.append(len(found))
    before = Runs(np.array(ends), np.array(found, np.int64).reshape(-1, 3), 1, 1)
    after = runs_to_tiles(before, step)
    for row in range(len(rows)):
        old, new = (each.runs[each.rows[row] : each.rows[row + 1]] for each in (before, after))
        seen, full = (np.zeros(80, np.int64) for _ in range(2))
        for first, last, masked in old:
            seen[first:last] += 1
            full[first:last] += not masked
        chains = np.split(seen, np.flatnonzero(np.diff(seen)) + 1)
        fewest = sum(-(-len(chain) // step) for chain in chains if chain[0])
        assert sum(-(-(last - first) // step) for first, last, _ in new) == fewest
        for first, last, masked in new:
            assert seen[first:last].all() and (masked or full[first:last].all())
            seen[first:last] = 0
        assert not seen.any()
        kinds = [tuple(run) for run in new]
        assert kinds == sorted(kinds)
        assert all(a[1] < b[0] or a[2] != b[2] for a, b in itertools.pairwise(kinds))


@pytest.mark.feature("M15")
def test_a_narrow_window_is_one_tile() -> None:
    asked = problem(
        causal() & local(64), q=(1, 2, 4096, 64), k=(1, 2, 4096, 64), v=(1, 2, 4096, 64)
    )
    launch = plan(asked, "apple9", "forward", blocks=Blocks(16, 128, 32)).launches[0]
    assert np.diff(launch.runs.rows).max() == 1 and launch.runs.met.max() <= 128


@pytest.mark.feature("M01", "M04")
def test_scratch_is_an_element_per_row_and_the_spilled_sums() -> None:
    for name in ("apple7", "apple9"):
        assert not plan(problem(), name, "forward").buffers
        buffers = plan(problem(), name, "backward").buffers
        assert buffers["delta"].shape == (2, 4, 300) and buffers["delta"].dtype == "float32"
        for sum_, shape in (("dk_spill", (2, 2, 420, 24)), ("dv_spill", (2, 2, 420, 40))):
            spilled = (
                sum_.removesuffix("_spill")
                not in plan(problem(), name, "backward").launches[1].spec.cached
            )
            assert (sum_ in buffers) == spilled
            assert not spilled or buffers[sum_].shape == shape
    wide = {"q": (2, 4, 300, 400), "k": (2, 2, 420, 400), "v": (2, 2, 420, 500)}
    assert plan(problem(**wide), "apple9", "forward").buffers["o_spill"].shape == (2, 4, 300, 500)
    assert plan(problem(**wide), "apple9", "backward").buffers.keys() == {
        *("delta", "dq_spill", "dk_spill", "dv_spill")
    }


@pytest.mark.feature("M07")
def test_a_plan_is_overridden_by_kernel_and_kept() -> None:
    asked = problem()
    blocks, cached = {"backward_dkv": Blocks(8, 48, 24)}, {"backward_dq": ("dq",)}
    made = plan(asked, "apple9", "backward", blocks=blocks, cached=cached)
    dq, dkv = made.launches
    assert dq.spec.cached == ("dq",) and dq.spec.blocks != blocks["backward_dkv"]
    assert dkv.spec.blocks == blocks["backward_dkv"] and dkv.grid[0] == 53
    assert plan(asked, "apple9", "backward", blocks=blocks, cached=cached) is made
    assert plan(asked, "apple8", "backward", blocks=blocks, cached=cached) is not made
    blocks = Blocks(24, 40, 8)
    (launch,) = plan(asked, "apple9", "forward", blocks=blocks, cached=("q",)).launches
    assert (launch.spec.blocks, launch.spec.cached) == (blocks, ("q",))
    for unknown, message in (
        ({"operation": "training"}, "operation must be"),
        ({"form": "fused"}, "form must be"),
        ({"operation": "backward", "form": "decode"}, "form must be 'auto' or 'tiled', got 'deco"),
        ({"blocks": {"dq": blocks}}, "a kernel of blocks must be 'forward', .*, got 'dq'"),
        ({"cached": {"dkv": ("k",)}}, "a kernel of cached must be 'forward', .*, got 'dkv'"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(asked, "apple9", **{"operation": "forward", **unknown})
    for wrong in ((8, 8, 8), {"forward": (8, 8, 8)}, 8):
        with pytest.raises(TypeError, match=r"^blocks must be Blocks, or Blocks by kernel, got"):
            plan(asked, "apple9", "forward", blocks=wrong)
    with pytest.raises(
        TypeError, match=r"^problem must be a tilefold.Problem such as .*, got None"
    ):
        plan(None, "apple9", "forward")  # type: ignore[arg-type]  # the point
    with pytest.raises(NotImplementedError, match="float64"):
        plan(problem(dtype="float64"), "apple9", "forward")


@pytest.mark.feature("M07")
def test_a_plan_explains_itself() -> None:
    asked = problem(q=(2, 4, 300, 96), k=(2, 2, 420, 96), v=(2, 2, 420, 96), dtype="bfloat16")
    assert plan(asked, "apple7", "backward").explain() == (
        """\
backward_dq: 32 x 48 x 32, cached dq
  from table apple7, dim up to 96: 32 x 64 x 32, cached dq
  traverse shrinks to 48: 32 x 64 x 32 takes 224 bytes of registers
  registers 192 of 216 bytes: dq 96, tiles 96
  threadgroup 6916 of 32768 bytes
  grid 10 x 4 x 2 threadgroups of 128 threads
backward_dkv: 32 x 32 x 32, cached dv
  from table apple7, dim up to 96: 32 x 64 x 32, cached dv
  traverse shrinks to 32: 32 x 64 x 32 takes 256 bytes of registers
  registers 192 of 216 bytes: dv 96, tiles 64, spill 32
  threadgroup 4612 of 32768 bytes
  grid 14 x 2 x 2 threadgroups of 128 threads
scratch delta: 2 x 4 x 300 float32
scratch dk_spill: 2 x 2 x 420 x 96 float32""".splitlines()
    )


@pytest.mark.parametrize(("len_q", "len_k"), [(0, 7), (7, 0), (0, 0)])
def test_a_plan_of_nothing_has_empty_grids_or_empty_runs(len_q: int, len_k: int) -> None:
    shapes = {"q": (2, 4, len_q, 8), "k": (2, 2, len_k, 8), "v": (2, 2, len_k, 8)}
    for launch in all_launches(problem(documents([0] * len_q, [0] * len_k), **shapes), "apple9"):
        length = len_q if launch.spec.row.parallel == "q" else len_k
        assert launch.grid[0] == -(-length // launch.spec.blocks.parallel)
        assert not launch.runs.met.any()


@pytest.mark.feature("M05", "M15")
@pytest.mark.parametrize("mask", [full(), causal() & local(1500)])
def test_decoding_cuts_keys_into_splits_and_rows_into_fragments(mask: object) -> None:
    shapes = {"q": (2, 12, 3, 200), "k": (2, 3, 2000, 200), "v": (2, 3, 2000, 96)}
    made = plan(problem(mask, **shapes), "apple9", "forward", form="decode")
    part, merge = made.launches
    count = part.splits
    assert part.grid == (2 * count, 3, 2)  # 4 heads x 3 queries are 2 fragments
    assert merge.grid == (3, 12, 2) and merge.splits == count
    assert sorted(part.order) == list(range(2 * count))
    assert np.all(np.diff(part.runs.met[part.order % count]) <= 0)
    assert part.runs.met.max() <= DEFAULT.keys_per_split
    first = 0 if mask == full() else 480  # a run begins at a multiple of MASK_STEP
    assert part.runs.met.sum() == 2000 - first
    assert made.buffers["part_o"].shape == (2, 12, count, 3, 96)
    assert made.buffers["part_m"].shape == made.buffers["part_l"].shape == (2, 12, count, 3)
    with pytest.raises(ValueError, match="no query or no key"):
        plan(problem(k=(2, 2, 0, 24), v=(2, 2, 0, 24)), "apple9", "forward", form="decode")


@pytest.mark.feature("M07")
def test_decode_makes_as_many_splits_of_a_key_head_as_fill_the_gpu() -> None:
    window = Problem.of((1, 2, 4, 64), (1, 2, 10**5, 64), mask=causal() & local(1000))
    part = plan(window, "apple9", "forward").launches[0]
    assert part.splits == -(-part.runs.met.sum() // DEFAULT.keys_per_split) < 6
    # Where there are threadgroups enough, keys are not split further.
    long = Problem.of((2, 8, 1, 64), (2, 4, 10**6, 64))
    part = plan(long, "apple9", "forward").launches[0]
    assert part.grid == (part.splits, 4, 2) and 1000 < part.splits <= 1024
    few_groups = Planner(long, family("apple9"), heuristics=Heuristics(enough_groups=64))
    assert 60 < few_groups.plan("forward").launches[0].splits <= 64


@pytest.mark.feature("M07")
def test_the_splits_of_a_key_head_do_not_depend_on_what_is_beside_it() -> None:
    def cuts(batch: int, heads: int, *lens: int) -> object:
        shapes = (batch, heads, 1, 64), (batch, heads, 10**6, 64)
        problem = Problem.of(*shapes, mask=lengths(lens * (batch // len(lens))))
        runs = plan(problem, "apple9", "forward").launches[0].runs
        return runs.runs[: runs.rows[runs.block_rows]].tolist()

    alone = cuts(1, 1, 10**5)
    assert len(alone) > 100
    assert cuts(64, 1, 10**5) == cuts(2, 32, 10**5) == cuts(2, 1, 10**5, 10**6) == alone
