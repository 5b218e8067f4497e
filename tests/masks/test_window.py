"""A piece of a rule says what the rule says there, and is a rule like any other."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import mask_cases
import numpy as np
import pytest
from cases import Sizes, random_rule
from hypothesis import given
from hypothesis import strategies as st
from mask_cases import Case

from tilefold import Rule, causal, chunked, dense, documents, full, lengths, local, prefix, rule
from tilefold.masks.evaluate import index_bits
from tilefold.masks.parse import parse
from tilefold.masks.runs import Counts
from tilefold.masks.skeleton import split


@pytest.mark.slow
@pytest.mark.feature("M15")
@given(mask_cases.cases(), st.data())
def test_a_piece_is_a_slice_of_the_whole(case: Case, data: st.DataObject) -> None:
    s = case.sizes
    q0, k0 = data.draw(st.integers(0, s.len_q)), data.draw(st.integers(0, s.len_k))
    q1, k1 = data.draw(st.integers(q0, s.len_q)), data.draw(st.integers(k0, s.len_k))
    piece = case.rule.window(s.len_q, s.len_k, q0=q0, k0=k0)
    found = piece.to_dense(q1 - q0, k1 - k0, s.batch, s.heads)
    np.testing.assert_array_equal(found, case.dense()[..., q0:q1, k0:k1])


def test_pieces_join_and_have_pieces() -> None:
    sizes = Sizes(batch=2, heads=3, len_q=60, len_k=84)
    for seed in range(20):
        one, other = (random_rule(random.Random(2 * seed + i), sizes, 1) for i in (0, 1))
        whole = (one & ~other).to_dense(60, 84, 2, 3)
        pieces = one.window(60, 84, q0=20, k0=7), other.window(60, 84, q0=20, k0=7)
        joined = pieces[0] & ~pieces[1]
        np.testing.assert_array_equal(joined.to_dense(30, 70, 2, 3), whole[..., 20:50, 7:77])
        inner = joined.window(30, 70, q0=5, k0=9)
        np.testing.assert_array_equal(inner.to_dense(9, 8, 2, 3), whole[..., 25:34, 16:24])


@pytest.mark.feature("M15")
def test_tiles_of_a_piece_are_those_of_the_whole() -> None:
    """Tables keep their indices, and are bounded as tightly where pieces begin on a block."""
    ids = np.repeat(np.arange(8), 100)[:512]
    data = np.arange(512)[:, None] // 96 == np.arange(512) // 96
    for made in (causal() & local(70), documents(ids), dense(data), lengths(300), chunked(50)):
        whole = made.to_dense(512, 512)
        tiles = whole[128:384, 64:448].reshape(8, 32, 12, 32)
        full_, seen = tiles.all((1, 3)), tiles.any((1, 3))
        expected = Counts((~seen).sum(), full_.sum(), (seen & ~full_).sum())
        assert made.window(512, 512, q0=128, k0=64).blocks(256, 384, 32, 32) == expected


def test_all_pieces_of_a_mask_share_a_kernel() -> None:
    made = causal() & documents(np.arange(64) // 9)
    pieces = [made.window(64, 64, q0=q0, k0=k0) for q0 in (0, 16, 48) for k0 in (0, 32)]
    skeletons = {split(piece.bind(16, 32)).skeleton for piece in pieces}
    assert len(skeletons) == 1


def test_the_numbers_of_a_piece_decide_the_width_of_integers() -> None:
    product = rule(lambda q, k: q * k >= 0)
    for q0, bits in ((2**16 - 1, 32), (2**16, 64)):
        piece = product.window(2**17, 2**16, q0=q0, k0=2**15)
        assert index_bits(piece.bind(1, 1), 1, 1, 1, 1) == bits


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (causal().window(8, 8), "causal().window(8, 8)"),
        (causal().window(8, 9, q0=4), "causal().window(8, 9, q0=4)"),
        (local(3).window(8, 9, k0=4), "local(3).window(8, 9, k0=4)"),
        ((~full()).window(8, 9, q0=1, k0=2), "(~full()).window(8, 9, q0=1, k0=2)"),
        (~full().window(8, 9), "~full().window(8, 9)"),
        (
            (causal() & local(3)).window(8, 8, q0=4) | prefix(2),
            "(causal() & local(3)).window(8, 8, q0=4) | prefix(2)",
        ),
        (
            full().window(8, 9, q0=1).window(7, 9, k0=3),
            "full().window(8, 9, q0=1).window(7, 9, k0=3)",
        ),
        (
            rule(lambda q, k: q < k).window(4, 4, k0=3),
            "rule(lambda q, k: q < k).window(4, 4, k0=3)",
        ),
    ],
)
def test_a_piece_prints_as_it_is_made_and_reads_back(made: Rule, text: str) -> None:
    assert repr(made) == text
    assert parse(text) == made


def test_pieces_are_equal_by_rule_lengths_and_place() -> None:
    def make(**start: int) -> Rule:
        return documents([1, 2, 3, 4]).window(4, 4, **start)

    assert make(q0=2) == make(q0=2)
    assert hash(make(q0=2)) == hash(make(q0=2))
    others = (make(), make(k0=2), documents([1, 2, 3, 5]).window(4, 4, q0=2))
    assert len({make(q0=2), *others, full().window(4, 4, q0=2)}) == 5


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (lambda: causal().window(-1, 4), ValueError, "window: len_q must be an integer >= 0"),
        (lambda: causal().window(4, 2.5), TypeError, "window: len_k must be an integer >= 0"),
        (lambda: causal().window(4, 4, q0=-1), ValueError, "window: q0 must be an integer"),
        (lambda: causal().window(4, 4, q0=5), ValueError, "window: q0 must be <= len_q=4, got 5"),
        (lambda: causal().window(4, 4, k0="1"), TypeError, "window: k0 must be an integer"),
        (
            lambda: causal().window(4, 4, q0=2).to_dense(3, 4),
            ValueError,
            "causal().window(4, 4, q0=2): q0=2 and len_q=3 leave the whole, which ends at 4",
        ),
        (
            lambda: causal().window(4, 4, k0=1).blocks(4, 4, 2, 2),
            ValueError,
            "causal().window(4, 4, k0=1): k0=1 and len_k=4 leave the whole, which ends at 4",
        ),
        (
            lambda: documents([0, 1, 1]).window(4, 4).to_dense(3, 3),
            ValueError,
            "documents(ids[3]): ids_q has 3 entries, but len_q is 4; give one id per position",
        ),
        (
            lambda: lengths([1, 2]).window(4, 4).to_dense(3, 3, batch=3),
            ValueError,
            "lengths(n_k[2]): n_k is for a batch of 2, but batch is 3",
        ),
        (
            lambda: parse("causal().window(4)"),
            ValueError,
            "mask string, column 1: window takes len_q, len_k, q0, k0: missing a required",
        ),
        (
            lambda: parse("full() & causal().window(4, 4, k0=9)"),
            ValueError,
            "mask string, column 10: window: k0 must be <= len_k=4, got 9",
        ),
    ],
)
def test_pieces_that_do_not_fit_raise_one_line(
    wrong: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        wrong()
