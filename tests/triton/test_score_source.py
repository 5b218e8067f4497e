"""The emitted function of a modified score: run, it computes what the exact fold does."""

from __future__ import annotations

import functools
from typing import Any

import interpreted
import numpy as np
import pytest
from score_sources import COLUMNS, EXPRESSIONS, INPUTS, ROWS, SCORES, Array, assert_as_said

from tilefold.backends.triton import module
from tilefold.backends.triton.kernels import mask
from tilefold.backends.triton.kernels.frame import HEADERS
from tilefold.masks.expression import Several
from tilefold.masks.skeleton import split
from tilefold.masks.tables import Table

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


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "dtype"), [(64, "float64"), (32, "float32")])
def test_score_source_computes_what_the_expression_says(bits: int, dtype: str) -> None:
    within = {"float64": 1e-13, "float32": 3e-5}[dtype]
    assert_as_said(computed(bits, dtype), dtype, within)


@pytest.mark.slow
def test_tanh_of_small_and_large_scores_keeps_its_digits() -> None:
    (at,) = [number for number, one in enumerate(EXPRESSIONS) if str(one) == "tanh(s)"]
    found = computed(64, "float64")[at]
    known = np.isfinite(SCORES)
    np.testing.assert_allclose(found[known], np.tanh(SCORES[known]), rtol=1e-15)
    assert found[0, 3] == 1e-8 and found[0, 1:3].tolist() == [1, -1]
