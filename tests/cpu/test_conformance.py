"""Every case, forward and backward in every form, against the dense definition in float64."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import pytest
from cases import AXES, CASES, LAYOUTS, MEMORY, PAIRS, Case, Sizes, random_rule
from compare import HALVES, UNITS, assert_near, assert_same, dense, tolerances
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operands import FORMS, Array, backward, canonical, forward, inputs, place, run

import tilefold
from tilefold.problems.attention import STATISTICS, Problem, default_scale

QUICK = {
    Case((113, 203), 16, "window-and-prefix", "bhnd", "gqa", "padded"): "float32",
    Case((64, 32), 77, "full", "bhdn", "mqa", "packed", "narrower"): "bfloat16",
}
"""A representative part for the quick suite; the kernels of a case take about a second to make."""


def doubles() -> set[Case]:
    """The first cases that meet every value of every axis but the rule."""
    found, met = set(), set()
    for case in CASES:
        values = {(axis, getattr(case, axis)) for axis in AXES if axis != "rule"}
        if not values <= met:
            met |= values
            found.add(case)
    return found


def trials(every: int) -> list[tuple[Case, str]]:
    """Case and type: the quick cases in one type each, the others in float32, a quarter of them
    also in float64, and one in `every` in a half type.

    Half types take turns: their kernels differ in how tiles are read and written, whatever the
    rule. Those of float64 differ from float32 by their lanes and their exponential alone.
    """
    found, in_float64 = [*QUICK.items()], doubles()
    for number, case in enumerate(CASES):
        half = [] if number % every else [HALVES[number // every % 2]]
        double = ["float64"] if case in in_float64 else []
        found += [(case, dtype) for dtype in ("float32", *double, *half)]
    return found


TURNS = {"float32": 0, "float64": 1}
"""How far the form of a type is from that of float32; half types have the third one."""


def calls() -> list[Any]:
    """Trials of the public calls, and of forms, which take turns; those of one case share its
    definition. Another type of a case has another form than float32.
    """
    ways = {trial: ["public"] for trial in trials(every=3)}
    numbers = {case: number for number, case in enumerate(CASES)}
    for case, dtype in trials(every=5):
        turn = numbers.get(case, 0) + TURNS.get(dtype, 2)
        forms = [[*FORMS][turn % len(FORMS)]] if case in numbers else [*FORMS]
        ways.setdefault((case, dtype), []).extend(forms)
    found = []
    for number, ((case, dtype), forms) in enumerate(ways.items()):
        for form in forms:
            slow = number >= len(QUICK) or form != "public"
            marks = [pytest.mark.slow] if slow else []
            found.append(pytest.param(case, dtype, form, id=f"{case}-{dtype}-{form}", marks=marks))
    return found


SHOWS = pytest.mark.feature(
    *("M01", "M06", "M16", "T01", "T02", "T03", "T04", "T05", "T06"),
)


@lru_cache(maxsize=2)
def definition(
    case: Case, dtype: str
) -> tuple[dict[str, Array], dict[str, Array], dict[str, float]]:
    """The inputs of a case, what it should give, and within what."""
    problem = case.problem(dtype)
    operands = inputs(problem, case.layout, case.memory)
    want = dense(operands, problem.mask, problem.scale)
    return operands, want, tolerances(problem, operands, want)


@SHOWS
@pytest.mark.feature("M04", "T09", "T10")
@pytest.mark.parametrize(("case", "dtype", "form"), calls())
def test_every_case(case: Case, dtype: str, form: str) -> None:
    if form == "public":
        check_public_calls(case, dtype)
    else:
        check_backward(case, dtype, form)


def check_public_calls(case: Case, dtype: str) -> None:
    """Both passes as a user calls them; the inputs stay as they are."""
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
        assert array.dtype == (STATISTICS[dtype] if name == "lse" else dtype)
        assert_near(name, array, want[name], tolerance[name])
    for name, array in given.items():
        assert_same(f"{name} after the call", array, before[name])


def check_backward(case: Case, dtype: str, form: str) -> None:
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
    for axis in AXES.keys() - {"rule"}:
        assert {getattr(case, axis) for case in doubles()} == set(AXES[axis]), axis


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
        dtype=draw(st.sampled_from([*UNITS])),
        scale=draw(st.sampled_from([default_scale(dim), 1.0])),
        mask=rule,
    )
    return problem, draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(MEMORY))


@SHOWS
@pytest.mark.slow
@given(problems())
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_any_problem(drawn: tuple[Problem, str, str]) -> None:
    problem, layout, memory = drawn
    operands = inputs(problem, layout, memory)
    want = dense(operands, problem.mask, problem.scale)
    tolerance = tolerances(problem, operands, want)
    got = forward(problem, operands)
    for name in got:
        assert_near(name, got[name], want[name], tolerance[name])
    for form in FORMS:
        for name, array in backward(problem, {**operands, **got}, form).items():
            assert_near(f"{name} ({form})", array, want[name], tolerance[name])
