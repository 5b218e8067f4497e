"""Forward and backward: operations per second over the length, beside the rivals, turn by turn."""

from __future__ import annotations

import functools
import itertools

from gpu_parts import attend, timing
from gpu_parts.section import Here, Row, Section, Settings, Stage
from tilefold.masks.position_rules import Rule, causal, full
from tilefold.problems.attention import Problem, default_scale

MASKS: dict[str, Rule] = {"full": full(), "causal": causal()}


def flops(problem: Problem, operation: str) -> float:
    """Floating-point operations by the usual count: 2 for a multiply-add, 4 B H N^2 D forward, of
    which causal is half, and 2.5 times as many backward.

    >>> flops(Problem.of((2, 4, 512, 64)), "forward") == 4 * 2 * 4 * 512**2 * 64
    True
    """
    p = problem
    pairs = p.batch * p.heads_q * p.len_q * p.len_k * (0.5 if p.mask == causal() else 1.0)
    return 2 * pairs * (p.dim + p.dim_v) * (2.5 if operation == "backward" else 1.0)


def cases(settings: Settings) -> dict[str, Problem]:
    """All problems by name, those that are asked for by figure first."""
    settled = list(itertools.product(settings.dtypes, settings.lengths, settings.dims, MASKS))
    if settings.quick:
        settled = [
            each for each in settled if each[:2] == (settings.dtypes[0], settings.lengths[0])
        ]
    # The first type at the first length, the other types there, then the sweep over lengths.
    settled.sort(key=lambda each: (each[1] != settings.lengths[0], each[0] != settings.dtypes[0]))
    return {name_of(*each): problem_of(settings, *each) for each in settled}


def name_of(dtype: str, length: int, dim: int, mask: str) -> str:
    """A case in words."""
    return f"{dtype} d{dim} n{length} {mask}"


def problem_of(settings: Settings, dtype: str, length: int, dim: int, mask: str) -> Problem:
    """Batch x length and heads x dim are those of the settings."""
    heads = max(1, settings.width // dim)
    return Problem(
        batch=max(1, settings.tokens // length),
        heads_q=heads,
        heads_kv=heads,
        len_q=length,
        len_k=length,
        dim=dim,
        dim_v=dim,
        dtype=dtype,
        scale=default_scale(dim),
        mask=MASKS[mask],
    )


def jobs(settings: Settings) -> list[str]:
    """The names of the cases."""
    return list(cases(settings))


def makers(
    stage: Stage, problem: Problem, given: attend.Tensors, operation: str, settings: Settings
) -> dict[str, attend.Maker]:
    """All implementations that are measured on a case, by name, tilefold first."""
    found: dict[str, attend.Maker] = {
        attend.named(form): functools.partial(attend.own, stage, problem, given, operation, form)
        for form in attend.forms(operation)
    }
    found |= attend.rivals(stage, problem, given, operation)
    if problem.len_q in settings.compiled:
        attend.forget_compiled()
    else:
        del found[attend.FLEX]
    return found


def measure(name: str, here: Here, operation: str) -> Row:
    """The row of a case: every implementation's error, times and TFLOP/s, or why it has none."""
    stage, problem = here.stage, cases(here.settings)[name]
    given = attend.tensors(stage, problem)
    want = attend.exact(problem, given)
    if operation == "backward":
        given = attend.with_forward(stage, problem, given)
    each = makers(stage, problem, given, operation, here.settings)
    calls, rows = attend.checked(here, each, problem, operation, want)
    del want
    here.begin("turn by turn")
    seconds = here.settings.row_seconds * (1.5 if operation == "backward" else 1.0)
    count = flops(problem, operation)
    for implementation, times in timing.turn_by_turn(stage, calls, seconds).items():
        found = timing.summary(times)
        rows[implementation] |= found | {"tflops": count / found["median_seconds"] / 1e12}
    for form in attend.forms(operation):
        row = rows[attend.named(form)]
        if "reason" not in row:
            row["kernels"] = attend.kernels(attend.planned(stage, problem, operation, form))
    around = {"sm_clock_mhz": timing.clock(stage), "flops": count}
    return {**sizes(problem), **around, "implementations": rows}


def sizes(problem: Problem) -> Row:
    """What a row says of its problem."""
    p = problem
    return {
        "batch": p.batch,
        "heads": p.heads_q,
        "heads_kv": p.heads_kv,
        "len_q": p.len_q,
        "len_k": p.len_k,
        "dim": p.dim,
        "dtype": p.dtype,
        "mask": str(p.mask),
    }


# Compiling ahead ---------------------------------------------------------------------------------


def ready(settings: Settings, operation: str) -> list[str]:
    """A case and an implementation for each text that has to be compiled, for several processes."""
    found: dict[tuple[object, ...], str] = {}
    for name, problem in cases(settings).items():
        for implementation in implementations(operation):
            if implementation == attend.FLEX and problem.len_q not in settings.compiled:
                continue
            alike = problem.len_q if implementation == attend.FLEX else 0  # ours know no lengths
            text = (implementation, problem.dtype, problem.dim, str(problem.mask), alike)
            found.setdefault(text, f"{name} | {implementation}")
    return list(found.values())


def implementations(operation: str) -> list[str]:
    """Those that compile at their first call."""
    compiled = [attend.named(form) for form in attend.forms(operation)]
    return [*compiled, *([attend.PLAIN] if operation == "forward" else []), attend.FLEX]


def prepare(job: str, here: Here, operation: str) -> Row:
    """Have one implementation make one call, which leaves what was compiled on the disk."""
    name, implementation = job.split(" | ")
    stage, problem = here.stage, cases(here.settings)[name]
    given = attend.tensors(stage, problem)
    if operation == "backward":
        # Any o and lse do for compiling.
        given |= {"o": given["do"], "lse": given["q"][..., 0].float().contiguous()}
    make = makers(stage, problem, given, operation, here.settings)[implementation]
    here.begin(attend.part_of(implementation, problem, operation))
    return {"first_call_seconds": round(timing.wall(stage, lambda: make()()), 3)}


SECTIONS = tuple(
    Section(
        operation,
        share,
        jobs,
        functools.partial(measure, operation=operation),
        functools.partial(ready, operation=operation),
        functools.partial(prepare, operation=operation),
        patience=1,
        stall_seconds=75.0,
        first=4,
    )
    for operation, share in (("forward", 0.27), ("backward", 0.22))
)
