"""Modified scores in Metal kernels, beyond the table of variants (`backends/test_variants.py`).

Wide heads, tensor operations, all ways of adding to entries, and what is hidden or not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # NumPy knows the name "bfloat16" from it
import numpy as np
import pytest
from compare import UNITS, assert_near
from metal import FAMILIES, machine, tensor_plan
from operands import SENTINEL, Array

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
)
from tilefold.backends.metal import dispatch
from tilefold.backends.metal.families import family
from tilefold.backends.metal.heuristics import Heuristics
from tilefold.backends.metal.plan import Planner, plan
from tilefold.backends.metal.spec import Blocks
from tilefold.problems import reference
from tilefold.problems.attention import Problem
from tilefold.scores.score import as_score

Normal = Callable[..., Array]

B, H, KV, Q, K, D = 2, 4, 2, 19, 53, 16
TILES = Blocks(16, 16, 16)
"""Whole tiles and tiles of an edge take turns."""

TOLERANCES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}


class Case(NamedTuple):
    """A score of arrays of random numbers, sinks of each head, and how it is computed."""

    make: Callable[[Normal], Any]
    mask: Any = full()
    dtype: str = "float32"
    form: str = "tiled"
    sinks: int = 0
    scale: float = 0.3
    sizes: tuple[int, ...] = (B, H, KV, Q, K, D)


def hiding(array: Array) -> Array:
    """The array, with pairs that are hidden: some of all queries, and all of one."""
    array[..., 5:11] = -np.inf
    array[..., 2, :] = -np.inf
    return array


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


CASES = {
    "ways": Case(own, causal(), scale=-0.4),
    "half": Case(
        lambda n: [alibi(n(H)), bias(n(H, Q, 1))], local(20), "bfloat16", "decode", sinks=1
    ),
    "wide": Case(
        lambda n: [bias(hiding(n(4, 37, 70))), temperature(2 + n()[..., None] ** 2)],
        local(20),
        sizes=(2, 4, 1, 37, 70, 264),
    ),
    "tensors": Case(lambda n: softcap(2.0), causal(), "float16", "tensorops"),
    "hiding-tensors": Case(
        lambda n: bias(hiding(n(H, Q, K))), local(20), form="tensorops", sinks=1
    ),
}


def of_case(case: Case) -> tuple[Problem, dict[str, Array], Any]:
    """The problem of a case, its arrays by their names, and the score with its arrays."""
    rng = np.random.default_rng(3)
    batch, heads, heads_kv, len_q, len_k, dim = case.sizes

    def normal(*shape: int) -> Array:
        return rng.normal(size=shape).astype(case.dtype)

    modified = as_score(case.make(normal))
    assert modified is not None
    arrays = {
        "q": normal(batch, heads, len_q, dim),
        "k": normal(batch, heads_kv, len_k, dim),
        "v": normal(batch, heads_kv, len_k, dim + 8),
        "do": normal(batch, heads, len_q, dim + 8),
        "dlse": normal(batch, heads, len_q).astype(np.float32),
    }
    shapes = [arrays[name].shape for name in "qkv"]
    options = {"scale": case.scale, "sinks": case.sinks, "dtype": case.dtype}
    problem = Problem.of(*shapes, mask=case.mask, score=modified, **options)
    arrays |= {f"input{i}": array for i, array in enumerate(modified.form.arrays)}
    if case.sinks:
        arrays["sinks"] = normal(heads, case.sinks).astype(np.float32)
    return problem, arrays, modified


def run(
    problem: Problem,
    operation: str,
    given: Mapping[str, Array],
    shapes: Mapping[str, Any],
    device: str,
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
        made = plan(problem, device, operation, form=form, blocks=blocks, extra=more)
    results = {name: np.full(shape, SENTINEL, dtype) for name, (shape, dtype) in shapes.items()}
    dispatch.execute(made, machine(made.family.name, check), {**given, **results})
    return results


def results_of(arrays: Mapping[str, Array]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The shapes and types of the results of both passes."""
    names = ["q", "k", "v", *(name for name in arrays if name.startswith(("input", "sinks")))]
    forward = {
        "o": (arrays["do"].shape, arrays["do"].dtype),
        "lse": (arrays["dlse"].shape, "float32"),
    }
    return forward, {f"d{name}": (arrays[name].shape, arrays[name].dtype) for name in names}


def compared(case: Case, device: str, check: str = "fast") -> None:
    """Raises unless all results are those of the definition."""
    problem, arrays, modified = of_case(case)
    forward, backward = results_of(arrays)
    given = {name: arrays[name] for name in arrays if name not in ("do", "dlse")}
    got = run(problem, "forward", given, forward, device, case.form, check)
    given |= {name: arrays[name] for name in ("do", "dlse")} | got
    got |= run(problem, "backward", given, backward, device, case.form, check)
    options = {"mask": case.mask, "scale": case.scale, "score": modified}
    options |= {"sinks": arrays["sinks"]} if case.sinks else {}
    q, k, v = (arrays[name] for name in "qkv")
    o, lse = reference.attention(q, k, v, **options)
    gradients = reference.attention_backward(
        arrays["do"], q, k, v, o, lse, dlse=arrays["dlse"], **options
    )
    for (name, array), want in zip(got.items(), (o, lse, *gradients), strict=True):
        within = TOLERANCES[case.dtype] + 2 * UNITS[array.dtype.name]
        assert_near(name, array, want, within * np.abs(want[np.isfinite(want)]).max(initial=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_modified_scores_are_those_of_the_definition(name: str) -> None:
    compared(CASES[name], FAMILIES[list(CASES).index(name) % 2])


@pytest.mark.slow
@pytest.mark.parametrize("check", ["address", "memory", "thread"])
def test_nothing_is_read_or_written_that_is_not_there(check: str) -> None:
    compared(Case(lambda n: bias(hiding(n(H, Q, K))), causal(), sinks=1), "apple9", check)


def hides(s: Any, q: Any, k: Any) -> Any:
    return where((k >= 5) & (k < 11), -np.inf, s)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tiled", "decode", "tensorops"])
def test_what_a_score_hides_is_not_looked_at(form: str) -> None:
    """NaN in keys and values that a score hides from all queries changes nothing of the others."""
    case = Case(lambda n: score(hides), causal("start") if form == "tiled" else full(), form=form)
    problem, arrays, _ = of_case(case)
    forward, backward = results_of(arrays)
    found = []
    for poison in (0.0, np.nan):
        given = {name: arrays[name].copy() for name in "qkv"}
        given["v"][:, :, 5:11] = given["k"][:, :, 5:11] = poison
        got = run(problem, "forward", given, forward, "apple9", form)
        given |= got | {"do": arrays["do"]}
        found.append(got | run(problem, "backward", given, backward, "apple9", form))
    for name, array in found[0].items():
        within = 2e-6 * np.abs(array[np.isfinite(array)]).max(initial=1)
        assert_near(name, found[1][name], array, within)


@pytest.mark.slow
def test_parts_have_the_same_bits_every_time_and_may_be_fewer() -> None:
    problem, arrays, _ = of_case(CASES["ways"])
    problem = replace(problem, dropout=0.3)
    forward, backward = results_of(arrays)
    given = {name: arrays[name] for name in arrays if name not in ("do", "dlse")}
    given["seed"] = np.array([7])
    given |= run(problem, "forward", given, forward, "apple9", "tiled") | {"do": arrays["do"]}
    first, second = (run(problem, "backward", given, backward, "apple9", "auto") for _ in "12")
    assert all(array.any() and np.array_equal(array, second[x]) for x, array in first.items())
    few = Heuristics(enough_groups=6, part_elements=1, fixed_parts=2)
    extra = tuple([name for name in backward if "input" in name])
    made = Planner(problem, family("apple9"), heuristics=few, extra=extra).plan("backward")
    added = [launch for launch in made.launches if launch.added]
    assert all(launch.splits == 2 < launch.added.shared - 1 for launch in added if launch.added)
    into = {name: np.full(shape, SENTINEL, dtype) for name, (shape, dtype) in backward.items()}
    dispatch.execute(made, machine("apple9"), {**given, **into})
    for name in extra:
        within = 1e-5 + 2 * UNITS[into[name].dtype.name]
        assert_near(name, into[name], first[name], within * np.abs(first[name]).max(initial=1))


@pytest.mark.slow
def test_an_array_that_no_gradient_reaches_gets_zeros() -> None:
    shape = (1, 2, 8, 16)
    unread = score(lambda s: s + table(np.zeros(4, np.float32))[0] * 0)
    problem = Problem.of(shape, score=unread)
    arrays = {name: np.ones(shape, np.float32) for name in ("q", "k", "v", "do", "o")}
    arrays |= {"lse": np.zeros(shape[:3], np.float32), "input0": np.zeros(4, np.float32)}
    into = {f"d{name}": (shape, "float32") for name in "qkv"} | {"dinput0": ((4,), "float32")}
    assert not run(problem, "backward", arrays, into, "apple9", "auto")["dinput0"].any()


def test_parts_of_the_gradient_of_an_array_are_few() -> None:
    """They follow from shapes alone; a small array has as many as keep the GPU at work."""

    def parts(*of: int) -> tuple[int, ...]:
        problem = Problem.of((2, 8, 64, 16), score=bias(np.zeros(of, np.float32)))
        made = plan(problem, "apple9", "backward", extra=("dinput0",))
        assert made.cleared == ("dinput0_parts",)
        return made.buffers["dinput0_parts"].shape

    assert parts(2, 8, 64, 64) == (1, 2, 8, 64, 64)
    assert parts(8, 64, 64) == (2, 8, 64, 64), "batch entries share"
    assert parts(64) == (128, 64), "2 x 8 x 8 units, one part for each"


def test_what_metal_has_not_is_refused() -> None:
    problem = Problem.of((1, 2, 8, 16), score=bias(np.zeros((8, 8))))
    with pytest.raises(NotImplementedError, match="array 0 of score is of float64, which Apple"):
        plan(problem, "apple9", "forward")
    problem = Problem.of((1, 2, 8, 16), score=softcap(2.0))
    with pytest.raises(NotImplementedError, match="no operand dinput1 in a backward pass"):
        plan(problem, "apple9", "backward", extra=("dinput1",))
