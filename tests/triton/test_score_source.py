"""The emitted function of a modified score: run, it computes what the exact fold does."""

from __future__ import annotations

import functools
import random
from typing import Any

import interpreted
import numpy as np
import pytest
from numpy.typing import NDArray

from tilefold.backends.triton import module
from tilefold.backends.triton.kernels import mask
from tilefold.backends.triton.kernels.frame import HEADERS
from tilefold.masks.evaluate import exact_real
from tilefold.masks.expression import Index, RealLookup, ScoreValue, Several, as_real
from tilefold.masks.skeleton import split
from tilefold.masks.tables import Input, Table
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

KERNEL = """
@triton.jit
def values({given}):
    q_at, k_at = tl.arange(0, {rows})[:, None], tl.arange(0, {columns})[None, :]
    s = tl.load(scores + q_at * {columns} + k_at)
    found = modified(s, tl.program_id(0), tl.program_id(0) + 2, q_at, k_at, {rest})
    at = out + q_at * {columns} + k_at
{stores}
"""


@functools.cache
def computed(bits: int, dtype: str) -> Array:
    """The values of all expressions, by a function of integers of some bits and a real type."""
    interpreted.needs()
    import torch

    parts = split(Several(tuple(EXPRESSIONS)))
    wanted = range(len(EXPRESSIONS))
    function = mask.modified(parts.skeleton, bits, dtype, "", wanted)
    rest = mask.arguments(parts.skeleton)
    size = ROWS * COLUMNS
    stores = "\n".join(f"    tl.store(at + {n} * {size}, found[{n}])" for n in wanted)
    sizes = {"rows": ROWS, "columns": COLUMNS, "rest": ", ".join(rest), "stores": stores}
    given = ", ".join(["out", "scores", *rest])
    source = "\n".join([*HEADERS, "", function, KERNEL.format(given=given, **sizes)])
    out = torch.full((len(wanted), ROWS, COLUMNS), 7.0, dtype=getattr(torch, dtype))
    known: dict[str, Any] = {}
    for parameter, value in zip(parts.skeleton.parameters, parts.parameters, strict=True):
        by_bits = parameter.dtype == "real" and dtype == "float64"
        known[parameter.name] = int(np.float64(value).view(np.int64)) if by_bits else value
    for slot, read in zip(parts.skeleton.slots, parts.tables, strict=True):
        held = read.array if isinstance(read, Table) else INPUTS[read.number]
        known[slot.name] = torch.tensor(held.copy())
        known |= dict(zip(slot.strides, known[slot.name].stride(), strict=True))
    kernel = module.load(source, "values")
    scores = torch.tensor(SCORES.astype(dtype))
    with np.errstate(all="ignore"):
        kernel[(1,)](out, scores, *(known[name] for name in rest))
    return out.numpy()


@pytest.mark.parametrize(("bits", "dtype"), [(64, "float64"), (32, "float32")])
def test_score_source_computes_what_the_expression_says(bits: int, dtype: str) -> None:
    q, k = np.ogrid[:ROWS, :COLUMNS]
    found = computed(bits, dtype)
    for number, expression in enumerate(EXPRESSIONS):
        scores = SCORES.astype(dtype).astype(np.float64)
        want = exact_real(expression, scores, b=0, h=2, q=q, k=k, inputs=INPUTS)
        got = found[number].astype(np.float64)
        assert (np.isnan(got) == np.isnan(want)).all(), expression
        within = {"float64": 1e-13, "float32": 3e-5}[dtype]
        with np.errstate(invalid="ignore"):
            wrong = abs(got - want) > within * np.maximum(1, abs(want))
        assert not (wrong & (got != want)).any(), f"{expression}: {np.argwhere(wrong)[0]}"


def test_tanh_of_small_and_large_scores_keeps_its_digits() -> None:
    (at,) = [number for number, one in enumerate(EXPRESSIONS) if str(one) == "tanh(s)"]
    found = computed(64, "float64")[at]
    known = np.isfinite(SCORES)
    np.testing.assert_allclose(found[known], np.tanh(SCORES[known]), rtol=1e-15)
    assert found[0, 3] == 1e-8 and found[0, 1:3].tolist() == [1, -1]
