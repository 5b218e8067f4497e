"""Real expressions whose source in a language must compute what the exact fold does."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.masks.evaluate import exact_real
from tilefold.masks.expression import Index, RealLookup, ScoreValue, as_real
from tilefold.masks.tables import Input
from tilefold.scores.functions import exp, log, maximum, minimum, sigmoid, sqrt, table, tanh, where

Array = NDArray[Any]

ROWS, COLUMNS = 16, 32
S, Q, K, H = ScoreValue(), Index("q"), Index("k"), Index("h")
INPUTS = {
    0: np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float16),
    1: np.random.default_rng(1).normal(size=COLUMNS).astype(np.float32),
}
BOTH = RealLookup(Input(0, "float16", (ROWS, COLUMNS)), (Q, K))
KEYS = RealLookup(Input(1, "float32", (COLUMNS,)), (minimum(K + Q, COLUMNS - 1),))
STEPS = table(np.arange(COLUMNS, dtype=np.int32) % 5 - 2)

LEAVES = [
    S,
    S,
    S,
    BOTH,
    KEYS,
    as_real(Q),
    as_real(K - Q),
    as_real(0.1),
    as_real(STEPS[K]),
    as_real(1),
]
ONE = [
    lambda x: -x,
    abs,
    lambda x: exp(minimum(x, 1)),
    lambda x: log(abs(x) + 0.5),
    tanh,
    sigmoid,
    lambda x: sqrt(abs(x)),
]
TWO = [
    lambda x, y: x + y,
    lambda x, y: x - (y - x),
    lambda x, y: tanh(x) * y,
    lambda x, y: x / (abs(y) + 0.5),
    minimum,
    maximum,
    lambda x, y: where((Q > K) | (x < y), x, y),
    lambda x, y: where(maximum(Q, 3) % 4 == minimum(K, Q) // 2, exp(where(K > 3, 1, 0)) * x, y),
]


def drawn(draw: random.Random, depth: int) -> Any:
    """A random real expression."""
    if not depth:
        return draw.choice(LEAVES)
    if draw.random() < 0.4:
        return draw.choice(ONE)(drawn(draw, depth - 1))
    return draw.choice(TWO)(drawn(draw, depth - 1), drawn(draw, depth - 1))


EXPRESSIONS = [*(f(S) for f in ONE), *(f(S, BOTH) for f in TWO)]
EXPRESSIONS += [drawn(random.Random(seed), 4) for seed in range(12)]
"""Each function of the score, and random ones: parts of one function of the module."""

SCORES = np.random.default_rng(2).normal(size=(ROWS, COLUMNS)) * 3
SCORES[0, :4] = np.nan, np.inf, -np.inf, 1e-8


def assert_as_said(found: Array, dtype: str, within: float) -> None:
    """Raises unless the values of all expressions are those of the exact fold, for `SCORES`."""
    q, k = np.ogrid[:ROWS, :COLUMNS]
    for number, expression in enumerate(EXPRESSIONS):
        scores = SCORES.astype(dtype).astype(np.float64)
        want = exact_real(expression, scores, b=0, h=2, q=q, k=k, inputs=INPUTS)
        got = found[number].astype(np.float64)
        assert (np.isnan(got) == np.isnan(want)).all(), expression
        with np.errstate(invalid="ignore"):
            wrong = abs(got - want) > within * np.maximum(1, abs(want))
        assert not (wrong & (got != want)).any(), f"{expression}: {np.argwhere(wrong)[0]}"
