"""Blocks of Metal kernels, run: results do not depend on them, and hidden tiles cost nothing."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_near, dense, tolerances
from metal import backward, forward, machine
from operands import inputs

from tilefold import Rule, causal, documents, full, local
from tilefold.backends.metal import dispatch, source
from tilefold.backends.metal.plan import Launch, plan
from tilefold.backends.metal.spec import Blocks, whole
from tilefold.problems.attention import Problem

pytestmark = pytest.mark.slow  # each launch is a process, each kernel a run of a C++ compiler

BLOCKS: list[tuple[str, Blocks, dict[str, tuple[str, ...]]]] = [
    ("apple9", Blocks(8, 8, 8), {"forward": (), "backward_dq": (), "backward_dkv": ()}),
    (
        "apple7",
        Blocks(24, 40, 16),
        {"forward": ("q",), "backward_dq": ("do", "dq"), "backward_dkv": ("v", "dk")},
    ),
    (
        "apple9",
        Blocks(40, 24, 48),
        {"forward": ("q", "o"), "backward_dq": ("q",), "backward_dkv": ("k", "dv")},
    ),
]
"""Family, blocks and cached operands: neither of them from a table."""


def problem(mask: Rule, len_q: int = 47, len_k: int = 61) -> Problem:
    k, v = (1, 1, len_k, 24), (1, 1, len_k, 37)
    return Problem.of((1, 2, len_q, 24), k, v, mask=mask, scale=0.2)


@pytest.mark.slow
@pytest.mark.feature("M06", "M07")
@pytest.mark.parametrize(("family", "blocks", "cached"), BLOCKS)
def test_results_do_not_depend_on_blocks_or_cached_operands(
    family: str, blocks: Blocks, cached: dict[str, tuple[str, ...]]
) -> None:
    asked, on = problem(causal() & local(30)), machine(family)
    operands = inputs(asked, "bhnd", "packed")
    want = dense(operands, asked.mask, asked.scale)
    tolerance = tolerances(asked, operands, want, host_pairs=False)
    got = forward(asked, operands, on, blocks=blocks, cached=cached)
    got |= backward(asked, {**operands, **got}, on, blocks=blocks, cached=cached)
    for name, array in got.items():
        assert_near(name, array, want[name], tolerance[name])


RULES: dict[str, Rule] = {
    "everything": full(),
    "window": causal() & local(20),
    "documents": documents(np.arange(90) // 32, np.arange(140) // 50),
    "2-D": local(2, grid_q=(9, 10), grid_k=(10, 14)),
}

PRODUCTS = {"forward": "dv", "backward_dq": "dvd", "backward_dkv": "dvvd"}
"""Along which dimension each product of a kernel is long: d is dim, v is dim_v."""


@pytest.mark.slow
@pytest.mark.feature("M15", "T07")
@pytest.mark.parametrize("name", RULES)
def test_kernels_multiply_the_tiles_of_the_plan_and_no_other(name: str) -> None:
    asked, on = problem(RULES[name], 90, 140), machine("apple9")
    everything = problem(full(), 90, 140)
    operands, blocks = inputs(asked, "bhnd", "packed"), Blocks(16, 32, 16)
    got = forward(asked, operands, on, blocks=blocks)
    backward(asked, {**operands, **got}, on, blocks=blocks)
    for operation in ("forward", "backward"):
        made, dense_one = (
            plan(each, "apple9", operation, blocks=blocks).launches for each in (asked, everything)
        )
        for launch, most in zip(made, dense_one, strict=True):
            counters = dispatch.library_of(on, source.emit(launch.spec)).counters
            assert counters["multiplies"] == multiplies(launch, heads=2)
            saved = 1 - multiplies(launch, heads=2) / multiplies(most, heads=2)
            assert saved == 0 if name == "everything" else saved > 0.35


def multiplies(launch: Launch, heads: int) -> int:
    """Fragments that the tiles of a launch multiply: every simdgroup has 8 rows of each."""
    spec, runs = launch.spec, launch.runs.runs
    tiles = -(-(runs[:, 1] - runs[:, 0]) // spec.blocks.traverse)
    widths = {"d": whole(spec.dim) // 8, "v": whole(spec.dim_v) // 8}
    fragments = sum(widths[axis] for axis in PRODUCTS[spec.kernel])
    return int(tiles.sum()) * heads * spec.simdgroups * spec.blocks.traverse // 8 * fragments
