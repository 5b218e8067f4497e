"""Few queries against many keys on Metal: the split keys and their merge, as emitted and run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import Case
from compare import assert_near, assert_same, dense, tolerances
from metal import forward, machine
from operands import inputs

from tilefold import causal, lengths
from tilefold.backends.metal.families import family
from tilefold.backends.metal.heuristics import Heuristics
from tilefold.backends.metal.plan import Planner, plan
from tilefold.problems.attention import Problem

pytestmark = pytest.mark.slow  # each launch is a process, each kernel a run of a C++ compiler

TRIALS = [
    ("apple9", "float32", Case((1, 700), 64, "full", "bhnd", "gqa")),
    ("apple7", "float16", Case((3, 530), 40, "causal", "bnhd", "mqa", "padded")),
    ("apple9", "bfloat16", Case((8, 520), 80, "documents-of-batch", "bhdn", "gqa")),
    ("apple7", "bfloat16", Case((2, 515), 128, "lengths-of-batch", "bhnd", "mha", dim_v="wider")),
    ("apple7", "float32", Case((5, 600), 13, "heads-differ", "bnhd", "gqa", "reversed")),
    ("apple9", "float32", Case((2, 513), 300, "window-and-prefix", dim_v="narrower")),
    ("apple9", "float16", Case((1, 800), 3, "nothing", heads="mqa")),
]
"""Family, type and case, as different from each other as they can be; the last two page O and see
nothing."""


@pytest.mark.slow
@pytest.mark.feature("M01", "M06", "M15", "M16")
@pytest.mark.parametrize("number", range(len(TRIALS)))
def test_results_of_splits(number: int) -> None:
    family, dtype, case = TRIALS[number]
    problem = case.problem(dtype)
    kernels = [launch.spec.kernel for launch in plan(problem, family, "forward").launches]
    assert kernels == ["decode", "merge"]
    operands = inputs(problem, case.layout, case.memory)
    want = dense(operands, problem.mask, problem.scale)
    tolerance = tolerances(problem, operands, want, host_pairs=False)
    for name, array in forward(problem, operands, machine(family)).items():
        assert_near(name, array, want[name], tolerance[name])


@pytest.mark.slow
@pytest.mark.feature("M07")
def test_results_depend_on_the_splits_only_by_rounding() -> None:
    """From a split of one tile to one of all keys, with the same kernel."""
    case = TRIALS[0][2]
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


@pytest.mark.slow
@pytest.mark.feature("M15")
def test_what_a_query_does_not_see_does_not_leak() -> None:
    """NaN in hidden keys, of a split that is skipped and of one that is partial."""
    case = replace(TRIALS[0][2], rule="lengths")
    problem = replace(case.problem("float32"), mask=lengths([300, 601]))
    operands = inputs(problem, case.layout, case.memory)
    clean = forward(problem, operands, machine("apple9"))
    for b, length in enumerate((300, 601)):
        for name in "kv":
            operands[name][b, :, length:] = (np.nan, np.inf)[b]
    for name, array in forward(problem, operands, machine("apple9")).items():
        assert_near(name, array, clean[name], 1e-6)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.feature("M01")
def test_infinite_scores_and_rows_that_see_nothing_stay_apart() -> None:
    """As in the definition: -inf alone is NaN, beside others it weighs nothing; no key gives 0."""
    problem = Problem.of((3, 1, 1, 4), (3, 1, 600, 4), mask=lengths([600, 600, 0]), scale=1.0)
    operands = inputs(problem, "bhnd", "packed")
    operands["q"][...] = 1
    operands["k"][0] = operands["k"][1, :, :300] = -np.inf
    want = dense(operands, problem.mask, problem.scale)
    assert np.isnan(want["o"][0]).all() and not want["o"][2].any()
    for name, array in forward(problem, operands, machine("apple9")).items():
        assert_near(name, array, want[name], 1e-5)
