"""Few queries against many keys on Metal: what is particular to its kernels."""

from __future__ import annotations

import numpy as np
import pytest
from cases import Case
from compare import assert_near, assert_same, dense, tolerances
from metal import backward, forward, machine
from operands import inputs

from tilefold import causal, lengths
from tilefold.backends.metal.families import family
from tilefold.backends.metal.heuristics import Heuristics
from tilefold.backends.metal.plan import Planner, plan
from tilefold.problems.attention import Problem

pytestmark = pytest.mark.slow  # each launch is a process, each kernel a run of a C++ compiler


@pytest.mark.feature("M07")
def test_results_depend_on_the_splits_only_by_rounding() -> None:
    """From a split of one tile to one of all keys, with the same kernel."""
    case = Case((1, 700), 64, "full", "bhnd", "gqa")
    problem = case.problem("float32")
    operands = inputs(problem, case.layout, case.memory)
    want = dense(operands, problem.mask, problem.scale)
    tolerance = tolerances(problem, operands, want, host_pairs=False)
    counts = []
    for keys in (32, 96, 1024):
        splitting = Heuristics(keys_per_split=keys)
        made = Planner(problem, family("apple9"), heuristics=splitting).plan("forward")
        counts.append(made.launches[0].splits)
        first, again = (forward(problem, operands, machine("apple9"), made=made) for _ in range(2))
        for name in ("o", "lse"):
            assert_near(f"{name}, {keys} keys", first[name], want[name], tolerance[name])
            assert_same(name, first[name], again[name])
    assert counts == [22, 8, 1]


@pytest.mark.feature("M07")
@pytest.mark.parametrize(("len_q", "form"), [(2, "decode"), (40, "tiled")])
def test_bits_do_not_depend_on_the_batch_and_heads_beside(len_q: int, form: str) -> None:
    lens = [600, 40, 530]
    k = (3, 2, 600, 20)
    whole = Problem.of((3, 4, len_q, 20), k, mask=lengths(lens))
    operands, on = inputs(whole, "bhnd", "packed"), machine("apple7")
    together = forward(whole, operands, on, form=form)
    slopes = backward(whole, {**operands, **together}, on) if form == "tiled" else {}
    for b, h in ((0, 0), (2, 1)):
        alone = Problem.of((1, 2, len_q, 20), (1, 1, *k[2:]), mask=lengths(lens[b : b + 1]))
        heads = {1: slice(h, h + 1), 2: slice(2 * h, 2 * h + 2)}
        parts = {
            name: np.ascontiguousarray(array[b : b + 1, heads[array.shape[1] // 2]])
            for name, array in {**operands, **together, **slopes}.items()
        }
        got = forward(alone, parts, on, form=form)
        got |= backward(alone, parts, on) if form == "tiled" else {}
        for name, array in got.items():
            assert_same(name, array, parts[name])


@pytest.mark.feature("M05")
@pytest.mark.parametrize("check", ["fast", "memory", "thread"])
def test_rows_fill_several_fragments_and_page_their_sum(check: str) -> None:
    """More rows than a fragment has; a split that sees nothing leaves its part unset."""
    k, v = (2, 2, 300, 20), (2, 2, 300, 13)
    problem = Problem.of((2, 6, 5, 20), k, v, mask=causal() & lengths([300, 20]))
    part, _ = plan(problem, "apple7", "forward", form="decode").launches
    assert (np.diff(part.runs.rows) == 0).any() and part.grid[0] == 2 * part.splits
    on = machine("apple7", check)
    operands = inputs(problem, "bhnd", "packed")
    want = dense(operands, problem.mask, problem.scale)
    tolerance = tolerances(problem, operands, want, host_pairs=False)
    got = forward(problem, operands, on, form="decode", cached={"decode": ("q",)})
    for name, array in got.items():
        assert_near(name, array, want[name], tolerance[name])
