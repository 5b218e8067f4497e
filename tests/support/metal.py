"""Attention on the Metal emulator: the operands of a case, and the results of its kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from operands import SENTINEL, Array

from tilefold.backends.metal import dispatch, emulate, gated
from tilefold.backends.metal.plan import MetalPlan, plan
from tilefold.problems.attention import Problem

FAMILIES = ("apple7", "apple9")
"""One family of each kind: traversed operands are staged and bfloat16 widened, or read in place."""

PLACES = ("packed", "padded", "step2", "reversed", "transposed")
"""Kinds of memory that results can be written to."""

TENSOR_LAYOUTS = (0, 1)
"""Layouts of cooperative tensors that the emulator knows."""

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"


def kernel(body: str, *buffers: str, before: str = "", threads: int = 32) -> str:
    """A kernel `test` with these buffers, and the numbers of lane, thread and group."""
    numbered = [f"{each} [[buffer({n})]]" for n, each in enumerate(buffers)]
    positions = [
        "uint3 group [[threadgroup_position_in_grid]]",
        "ushort lane [[thread_index_in_simdgroup]]",
        "ushort simdgroup [[simdgroup_index_in_threadgroup]]",
        "ushort thread_index [[thread_index_in_threadgroup]]",
    ]
    promise = f"[[max_total_threads_per_threadgroup({threads})]]"
    parameters = ", ".join([*numbered, *positions])
    return f"{HEAD}{before}{promise} kernel void test({parameters}) {{\n{body}\n}}\n"


def tensor_plan(problem: Problem, extra: tuple[str, ...] = ()) -> MetalPlan:
    """The plan of a forward pass on tensor operations; see `plan` for `extra`."""
    return gated.plan(problem, "apple10", extra)


def needs(check: str = "fast") -> None:
    """Skip, with the reason, if the emulator cannot make this check; CI has its tools."""
    if reason := emulate.available(check):
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def machine(family: str, check: str = "fast", tensor_layout: int = 0) -> dispatch.Emulated:
    """The emulator as a GPU of a family; skips if it cannot make this check."""
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
    """The emulator, on edited kernel sources."""

    edit: Edit = str

    def compile(self, text: str) -> Any:
        return emulate.compile_shader(self.edit(text), self.checks, self.tensor_layout)


def instead(old: str, new: str) -> Edit:
    """An edit that replaces a part of a source; the part must be there."""

    def edit(text: str) -> str:
        assert old in text, old
        return text.replace(old, new)

    return edit


def forward(
    problem: Problem,
    operands: Mapping[str, Array],
    on: dispatch.Emulated,
    into: Array | None = None,
    made: MetalPlan | None = None,
    **options: Any,
) -> dict[str, Array]:
    """Return o, in `into` if it is given, and lse; `options` go to `plan` if no plan is given."""
    shape = (problem.batch, problem.heads_q, problem.len_q)
    if into is None:
        into = np.full((*shape, problem.dim_v), SENTINEL, problem.dtype)
    results = {"o": into, "lse": np.full(shape, SENTINEL, np.float32)}
    given = {name: operands[name] for name in ("q", "k", "v", "seed") if name in operands}
    made = made or plan(problem, on.family, "forward", **options)
    dispatch.execute(made, on, {**given, **results})
    return results


def backward(
    problem: Problem,
    operands: Mapping[str, Array],
    on: dispatch.Emulated,
    into: Mapping[str, Array] | None = None,
    made: MetalPlan | None = None,
    **options: Any,
) -> dict[str, Array]:
    """dq, dk and dv, in `into` if it is given; `operands` holds do, q, k, v, o and lse.

    `options` are those of `plan`, used without a plan.
    """
    results = into or {
        f"d{name}": np.full(operands[name].shape, SENTINEL, problem.dtype) for name in "qkv"
    }
    names = ("do", "q", "k", "v", "o", "lse", "seed")
    given = {name: operands[name] for name in names if name in operands}
    made = made or plan(problem, on.family, "backward", **options)
    dispatch.execute(made, on, {**given, **results})
    return dict(results)
