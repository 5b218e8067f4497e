"""Attention on the executor of Metal text: the operands of a case, and what its kernels give."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from operands import SENTINEL, Array

from tilefold.backends.metal import dispatch, emulate
from tilefold.backends.metal.plan import plan
from tilefold.problem import Problem

FAMILIES = ("apple7", "apple9")
"""One of each kind: traversed operands staged and bfloat16 widened, or read where they lie."""


def machine(family: str, check: str = "fast", tensor_layout: int = 0) -> dispatch.Emulated:
    """The executor as a GPU of a family; skips, with the reason, where there is no C++ compiler."""
    reason = emulate.available(check)
    if reason is not None:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    key = family, check, tensor_layout
    found = _machines.get(key)
    if found is None:
        found = _machines[key] = dispatch.Emulated(*key)
    return found


_machines: dict[tuple[str, str, int], dispatch.Emulated] = {}


def forward(
    problem: Problem, operands: Mapping[str, Array], on: dispatch.Emulated, **options: Any
) -> dict[str, Array]:
    """o and lse, contiguous."""
    shape = (problem.batch, problem.heads_q, problem.len_q)
    results = {
        "o": np.full((*shape, problem.dim_v), SENTINEL, problem.dtype),
        "lse": np.full(shape, SENTINEL, np.float32),
    }
    given = {name: operands[name] for name in ("q", "k", "v")}
    made = plan(problem, on.family, "forward", **options)
    dispatch.execute(made, on, {**given, **results})
    return results


def backward(
    problem: Problem, operands: Mapping[str, Array], on: dispatch.Emulated, **options: Any
) -> dict[str, Array]:
    """dq, dk and dv, contiguous; `operands` holds do, q, k, v, o and lse."""
    results = {f"d{name}": np.full(operands[name].shape, SENTINEL, problem.dtype) for name in "qkv"}
    given = {name: operands[name] for name in ("do", "q", "k", "v", "o", "lse")}
    dispatch.execute(plan(problem, on.family, "backward", **options), on, {**given, **results})
    return results
