"""A small case of each form before all else: a form that fails or hangs there is left out.

A kernel that hangs would take its time limit from every row that it has a part in, and a kernel
that is wrong or does not compile would be tried a hundred times. So each form of tilefold is tried
once, on a few hundred queries and keys, in a process with a short time limit. After one that fails
nothing asks for that form: neither by its name nor, in the case of Hopper's kernel, by "auto".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from gpu_parts import attend, checks
from gpu_parts.section import Here, Row, Section, Settings, Stage, processes
from tilefold.masks.position_rules import causal
from tilefold.problems.attention import Problem

STALL_SECONDS = 30.0
"""Importing torch, or compiling a kernel, takes less; what a kernel of this size takes is
microseconds."""


def jobs(settings: Settings) -> list[str]:
    """Each form of each operation, as "forward tiled"."""
    forward = [f"forward {form}" for form in (*attend.forms("forward"), "decode")]
    return [*forward, *(f"backward {form}" for form in attend.forms("backward"))]


def problem(settings: Settings, form: str) -> Problem:
    """A few tiles, the last ones at an edge of the mask and of the sequence."""
    length, dim = (300, 128) if settings.machine == "gpu" else (40, 16)
    queries = 2 if form == "decode" else length
    shapes = (1, 2, queries, dim), (1, 2, length, dim)
    return Problem.of(*shapes, dtype=settings.dtypes[0], mask=causal())


def measure(job: str, here: Here) -> Row:
    """Whether a form gives the right results: what ran, what failed, what a plan rules out."""
    operation, form = job.split()
    here.begin("start")
    run = functools.partial(_run, here.stage, problem(here.settings, form), operation, form)
    return checks.tried([(job, run)], here)


def _run(stage: Stage, small: Problem, operation: str, form: str) -> None:
    given = attend.tensors(stage, small)
    want = attend.exact(small, given)
    if operation == "backward":
        q, k, v = (given[name].double() for name in "qkv")
        s = (small.scale * (q @ k.mT)).masked_fill_(_hidden(stage, small), float("-inf"))
        given |= {"o": (s.softmax(3) @ v).to(given["q"].dtype), "lse": s.logsumexp(3).float()}
    attend.error(small, operation, attend.own(stage, small, given, operation, form)(), want)


def _hidden(stage: Stage, small: Problem) -> Any:
    import torch

    sizes = small.len_q, small.len_k
    everything = torch.ones(sizes, dtype=torch.bool, device=stage.device)
    return everything.triu_(1 + small.len_k - small.len_q)


def without(rows: Sequence[Row], jobs: Sequence[str]) -> dict[str, str]:
    """The forms of jobs that failed, or of which nothing was heard, each with the reason."""
    found, heard = {}, {row["job"]: row for row in rows}
    for job in jobs:
        row = heard.get(job, {"reason": "there was no time for it"})
        reason = row.get("reason") or "; ".join(row.get("failures", {}).values())
        if reason:
            found[job.split()[-1]] = f"the canary, {job}: {reason}"
    return found


SECTION = Section(
    "canary",
    0.0,
    jobs,
    measure,
    workers=min(5, processes()),
    patience=1,
    stall_seconds=STALL_SECONDS,
)
