"""The exact fold is Python's arithmetic; the interval fold is never wrong, and often tight."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from typing import Any

import mask_cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import Case
from numpy.typing import NDArray

from tilefold import causal, chunked, dense, documents, full, lengths, local, prefix, rule
from tilefold.masks import evaluate, table_bounds
from tilefold.masks.evaluate import Range, exact, index_bits, intervals
from tilefold.masks.expression import (
    Boolean,
    Expression,
    Index,
    Integer,
    Lookup,
    Table,
    TruthLookup,
)
from tilefold.masks.position_rules import Rule
from tilefold.masks.table_bounds import TableBounds

# Tracing Python's operations doubles the time of these tests.
pytestmark = pytest.mark.no_cover

Q, K = Index("q"), Index("k")


@pytest.mark.parametrize("module", [evaluate, table_bounds], ids=lambda m: m.__name__)
def test_the_examples_of_the_documentation_are_true(module: Any) -> None:
    failed, tried = doctest.testmod(module)
    assert (failed, tried > 0) == (0, True)


# The exact fold.


@pytest.mark.parametrize("divisor", [1, 2, 3, 7])
def test_division_floors_as_in_python(divisor: int) -> None:
    for q in range(-9, 10):
        for k in (q // divisor, q % divisor):
            here = {"b": 0, "h": 0, "q": q, "k": k}
            assert exact((Q // divisor == K) | (Q % divisor == K), **here).item()
    shifted = rule(lambda q, k: (k - q) // 3 == -1).to_dense(5, 5)
    assert shifted.tolist() == [[-3 <= k - q < 0 for k in range(5)] for q in range(5)]


def test_exact_broadcasts_even_what_reads_no_index() -> None:
    expression = full().bind(2, 3)
    q, k = np.ogrid[:2, :3]
    assert exact(expression, b=0, h=0, q=q, k=k).tolist() == [[True] * 3] * 2
    batches = np.arange(4)[:, None, None, None]
    assert exact(expression, b=batches, h=0, q=q, k=k).shape == (4, 1, 2, 3)


# The interval fold.


def tiles_of(lengths: tuple[int, int], blocks: tuple[int, int]) -> dict[str, Any]:
    """The first and last index of every tile of a grid."""
    ranges = {}
    for axis, name in enumerate("qk"):
        first = np.arange(0, lengths[axis], blocks[axis])
        last = np.minimum(first + blocks[axis], lengths[axis]) - 1
        shape = (-1, 1) if axis == 0 else (1, -1)
        ranges[name] = (first.reshape(shape), last.reshape(shape))
    return ranges


def truly(
    visible: NDArray[np.bool_], blocks: tuple[int, int]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether all and whether any pairs of each tile are visible."""
    starts = [np.arange(0, size, block) for size, block in zip(visible.shape, blocks, strict=True)]
    numbers = visible.astype(np.uint8)
    every, some = (
        join.reduceat(join.reduceat(numbers, starts[0], axis=0), starts[1], axis=1).astype(bool)
        for join in (np.minimum, np.maximum)
    )
    return every, some


def known_of(
    expression: Boolean, lengths: tuple[int, int], blocks: tuple[int, int], b: int, h: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    ranges = tiles_of(lengths, blocks) | {"b": (b, b), "h": (h, h)}
    summary = TableBounds({"q": blocks[0], "k": blocks[1]})
    known = intervals(expression, ranges, summary)
    shape = (len(ranges["q"][0]), ranges["k"][0].size)
    return np.broadcast_to(known.all, shape), np.broadcast_to(known.any, shape)


BLOCKS = st.tuples(st.integers(1, 9), st.integers(1, 9))


def check_tiles(case: Case, blocks: tuple[int, int]) -> None:
    s = case.sizes
    expression = case.rule.bind(s.len_q, s.len_k)
    visible = case.dense()
    for b, h in np.ndindex(s.batch, s.heads):
        every, some = known_of(expression, (s.len_q, s.len_k), blocks, b, h)
        truly_every, truly_some = truly(visible[b, h], blocks)
        assert not (every & ~truly_every).any(), "a tile is called full"
        assert not (truly_some & ~some).any(), "a tile is called skipped"


@pytest.mark.slow
@pytest.mark.feature("T07", "M15")
@given(mask_cases.cases(longest=36), BLOCKS)
def test_no_tile_is_called_full_or_skipped_that_is_not(case: Case, blocks: tuple[int, int]) -> None:
    check_tiles(case, blocks)


@pytest.mark.slow
@pytest.mark.feature("T07", "M15")
@settings(max_examples=400)
@given(mask_cases.cases(longest=49, depth=3), BLOCKS)
def test_no_tile_of_many_masks_is_called_what_it_is_not(
    case: Case, blocks: tuple[int, int]
) -> None:
    check_tiles(case, blocks)


@pytest.mark.slow
@pytest.mark.feature("T07")
@given(mask_cases.cases(longest=30), st.data())
def test_tiles_of_any_extent(case: Case, data: st.DataObject) -> None:
    """Tiles that lie on no grid, over ranges of the batch and the heads too."""
    s = case.sizes
    expression = case.rule.bind(s.len_q, s.len_k)
    ranges = {}
    for name, size in (("b", s.batch), ("h", s.heads), ("q", s.len_q), ("k", s.len_k)):
        first = data.draw(st.integers(0, size - 1), label=name)
        ranges[name] = (first, data.draw(st.integers(first, size - 1)))
    known = intervals(expression, ranges, TableBounds({}))
    inside = case.dense()[tuple(slice(first, last + 1) for first, last in ranges.values())]
    assert inside.all() or not known.all
    assert known.any or not inside.any()


GRIDS = [((5, 6), (5, 6)), ((4, 3), (2, 7)), ((2, 9), (6, 3)), ((3, 3), (6, 6))]

UNLIKE = [np.repeat(np.arange(6), counts) for counts in ((3, 1, 1, 9, 4, 5), (8, 6, 1, 7, 2, 9))]
"""Documents with fewer queries than keys, as many, and more."""

TIGHT: list[tuple[Rule, int, int]] = [
    *((causal(align), 23, 17) for align in ("end", "start")),
    *((causal(sync=sync), 17, 35) for sync in mask_cases.SYNCS),
    *((local(window), 31, 31) for window in (1, 4, 9)),
    *((causal() & local(window), 19, 31) for window in (1, 4, 9)),
    *((local(window, causal=True, sync="scale_end"), 31, 15) for window in (2, 5)),
    *((prefix(n), 9, 20) for n in (0, 7, 20)),
    (lengths(11), 9, 20),
    (lengths(11, side="left"), 9, 20),
    (lengths(11, side="left") & causal(), 9, 20),
    *((causal(lengths=n), 9, 20) for n in (0, 5, 17, 20)),
    *((local(window, causal=True, lengths=17), 9, 20) for window in (1, 4)),
    (chunked(6), 31, 31),
    (documents(np.arange(30) // 7), 30, 30),
    (causal() & documents(np.arange(30) // 7), 30, 30),
    (documents(np.arange(30) // 7, causal=True), 30, 30),
    (documents(UNLIKE[0], UNLIKE[1], causal=True), len(UNLIKE[0]), len(UNLIKE[1])),
    (documents(UNLIKE[1], UNLIKE[0], causal=True), len(UNLIKE[1]), len(UNLIKE[0])),
    (~causal(), 20, 20),
    *(
        (causal(sync=sync, grid_q=(h, w), grid_k=(m, n)), h * w, m * n)
        for sync in (None, *mask_cases.SYNCS)
        for (h, w), (m, n) in GRIDS
    ),
]


@pytest.mark.feature("T07", "M15")
@pytest.mark.parametrize(("tight", "len_q", "len_k"), TIGHT, ids=repr)
def test_tiles_are_classified_exactly(tight: Rule, len_q: int, len_k: int) -> None:
    """Order, windows, chunks, lengths and sorted documents lose no tile; raster order neither."""
    for blocks in ((1, 1), (4, 4), (4, 7), (8, 3), (5, 16)):
        every, some = known_of(tight.bind(len_q, len_k), (len_q, len_k), blocks, 0, 0)
        truly_every, truly_some = truly(tight.to_dense(len_q, len_k), blocks)
        np.testing.assert_array_equal(every, truly_every, str(blocks))
        np.testing.assert_array_equal(some, truly_some, str(blocks))


@pytest.mark.feature("T07")
def test_a_tile_that_begins_and_ends_mid_row_keeps_its_pairs() -> None:
    window = local(9, sync="scale_front", grid_q=(12, 56), grid_k=(30, 33))
    len_q, len_k, blocks = 12 * 56, 30 * 33, (32, 28)
    visible = window.to_dense(len_q, len_k)
    assert visible.sum() == 96075
    every, some = known_of(window.bind(len_q, len_k), (len_q, len_k), blocks, 0, 0)
    truly_every, truly_some = truly(visible, blocks)
    assert not (truly_some & ~some).any()
    assert not (every & ~truly_every).any()
    assert some.mean() < 0.6, "and hidden tiles are still skipped"


# Bounds of tables.


@pytest.mark.slow
@settings(max_examples=200)
@given(st.data())
def test_bounds_of_tables_are_those_of_their_blocks(data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)))
    grain = {"q": data.draw(st.integers(1, 6)), "k": data.draw(st.integers(1, 6))}
    truths = data.draw(st.booleans())
    axes = data.draw(st.permutations("bqk")) if truths else data.draw(st.permutations("bq"))
    sizes = dict(zip("bqk", shape, strict=True))
    inner = tuple(sizes[axis] for axis in axes)
    chance = data.draw(st.sampled_from((0.1, 0.9)))
    array = random.random(inner) < chance if truths else random.integers(-9, 9, inner, np.int32)
    expected, asked = [], []
    for axis in axes:
        step = grain.get(axis, 1)
        first = data.draw(st.integers(0, (sizes[axis] - 1) // step)) * step
        blocks = 1 if axis == "b" else data.draw(st.integers(1, 5))
        last = min(first + blocks * step, sizes[axis]) - 1
        expected.append(slice(first, last + 1))
        asked.append(Range(np.array([first]), np.array([last]), axis))
    low, high = TableBounds(grain).bounds(Table(array), tuple(asked))
    inside = array[tuple(expected)]
    assert (low.item(), high.item()) == (inside.min(), inside.max())


def test_tables_at_computed_places_are_bounded_as_a_whole() -> None:
    table = Table(np.array([3, 1, 2], np.int32))
    halves = Lookup(table, (Q // 2,)) >= K
    known = intervals(halves, {"q": (0, 1), "k": (3, 3)}, TableBounds({}))
    assert (known.all, known.any) == (False, True)
    truths = TruthLookup(Table(np.array([True, True])), (Q // 2,))
    assert intervals(truths, {"q": (0, 1)}, TableBounds({})).all


# The width of indices.


@pytest.mark.parametrize(
    ("made", "len_q", "len_k", "bits"),
    [
        (causal(), 2**20, 2**20, 32),
        (local(10**30, stride=10**20, causal=True), 2**20, 2**20, 32),
        (prefix(10**30), 9, 2**30, 32),
        (chunked(10**30), 9, 9, 32),
        (causal(lengths=[2**20]) & local(10**30, lengths=[2**20]), 2**20, 2**20, 32),
        (lengths([9], side="left"), 9, 9, 32),
        (causal(grid_q=(2**10, 2**10)), 2**20, 2**20, 32),
        (causal(grid_q=(2**20, 1), grid_k=(1, 2**20)), 2**20, 2**20, 64),
        (rule(lambda q, k: q * q > k), 46341, 9, 32),
        (rule(lambda q, k: q * q > k), 46342, 9, 64),
        (rule(lambda q, k: -q * q > k), 46342, 9, 64),
        (rule(lambda q, k: abs(q - k) * 2**31 > k), 2, 2, 64),
        (rule(lambda q, k: q % 3000000000 > k), 2, 2, 64),
        (rule(lambda q, k: q > -(2**31)), 2, 2, 32),
        (rule(lambda q, k: q > 2**31), 2, 2, 64),
        (documents(np.array([0, 2**31 - 1])), 2, 2, 32),
        (dense([[True, False]]), 2, 2, 32),
    ],
    ids=repr,
)
def test_index_bits(made: Rule, len_q: int, len_k: int, bits: int) -> None:
    assert index_bits(made.bind(len_q, len_k), 1, 1, len_q, len_k) == bits


def integers_of(node: Expression) -> Iterator[Integer]:
    """The nodes of a tree that are numbers."""
    if isinstance(node, Integer):
        yield node
    for value in vars(node).values():
        for below in value if isinstance(value, tuple) else (value,):
            if isinstance(below, Expression):
                yield from integers_of(below)


@settings(max_examples=200)
@given(mask_cases.cases(longest=12))
@pytest.mark.slow
def test_every_node_stays_within_the_width_of_indices(case: Case) -> None:
    s = case.sizes
    expression = case.rule.bind(s.len_q, s.len_k)
    if index_bits(expression, s.batch, s.heads, s.len_q, s.len_k) == 32:
        b, h, q, k = np.ogrid[: s.batch, : s.heads, : s.len_q, : s.len_k]
        for node in integers_of(expression):
            within = (node >= -(2**31)) & (node < 2**31)
            assert exact(within, b=b, h=h, q=q, k=k).all(), str(node)


def test_numbers_past_64_bits_are_refused() -> None:
    expression = rule(lambda q, k: q * 2**62 > k).bind(3, 3)
    assert index_bits(expression, 1, 1, 2, 2) == 64
    with pytest.raises(OverflowError, match="at most 64 bits are allowed"):
        index_bits(expression, 1, 1, 3, 3)
