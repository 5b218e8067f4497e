"""Derivatives of expressions: against finite differences, and in the simplest form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from score_trees import K, Q, trees

from tilefold.masks.derivative import derivatives
from tilefold.masks.evaluate import exact_real
from tilefold.masks.expression import FromInteger, RealLookup, ScoreValue, as_real
from tilefold.masks.tables import Input
from tilefold.scores.functions import exp, sqrt, tanh, where

S = ScoreValue()
ARRAYS = {0: np.random.default_rng(0).normal(size=(3, 4)), 1: np.array([0.7])}
FIRST = RealLookup(Input(0, "float64", (3, 4)), (Q, K))
SECOND = RealLookup(Input(1, "float64", (1,)), (Q * 0,))
STEP = 1e-5

LEAVES = [S, S, FIRST, SECOND, FromInteger(Q), FromInteger(K - Q), as_real(0.5)]


def value(expression: Any, s: Any, arrays: Any = ARRAYS) -> Any:
    q, k = np.ogrid[:3, :4]
    return exact_real(expression, s, b=0, h=0, q=q, k=k, inputs=arrays)


def near(got: Any, low: Any, middle: Any, high: Any) -> bool:
    """True if a slope is that between two values, or where they bend that of one side."""
    left, right = (middle - low) / STEP, (high - middle) / STEP
    size = 1e-4 * (1 + abs(left) + abs(right))
    smooth = abs(got - (left + right) / 2) <= size
    sides = np.minimum(abs(got - left), abs(got - right)) <= size
    return bool((smooth | sides).all())


@pytest.mark.slow
@settings(max_examples=150, derandomize=True)
@given(trees(LEAVES), st.integers(0, 2**16))
def test_derivatives_are_those_of_finite_differences(expression: Any, seed: int) -> None:
    s = np.random.default_rng(seed).normal(size=(3, 4))
    found = derivatives(as_real(expression))
    middle = value(expression, s)
    assume(np.abs(middle).max() < 1e6)
    shifted = [value(expression, s + step) for step in (-STEP, STEP)]
    assert near(value(found.score, s), shifted[0], middle, shifted[1])
    for number, array in ARRAYS.items():
        total = np.zeros((3, 4))
        for entry, slope in found.entries:
            if entry.table.number == number:  # type: ignore[union-attr]  # all tables are inputs
                total += value(slope, s)
        moved = [value(expression, s, ARRAYS | {number: array + step}) for step in (-STEP, STEP)]
        assert near(total, moved[0], middle, moved[1])


SIMPLE = [
    (S, "1"),
    (as_real(3.0), "0.0"),
    (FIRST * 2.0, "0.0"),
    (S + FIRST, "1"),
    (S - 0.5 * abs(FromInteger(Q - K)), "1"),
    (S * 2.0 * 3.0, "6"),
    (-S, "-1"),
    (-abs(-S), "where((-s > 0.0), 1, where((-s < 0.0), -1, 0.0))"),
    (S / 4.0, "0.25"),
    (exp(S), "exp(s)"),
    (where(Q >= K, S, -np.inf), "where((q >= k), 1, 0.0)"),
    (where(Q >= K, S, 2.0 * S), "where((q >= k), 1, 2)"),
    (10.0 * tanh(S), "(10 * (1 - (tanh(s) * tanh(s))))"),
]


@pytest.mark.parametrize(("expression", "text"), SIMPLE, ids=lambda x: str(x))
def test_derivatives_are_simplified(expression: Any, text: str) -> None:
    assert str(derivatives(as_real(expression)).score) == text


def test_what_is_not_chosen_has_no_slope_even_where_it_is_infinite() -> None:
    expression = as_real(where(Q > K, sqrt(S), S))
    slope = value(derivatives(expression).score, np.zeros((3, 4)))
    q, k = np.ogrid[:3, :4]
    np.testing.assert_array_equal(slope, np.where(q > k, np.inf, 1.0))


def test_an_entry_that_is_read_twice_is_one_entry_of_each_node() -> None:
    found = derivatives(as_real(S * FIRST + exp(FIRST)))
    assert [str(entry.table) for entry, _ in found.entries] == ["input0:float64[3x4]"]
    assert str(found.entries[0].derivative) == f"(exp({FIRST}) + s)"
    assert found.score is FIRST
