"""Everything that a GPU has to show: right results, speed beside its rivals, what its tools say.

    python benchmarks/gpu.py --save benchmarks/results [--minutes 9] [--sections forward,masks]
    python benchmarks/gpu.py --plot benchmarks/results/gpu_<device>.json

Sections: conformance, forward, backward, masks, decode, sanitizer, counters. Each has its share of
the time, and processes of its own: what fails in one is text in the document, which is written
after every section. A run of some sections replaces these in a document that is there already.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from gpu_parts import (
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


def run(section: Section, settings: Settings, deadline: float) -> Row:
    """The section of the document, by a deadline of `time.monotonic`; it never raises."""
    around = environment()
    start = time.monotonic()
    found: Row = {"date": around["date"], "commit": around["commit"], "quick": settings.quick}
    found |= {"reason": None, "rows": [], "undone": []}
    rest = {"patience": section.patience, "stall_seconds": section.stall_seconds}
    never: dict[str, str] = {}
    try:
        if section.ready and section.prepare:
            ahead = workers.run(
                section.prepare,
                section.ready(settings),
                settings,
                workers=processes(),
                deadline=start + READY_SHARE * (deadline - start),
                **rest,
            )
            never = ahead.never
            found["ahead"] = {
                "seconds": round(time.monotonic() - start, 1),
                "jobs": len(ahead.rows),
                "undone": len(ahead.undone),
                "reasons": {n: r["reason"] for n, r in ahead.rows.items() if r.get("reason")},
            }
        outcome = workers.run(
            section.measure,
            section.jobs(settings),
            settings,
            workers=section.workers,
            deadline=deadline,
            never=never,
            **rest,
        )
        found |= {"rows": list(outcome.rows.values()), "undone": outcome.undone}
    except Exception as error:
        found["reason"] = said(error)
    return found | {"seconds": round(time.monotonic() - start, 1), "clocks": device.clocks()}


def measured(
    names: Sequence[str],
    sections: Mapping[str, Section],
    settings: Settings,
    minutes: float,
    folder: Path | None,
) -> Row:
    """The document of a run of sections; it is saved after each of them."""
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
    left = [sections[name] for name in names]
    while left:
        section, now = left[0], time.monotonic()
        share = section.share / sum(each.share for each in left)
        print(f"{section.name}: {share * max(0, end - now):.0f} s", file=sys.stderr, flush=True)
        kept = run(section, settings, now + share * max(0.0, end - now))
        found["sections"][section.name] = kept
        print(document.line(section.name, kept), file=sys.stderr, flush=True)
        if folder:
            document.save(found, folder)
        left.pop(0)
    found["verdicts"] = list(document.verdicts(found))
    return found


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


def main(words: Sequence[str] | None = None, sections: Mapping[str, Section] = SECTIONS) -> int:
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
    found = measured(options.sections, sections, settings, options.minutes, options.save)
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
