"""Sections for `benchmarks/gpu.py` that fail; these functions are sent to its processes."""

from __future__ import annotations

import os
import time

from gpu_parts.section import Here, Row, Section, Settings


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
    return ["ahead"]


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
