"""Runs of tiles: they cover what a mask shows, skip what it hides, and stay small and fast."""

from __future__ import annotations

import doctest
import time
import tracemalloc
from typing import Any

import mask_cases
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mask_cases import Case
from numpy.typing import NDArray

from tilefold import causal, dense, documents, full, lengths, local, prefix, rule
from tilefold.masks import runs as blocks
from tilefold.masks.position_rules import Rule
from tilefold.masks.runs import Runs, runs

MILLION = 1 << 20


def test_the_examples_of_the_documentation_are_true() -> None:
    failed, tried = doctest.testmod(blocks)
    assert (failed, tried > 0) == (0, True)


def runs_of(
    made: Rule,
    len_q: int,
    len_k: int,
    block_q: int,
    block_k: int,
    *,
    parallel: str = "q",
    batch: int = 1,
    heads: int = 1,
) -> Runs:
    """The runs of a rule, with sizes and blocks named by side."""
    sizes = {"q": (len_q, block_q), "k": (len_k, block_k)}
    along, across = sizes[parallel], sizes["k" if parallel == "q" else "q"]
    return runs(
        made.bind(len_q, len_k),
        parallel=parallel,
        batch=batch,
        heads=heads,
        len_parallel=along[0],
        len_traverse=across[0],
        block_parallel=along[1],
        block_traverse=across[1],
    )


def row_of(found: Runs, row: int) -> list[list[int]]:
    return found.runs[found.rows[row] : found.rows[row + 1]].tolist()


def check_form(found: Runs, len_traverse: int, block_traverse: int) -> None:
    """What the kernels rely on: rows, types, order, whole tiles, and no two runs that are one."""
    assert found.rows.dtype == found.runs.dtype == np.int64
    assert found.rows[0] == 0
    assert found.rows[-1] == len(found.runs)
    for row in range(len(found.rows) - 1):
        end, kind = -1, -1
        for first, last, masked in row_of(found, row):
            assert 0 <= first < last <= len_traverse
            assert first % block_traverse == 0
            assert last % block_traverse == 0 or last == len_traverse
            assert masked in (0, 1)
            assert first > end or (first == end and masked != kind)
            end, kind = last, masked


def check_cover(found: Runs, visible: NDArray[np.bool_], block: int) -> None:
    """Every visible pair lies in a run, and a run without mask holds visible pairs only.

    `visible` has the axes (planes_b, planes_h, parallel, traverse).
    """
    planes = visible.reshape(-1, *visible.shape[2:])
    for plane, pairs in enumerate(planes):
        for row in range(found.block_rows):
            here = pairs[row * block : (row + 1) * block]
            covered = np.zeros(pairs.shape[1], bool)
            for first, last, masked in row_of(found, plane * found.block_rows + row):
                covered[first:last] = True
                assert masked or here[:, first:last].all()
            assert not here[:, ~covered].any()


@pytest.mark.slow
@pytest.mark.feature("M15", "T07")
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the patch is the same for all
)
@given(
    case=mask_cases.cases(longest=40),
    block_q=st.integers(1, 9),
    block_k=st.integers(1, 9),
    parallel=st.sampled_from("qk"),
    fine=st.booleans(),
)
def test_runs_cover_what_is_visible(
    case: Case,
    block_q: int,
    block_k: int,
    parallel: str,
    fine: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Small super-tiles bring several levels and chunks to masks that can be checked pair by pair.
    with monkeypatch.context() as patch:
        if fine:
            patch.setattr(blocks, "FAN", 2)
            patch.setattr(blocks, "TOP_TILES", 4)
            patch.setattr(blocks, "CHUNK_TILES", 8)
            patch.setattr(blocks, "COMPACT_SEGMENTS", 5)
        s = case.sizes
        found = runs_of(
            case.rule,
            s.len_q,
            s.len_k,
            block_q,
            block_k,
            parallel=parallel,
            batch=s.batch,
            heads=s.heads,
        )
    visible = case.dense()[: found.planes_b, : found.planes_h]
    if parallel == "k":
        visible = visible.swapaxes(2, 3)
    along, across = (block_q, block_k) if parallel == "q" else (block_k, block_q)
    assert found.block_rows == -(-visible.shape[2] // along)
    check_form(found, visible.shape[3], across)
    check_cover(found, visible, along)


@pytest.mark.feature("M15", "T07")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=mask_cases.cases(longest=40), block=st.integers(1, 6))
@pytest.mark.slow
def test_super_tiles_change_nothing(
    case: Case, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = case.sizes
    sizes = (s.len_q, s.len_k, block, block)
    at_once = runs_of(case.rule, *sizes, batch=s.batch, heads=s.heads)
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "FAN", 2)
        patch.setattr(blocks, "TOP_TILES", 2)
        coarse_to_fine = runs_of(case.rule, *sizes, batch=s.batch, heads=s.heads)
    # What is known of a tile is known of its parts, so looking at super-tiles first loses nothing.
    np.testing.assert_array_equal(coarse_to_fine.rows, at_once.rows)
    np.testing.assert_array_equal(coarse_to_fine.runs, at_once.runs)


@pytest.mark.feature("M15", "T05")
@pytest.mark.parametrize("parallel", ["q", "k"])
@pytest.mark.parametrize("window", [1, 5, 64, 100, 1000])
def test_a_sliding_window_has_at_most_three_runs(window: int, parallel: str) -> None:
    found = runs_of(causal() & local(window), 2000, 2000, 64, 32, parallel=parallel)
    check_form(found, 2000, 32 if parallel == "q" else 64)
    kinds = {tuple(run[2] for run in row_of(found, row)) for row in range(found.block_rows)}
    assert kinds <= {(1,), (1, 0, 1), (0, 1), (1, 0)}
    if window == 1000:
        assert (1, 0, 1) in kinds


@pytest.mark.feature("T07", "M15")
def test_hidden_tiles_are_not_visited() -> None:
    assert causal().blocks(1024, 1024, 64, 64) == (120, 120, 16)
    assert (causal() & local(64)).blocks(1024, 1024, 64, 64) == (225, 0, 31)
    assert full().blocks(1000, 1000, 64, 64) == (0, 256, 0)
    assert lengths(100).blocks(64, 1024, 64, 64) == (14, 1, 1)
    assert documents(np.arange(1024) // 256).blocks(1024, 1024, 64, 64) == (192, 64, 0)
    assert (~full()).blocks(64, 64, 64, 64) == (1, 0, 0)


DOCUMENTS = [
    np.repeat(np.arange(5), counts) for counts in ((3, 70, 1, 40, 8), (90, 70, 300, 35, 9))
]


@pytest.mark.feature("T07", "M15")
@pytest.mark.parametrize(
    ("made", "len_q", "len_k"),
    [
        (lengths([500, 70, 0], side="left"), 64, 512),
        (lengths([500, 70, 0], side="left") & causal(), 64, 512),
        (causal(lengths=[500, 70, 0]), 100, 512),
        (causal(lengths=[500, 70, 0]) & local(40, lengths=[500, 70, 0]), 100, 512),
        (documents([DOCUMENTS[0]] * 3, DOCUMENTS[1], causal=True), 122, 504),
    ],
    ids=repr,
)
def test_no_more_tiles_are_visited_than_of_the_dense_mask(
    made: Rule, len_q: int, len_k: int
) -> None:
    sizes = {"len_q": len_q, "len_k": len_k, "block_q": 16, "block_k": 32, "batch": 3}
    assert made.blocks(**sizes) == dense(made.to_dense(len_q, len_k, batch=3)).blocks(**sizes)


def test_counts_are_per_plane() -> None:
    made = lengths([64, 100, 0])
    assert made.blocks(64, 128, 64, 64, batch=3) == (3, 2, 1)
    assert made.blocks(64, 128, 64, 64, batch=3, heads=8) == (3, 2, 1)
    per_head = rule(lambda h, q, k: k < (h + 1) * 64)
    assert per_head.blocks(64, 128, 64, 64, heads=2) == (1, 3, 0)
    assert per_head.blocks(64, 128, 64, 64, batch=5, heads=2) == (1, 3, 0)


@pytest.mark.parametrize(
    ("made", "planes"),
    [
        (causal(), (1, 1)),
        (lengths([3, 4]), (2, 1)),
        (rule(lambda h, q, k: q - k < h), (1, 3)),
        (rule(lambda h, q, k: q - k < h) & documents([[0] * 8] * 2), (2, 3)),
        (dense(np.ones((2, 1, 8, 8), bool)), (2, 1)),
        (dense(np.ones((1, 3, 1, 8), bool)), (1, 3)),
    ],
    ids=repr,
)
def test_planes_are_those_that_a_rule_depends_on(made: Rule, planes: tuple[int, int]) -> None:
    found = runs_of(made, 8, 8, 4, 4, batch=2, heads=3)
    assert (found.planes_b, found.planes_h) == planes
    assert len(found.rows) == planes[0] * planes[1] * 2 + 1


def test_tails_are_clipped() -> None:
    found = runs_of(full(), 10, 7, 4, 4)
    assert found.runs.tolist() == [[0, 7, 0]] * 3
    found = runs_of(causal(), 10, 7, 4, 4, parallel="k")
    assert found.runs.tolist() == [[0, 8, 1], [8, 10, 0], [4, 10, 1]]


@pytest.mark.parametrize(("len_q", "len_k"), [(0, 0), (0, 9), (9, 0)])
def test_empty_sequences_have_no_runs(len_q: int, len_k: int) -> None:
    for parallel, rows in (("q", -(-len_q // 4)), ("k", -(-len_k // 4))):
        found = runs_of(causal(), len_q, len_k, 4, 4, parallel=parallel)
        assert found.runs.shape == (0, 3)
        assert found.rows.tolist() == [0] * (rows + 1)
    none = runs_of(lengths(np.zeros(0, int)), 8, 8, 4, 4, batch=0)
    assert (none.planes_b, none.block_rows, none.rows.tolist()) == (0, 0, [0])


def measured(made: Rule, len_q: int, len_k: int, **given: Any) -> tuple[Runs, float, int]:
    """The runs, the best time of three in seconds of CPU, and the peak of memory in bytes."""
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        found = runs_of(made, len_q, len_k, 64, 64, **given)
        seconds.append(time.process_time() - begin)
    tracemalloc.start()
    runs_of(made, len_q, len_k, 64, 64, **given)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, min(seconds), peak


@pytest.mark.slow
@pytest.mark.feature("T07", "M15")
@pytest.mark.parametrize("parallel", ["q", "k"])
def test_a_window_over_a_million_tokens_is_planned_at_once(parallel: str) -> None:
    made = causal() & local(4096)
    found, seconds, peak = measured(made, MILLION, MILLION, parallel=parallel)
    assert np.diff(found.rows).max() == 3
    assert found.runs[:, 2].sum() < len(found.runs)
    assert peak < 100 * 2**20
    assert seconds < 0.5, "0.1 s is promised; a busy machine is given five times that"


@pytest.mark.slow
@pytest.mark.parametrize(
    "made",
    [
        causal(),
        full(),
        documents(np.arange(MILLION) // 1000) & causal(),
        causal() & (local(1024) | prefix(8)),
        local(9, grid_q=(1024, 1024)),
        causal(grid_q=(1024, 1024)) & local(5, grid_q=(1024, 1024)),
    ],
    ids=repr,
)
def test_masks_over_a_million_tokens_cost_their_own_length(made: Rule) -> None:
    found, seconds, peak = measured(made, MILLION, MILLION)
    assert found.block_rows == MILLION // 64
    assert peak < 100 * 2**20
    assert seconds < 1


@pytest.mark.parametrize(
    "made",
    [
        dense(np.random.default_rng(0).random((4096, 4096)) < 0.5),
        rule(lambda q, k: (q - k) % 3 == 0),
        documents(np.random.default_rng(0).integers(0, 9, 4096)),
    ],
    ids=repr,
)
def test_masks_that_skip_nothing_are_planned_at_once_too(made: Rule) -> None:
    found, seconds, peak = measured(made, 4096, 4096)
    assert found.runs.tolist() == [[0, 4096, 1]] * 64
    assert seconds < 0.5
    assert peak < 100 * 2**20
