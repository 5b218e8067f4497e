"""The one table of modified scores for tests of processors, and what each is in plain NumPy.

The formulas use no part of the language of scores: they are a second definition. Arrays lie in
memory with odd strides, and take turns in their types.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # NumPy knows the name "bfloat16" from it
import numpy as np
from cases import RULES, Sizes
from numpy.typing import NDArray
from trial import Trial, problem

import tilefold
from tilefold.scores.score import Score, as_score

Array = NDArray[Any]
Formula = Callable[..., Array]
"""(s, b, h, q, k) -> the modified scores; all are arrays of four axes."""


class Variant(NamedTuple):
    """A score, and the formula that says the same."""

    score: Any
    formula: Formula


def _softcap(sizes: Sizes, array: Callable[..., Array]) -> Variant:
    return Variant(tilefold.softcap(1.5), lambda s, b, h, q, k: 1.5 * np.tanh(s / 1.5))


def _alibi(sizes: Sizes, array: Callable[..., Array]) -> Variant:
    slopes = np.abs(array(sizes.heads, dtype="float64"))
    off = sizes.len_k - sizes.len_q
    return Variant(
        tilefold.alibi(slopes), lambda s, b, h, q, k: s - slopes[h] * np.abs(q + off - k)
    )


def _bias(sizes: Sizes, array: Callable[..., Array]) -> Variant:
    full = array(sizes.batch, sizes.heads, sizes.len_q, sizes.len_k, dtype="float32")
    return Variant(tilefold.bias(full), lambda s, b, h, q, k: s + full[b, h, q, k])


def _bias_of_keys(sizes: Sizes, array: Callable[..., Array]) -> Variant:
    keys = array(sizes.batch, 1, 1, sizes.len_k, dtype="float16")
    return Variant(tilefold.bias(keys), lambda s, b, h, q, k: s + keys[b, 0, 0, k].astype(float))


def _in_order(sizes: Sizes, array: Callable[..., Array]) -> Variant:
    heat = np.exp(array(sizes.heads, 1, 1, dtype="bfloat16").astype(float))
    rows = array(sizes.len_q, 1, dtype="bfloat16")
    score = [tilefold.temperature(heat), tilefold.bias(rows), tilefold.softcap(2.0)]
    return Variant(
        score,
        lambda s, b, h, q, k: 2 * np.tanh((s / heat[h, 0, 0] + rows[q, 0].astype(float)) / 2),
    )


def _hides(sizes: Sizes, array: Callable[..., Array]) -> Variant:
    """Every third pair is hidden, and all pairs of every fifth query."""

    def function(s: Any, q: Any, k: Any, b: Any, h: Any) -> Any:
        gone = ((q + k) % 3 == 0) | (q % 5 == 4)
        return tilefold.where(gone, float("-inf"), s * tilefold.sigmoid(s) + 0.1 * h)

    def formula(s: Array, b: Array, h: Array, q: Array, k: Array) -> Array:
        gone = ((q + k) % 3 == 0) | (q % 5 == 4)
        return np.where(gone, -np.inf, s / (1 + np.exp(-s)) + 0.1 * h)

    return Variant(tilefold.score(function), formula)


def _functions(sizes: Sizes, array: Callable[..., Array]) -> Variant:
    """All functions of the language."""

    def function(s: Any, q: Any, k: Any, b: Any, h: Any) -> Any:
        near = tilefold.minimum(tilefold.exp(-abs(s)), tilefold.sqrt(1 + s * s) / 2)
        return tilefold.maximum(near - tilefold.log(2 + s * s), s / (1.5 + b))

    def formula(s: Array, b: Array, h: Array, q: Array, k: Array) -> Array:
        near = np.minimum(np.exp(-np.abs(s)), np.sqrt(1 + s * s) / 2)
        return np.maximum(near - np.log(2 + s * s), s / (1.5 + b))

    return Variant(tilefold.score(function), formula)


VARIANTS: dict[str, Callable[[Sizes, Callable[..., Array]], Variant]] = {
    "softcap": _softcap,
    "alibi": _alibi,
    "bias": _bias,
    "bias-of-keys": _bias_of_keys,
    "in-order": _in_order,
    "hides": _hides,
    "functions": _functions,
}


def variant(name: str, sizes: Sizes) -> Variant:
    """A variant at these sizes, with arrays that are every second element of others."""
    random = np.random.default_rng([sizes.len_q, sizes.len_k])

    def array(*shape: int, dtype: str) -> Array:
        numbers = random.normal(size=(*shape[:-1], 2 * shape[-1])).astype(dtype)
        return numbers[..., ::2]

    return VARIANTS[name](sizes, array)


def score_of(name: str, sizes: Sizes) -> Score:
    """The score of a variant at these sizes."""
    found = as_score(variant(name, sizes).score)
    assert found is not None
    return found


SHAPES = [
    ("full", (113, 203), (40, 40), "bhnd"),
    ("full", (3, 300), (3, 2), "padded bhdn"),
    ("window-and-prefix", (150, 140), (64, 64), "bnhd"),
    ("documents-of-batch", (37, 71), (16, 5), "backwards"),
    ("dense-all", (70, 9), (2, 77), "no unit stride"),
    ("heads-differ", (41, 260), (128, 16), "padded bhnd"),
    ("full", (1, 9000), (16, 16), "bhnd"),
]
"""Tiled, decoded and split kernels; masks of all kinds, and all kinds of memory."""

DTYPES = ("float32", "float64", "float16", "bfloat16")


def trials(every: int = 1) -> list[Trial]:
    """Each variant in two shapes and two types: pairs take turns. Every second one has sinks.

    Or every few of these trials.
    """
    found = []
    for number, (name, turn) in enumerate(itertools.product(VARIANTS, range(2))):
        rule, (len_q, len_k), (dim, dim_v), layout = SHAPES[(number // 2 + 3 * turn) % len(SHAPES)]
        sizes = Sizes(2, 2, len_q, len_k)
        score, mask = score_of(name, sizes), RULES[rule](sizes)
        dtype = DTYPES[(number // 2 + 2 * turn) % len(DTYPES)]
        more = {"dim_v": dim_v, "batch": 2, "score": score, "sinks": (number // 2 + turn) % 2 * 2}
        made = problem(len_q, len_k, dim, mask, dtype, **more)
        found.append(Trial(made, layout, poisoned=turn == 0, score=score))
    return found[::every]


def short(trial: Trial) -> str:
    """A name of a trial: its type, lengths and score."""
    p = trial.problem
    return f"{p.dtype}-{p.len_q}x{p.len_k}-{str(p.score).partition('(')[0]}"
