"""Modified scores in the kernels of Apple GPUs, run by the emulator: both passes and all gradients.

Blocks are small, so that whole tiles and tiles of an edge take turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from compare import assert_near
from metal import FAMILIES, machine, tensor_plan
from modified import (
    CASES,
    KV,
    TOLERANCES,
    Array,
    B,
    Case,
    D,
    H,
    K,
    Normal,
    Q,
    definition,
    extra,
    hiding,
    of_case,
)
from operands import SENTINEL

from tilefold import (
    alibi,
    bias,
    causal,
    full,
    local,
    minimum,
    score,
    softcap,
    table,
    temperature,
    where,
    window_bias,
)
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
        within = max(TOLERANCES[case.dtype], TOLERANCES[array.dtype.name])
        assert_near(result, array, want[result], within * most)


def own(n: Normal) -> Any:
    """Arrays that are read in every way; two places of one array add to the same entries."""
    square, few, half = table(n(Q, Q)), table(n(3)), table(n(K).astype(np.float16))
    steps = table(np.arange(K, dtype=np.int32) % 5 - 2)
    return score(
        lambda s, b, h, q, k: (
            (s + half[k]) * few[minimum(abs(steps[k] + q), 2)]
            + square[q, minimum(k, Q - 1)] * square[minimum(k, Q - 1), q] / (b + 2)
        )
    )


OTHERS = {
    "ways": Case(own, causal(), scale=-0.4),
    "all": Case(lambda n: [bias(n(B, H, Q, K)), temperature(2 + n(H, 1, 1) ** 2)], dtype="float16"),
    "half": Case(lambda n: [alibi(n(H)), bias(n(H, Q, 1))], local(20), "bfloat16", sinks=1),
    "wide": Case(
        lambda n: [bias(hiding(n(4, 37, 70))), temperature(2 + n()[..., None] ** 2)],
        local(20),
        sizes=(2, 4, 1, 37, 70, 264),
    ),
    "grid": Case(lambda n: window_bias(n(H, 7, 9)), sizes=(B, H, KV, 20, 20, D)),
    "tensors": Case(lambda n: softcap(2.0), causal(), "float16", form="tensorops"),
    "hiding-tensors": Case(
        lambda n: bias(hiding(n(H, Q, K))), local(20), form="tensorops", sinks=1
    ),
}


def on_metal(case: Case) -> Case:
    """A case in a type and a form that Metal has."""
    dtype = {"float64": "float32"}.get(case.dtype, case.dtype)
    return case._replace(dtype=dtype, form={"fused": "tiled"}.get(case.form, case.form))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_modified_scores_are_those_of_the_definition(name: str, family: str) -> None:
    compared(on_metal(CASES[name]), family)


@pytest.mark.parametrize("name", OTHERS)
def test_so_are_wide_heads_other_ways_and_tensor_operations(name: str) -> None:
    compared(OTHERS[name], FAMILIES[list(OTHERS).index(name) % 2])


@pytest.mark.parametrize("check", ["address", "memory", "thread"])
def test_nothing_is_read_or_written_that_is_not_there(check: str) -> None:
    compared(on_metal(CASES["hiding"]), "apple9", check)


@pytest.mark.parametrize("form", ["tiled", "decode", "tensorops"])
def test_what_a_score_hides_is_not_looked_at(form: str) -> None:
    """NaN in keys and values that a score hides from all queries changes nothing of the others."""
    case = Case(lambda n: score(hides), causal("start") if form == "tiled" else full(), form=form)
    problem, arrays, _ = of_case(case)
    shapes = {"o": (arrays["do"].shape, "float32"), "lse": (arrays["dlse"].shape, "float32")}
    gradients = {f"d{name}": (arrays[name].shape, "float32") for name in "qkv"}
    found = []
    for poison in (0.0, np.nan):
        given = {name: arrays[name].copy() for name in "qkv"}
        given["v"][:, :, 5:11] = given["k"][:, :, 5:11] = poison
        got = run(problem, "forward", given, shapes, "apple9", form)
        given |= got | {"do": arrays["do"]}
        found.append(got | run(problem, "backward", given, gradients, "apple9", form))
    for name, array in found[0].items():
        other = found[1][name]
        assert_near(name, other, array, 2e-6 * max(1.0, np.abs(array[np.isfinite(array)]).max()))


def hides(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return where((k >= 5) & (k < 11), -np.inf, s)


def test_dropped_pairs_add_to_no_entry() -> None:
    """As the forward pass drops them: the gradient is that of finite differences of sum(do o)."""
    case = Case(lambda n: bias(n(H, Q, K)), causal())
    problem, arrays, _ = of_case(case)
    problem = replace(problem, dropout=0.3)
    seed = np.array([7])
    shapes = {"o": (arrays["do"].shape, "float32"), "lse": (arrays["dlse"].shape, "float32")}
    given = {name: arrays[name] for name in ("q", "k", "v", "input0")} | {"seed": seed}
    got = run(problem, "forward", given, shapes, "apple9", "tiled")
    backward = given | got | {"do": arrays["do"]}
    into = {f"d{name}": (arrays[name].shape, "float32") for name in ("q", "k", "v", "input0")}
    found = run(problem, "backward", backward, into, "apple9", "tiled")
    again = run(problem, "backward", backward, into, "apple9", "tiled")
    assert all(np.array_equal(found[name], again[name]) for name in found), "the same bits"
    step = np.random.default_rng(5).normal(size=arrays["input0"].shape).astype(np.float32)
    sums = []
    for sign in (1, -1):
        moved = given | {"input0": arrays["input0"] + np.float32(sign * 1e-2) * step}
        o = run(problem, "forward", moved, shapes, "apple9", "tiled")["o"]
        sums.append((o.astype(float) * arrays["do"]).sum())
    along = (found["dinput0"].astype(float) * step).sum()
    assert along == pytest.approx((sums[0] - sums[1]) / 2e-2, abs=2e-3)


def test_parts_of_the_gradient_of_an_array_are_few() -> None:
    """They follow from shapes alone; what no pair adds to gets no kernel."""
    shape = (2, 8, 64, 16)

    def parts(*of: int) -> tuple[int, ...]:
        problem = Problem.of(shape, dtype="float16", score=bias(np.zeros(of, np.float32)))
        made = plan(problem, "apple9", "backward", extra=("dinput0",))
        return made.buffers["dinput0_parts"].shape

    assert parts(2, 8, 64, 64) == (1, 2, 8, 64, 64)
    assert parts(8, 64, 64) == (2, 8, 64, 64), "batch entries share"
    assert parts(64) == (128, 64), "2 x 8 x 8 units, one part for each"
    unread = score(lambda s, b, h, q, k: s + table(np.zeros(4, np.float32))[0] * 0)
    problem = Problem.of(shape, dtype="float32", score=unread)
    arrays = {name: np.ones(shape, np.float32) for name in ("q", "k", "v", "do", "o")}
    arrays |= {"lse": np.zeros(shape[:3], np.float32), "input0": np.zeros(4, np.float32)}
    into = {f"d{name}": (shape, "float32") for name in "qkv"} | {"dinput0": ((4,), "float32")}
    assert not run(problem, "backward", arrays, into, "apple9", "tiled")["dinput0"].any()


def test_an_array_of_float64_is_refused() -> None:
    problem = Problem.of((1, 2, 8, 16), dtype="float32", score=bias(np.zeros((8, 8))))
    with pytest.raises(NotImplementedError, match="array 0 of score is of float64, which Apple"):
        plan(problem, "apple9", "forward")
    with pytest.raises(NotImplementedError, match="no operand dinput1 in a backward pass"):
        problem = Problem.of((1, 2, 8, 16), dtype="float32", score=softcap(2.0))
        plan(problem, "apple9", "backward", extra=("dinput1",))
