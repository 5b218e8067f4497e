"""Modified scores in the kernels of Apple GPUs, run by the emulator: both passes and all gradients.

Blocks are small, so that whole tiles and tiles of an edge take turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from compare import assert_near
from metal import machine, tensor_plan
from modified import CASES, TOLERANCES, Array, Case, definition, extra, of_case
from operands import SENTINEL

from tilefold.backends.metal import dispatch
from tilefold.backends.metal.plan import plan
from tilefold.backends.metal.spec import Blocks
from tilefold.problems.attention import Problem

pytestmark = pytest.mark.slow  # kernels are compiled

TILES = Blocks(16, 16, 16)


def run(
    problem: Problem,
    operation: str,
    given: Mapping[str, Array],
    shapes: Mapping[str, Any],
    family: str,
    form: str,
    check: str = "fast",
) -> dict[str, Array]:
    """The results of a pass by their names, given their shapes and types."""
    more = tuple([name for name in shapes if name in ("max", "dsinks") or "input" in name])
    more += tuple([name for name in given if name == "dlse"])
    if form == "tensorops" and operation == "forward":
        made = tensor_plan(problem, extra=more)
    else:
        form = form if operation == "forward" else "auto"
        blocks = None if form == "decode" else TILES
        made = plan(problem, family, operation, form=form, blocks=blocks, extra=more)
    results = {name: np.full(shape, SENTINEL, dtype) for name, (shape, dtype) in shapes.items()}
    dispatch.execute(made, machine(made.family.name, check), {**given, **results})
    return results


def both(case: Case, family: str, check: str = "fast") -> tuple[dict[str, Array], dict[str, Array]]:
    """All results of both passes, and what they are by the definition."""
    problem, arrays, modified = of_case(case)
    rows, more = arrays["dlse"].shape, extra(arrays)
    shapes = {"o": (arrays["do"].shape, case.dtype), "lse": (rows, "float32")}
    given = {name: arrays[name] for name in ("q", "k", "v", *more)}
    got = run(
        problem, "forward", given, shapes | {"max": (rows, "float32")}, family, case.form, check
    )
    shapes = {
        f"d{name}": (arrays[name].shape, arrays[name].dtype) for name in ("q", "k", "v", *more)
    }
    given |= {name: arrays[name] for name in ("do", "dlse")} | {"o": got["o"], "lse": got["lse"]}
    got |= run(problem, "backward", given, shapes, family, case.form, check)
    return got, definition(case, arrays, modified)


def compared(case: Case, family: str, check: str = "fast") -> None:
    """Raises unless all results are those of the definition."""
    got, want = both(case, family, check)
    for result, array in got.items():
        finite = np.isfinite(want[result])
        most = max(1.0, np.max(np.abs(want[result]), where=finite, initial=1))
        assert_near(result, array, want[result], TOLERANCES[case.dtype] * most)


@pytest.mark.parametrize("family", ["apple7", "apple9"])
@pytest.mark.parametrize("name", CASES)
def test_modified_scores_are_those_of_the_definition(name: str, family: str) -> None:
    case = CASES[name]
    case = case._replace(dtype={"float64": "float32"}.get(case.dtype, case.dtype))
    case = case._replace(form={"fused": "tiled"}.get(case.form, case.form))
    compared(case, family)
