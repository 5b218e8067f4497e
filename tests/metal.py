"""Attention on the executor of Metal text: the operands of a case, and what its kernels give."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from operands import SENTINEL, Array

from tilefold.backends.metal import dispatch, emulate
from tilefold.backends.metal.plan import plan
from tilefold.problems.attention import Problem

FAMILIES = ("apple7", "apple9")
"""One of each kind: traversed operands staged and bfloat16 widened, or read where they lie."""


def needs(check: str = "fast") -> None:
    """Skip, with the reason, where the executor cannot make this check; CI has what it needs."""
    if reason := emulate.available(check):
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def machine(family: str, check: str = "fast", tensor_layout: int = 0) -> dispatch.Emulated:
    """The executor as a GPU of a family; skips where it cannot make this check."""
    needs(check)
    key = family, check, tensor_layout
    found = _machines.get(key)
    if found is None:
        found = _machines[key] = dispatch.Emulated(*key)
    return found


_machines: dict[tuple[str, str, int], dispatch.Emulated] = {}


Edit = Callable[[str], str]


@dataclass(frozen=True, eq=False)
class Edited(dispatch.Emulated):
    """The executor, on texts that are not quite the emitted ones."""

    edit: Edit = str

    def compile(self, text: str) -> Any:
        return emulate.compile_shader(self.edit(text), self.checks, self.tensor_layout)


def instead(old: str, new: str) -> Edit:
    """The text with another part, wherever that one stands; it must."""

    def edit(text: str) -> str:
        assert old in text, old
        return text.replace(old, new)

    return edit


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
