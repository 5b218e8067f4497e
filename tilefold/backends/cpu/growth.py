"""Decoding with keys that grow: the plan of one number of keys, made from that of another.

A loop that generates text calls with one key more each time. Where every query sees every key, as
one query does under a causal mask, only the last split grows, so the plan of the call before serves
with another run of keys. That takes a tenth of the time of a plan from the beginning, and gives the
same plan: `tests/cpu/test_growth.py` compares them.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.heuristics import DEFAULT
from tilefold.backends.cpu.plan import CpuPlan, plan
from tilefold.backends.cpu.splits import KeySplitter
from tilefold.common import generation, reproducible
from tilefold.common.lru import LruCache
from tilefold.masks.expression import Truth
from tilefold.masks.runs import Runs
from tilefold.problems.attention import Problem

_DECODE = ("decode", "decode_part")

_kept: LruCache[CpuPlan] = LruCache(most=64, most_bytes=2**24)
"""The newest plan of each problem of few queries, whatever its number of keys."""


def grown(problem: Problem, device: Device, form: str) -> CpuPlan:
    """The plan of a forward pass: see `plan`."""
    rows = problem.heads_q // max(1, problem.heads_kv) * problem.len_q
    if problem.empty or rows > DEFAULT.most_rows or not _all_visible(problem):
        return plan(problem, device, "forward", form)
    scope = reproducible.get_reproducible()
    key = (generation.number, scope, id(device), form, *_but_keys(problem))
    found = _kept.get(key)
    made = found and found.device is device and _of_other_keys(found, problem)
    if made:
        return made
    made = plan(problem, device, "forward", form)
    if scope == "anywhere" and made.launches[0].spec.kernel in _DECODE:
        _kept.put(key, made, made.data_bytes)
    return made


def _all_visible(problem: Problem) -> bool:
    """True where the rule says at once that every query sees every key."""
    expression = problem.mask.bind(problem.len_q, problem.len_k)
    return isinstance(expression, Truth) and expression.value


def _but_keys(problem: Problem) -> tuple[object, ...]:
    """All sizes and options but the number of keys, and the mask, which hides none."""
    return (
        problem.batch,
        problem.heads_q,
        problem.heads_kv,
        problem.len_q,
        problem.dim,
        problem.dim_v,
        problem.dtype,
        problem.scale,
        problem.precision,
    )


def _of_other_keys(made: CpuPlan, problem: Problem) -> CpuPlan | None:
    """The plan with this problem's keys; None where they are split into more or fewer parts."""
    if made.problem == problem:
        return made
    (launch,) = made.launches
    splitter = KeySplitter(problem, None, launch.spec.lanes)
    keys = splitter.fixed_keys(problem.len_k)
    if -(-problem.len_k // keys) != launch.block_rows:
        return None
    ends = [*range(0, problem.len_k, keys), problem.len_k]
    spans = np.array([(*span, 0) for span in itertools.pairwise(ends)], np.int64)
    runs = Runs(launch.runs.rows, spans, 1, 1)
    return replace(made, problem=problem, launches=(replace(launch, problem=problem, runs=runs),))
