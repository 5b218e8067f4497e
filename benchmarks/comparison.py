"""All implementations that are installed, at one shape: forward and backward, in three types.

    python benchmarks/comparison.py [--seconds 2] [--save benchmarks/results]

Libraries differ in how their number of threads is set, and some have no way at all once they run.
So each number of threads has a process of its own, bound to so many cores before anything is
imported; inside, all take turns (see `tilefold.bench`). What a peer cannot do is said.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tilefold.backends.cpu.device import host
from tilefold.commands import terminal
from tilefold.common.files import write_atomically
from tilefold.masks.position_rules import causal, full
from tilefold.measuring import timing
from tilefold.measuring.baselines import BASELINES
from tilefold.measuring.environment import environment
from tilefold.measuring.workload import OPERATIONS, Case
from tilefold.problems.attention import Problem, default_scale

BATCH, HEADS, LENGTH, DIM = 1, 8, 2048, 64
KINDS = (("float32", full()), ("float32", causal()), ("bfloat16", full()), ("float16", full()))
COLOURS = {
    "tilefold": "#0b6e99",
    "torch": "#e3a857",
    "flex": "#c77f3a",
    "openvino": "#8aa399",
    "onnxruntime": "#a7a29a",
    "keras": "#b5838d",
    "jax": "#7d8597",
}
Row = dict[str, Any]


def names() -> list[str]:
    """The peers that are installed; NumPy's dense formula is no rival."""
    return [name for name, peer in BASELINES.items() if name != "numpy" and peer.unusable is None]


def measure(threads: int, seconds: float, length: int, peers: list[str]) -> list[Row]:
    """All cases, in this process, which is bound to so many cores."""
    rows = []
    for operation in OPERATIONS:
        for dtype, mask in KINDS:
            problem = Problem(
                batch=BATCH,
                heads_q=HEADS,
                heads_kv=HEADS,
                len_q=length,
                len_k=length,
                dim=DIM,
                dim_v=DIM,
                dtype=dtype,
                scale=default_scale(DIM),
                mask=mask,
            )
            found = timing.measure(Case(problem, operation, threads), peers, seconds=seconds)
            rows += [row.record(found[0]) for row in found]
    return rows


def bound(threads: int, seconds: float, length: int, peers: list[str]) -> list[Row]:
    """The rows of a new process that may use so many of this one's cores (on Linux)."""
    cores = sorted(os.sched_getaffinity(0))[-threads:]
    options = {"--threads": threads, "--seconds": seconds, "--length": length}
    words = [str(word) for option in options.items() for word in option]
    words += ["--peers", *peers]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),  # no thread runs yet
    )
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def show(rows: list[Row]) -> None:
    """Times per case (down) and implementation (across)."""
    implementations = list(dict.fromkeys(row["name"] for row in rows))
    lines = []
    for case in cases(rows):
        cells = {row["name"]: row for row in rows if label(row) == case}
        lines.append([case, *(cell(cells[name]) for name in implementations)])
    console = terminal.out()
    title = f"{rows[0]['shape']} on {host().name}, {host().isa}"
    console.print(terminal.table(title, ["", *(f">{name}" for name in implementations)], lines))
    for reason in dict.fromkeys(row["reason"] for row in rows if row["reason"]):
        console.print(f"-: {terminal.escape(reason)}")


def cell(row: Row) -> str:
    """A time, or a mark where there is none."""
    return "-" if row["reason"] else terminal.seconds(row["median_seconds"])


def cases(rows: list[Row]) -> list[str]:
    """The labels of all cases, in order."""
    return list(dict.fromkeys(label(row) for row in rows))


def label(row: Row) -> str:
    """A case in one line."""
    mask = "" if row["mask"] == "full()" else f" {row['mask']}"
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    return f"{row['operation']} {row['dtype']}{mask}, {threads}"


def plot(rows: list[Row], title: str) -> bytes:
    """Operations per second of each implementation: a panel per pass and number of threads."""
    from matplotlib.figure import Figure

    numbers = list(dict.fromkeys(row["threads"] for row in rows))
    kinds = [f"{dtype} {mask}".removesuffix(" full()") for dtype, mask in KINDS]
    figure = Figure(figsize=(11, 3.6 * len(numbers)), layout="constrained")
    panels = figure.subplots(len(numbers), len(OPERATIONS), squeeze=False)
    for line, threads in zip(panels, numbers, strict=True):
        for axes, operation in zip(line, OPERATIONS, strict=True):
            here = [r for r in rows if (r["threads"], r["operation"]) == (threads, operation)]
            able = [n for n in COLOURS if any(r["name"] == n and not r["reason"] for r in here)]
            width = 0.84 / len(able)
            for number, name in enumerate(able):
                speeds = [r["gflops"] or 0 for r in here if r["name"] == name]
                at = [index + (number - (len(able) - 1) / 2) * width for index in range(len(kinds))]
                bars = axes.bar(at, speeds, width * 0.9, label=name, color=COLOURS[name])
                marks = [f"{speed:.0f}" if speed else "" for speed in speeds]
                axes.bar_label(bars, marks, padding=2, fontsize=7, rotation=90)
            axes.set_xticks(range(len(kinds)), kinds, fontsize=9)
            axes.margins(y=0.16)
            words = "1 thread" if threads == 1 else f"{threads} threads"
            axes.set_title(f"{operation}, {words}", fontsize=10, loc="left")
            axes.set_ylabel("GFLOP/s over visible pairs", fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    handles = {}
    for axes in panels.flat:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()


def main() -> None:
    """Measure in bound processes, print and save; as such a process, measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="per case (default 2)")
    parser.add_argument("--save", type=Path, help="write comparison.json and .png there")
    parser.add_argument(
        "--peers", nargs="+", choices=names(), default=names(), help="default: all installed"
    )
    parser.add_argument("--length", type=int, default=LENGTH, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        rows = measure(options.threads, options.seconds, options.length, options.peers)
        print(json.dumps(rows))
        return
    numbers = sorted({1, host().cores})
    given = (options.seconds, options.length, options.peers)
    rows = [row for number in numbers for row in bound(number, *given)]
    show(rows)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        text = json.dumps(environment() | {"rows": rows}, indent=1) + "\n"
        title = f"batch {BATCH}, {HEADS} heads, {options.length} tokens, dim {DIM}; {host().name}"
        write_atomically(options.save / "comparison.json", text.encode())
        write_atomically(options.save / "comparison.png", plot(rows, title))


if __name__ == "__main__":
    main()
