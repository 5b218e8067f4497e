"""A problem whose mask is bound once: what all planners read of it."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from tilefold import Problem, causal, full, local, rule
from tilefold.planning import masked, visited
from tilefold.planning.masked import MaskedProblem
from tilefold.problems.attention import LIMIT


@pytest.mark.parametrize("module", [masked, visited])
def test_examples(module: object) -> None:
    failed, tried = doctest.testmod(module)  # type: ignore[arg-type]  # a module
    assert tried and not failed


def test_the_mask_is_bound_once_and_its_runs_are_kept() -> None:
    asked = Problem.of((2, 4, 300, 16), (2, 2, 420, 16), mask=causal() & local(100))
    made = MaskedProblem.of(asked)
    found = made.visited_by("k", 48)
    assert found.block_rows == -(-420 // 48)
    assert made.visited_by("k", 48) is found and made.visited_by("q", 48) is not found
    assert made.visited_together(2).block_rows == 1
    assert made.parameters and made.index_bits == 32 and not made.constant
    assert MaskedProblem.of(Problem.of((1, 1, 8, 16), mask=full())).constant
    far = Problem.of((1, 1, LIMIT - 1, 16), mask=rule(lambda q, k: q * 3 >= k))
    assert MaskedProblem.of(far).index_bits == 64


def test_the_heaviest_block_row_comes_first() -> None:
    made = MaskedProblem.of(Problem.of((1, 1, 128, 16), mask=causal()))
    order = visited.heaviest_first(made.visited_by("q", 32))
    assert order.tolist() == [3, 2, 1, 0]
    nothing = visited.nothing(3)
    assert nothing.block_rows == 3 and visited.heaviest_first(nothing).tolist() == [0, 1, 2]
    assert not np.any(nothing.met)
