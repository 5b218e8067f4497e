"""The JSON document of a run: what was measured where and when, and the figures asked for.

    {"device": {...}, "machine", "versions", "date", "commit", "conditions",
     "sections": {"forward": {"date", "commit", "seconds", "reason", "rows", "undone", "ahead"}},
     "verdicts": [{"what", "asked", "unit", "reached", "verdict", "by"}]}

A run of some sections replaces these in the document of an earlier run on the same GPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_parts import timing
from gpu_parts.section import Row
from tilefold.common.files import write_atomically
from tilefold.measuring.environment import environment

JUDGED = ("H100", "H200")
"""GPUs that the figures hold for; an H200 has the multiprocessors of an H100."""

MOST_EXCESS = 1.1
"""What a mask may cost over the share of its live tiles."""


@dataclass(frozen=True)
class Figure:
    """TFLOP/s that are asked for: of one implementation, or of the best whose name begins so."""

    what: str
    asked: float
    section: str
    job: str
    name: str


FIGURES = (
    Figure("forward, plain Triton", 450, "forward", "bfloat16 d128 n8192 full", "tilefold tiled"),
    Figure("forward, Gluon", 640, "forward", "bfloat16 d128 n8192 full", "tilefold hopper"),
    Figure(
        "forward causal, Gluon", 600, "forward", "bfloat16 d128 n8192 causal", "tilefold hopper"
    ),
    Figure("forward, D = 64", 480, "forward", "bfloat16 d64 n8192 full", "tilefold"),
    Figure("backward", 500, "backward", "bfloat16 d128 n8192 full", "tilefold"),
)
"""On an H100 in bfloat16 at a length of 8192."""


def slug(name: str) -> str:
    """A device as part of a file's name.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia_h100_80gb_hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "unknown"


def started(device: Row) -> Row:
    """The document before any section."""
    around = environment()
    device = dict(device)
    versions = {**around["versions"], **device.pop("versions", {})}
    return {
        "date": around["date"],
        "commit": around["commit"],
        "device": device,
        "machine": around["machine"],
        "versions": versions,
        "conditions": timing.CONDITIONS,
        "sections": {},
        "verdicts": [],
    }


def continued(document: Row, path: Path) -> Row:
    """The document with the sections of an earlier one at the path, if that is of the same GPU."""
    try:
        before = json.loads(path.read_bytes())
        same = before["device"]["name"] == document["device"]["name"]
        kept = dict(before["sections"]) if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        kept = {}
    return {**document, "sections": {**kept, **document["sections"]}}


def save(document: Row, folder: Path) -> Path:
    """Write the document; return where it lies. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu_{slug(document['device']['name'])}.json"
    document["verdicts"] = list(verdicts(document))
    write_atomically(path, (json.dumps(plain(document), indent=1) + "\n").encode())
    return path


def plain(value: Any) -> Any:
    """A value without what JSON does not know: NaN and infinities are None."""
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


# What is asked for -------------------------------------------------------------------------------


def verdicts(document: Row) -> Iterator[Row]:
    """Each figure beside what was reached, or why there is nothing beside it."""
    for figure in FIGURES:
        row = _row(document, figure.section, figure.job)
        by, found, reason = _best(row, figure.name, "tflops", max)
        yield _verdict(document, figure.what, figure.asked, "TFLOP/s", by, found, reason)
    for row in document["sections"].get("masks", {}).get("rows", []):
        by, found, reason = _best(row, "tilefold", "excess", min)
        what = f"mask: {row['job']}"
        yield _verdict(document, what, MOST_EXCESS, "cost / live share", by, found, reason)


def _row(document: Row, section: str, job: str) -> Row:
    rows = document["sections"].get(section, {}).get("rows", [])
    absent = {"reason": f"{section}: {job} was not run"}
    return next((row for row in rows if row["job"] == job), absent)


def _best(
    row: Row, name: str, field: str, choose: Callable[..., Any]
) -> tuple[str | None, float | None, str]:
    """Who reached the best value of a field, the value, and why there is none."""
    implementations = row.get("implementations", {})
    own = {n: each for n, each in implementations.items() if n.startswith(name)}
    values = {n: each[field] for n, each in own.items() if each.get(field) is not None}
    if values:
        by = choose(values, key=values.__getitem__)
        return by, values[by], ""
    reasons = [each["reason"] for each in own.values() if each.get("reason")]
    return None, None, row.get("reason") or "; ".join(reasons) or f"there is no {name}"


def _verdict(
    document: Row,
    what: str,
    asked: float,
    unit: str,
    by: str | None,
    found: float | None,
    reason: str,
) -> Row:
    name = document["device"]["name"]
    kept = found is not None and (found <= asked if unit.startswith("cost") else found >= asked)
    if found is None:
        text = f"not measured: {reason}"
    elif not any(chip in name for chip in JUDGED):
        text = f"not judged: the figure is one of an H100, and this is {name}"
    else:
        text = "reached" if kept else "not reached"
    row = {"what": what, "asked": asked, "unit": unit, "reached": found, "by": by}
    return row | {"verdict": text}


def failures(document: Row) -> list[str]:
    """What is wrong in a document: broken cases, errors of the sanitizer, sections without rows."""
    found = []
    for name, section in document["sections"].items():
        if section.get("reason"):
            found.append(f"{name}: {section['reason']}")
        for row in section["rows"]:
            found += [
                f"{row['job']}, {part}: {why}" for part, why in row.get("failures", {}).items()
            ]
            if row.get("errors"):
                found.append(f"{row['job']}: {row['summary']}")
            if name in ("canary", "conformance") and row.get("reason"):
                found.append(f"{row['job']}: {row['reason']}")
    return found


def line(name: str, section: Row) -> str:
    """A section in a line."""
    rows = section["rows"]
    told = [f"{len(rows)} rows in {section['seconds']:.0f} s"]
    if name == "conformance":
        good = sum(not row.get("failures") and not row.get("reason") for row in rows)
        parts = sum(len(row.get("ran", [])) for row in rows)
        told.append(f"{good} of {len(rows)} pass, {parts} runs of kernels")
    broken = sum(bool(row.get("reason")) for row in rows)
    told += [f"{broken} with a reason instead"] if broken else []
    told += [f"{len(section['undone'])} out of time"] if section["undone"] else []
    told += [section["reason"]] if section.get("reason") else []
    return f"{name}: {', '.join(told)}"
