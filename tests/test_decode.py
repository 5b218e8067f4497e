"""Few queries against many keys: the kernel with the head dimension in the lanes, and its merge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cases import RULES, Sizes
from trial import Trial, numbers, problem, run

from tilefold import splits
from tilefold.device import Device, host
from tilefold.plan import plan
from tilefold.problem import Problem

ROOT = Path(__file__).parents[1]

# Results --------------------------------------------------------------------------------------

TRIALS = [
    ("full", (1, 300), (64, 64), (8, 8), "bhnd"),
    ("full", (3, 203), (40, 77), (4, 1), "bnhd"),
    ("causal", (2, 271), (1, 2), (4, 2), "bhdn"),
    ("window-and-prefix", (7, 290), (80, 40), (2, 2), "padded bhnd"),
    ("documents-of-batch", (5, 71), (16, 5), (4, 2), "backwards"),
    ("lengths-of-batch", (1, 333), (199, 13), (2, 1), "padded bhdn"),
    ("dense-all", (4, 260), (2, 300), (4, 2), "no unit stride"),
    ("heads-differ", (6, 260), (128, 16), (4, 2), "shared heads"),
    ("every-third", (1, 90), (512, 3), (3, 1), "bhnd"),
    ("nothing", (2, 64), (5, 7), (2, 2), "bhnd"),
]
"""Rule, lengths, dims, heads, layout: as different from each other as they can be."""


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device on which keys are split however few there are: it is named so, for its plans."""
    return shorten(monkeypatch)


def shorten(patch: pytest.MonkeyPatch) -> Device:
    """Splits of one tile, and tiles of 32 keys, until the patch is undone."""
    patch.setattr(splits, "TILE", 32)
    patch.setattr(splits, "most_splits", lambda *_: 1000)
    return replace(host(), name="many small splits", cores=8)


def trial(number: int, dtype: str) -> Trial:
    rule, (len_q, len_k), (dim, dim_v), heads, layout = TRIALS[number]
    mask = RULES[rule](Sizes(2, heads[0], len_q, len_k))
    sizes = problem(len_q, len_k, dim, mask, dtype, dim_v=dim_v, batch=2, heads=heads)
    return Trial(sizes, layout, poisoned=number % 2 == 1)


def kernels(sizes: Problem, device: Device, form: str = "auto") -> list[str]:
    return [launch.spec.operation for launch in plan(sizes, device, "forward", form).launches]


@pytest.mark.feature("M01", "M16", "T02", "T09", "T10")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, len(TRIALS)))]
)
def test_results(number: int, dtype: str) -> None:
    this = trial(number, dtype)
    alone = replace(host(), cores=1)  # where nothing is split
    assert kernels(this.problem, alone, "decode") == ["decode"]
    run(this, numbers(this), "forward", "decode", device=alone)


@pytest.mark.slow
@pytest.mark.feature("M01", "M16", "T08", "T10")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", range(len(TRIALS)))
def test_results_of_splits(number: int, dtype: str, small_splits: Device) -> None:
    this = trial(number, dtype)
    parts = ["decode_part", "merge"] if TRIALS[number][0] != "nothing" else ["decode"]
    assert kernels(this.problem, small_splits, "decode") == parts
    run(this, numbers(this), "forward", "decode", device=small_splits)
