"""Modified scores, sinks, the largest score and gradients through lse, in Triton's interpreter.

Blocks are small, so that whole tiles and tiles of an edge take turns.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import interpreted
import numpy as np
import pytest
from compare import assert_near
from modified import CASES, TOLERANCES, Array, Case, definition, extra, of_case

from tilefold import bias, causal, softcap
from tilefold.backends.triton import dispatch
from tilefold.backends.triton.plan import plan
from tilefold.backends.triton.spec import Blocks
from tilefold.problems.attention import STATISTICS, Problem

TILES = Blocks(16, 16, 4, 1)
FORMS = {"tiled": ("tiled", "split"), "decode": ("decode", "split"), "fused": ("tiled", "fused")}
"""The forms of both passes."""


def run(
    problem: Problem,
    operation: str,
    given: Mapping[str, Array],
    shapes: Mapping[str, Any],
    form: str,
) -> dict[str, Array]:
    """The results of a pass by their names, given their shapes and types."""
    import torch

    on = interpreted.machine()
    extra = tuple([name for name in shapes if name in ("max", "dsinks") or "input" in name])
    extra += tuple([name for name in given if name == "dlse"])
    made = plan(problem, on.architecture, operation, form=form, blocks=TILES, extra=extra)
    arrays = {name: torch.tensor(array) for name, array in given.items()}
    results = {
        name: torch.full(shape, 7.0, dtype=getattr(torch, dtype))
        for name, (shape, dtype) in shapes.items()
    }
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        dispatch.execute(made, on, {**arrays, **results})
    return {name: tensor.numpy() for name, tensor in results.items()}


def both(case: Case) -> tuple[dict[str, Array], dict[str, Array]]:
    """All results of both passes, and what they are by the definition."""
    problem, arrays, modified = of_case(case)
    kind, rows, more = STATISTICS[case.dtype], arrays["dlse"].shape, extra(arrays)
    shapes = {"o": (arrays["do"].shape, case.dtype), "lse": (rows, kind), "max": (rows, kind)}
    forms = FORMS[case.form]
    given = {name: arrays[name] for name in ("q", "k", "v", *more)}
    got = run(problem, "forward", given, shapes, forms[0])
    gradients = ["q", "k", "v", *more]
    shapes = {f"d{name}": (arrays[name].shape, arrays[name].dtype.name) for name in gradients}
    given |= {name: arrays[name] for name in ("do", "dlse")} | {"o": got["o"], "lse": got["lse"]}
    got |= run(problem, "backward", given, shapes, forms[1])
    return got, definition(case, arrays, modified)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_modified_scores_are_those_of_the_definition(name: str) -> None:
    case = CASES[name]
    got, want = both(case)
    assert list(got) and set(got) == set(want)
    for result, array in got.items():
        most = max(1.0, np.nanmax(np.abs(want[result]), where=np.isfinite(want[result]), initial=1))
        assert_near(result, array, want[result], TOLERANCES[case.dtype] * most)


@pytest.mark.slow
def test_what_is_hidden_by_a_score_is_not_looked_at() -> None:
    """NaN in a key and value that a score hides from all queries changes no bit of the others."""
    case = CASES["hiding"]
    problem, arrays, _ = of_case(case)
    rows, kind = arrays["dlse"].shape, "float32"
    forward = {"o": (arrays["do"].shape, kind), "lse": (rows, kind)}
    backward = {f"d{name}": (arrays[name].shape, kind) for name in ("q", "k", "v", "input0")}
    found = []
    for poison in (0.0, np.nan):
        given = {name: arrays[name].copy() for name in ("q", "k", "v", "input0", "sinks")}
        given["v"][:, :, 5:11] = poison
        got = run(problem, "forward", given, forward, "tiled")
        given |= got | {"do": arrays["do"]}
        found.append(got | run(problem, "backward", given, backward, "split"))
    for name in found[0]:
        assert_near(
            name,
            found[1][name],
            found[0][name],
            2e-6 * max(1, np.abs(found[0][name][np.isfinite(found[0][name])]).max()),
        )


def test_hopper_modifies_no_scores() -> None:
    """The plain kernel takes its place, and asking for it says why not."""
    problem = Problem.of((1, 2, 256, 64), dtype="bfloat16", mask=causal(), score=softcap(30.0))
    (launch,) = plan(problem, "sm_90", "forward").launches
    assert not launch.spec.gluon and launch.spec.score is not None and not launch.spec.hides
    with pytest.raises(ValueError, match="'hopper' is not possible: it does not modify scores"):
        plan(problem, "sm_90", "forward", form="hopper")
    with pytest.raises(NotImplementedError, match="no operand lse_low in a forward pass"):
        plan(problem, "sm_90", "forward", extra=("lse_low",))


def test_parts_of_the_gradient_of_an_array_are_few() -> None:
    """Units that share entries are dealt to a fixed number of parts; the others share one part."""
    sizes = {"h": 8, "q": 512, "k": 512}

    def parts(*axes: str) -> tuple[int, ...]:
        array = np.zeros([sizes.get(axis, 1) for axis in axes], np.float32)
        problem = Problem.of((16, 8, 512, 64), score=bias(array))
        made = plan(problem, "sm_80", "backward", extra=("dinput0",))
        launch = made.launches[-1]
        assert launch.added is not None and len(launch.order) % launch.added.shared == 0
        return made.buffers["dinput0_parts"].shape

    assert parts("h", "q", "k") == (4, 8, 512, 512), "16 batch entries share 4 parts"
    assert parts("q", "k") == (4, 512, 512), "and 8 heads with them"
    assert 4 < parts("h", "1", "1")[0] <= 264, "small arrays have more"
    full_bias = Problem.of((2, 8, 64, 64), score=bias(np.zeros((2, 8, 64, 64), np.float32)))
    made = plan(full_bias, "sm_80", "backward", extra=("dinput0",))
    assert made.buffers["dinput0_parts"].shape == (1, 2, 8, 64, 64)
