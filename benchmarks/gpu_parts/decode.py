"""Decoding: few queries and many keys, as bytes of keys and values per second.

It reads memory and does little else, so what counts is the share of the device's bandwidth: that of
a copy which moves as many bytes in the same rounds, read and written.
"""

from __future__ import annotations

import functools

from gpu_parts import attend, speed, timing
from gpu_parts.section import Here, Row, Section, Settings, Stage
from tilefold.backends.triton.heuristics import DEFAULT
from tilefold.masks.position_rules import full
from tilefold.problems.attention import ITEM_BYTES, Problem, default_scale

COPY = "copy"
FORM = "decode"


def cases(settings: Settings) -> dict[str, Problem]:
    """Problems by name: many sequences of the first length, one of the others; grouped and not.

    Grouped ones also with several queries, which still fill blocks together.
    """
    found = {}
    for length in settings.decoded:
        batch = max(1, min(32, settings.tokens * 16 // length))
        most = DEFAULT.packed_queries
        for heads_q, heads_kv, queries in ((32, 8, 1), (16, 16, 1), (32, 8, most)):
            for dtype in settings.dtypes[: 1 if settings.quick else 2]:
                dim = settings.dims[0]
                name = f"{dtype} b{batch} h{heads_q}/{heads_kv} q{queries} n{length} d{dim}"
                found[name] = Problem(
                    batch=batch,
                    heads_q=heads_q,
                    heads_kv=heads_kv,
                    len_q=queries,
                    len_k=length,
                    dim=dim,
                    dim_v=dim,
                    dtype=dtype,
                    scale=default_scale(dim),
                    mask=full(),
                )
    return found


def jobs(settings: Settings) -> list[str]:
    """The names of the cases."""
    return list(cases(settings))


def size(problem: Problem) -> int:
    """Bytes of keys and values."""
    p = problem
    return p.batch * p.heads_kv * p.len_k * (p.dim + p.dim_v) * ITEM_BYTES[p.dtype]


def measure(name: str, here: Here) -> Row:
    """The row of a case: bytes per second of each implementation, and as a share of the copy's."""
    stage, problem = here.stage, cases(here.settings)[name]
    given = attend.tensors(stage, problem)
    want = attend.exact(problem, given)
    forms = (FORM,) if problem.len_q == 1 else (FORM, "tiled")
    makers = {
        attend.named(form): functools.partial(attend.own, stage, problem, given, "forward", form)
        for form in forms
    }
    makers |= attend.rivals(stage, problem, given, "forward")
    del makers[attend.PLAIN]  # it has no form for few queries
    if not here.settings.compiled:
        del makers[attend.FLEX]
    else:
        attend.forget_compiled()
    calls, rows = attend.checked(here, makers, problem, "forward", want)
    calls[COPY] = copy(stage, size(problem))
    rows[COPY] = {}
    here.begin("turn by turn")
    for implementation, times in timing.turn_by_turn(
        stage, calls, here.settings.row_seconds
    ).items():
        found = timing.summary(times)
        rate = size(problem) / found["median_seconds"]
        rows[implementation] |= found | {"bytes_per_second": rate}
    for row in rows.values():
        if "bytes_per_second" in row:
            row["share_of_copy"] = row["bytes_per_second"] / rows[COPY]["bytes_per_second"]
    return {**speed.sizes(problem), "bytes": size(problem), "implementations": rows}


def copy(stage: Stage, number_bytes: int) -> timing.Call:
    """A copy that moves so many bytes, half of them read and half written."""
    import torch

    source = torch.ones(number_bytes // 2, dtype=torch.int8, device=stage.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


SECTION = Section("decode", 0.07, jobs, measure, patience=1, stall_seconds=75.0, first=1)
