"""Tables that are known at launch only: plans see their bounds, and nobody reads their entries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilefold.masks.evaluate import exact, index_bits
from tilefold.masks.expression import Boolean, Declared, Index, Lookup, Table, TruthLookup
from tilefold.masks.rewrite import fill
from tilefold.masks.runs import Counts, count, runs
from tilefold.masks.skeleton import split

B, Q, K = (Index(name) for name in "bqk")
LENGTHS = Declared((2,), "int32", low=100, high=200)
BLOCK = 64


def below(table: Table | Declared) -> Boolean:
    """Keys below the length of their batch."""
    return Index("k") < Lookup(table, (B,))


def visited(expression: Boolean, length: int) -> tuple[np.ndarray, Counts]:
    """The kind of every tile, (batch, rows, columns), and how many there are of each."""
    found = runs(
        expression,
        parallel="q",
        batch=2,
        heads=1,
        len_parallel=length,
        len_traverse=length,
        block_parallel=BLOCK,
        block_traverse=BLOCK,
    )
    blocks = length // BLOCK
    kinds = np.full((len(found.rows) - 1, blocks), "skip", "<U7")
    for row, (start, end) in enumerate(zip(found.rows, found.rows[1:], strict=False)):
        for first, last, masked in found.runs[start:end]:
            kinds[row, first // BLOCK : last // BLOCK] = "partial" if masked else "full"
    return kinds.reshape(-1, blocks, blocks), count(found, length, BLOCK)


@pytest.mark.feature("M15")
def test_bounds_of_lengths_classify_tiles() -> None:
    kinds, counts = visited(below(LENGTHS), 512)
    assert kinds.shape == (2, 8, 8)
    assert (kinds == ["full", *["partial"] * 3, *["skip"] * 4]).all()
    assert counts == Counts(skip=64, full=16, partial=48)


@pytest.mark.slow
@pytest.mark.feature("M15")
@given(
    st.lists(st.integers(100, 200), min_size=2, max_size=2), st.integers(-150, 150), st.booleans()
)
def test_a_plan_holds_whatever_the_entries_are(
    entries: list[int], shift: int, causal: bool
) -> None:
    length = 256
    expression = K + shift < Lookup(LENGTHS, (B,))
    expression = expression & (Q >= K) if causal else expression
    kinds, _ = visited(expression, length)
    filled = fill(expression, [np.array(entries, np.int32)])
    b, q, k = np.ogrid[:2, :length, :length]
    dense = exact(filled, b=b, h=0, q=q, k=k)
    tiles = dense.reshape(2, length // BLOCK, BLOCK, length // BLOCK, BLOCK).swapaxes(2, 3)
    assert tiles.all((3, 4))[kinds == "full"].all()
    assert not tiles.any((3, 4))[kinds == "skip"].any()


def test_truths_with_bounds() -> None:
    for low, high, kind in ((0, 0, "skip"), (0, 1, "partial"), (1, 1, "full")):
        kinds, _ = visited(TruthLookup(Declared((128,), "bool", low, high), (K,)), 128)
        assert (kinds == kind).all()


def test_bounds_decide_the_width_of_integers() -> None:
    for high, bits in ((46341, 32), (46342, 64)):
        table = Declared((9,), "int32", low=-5, high=high)
        assert index_bits(Lookup(table, (K,)) * Q < 0, 1, 1, len_q=46341, len_k=9) == bits


def test_a_kernel_does_not_know_what_is_declared() -> None:
    ids = Table(np.array([3, 4], np.int32))
    known = below(ids) & (Lookup(ids, (Q,)) == 5)
    declared = below(LENGTHS) & (Lookup(ids, (Q,)) == 5)
    assert split(declared).skeleton == split(known).skeleton
    assert split(declared).parameters == split(known).parameters
    assert split(declared).tables == (LENGTHS, ids)
    assert [slot.name for slot in split(declared).declared] == ["t0"]
    assert split(known).declared == ()
    assert split(fill(declared, [np.array([100, 200], np.int32)])).declared == ()


def test_declared_tables_are_equal_by_what_is_declared() -> None:
    same = Declared((2,), "int32", 100, 200)
    assert same == LENGTHS and hash(same) == hash(LENGTHS)
    others = (
        Declared((3,), "int32", 100, 200),
        Declared((2,), "int32", 99, 200),
        Declared((2,), "int32", 100, 201),
    )
    assert LENGTHS not in others
    assert Declared((2,), "bool", 0, 1) != Declared((2,), "int32", 0, 1)
    assert str(below(LENGTHS)) == "(k < int32[2]{100..200}[b])"


def test_entries_must_be_there_and_keep_what_was_declared() -> None:
    expression = below(LENGTHS)
    with pytest.raises(ValueError, match=r"entries of int32\[2\]\{100..200\} are known at launch"):
        exact(expression, b=0, h=0, q=0, k=0)
    for array, reason in (
        (np.array([100, 201], np.int32), "got entries from 100 to 201"),
        (np.array([99, 200], np.int32), "got entries from 99 to 200"),
        (np.array([100, 200, 200], np.int32), r"got an array int32\[3\]"),
        (np.array([100, 200], np.int64), r"got an array int64\[2\]"),
    ):
        with pytest.raises(ValueError, match=reason):
            fill(expression, [array])
    for number in (0, 2):
        with pytest.raises(ValueError, match=f"1 tables are declared, got {number} arrays"):
            fill(expression, [np.array([100, 200], np.int32)] * number)
