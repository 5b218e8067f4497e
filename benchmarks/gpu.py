"""Everything that a GPU has to show: right results, speed beside its rivals, what its tools say.

    python benchmarks/gpu.py --save benchmarks/results [--minutes 9] [--sections forward,masks]
    python benchmarks/gpu.py --plot benchmarks/results/gpu_<device>.json

Sections: conformance, forward, backward, masks, decode, sanitizer, counters. Each has its share of
the time, and processes of its own: what fails in one is text in the document, which is written
after every row. A run of some sections replaces these in a document that is there already.

The rows that are worth most come first, so that a run that ends early has them:

1. the canary: each form once, small, with a time limit; what fails is left out of all that follows;
2. within the first 4 minutes, the first rows of each section: the promises (same bits, CUDA graphs,
   streams, autograd, torch.compile, long strides), the cases of decoding and a few others; forward
   and backward in the first type at length 8192, dims 128 and 64, full and causal, beside all
   rivals; the causal mask and a window; decoding with grouped heads;
3. the rest of each section, in its order; then the sanitizer and the counters.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from gpu_parts import (
    canary,
    conformance,
    decode,
    device,
    document,
    masks,
    plot,
    speed,
    tools,
    workers,
)
from gpu_parts.section import INTERPRETED, Row, Section, Settings, processes, said

from tilefold.backends.triton import interpreter, runtime
from tilefold.commands import terminal
from tilefold.common.files import write_atomically
from tilefold.measuring.environment import environment

SECTIONS: dict[str, Section] = {
    section.name: section
    for section in (
        conformance.SECTION,
        *speed.SECTIONS,
        masks.SECTION,
        decode.SECTION,
        tools.SANITIZER,
        tools.COUNTERS,
    )
}
"""In the order in which they run."""

READY_SHARE = 0.5
"""Of a section's time, the most that may pass with compiling ahead."""

FIRST_SECONDS = 240.0
"""From the start on, the most that may pass before the first rows of all sections are there."""


def parser(sections: Mapping[str, Section]) -> argparse.ArgumentParser:
    """The options."""
    made = terminal.Parser(
        prog="gpu.py",
        description=__doc__.partition("\n")[0],
        epilog="exit codes: 0 success, 1 something is wrong in the document, 2 bad input or no GPU",
    )
    made.add_argument("--save", type=Path, help="write gpu_<device>.json and .png into this folder")
    made.add_argument("--minutes", type=float, default=9.0, help="for everything (default 9)")
    made.add_argument(
        "--sections",
        type=lambda text: _chosen(text, sections),
        default=list(sections),
        metavar="A,B",
        help=f"some of {','.join(sections)} (default: all)",
    )
    made.add_argument("--quick", action="store_true", help="a few rows of each section")
    made.add_argument("--plot", type=Path, metavar="JSON", help="only draw a document again")
    made.add_argument(
        "--interpreter",
        action="store_true",
        help="try the sections on tiny problems in Triton's interpreter; its times say nothing",
    )
    return made


def _chosen(text: str, sections: Mapping[str, Section]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in sections]
    if unknown or not names:
        allowed = ", ".join(sections)
        raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown) or text!r}: {allowed}")
    return [name for name in sections if name in names]


def begun(settings: Settings) -> Row:
    """A section of the document before its first row."""
    around = environment()
    found: Row = {"date": around["date"], "commit": around["commit"], "quick": settings.quick}
    return found | {"reason": None, "rows": [], "undone": [], "seconds": 0.0}


def run(
    section: Section,
    settings: Settings,
    deadline: float,
    found: Row,
    jobs: Sequence[str],
    keep: Callable[[], None],
) -> None:
    """Do jobs of a section by a deadline of `time.monotonic`, and add their rows to `found`, its
    part of the document; `keep` is called after each. It never raises.
    """
    start, before = time.monotonic(), found["seconds"]
    rest = {"patience": section.patience, "stall_seconds": section.stall_seconds}
    never: dict[str, str] = {}

    def take(row: Row) -> None:
        found["rows"] = [each for each in found["rows"] if each["job"] != row["job"]] + [row]
        found["undone"] = [job for job in found["undone"] if job != row["job"]]
        found["seconds"] = round(before + time.monotonic() - start, 1)
        keep()

    try:
        if section.ready and section.prepare:
            chosen = [job for job in section.ready(settings) if _serves(job, jobs)]
            ahead = workers.run(
                section.prepare,
                chosen,
                settings,
                workers=processes(),
                deadline=start + READY_SHARE * (deadline - start),
                **rest,
            )
            never = ahead.never
            told = found.setdefault(
                "ahead", {"seconds": 0.0, "jobs": 0, "undone": 0, "reasons": {}}
            )
            told["seconds"] = round(told["seconds"] + time.monotonic() - start, 1)
            told["jobs"] += len(ahead.rows)
            told["undone"] += len(ahead.undone)
            told["reasons"] |= {n: r["reason"] for n, r in ahead.rows.items() if r.get("reason")}
        workers.run(
            section.measure,
            jobs,
            settings,
            workers=section.workers,
            deadline=deadline,
            never=never,
            keep=take,
            **rest,
        )
    except Exception as error:
        found["reason"] = said(error)
    found["seconds"] = round(before + time.monotonic() - start, 1)
    found["clocks"] = device.clocks()


def _serves(ready: str, jobs: Sequence[str]) -> bool:
    """Whether what is compiled ahead is for one of these jobs: it begins with the job's name, or is
    the job's last word (the group of cases that a tool looks at).
    """
    name = ready.partition(" | ")[0]
    return any(name in (job, job.rpartition(" ")[2]) for job in jobs)


def measured(
    names: Sequence[str],
    sections: Mapping[str, Section],
    settings: Settings,
    minutes: float,
    folder: Path | None,
    warning: Section,
) -> Row:
    """The document of a run of sections, after `warning`, the canary; saved after each row."""
    start = time.monotonic()
    end = start + 60 * minutes
    asked = workers.run(
        device.describe, ["device"], settings, workers=1, deadline=start + 120, stall_seconds=120
    )
    row = asked.rows.get("device", {"reason": "the GPU was not described in time"})
    found = document.started({"name": "unknown", **row})
    if folder:
        path = folder / f"gpu_{document.slug(found['device']['name'])}.json"
        found = document.continued(found, path)

    def keep() -> None:
        if folder:
            document.save(found, folder)

    found["sections"][warning.name] = heard = begun(settings)
    tried, limit = warning.jobs(settings), workers.START_SECONDS + 2 * warning.stall_seconds
    run(warning, settings, time.monotonic() + limit, heard, tried, keep)
    print(document.line(warning.name, heard), file=sys.stderr, flush=True)
    settings = replace(settings, without=canary.without(heard["rows"], tried))
    jobs: dict[str, list[str]] = {}
    for name in names:
        found["sections"][name] = begun(settings)
        try:
            jobs[name] = list(sections[name].jobs(settings))
        except Exception as error:
            found["sections"][name] |= {"reason": said(error), "clocks": device.clocks()}
        found["sections"][name]["undone"] = list(jobs.get(name, ()))
    first = {name: wanted[: sections[name].first] for name, wanted in jobs.items()}
    _round(first, min(end, start + FIRST_SECONDS), sections, settings, found, keep)
    rest = {name: found["sections"][name]["undone"] for name in jobs}
    _round(rest, end, sections, settings, found, keep)
    for name, wanted in jobs.items():
        order = {job: number for number, job in enumerate(wanted)}
        found["sections"][name]["rows"].sort(key=lambda row: order.get(row["job"], -1))
    found["verdicts"] = list(document.verdicts(found))
    keep()
    return found


def _round(
    jobs: Mapping[str, Sequence[str]],
    end: float,
    sections: Mapping[str, Section],
    settings: Settings,
    found: Row,
    keep: Callable[[], None],
) -> None:
    """Some jobs of each section until a time of `time.monotonic`, of which each has its share."""
    left = [sections[name] for name, some in jobs.items() if some]
    while left:
        section, now = left[0], time.monotonic()
        seconds = max(0.0, end - now) * section.share / sum(each.share for each in left)
        print(f"{section.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        kept = found["sections"][section.name]
        run(section, settings, now + seconds, kept, jobs[section.name], keep)
        print(document.line(section.name, kept), file=sys.stderr, flush=True)
        left.pop(0)


def show(found: Row) -> None:
    """What was asked for and what was reached, and what is wrong."""
    for row in found["verdicts"]:
        reached = "-" if row["reached"] is None else f"{row['reached']:.4g}"
        by = f" by {row['by']}" if row["by"] else ""
        asked = f"{row['asked']:g} {row['unit']}"
        print(f"{row['what']}: {reached}{by}, asked {asked}: {row['verdict']}")
    wrong = document.failures(found)
    for text in wrong[:40]:
        print(f"wrong: {text[:400]}")
    print(f"{found['device']['name']}: {len(wrong)} things are wrong")


def pictures(path: Path) -> list[Path]:
    """Draw a document beside it: one picture for each type, the first by the document's name."""
    found = json.loads(path.read_bytes())
    written = []
    for number, dtype in enumerate(plot.dtypes(found)):
        target = path.with_name(f"{path.stem}{f'_{dtype}' if number else ''}.png")
        write_atomically(target, plot.draw(found, dtype))
        written.append(target)
    return written


def main(
    words: Sequence[str] | None = None,
    sections: Mapping[str, Section] = SECTIONS,
    warning: Section = canary.SECTION,
) -> int:
    """Measure, save and show; or draw. Returns the exit code."""
    options = parser(sections).parse_args(words)
    if options.plot:
        try:
            drawn = pictures(options.plot)
        except (OSError, ValueError, KeyError) as error:
            print(f"gpu.py: {options.plot} cannot be drawn: {said(error)}", file=sys.stderr)
            return 2
        print("\n".join(map(str, drawn)))
        return 0
    reason = interpreter.missing() if options.interpreter else runtime.missing()
    if reason:
        print(f"gpu.py: nothing to measure on: {' '.join(reason.split())}", file=sys.stderr)
        return 2
    settings = INTERPRETED if options.interpreter else Settings(quick=options.quick)
    given = options.sections, sections, settings, options.minutes, options.save
    found = measured(*given, warning)
    show(found)
    if options.save:
        path = document.save(found, options.save)
        print(path)
        if plot.dtypes(found):
            print("\n".join(map(str, pictures(path))))
    return 1 if document.failures(found) else 0


if __name__ == "__main__":
    # So that processes end with this one where a time limit ends it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
