"""Sections for `benchmarks/gpu.py` that fail; these functions are sent to its processes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from gpu_parts import attend
from gpu_parts.section import Here, Row, Section, Settings

from tilefold.problems.attention import Problem


def two(settings: Settings) -> list[str]:
    return ["one", "two"]


def one(settings: Settings) -> list[str]:
    return ["one"]


def fine(job: str, here: Here) -> Row:
    return {"value": len(job)}


def raises(job: str, here: Here) -> Row:
    raise ValueError(f"{job} cannot be")


def no_jobs(settings: Settings) -> list[str]:
    raise RuntimeError("there are no jobs")


def dies(job: str, here: Here) -> Row:
    """End the process in the second of three parts."""
    reasons: dict[str, str] = {}
    ran = []
    for part in ("first", "second", "third"):
        if here.attempt(part, lambda part=part: part == "second" and _end(), reasons) is not None:
            ran.append(part)
    return {"ran_parts": ran, "reasons": reasons}


def _end() -> None:
    print("a last word", flush=True)
    os._exit(7)


def hangs(job: str, here: Here) -> Row:
    reasons: dict[str, str] = {}
    here.attempt("loop", lambda: time.sleep(600), reasons)
    return {"reasons": reasons}


def endless(settings: Settings) -> list[str]:
    return [str(number) for number in range(10_000)]


def slow(job: str, here: Here) -> Row:
    time.sleep(0.2)
    return {}


def ready(settings: Settings) -> list[str]:
    return ["one | ahead"]


FAKES = {
    section.name: section
    for section in (
        Section("endless", 0.1, endless, slow),
        Section("fine", 1, two, fine, ready, raises),
        Section("raises", 1, two, raises),
        Section("no jobs", 1, no_jobs, fine),
        Section("dies", 1, two, dies, patience=1),
        Section("hangs", 1, one, hangs, stall_seconds=1.0),
    )
}


def all_forms(settings: Settings) -> list[str]:
    return ["forward tiled", "forward hopper", "backward split", "backward fused"]


def canary(job: str, here: Here) -> Row:
    """Forms that are right, hang, are wrong and end their process."""
    if job == "forward hopper":
        return hangs(job, here) and {"failures": {job: "it hung"}}
    if job == "backward fused":
        _end()
    return {"failures": {job: "it is wrong"} if job == "backward split" else {}}


CANARY = Section("canary", 0, all_forms, canary, workers=4, patience=1, stall_seconds=1.0)
QUIET = Section("canary", 0, one, fine)


def after(job: str, here: Here) -> Row:
    """What a row after the canary finds around it; `FOLDER` names where the document is."""
    said = {}
    for form in ("tiled", "hopper"):
        try:
            attend.planned(here.stage, Problem.of((1, 1, 20, 16)), "forward", form)
        except (NotImplementedError, ValueError) as error:
            said[form] = str(error)
    (document,) = Path(os.environ["FOLDER"]).glob("*.json")
    sections = json.loads(document.read_text(encoding="utf-8"))["sections"]
    return {
        "said": said,
        "hopper": os.environ.get("TILEFOLD_HOPPER"),
        "threads": os.environ.get("TORCHINDUCTOR_COMPILE_THREADS"),
        "rows": {name: [row["job"] for row in one["rows"]] for name, one in sections.items()},
    }


AFTER = {name: Section(name, 1, two, after, first=1) for name in ("left", "right")}
