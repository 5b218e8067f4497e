"""NaN and infinities in Metal's kernels: what no query may see changes nothing, the rest follows.

The dense definition decides. On hardware this holds as far as it compiles without fast mathematics,
as `torch.mps.compile_shader` does; what must hold with them is written by bits.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from compare import assert_near, dense
from metal import FAMILIES, backward, forward, machine
from operands import inputs

from tilefold import Rule, causal, documents
from tilefold.problems.attention import Problem

LEN_Q, LEN_K = 45, 150
RULES = {
    "causal": causal(),
    "documents": documents(np.repeat([0, 1, 2], 15), np.repeat([0, 1, 4], 50)),
}
"""The first leaves padding at the end of tiles, the second also rows that see no key."""

RTOL = {"float32": 1e-5, "float16": 4e-3}
PLACES = {"k": slice(120, 150), "v": slice(120, 150), "q": slice(20, 25), "do": slice(20, 25)}


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("family", "dtype"), list(zip(FAMILIES, RTOL, strict=True)))
def test_results_are_as_defined(family: str, dtype: str, rule: str, bad: float) -> None:
    on, problem = machine(family), _problem(RULES[rule], dtype)
    for names in (("k", "v"), ("q",), ("do",)):
        operands = {name: array.copy() for name, array in inputs(problem, "bhnd", "packed").items()}
        for name in names:
            operands[name][:, :, PLACES[name]] = bad
        with np.errstate(all="ignore"):
            want = dense(operands, problem.mask, problem.scale)
        got = forward(problem, operands, on)
        got |= backward(problem, {**operands, **got}, on)
        for name, array in got.items():
            largest = abs(want[name][np.isfinite(want[name])]).max(initial=1)
            assert_near(f"{name}, {names}", array, want[name], RTOL[dtype] * largest)


def _problem(rule: Rule, dtype: str) -> Problem:
    shapes = (2, 4, LEN_Q, 5), (2, 2, LEN_K, 5), (2, 2, LEN_K, 7)
    return Problem.of(*shapes, dtype=dtype, mask=rule, scale=0.5)
