"""Plans of every backend: which kernels, what they forget, and that they are kept."""

from __future__ import annotations

from typing import Any

import pytest
from backends import Setting

from tilefold import Problem, causal, local
from tilefold.backends.metal.heuristics import DEFAULT

METAL, TRITON = Setting("metal", "float32", "apple9"), Setting("triton", "float16", "sm_90")
GPUS = (METAL, TRITON)
ALL = (Setting("cpu", "float32"), *GPUS)
OTHER = {"metal": "apple8", "triton": "sm_80"}
"""Another machine of a backend."""


def metal(len_q: int, len_k: int, form: str, expected: list[str]) -> tuple[Any, ...]:
    """A case of a plan on Metal, by its lengths."""
    return METAL, ((1, 2, len_q, 64), (1, 2, len_k, 64)), form, expected


FEW, MANY = DEFAULT.few_queries, DEFAULT.many_keys
DECODE, TILED = ["decode", "merge"], ["forward"]
DECODED = [
    metal(1, MANY, "auto", DECODE),
    metal(FEW, 9999, "auto", DECODE),
    metal(1, MANY - 1, "auto", TILED),
    metal(FEW + 1, 9999, "auto", TILED),
    metal(1, 9999, "tiled", TILED),
    metal(20, 30, "decode", DECODE),
    (TRITON, ((4, 8, 1, 64), (4, 2, 8192, 64)), "auto", DECODE),
    (TRITON, ((4, 8, 64, 64), (4, 2, 8192, 64)), "auto", DECODE),
    (TRITON, ((4, 8, 65, 64), (4, 2, 8192, 64)), "auto", TILED),
    (TRITON, ((4, 8, 16, 64), (4, 8, 8192, 64)), "auto", DECODE),
    (TRITON, ((4, 8, 17, 64), (4, 8, 8192, 64)), "auto", TILED),
    (TRITON, ((4, 8, 1, 64), (4, 2, 100, 64)), "auto", TILED),
    (TRITON, ((4, 8, 17, 64), (4, 2, 8192, 64)), "decode", DECODE),
    (TRITON, ((4, 8, 1, 64), (4, 2, 8192, 64)), "tiled", TILED),
]


@pytest.mark.feature("M07")
@pytest.mark.parametrize(("setting", "shapes", "form", "expected"), DECODED, ids=str)
def test_few_queries_of_many_keys_are_decoded_and_no_others(
    setting: Setting, shapes: tuple[Any, Any], form: str, expected: list[str]
) -> None:
    made = setting.plan(Problem.of(*shapes, dtype=setting.dtype), "forward", form=form)
    assert [launch.spec.kernel for launch in made.launches] == expected


@pytest.mark.feature("M03", "A05")
@pytest.mark.parametrize("setting", ALL, ids=str)
def test_plans_forget_lengths_batch_heads_and_numbers_of_the_rule(setting: Setting) -> None:
    form = "split" if setting.backend == "cpu" else "auto"  # the CPU's choice is for a problem

    def specs(problem: Problem) -> list[Any]:
        plans = setting.plan(problem, "forward"), setting.plan(problem, "backward", form=form)
        return [launch.spec for made in plans for launch in made.launches]

    def problem(batch: int, heads: int, lengths: tuple[int, int], mask: Any) -> Problem:
        keys = batch, heads, lengths[1]
        shapes = (batch, 2 * heads, lengths[0], 24), (*keys, 24), (*keys, 40)
        return Problem.of(*shapes, dtype=setting.dtype, mask=mask)

    short = specs(problem(2, 2, (300, 420), causal() & local(100)))
    assert short == specs(problem(1, 3, (900, 700), causal() & local(70)))
    assert short[0] != specs(problem(2, 2, (300, 420), causal()))[0]


@pytest.mark.feature("M07")
@pytest.mark.parametrize("setting", ALL, ids=str)
def test_plans_are_kept(setting: Setting) -> None:
    problem = Problem.of((1, 2, 300, 24), dtype=setting.dtype)
    for operation in ("forward", "backward"):
        made = setting.plan(problem, operation)
        assert setting.plan(problem, operation) is made
    assert setting.plan(problem, "forward") is not made
    if setting.backend != "cpu":
        other = Setting(setting.backend, setting.dtype, OTHER[setting.backend])
        assert other.plan(problem, operation) is not made
