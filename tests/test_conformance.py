"""Every case, forward and backward in both forms, against the dense definition in float64."""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
import pytest
from cases import AXES, CASES, LAYOUTS, MEMORY, PAIRS, Case, Sizes, random_rule
from compare import assert_near, assert_same, dense, roundings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operands import Array, backward, canonical, forward, inputs, place, run

import tilefold
from tilefold.problem import Problem, default_scale

FORMS = ("fused", "split")
UNITS = {"float32": 2.0**-24, "float64": 2.0**-53}
"""What a number is off by, relative to it, when it is rounded once."""

QUICK = [
    Case((113, 203), 16, "window-and-prefix", "bhnd", "gqa", "padded"),
    Case((64, 32), 77, "full", "bhdn", "mqa", "packed", "narrower"),
]
"""A representative part for the quick suite; the kernels of a case take about a second to make."""

ALL = [
    *(pytest.param(case, id=str(case)) for case in QUICK),
    *(pytest.param(case, id=str(case), marks=pytest.mark.slow) for case in CASES),
]
SHOWS = pytest.mark.feature(
    *("M01", "M06", "M16", "T01", "T02", "T03", "T04", "T05", "T06"),
)


def tolerances(
    problem: Problem,
    operands: dict[str, Array],
    want: dict[str, Array],
    dtype: str,
) -> dict[str, float]:
    """What a result may be off by.

    float64: 1e-12 of its largest number. float32: twice the largest error of the same computation
    done dense by NumPy in float32. Both on a floor of a few roundings of the terms of every sum
    (`compare.roundings`): 3 in float32, of which these cases and 120 random ones need 1.7 at most;
    and 6 in float64, where the definition rounds as much itself.
    """
    moves = roundings(operands, want, problem.mask, problem.scale)
    units = {"float32": 3, "float64": 6}[dtype] * UNITS[dtype]
    if dtype == "float64":
        allowed = {name: 1e-12 * abs(finite(array)).max(initial=0) for name, array in want.items()}
    else:
        low = dense(operands, problem.mask, problem.scale, dtype)
        allowed = {
            name: 2 * abs(finite(low[name]) - finite(array)).max(initial=0)
            for name, array in want.items()
        }
    return {name: float(allowed[name] + units * moves[name]) for name in want}


def finite(array: Array) -> Array:
    """0 for the -inf in lse, which must be met exactly."""
    return np.where(np.isneginf(array), 0, array).astype(np.float64)


@lru_cache(maxsize=2)
def definition(
    case: Case, dtype: str
) -> tuple[dict[str, Array], dict[str, Array], dict[str, float]]:
    """The inputs of a case, what it should give, and within what."""
    problem = case.problem(dtype)
    operands = inputs(problem, case.layout, case.memory)
    want = dense(operands, problem.mask, problem.scale)
    return operands, want, tolerances(problem, operands, want, dtype)


@SHOWS
@pytest.mark.feature("T10")
@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("case", ALL)
def test_public_calls(case: Case, dtype: str) -> None:
    operands, want, tolerance = definition(case, dtype)
    problem = case.problem(dtype)
    given = {name: canonical(array, case.layout) for name, array in operands.items()}
    before = {name: array.copy() for name, array in given.items()}
    options = {"mask": problem.mask, "scale": problem.scale, "layout": case.layout}
    q, k, v, do = (given[name] for name in ("q", "k", "v", "do"))
    o, lse = tilefold.attention(q, k, v, **options, return_lse=True)
    got = {"o": canonical(o, case.layout), "lse": lse}
    gradients = tilefold.attention_backward(do, q, k, v, o, lse, **options)
    for name, array in zip(("dq", "dk", "dv"), gradients, strict=True):
        got[name] = canonical(array, case.layout)
    for name, array in got.items():
        assert array.dtype == dtype
        assert_near(name, array, want[name], tolerance[name])
    for name, array in given.items():
        assert_same(f"{name} after the call", array, before[name])


@SHOWS
@pytest.mark.feature("M04", "T09")
@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ALL)
def test_backward_in_both_forms(case: Case, form: str, dtype: str) -> None:
    """Into arrays that lie as oddly as the inputs, with nothing written around them."""
    operands, want, tolerance = definition(case, dtype)
    problem = case.problem(dtype)
    memory = "packed" if case.memory in ("broadcast", "misaligned") else case.memory
    into = {
        f"d{name}": place(operands[name].shape, dtype, case.layout, memory)
        for name in ("q", "k", "v")
    }
    if form == "fused" and into["dq"].array.strides[3] != into["dq"].array.itemsize:
        into["dq"] = place(operands["q"].shape, dtype, "bnhd", "padded")
    outputs = {name: placed.array for name, placed in into.items()}
    run(problem, "backward", {**operands, **forward(problem, operands), **outputs}, form=form)
    for name, array in outputs.items():
        assert into[name].untouched(), f"the kernel wrote around {name}"
        assert_near(name, array, want[name], tolerance[name])


def test_the_table_covers_what_it_says() -> None:
    for axis, values in AXES.items():
        assert {getattr(case, axis) for case in CASES} == set(values), axis
    for left, right in PAIRS:
        met = {(getattr(case, left), getattr(case, right)) for case in CASES}
        assert len(met) == len(AXES[left]) * len(AXES[right]), (left, right)
    assert len({str(case) for case in CASES}) == len(CASES)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, str, str]:
    """Small problems of any kind and how their arrays lie; few dims, so few kernels but by rule."""
    heads_kv = draw(st.integers(1, 2))
    heads = heads_kv * draw(st.integers(1, 2))
    sizes = Sizes(
        draw(st.integers(1, 2)), heads, draw(st.integers(1, 70)), draw(st.integers(1, 70))
    )
    rule = random_rule(random.Random(draw(st.integers(0, 10**6))), sizes)
    dim, dim_v = draw(st.sampled_from([(5, 5), (32, 7)]))
    problem = Problem(
        batch=sizes.batch,
        heads_q=heads,
        heads_kv=heads_kv,
        len_q=sizes.len_q,
        len_k=sizes.len_k,
        dim=dim,
        dim_v=dim_v,
        dtype=draw(st.sampled_from(["float32", "float64"])),
        scale=draw(st.sampled_from([default_scale(dim), 1.0])),
        mask=rule,
    )
    return problem, draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(MEMORY))


@SHOWS
@pytest.mark.slow
@given(problems())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_any_problem(drawn: tuple[Problem, str, str]) -> None:
    problem, layout, memory = drawn
    operands = inputs(problem, layout, memory)
    want = dense(operands, problem.mask, problem.scale)
    tolerance = tolerances(problem, operands, want, problem.dtype)
    got = forward(problem, operands)
    for name in got:
        assert_near(name, got[name], want[name], tolerance[name])
    for form in FORMS:
        for name, array in backward(problem, {**operands, **got}, form).items():
            assert_near(f"{name} ({form})", array, want[name], tolerance[name])
