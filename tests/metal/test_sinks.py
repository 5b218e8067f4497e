"""Sinks, the largest score of a row, and the gradient of lse, in Metal kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from compare import assert_near
from metal import machine, tensor_plan
from operands import SENTINEL, Array, inputs

from tilefold import Rule, causal, local
from tilefold.backends.metal import dispatch
from tilefold.backends.metal.plan import MetalPlan, plan
from tilefold.problems import reference
from tilefold.problems.attention import Problem

pytestmark = pytest.mark.slow  # kernels are compiled

SINKS = np.array([[0.5, -np.inf], [3.0, -1.0], [-40.0, -50.0], [60.0, 1.0]], np.float32)
EMPTY = local(3) & causal("start")
"""With 21 queries and 11 keys, the last queries see no key."""


def problem(len_q: int, mask: Rule, dtype: str = "float32", scale: float = 0.3) -> Problem:
    shapes = (2, 4, len_q, 16), (2, 2, 11, 16)
    return Problem.of(*shapes, dtype=dtype, mask=mask, scale=scale, sinks=SINKS.shape[1])


def run(made: MetalPlan, given: dict[str, Array], results: dict[str, tuple[Any, str]]) -> Any:
    """The results of a plan, by their names: each has a shape and a type."""
    into = {name: np.full(shape, SENTINEL, dtype) for name, (shape, dtype) in results.items()}
    dispatch.execute(made, machine(made.family.name), {**given, **into})
    return into


def largest(asked: Problem, given: dict[str, Array]) -> Array:
    keys = np.repeat(given["k"], 2, axis=1).astype(float)
    scores = asked.scale * (given["q"].astype(float) @ keys.swapaxes(2, 3))
    visible = asked.mask.to_dense(asked.len_q, asked.len_k, asked.batch, asked.heads_q)
    return np.where(visible, scores, -np.inf).max(axis=3)


@pytest.mark.parametrize(
    ("kernel", "asked"),
    [
        ("tiled", problem(21, EMPTY)),
        ("decode", problem(3, causal(), scale=-0.3)),
        ("tensorops", problem(21, EMPTY, "float16")),
    ],
    ids=["tiled", "decode", "tensorops"],
)
def test_sinks_take_their_share_and_the_largest_score_is_told(kernel: str, asked: Problem) -> None:
    given = inputs(asked, "bhnd", "packed")
    want = reference.attention(
        given["q"], given["k"], given["v"], mask=asked.mask, scale=asked.scale, sinks=SINKS
    )
    if kernel == "tensorops":
        made = tensor_plan(asked, extra=("max",))
    else:
        made = plan(asked, "apple9", "forward", form=kernel, extra=("max",))
    rows = asked.batch, asked.heads_q, asked.len_q
    results = {"o": ((*rows, asked.dim_v), asked.dtype), "lse": (rows, "float32")}
    sinks = np.repeat(SINKS, 3, axis=1)[:, ::3]  # strided
    taken = {"q": given["q"], "k": given["k"], "v": given["v"], "sinks": sinks}
    got = run(made, taken, {**results, "max": (rows, "float32")})
    tolerance = 1e-5 if asked.dtype == "float32" else 4e-3
    assert_near("o", got["o"], want[0], tolerance)
    assert_near("lse", got["lse"], want[1], 1e-5)
    assert_near("max", got["max"], largest(asked, given), 1e-5)


def test_gradients_pass_through_lse_and_reach_sinks() -> None:
    asked = problem(21, EMPTY)
    given = inputs(asked, "bhnd", "packed")
    options = {"mask": asked.mask, "scale": asked.scale, "sinks": SINKS}
    q, k, v, do = (given[name] for name in ("q", "k", "v", "do"))
    o, lse = (x.astype(np.float32) for x in reference.attention(q, k, v, **options))
    dlse = np.random.default_rng(1).normal(size=lse.shape).astype(np.float32)
    want = reference.attention_backward(do, q, k, v, o, lse, dlse=dlse, **options)
    made = plan(asked, "apple9", "backward", extra=("dlse", "dsinks"))
    taken = {**given, "o": o, "lse": lse, "dlse": dlse, "sinks": SINKS}
    shapes = {"dq": q.shape, "dk": k.shape, "dv": v.shape, "dsinks": SINKS.shape}
    got = run(made, taken, {name: (shape, "float32") for name, shape in shapes.items()})
    for name, array in zip(shapes, want, strict=True):
        assert_near(name, got[name], array, 1e-5)


def test_an_operand_that_no_kernel_has_is_refused() -> None:
    asked = replace(problem(21, EMPTY), sinks=0)
    with pytest.raises(NotImplementedError, match="no operand lse_low in a forward pass"):
        plan(asked, "apple9", "forward", extra=("lse_low",))
    (launch,) = plan(asked, "apple9", "forward", form="tiled").launches
    for name in ("sinks", "lse", "input0"):
        with pytest.raises(ValueError, match=f"{name} has no rows of dim or dim_v elements"):
            launch.spec.width(name)
