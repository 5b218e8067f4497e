"""Masks beside FlexAttention: what each costs to make, and whether a call costs its live tiles.

A mask that hides most pairs should cost the share of the tiles that it leaves, of what the full
mask costs. That share is counted from the plan; the cost relative to the full mask is measured
turn by turn with it. `excess` is that cost over that share: 1 where nothing is lost.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpu_parts import attend, speed, timing
from gpu_parts.section import Here, Row, Section, Settings, Stage
from tilefold.backends.triton.launch import Launch
from tilefold.backends.triton.plan import plan
from tilefold.masks.data_rules import documents
from tilefold.masks.position_rules import Rule, causal, local
from tilefold.problems.attention import Problem

FULL = "full"


@dataclass(frozen=True)
class Mask:
    """A rule at some length; the same for FlexAttention, given how arrays become tensors."""

    rule: Callable[[int], Rule]
    seen: Callable[[int, Callable[[Any], Any]], Callable[..., Any]]


def window(length: int) -> int:
    """The window of the masks: 1024 at a length of 8192."""
    return max(4, length // 8)


def ids(length: int) -> Any:
    """Sixteen documents of random lengths."""
    ends = np.sort(np.random.default_rng(0).choice(np.arange(1, length), 15, replace=False))
    return np.searchsorted(ends, np.arange(length), side="right").astype(np.int32)


def grid(length: int) -> tuple[int, int]:
    """Height and width of a 2-D sequence: 64 x 128 at a length of 8192."""
    height = 1 << ((length.bit_length() - 1) // 2)
    return height, length // height


def radius(length: int) -> int:
    """How far a query sees in each direction of the grid, itself counted."""
    return max(2, grid(length)[0] // 4)


def _window(length: int, there: Callable[[Any], Any]) -> Callable[..., Any]:
    span = window(length)
    return lambda b, h, q, k: (q >= k) & (q - k < span)


def _documents(length: int, there: Callable[[Any], Any]) -> Callable[..., Any]:
    owner = there(ids(length))
    return lambda b, h, q, k: (q >= k) & (owner[q] == owner[k])


def _neighbours(length: int, there: Callable[[Any], Any]) -> Callable[..., Any]:
    width, span = grid(length)[1], radius(length)

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        rows, columns = q // width - k // width, q % width - k % width
        return (rows < span) & (-rows < span) & (columns < span) & (-columns < span)

    return seen


MASKS = {
    "causal": Mask(lambda n: causal(), lambda n, there: lambda b, h, q, k: q >= k),
    "window": Mask(lambda n: causal() & local(window(n)), _window),
    "documents": Mask(lambda n: causal() & documents(ids(n)), _documents),
    "neighbours": Mask(lambda n: local(radius(n), grid_q=grid(n), grid_k=grid(n)), _neighbours),
}
"""By name: causal, a causal window, causal within documents, and neighbours in two dimensions."""


def cases(settings: Settings) -> dict[str, tuple[str, Mask, Problem]]:
    """Operation, mask and the full problem, by name."""
    found = {}
    for operation in ("forward", "backward"):
        for dim in settings.dims[: 1 if settings.quick else 2]:
            for name, mask in MASKS.items():
                sizes = settings.dtypes[0], settings.lengths[0], dim
                problem = speed.problem_of(settings, *sizes, FULL)
                found[f"{operation} d{dim} {name}"] = operation, mask, problem
    return found


def jobs(settings: Settings) -> list[str]:
    """The names of the cases."""
    return list(cases(settings))


def live_share(launches: tuple[Launch, ...], problem: Problem) -> float:
    """Tiles that kernels visit, of all that there are, weighted alike over the launches."""
    shares = []
    for launch in launches:
        if not launch.visited_rows and launch.spec.kernel in ("delta", "reduce_dq"):
            continue
        along = problem.len_k if launch.spec.parallel == "q" else problem.len_q
        step = launch.spec.blocks.traverse
        spans = launch.runs[:, 1].astype(np.int64) - launch.runs[:, 0]
        visited = int(np.sum(-(-spans // step)))
        planes = launch.planes[0] * launch.planes[1]
        shares.append(visited / (planes * launch.block_rows * -(-along // step)))
    return float(np.mean(shares))


def measure(name: str, here: Here) -> Row:
    """A mask and the full one, by tilefold's forms and by FlexAttention."""
    stage, settings = here.stage, here.settings
    operation, mask, unmasked = cases(settings)[name]
    length = unmasked.len_q
    problem = replace(unmasked, mask=mask.rule(length))
    given = attend.tensors(stage, problem)
    visible = _there(stage)(problem.mask.to_dense(length, length))
    want = attend.exact(problem, given, visible)
    kept, made_of = given, {FULL: attend.exact(unmasked, given), "": want}
    each: dict[str, attend.Maker] = {}
    for kind, asked in ((FULL, unmasked), ("", problem)):
        ours = attend.with_forward(stage, asked, kept) if operation == "backward" else kept
        for form in attend.forms(operation):
            each[f"{attend.named(form)} {kind}".strip()] = functools.partial(
                attend.own, stage, asked, ours, operation, form
            )
    notes: dict[str, Row] = {}
    if length in settings.compiled:
        attend.forget_compiled()
        made = functools.partial(_flexible, stage, problem, mask, notes)
        each[f"{attend.FLEX} {FULL}"] = lambda: attend.flex(unmasked, given, operation)
        each[attend.FLEX] = lambda: attend.flex(problem, given, operation, made())
    calls: dict[str, timing.Call] = {}
    rows: dict[str, Row] = {}
    for kind in (FULL, ""):
        some = {n: make for n, make in each.items() if n.endswith(FULL) == (kind == FULL)}
        found = attend.checked(here, some, problem, operation, made_of[kind])
        calls |= found[0]
        rows |= found[1]
    del want, visible, made_of
    here.begin("turn by turn")
    for implementation, times in timing.turn_by_turn(
        stage, calls, 2 * settings.row_seconds
    ).items():
        rows[implementation] |= timing.summary(times)
    for form in attend.forms(operation):
        _judge(rows, attend.named(form), _planned(stage, problem, operation, form))
    _judge(rows, attend.FLEX, notes.get("flex", {}))
    return {
        **speed.sizes(problem),
        "operation": operation,
        "visible_share": float(np.mean(problem.mask.to_dense(length, length))),
        "implementations": rows,
    }


def _there(stage: Stage) -> Callable[[Any], Any]:
    import torch

    return lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(stage.device)


def _planned(stage: Stage, problem: Problem, operation: str, form: str) -> Row:
    """The live share of a form's tiles, and how long a plan takes that nobody has made before."""
    try:
        made = attend.planned(stage, problem, operation, form)
        fresh = replace(problem, scale=problem.scale * (1 + 1e-9))
        start = time.perf_counter()
        plan(fresh, stage.machine.architecture, operation, form=form)
        seconds = time.perf_counter() - start
    except (NotImplementedError, ValueError):
        return {}
    return {"live_share": live_share(made.launches, problem), "mask_seconds": seconds}


def _flexible(stage: Stage, problem: Problem, mask: Mask, notes: dict[str, Row]) -> Any:
    """FlexAttention's block mask; its sparsity, and the seconds it takes, eager and compiled."""
    from torch.nn.attention.flex_attention import create_block_mask

    seen = mask.seen(problem.len_q, _there(stage))
    lengths = problem.len_q, problem.len_k
    found: list[Any] = []

    def make(**options: Any) -> None:
        found.append(create_block_mask(seen, None, None, *lengths, device=stage.device, **options))

    first = timing.wall(stage, make)
    row = {"first_mask_seconds": first, "mask_seconds": timing.wall(stage, make)}
    try:
        row["first_compiled_mask_seconds"] = timing.wall(stage, lambda: make(_compile=True))
        row["compiled_mask_seconds"] = timing.wall(stage, lambda: make(_compile=True))
    except Exception as error:  # an option of torch's own that is not promised
        row["compiled_mask_reason"] = str(error)[:200]
    row["live_share"] = 1 - float(found[0].sparsity()) / 100
    notes["flex"] = row
    return found[0]


def _judge(rows: dict[str, Row], name: str, facts: Row) -> None:
    """Cost relative to the full mask, and that over the share of live tiles."""
    row, whole = rows.get(name, {}), rows.get(f"{name} {FULL}", {})
    row |= facts
    if "median_seconds" in row and "median_seconds" in whole:
        row["relative_cost"] = row["median_seconds"] / whole["median_seconds"]
        if facts.get("live_share"):
            row["excess"] = row["relative_cost"] / facts["live_share"]


def ready(settings: Settings) -> list[str]:
    """Everything compiles at its first call: all cases, by several processes."""
    return jobs(settings) if settings.compiled else []


def prepare(job: str, here: Here) -> Row:
    """The whole row, without times: what was compiled stays on the disk."""
    measure(job, replace(here, settings=replace(here.settings, row_seconds=0.0)))
    return {}


SECTION = Section(
    "masks", 0.12, jobs, measure, ready, prepare, patience=1, stall_seconds=75.0, first=2
)
