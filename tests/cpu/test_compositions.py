"""Scores drawn by hypothesis, with masks, arrays and sinks: kernels and "composed", all gradients.

They are compared with the reference, and gradients with central differences of what kernels
compute. `masks/test_derivative.py` draws such trees without kernels.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from backends import Setting
from cases import Sizes, random_rule
from compare import assert_near
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from operands import Array
from score_trees import K, Q, drawn

import tilefold
from tilefold import attention
from tilefold.backends.cpu.tables import RegisterTile
from tilefold.masks.expression import FromInteger, Index, ScoreValue, as_real
from tilefold.problems import reference
from tilefold.problems.attention import Problem
from tilefold.scores.score import Score

# Tracing Python's operations doubles the time of these tests.
pytestmark = pytest.mark.no_cover

SIZES = Sizes(2, 2, 11, 21)
RANDOM = np.random.default_rng(0)
SHAPES = {"q": (2, 2, 11, 3), "k": (2, 1, 21, 3), "v": (2, 1, 21, 5), "do": (2, 2, 11, 5)}
DATA = {name: RANDOM.normal(size=shape) for name, shape in SHAPES.items()}
DATA |= {"dlse": RANDOM.normal(size=(2, 2, 11)), "sinks": RANDOM.normal(size=(2, 2))}
FULL, CYCLE = RANDOM.normal(size=(11, 21)), RANDOM.normal(size=(2, 7))
S, B, H = ScoreValue(), Index("b"), Index("h")
STEPS = tilefold.table(np.array([2, -1, 0, 3], np.int32))

LEAVES = [
    S,
    S,
    S,
    tilefold.table(FULL)[Q, K],
    tilefold.table(CYCLE)[H, (2 * Q + K) % 7],
    FromInteger(K - Q),
    FromInteger(STEPS[(Q + B) % 4]),
    as_real(0.5),
]
SMALL = Setting("cpu", "float64", "", ("auto", "fused"), RegisterTile(2, 1))
"""Kernels of small tiles, which compile fast: every example has its own."""


def gradients_of(score: Score, sinks: int) -> list[str]:
    """The arrays that have a gradient, in the order of the reference."""
    inputs = [f"input{number}" for number, _ in enumerate(score.form.arrays)]
    return ["q", "k", "v", *inputs, *["sinks"] * bool(sinks)]


def forward(problem: Problem, arrays: dict[str, Array]) -> dict[str, Array]:
    """o and lse of kernels."""
    shapes = {"o": (DATA["do"].shape, "float64"), "lse": (DATA["dlse"].shape, "float64")}
    taken = {name: array for name, array in arrays.items() if name not in ("do", "dlse")}
    return SMALL.run(problem, "forward", taken, shapes)


def loss(problem: Problem, arrays: dict[str, Array]) -> float:
    """What has `do` and `dlse` as gradients with respect to o and lse, by kernels."""
    got = forward(problem, arrays)
    lse = np.where(np.isfinite(got["lse"]), got["lse"], 0)
    return float((arrays["do"] * got["o"]).sum() + (arrays["dlse"] * lse).sum())


@pytest.mark.slow
@pytest.mark.feature("M15")
@settings(
    max_examples=14,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.generate],  # a smaller example would be compiled too
)
@given(st.integers(0, 2**32))
def test_any_score_and_its_gradients(seed: int) -> None:
    draw = random.Random(seed)
    sinks = draw.randrange(3)
    tree = drawn(draw, LEAVES, 3)
    score = tilefold.score(lambda s: as_real(tree))
    mask = random_rule(draw, SIZES, depth=1)
    options = {"mask": mask, "scale": 0.6, "score": score}
    shapes = [SHAPES[name] for name in "qkv"]
    problem = Problem.of(*shapes, **options, sinks=sinks, dtype="float64")
    inputs = {f"input{number}": array for number, array in enumerate(score.form.arrays)}
    arrays = {**DATA, **inputs, "sinks": DATA["sinks"][:, :sinks]}
    if not sinks:
        del arrays["sinks"]
    got = forward(problem, arrays)
    names = gradients_of(score, sinks)
    results = {f"d{name}": (arrays[name].shape, "float64") for name in names}
    got |= SMALL.run(problem, "backward", {**arrays, **got}, results, "fused")
    want = defined(arrays, options, names)
    compare(got, want)
    compare(composed(arrays, options, names), want)
    for name in names:
        way = np.random.default_rng(seed).normal(size=arrays[name].shape)
        up, down = (
            loss(problem, {**arrays, name: arrays[name] + step * way}) for step in (1e-6, -1e-6)
        )
        slope = float((got[f"d{name}"] * way).sum())
        assert abs((up - down) / 2e-6 - slope) <= 1e-5 * (1 + np.abs(got[f"d{name}"]).sum()), name


def defined(
    arrays: dict[str, Array], options: dict[str, Any], names: list[str]
) -> dict[str, Array]:
    """All results of the reference."""
    options = {**options, "sinks": arrays.get("sinks")}
    o, lse = reference.attention(*(arrays[name] for name in "qkv"), **options)
    four = (arrays[name] for name in ("do", "q", "k", "v"))
    found = reference.attention_backward(*four, o, lse, **options, dlse=arrays["dlse"])
    return {"o": o, "lse": lse, **{f"d{x}": y for x, y in zip(names, found, strict=True)}}


def composed(
    arrays: dict[str, Array], options: dict[str, Any], names: list[str]
) -> dict[str, Array]:
    """All results of impl="composed" and torch's autograd."""
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    wanted = [tensors[name].requires_grad_() for name in names]
    score = options["score"]
    held = {id(x): tensors[f"input{number}"] for number, x in enumerate(score.form.arrays)}
    turned = score.renamed(lambda given: replace(given, held=held[id(given.held)]))
    options = {**options, "score": turned, "sinks": tensors.get("sinks"), "impl": "composed"}
    o, lse = attention(*(tensors[name] for name in "qkv"), **options, return_lse=True)
    found = torch.autograd.grad((o, lse), wanted, (tensors["do"], tensors["dlse"]))
    results = {"o": o, "lse": lse, **{f"d{x}": y for x, y in zip(names, found, strict=True)}}
    return {name: tensor.detach().numpy() for name, tensor in results.items()}


def compare(got: dict[str, Array], want: dict[str, Array]) -> None:
    """Raises AssertionError unless all results are near."""
    for name, array in got.items():
        size = np.abs(want[name][np.isfinite(want[name])]).max(initial=1)
        assert_near(name, array, want[name], 1e-11 * size)
