"""What NVIDIA's tools say of the kernels: compute-sanitizer of small cases, ncu of the main ones.

Either may be missing, or not be permitted to look; then the row says where it was looked for, or
what it said. Cases run without the tool first, which leaves compiled kernels on the disk.
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gpu_parts import one
from gpu_parts.section import Here, Row, Section, Settings, processes

PROGRAM = ("-m", "gpu_parts.one")
FOUND = 86
"""The exit code that compute-sanitizer is asked for where it finds something."""

LIMIT_SECONDS = 100.0
"""For one run of a tool."""

SMALL: dict[str, list[str]] = {
    "forward": [
        "forward --form tiled --shape 1,2,200,64 --mask causal()",
        "forward --form tiled --shape 1,2,130,77 --dtype float32 --mask local(20)",
    ],
    "hopper": [
        "forward --form hopper --shape 1,2,300,64 --mask causal()",
        "forward --form hopper --shape 1,1,260,128 --dtype bfloat16 --mask local(40)",
    ],
    "backward": [
        "backward --form split --shape 1,2,200,64 --mask causal()",
        "backward --form fused --shape 1,2,130,40 --dtype bfloat16 --mask local(20)",
    ],
    "decode": ["forward --form decode --shape 1,4,1,64 --keys 1500"],
}
"""Cases for the sanitizer by name: odd lengths and dims, descriptors and pointers."""

SIZES = "--shape 2,16,8192,128 --dtype bfloat16"
LARGE: dict[str, list[str]] = {
    "plain": [
        f"forward --form tiled {SIZES}",
        f"backward --form split {SIZES}",
        f"backward --form fused {SIZES}",
        "forward --form decode --shape 32,8,1,128 --keys 8192 --dtype bfloat16",
    ],
    "hopper": [f"forward --form hopper {SIZES}", f"forward --form hopper {SIZES} --mask causal()"],
}
"""Cases for ncu by name: every kernel of a group is looked at once for each of its launches."""

SECTIONS = (
    *("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats"),
    *("SchedulerStats", "Occupancy", "LaunchStats"),
)
"""Sections of ncu: see docs/profiling.md."""


# Where tools are -------------------------------------------------------------------------------


def places(tool: str) -> Iterator[Path]:
    """Where a tool may be: the toolkit's folders, NVIDIA's own, and its wheels."""
    roots = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    roots.append(str(Path(nvcc).resolve().parents[1]) if nvcc else None)
    for root in dict.fromkeys(root for root in roots if root):
        for pattern in (f"bin/{tool}", f"compute-sanitizer/{tool}", f"nsight-compute*/{tool}"):
            yield from sorted(Path(root).glob(pattern), reverse=True)
    yield from sorted(Path("/opt/nvidia").glob(f"nsight-compute/*/{tool}"), reverse=True)
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels.submodule_search_locations or []) if wheels else []:
        yield from Path(folder).glob(f"**/bin/{tool}")


def find(tool: str) -> str:
    """The path of a tool. Raises FileNotFoundError that says where it was looked for."""
    if on_path := shutil.which(tool):
        return on_path
    for path in places(tool):
        if os.access(path, os.X_OK):
            return str(path)
    raise FileNotFoundError(
        f"{tool} is neither on PATH nor in CUDA_HOME, CUDA_PATH, the folder of nvcc,"
        " /opt/nvidia/nsight-compute or the nvidia wheels"
    )


def call(command: Sequence[str], **environment: str) -> tuple[int, str]:
    """The exit code of a program and all that it said. Raises TimeoutExpired."""
    done = subprocess.run(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        timeout=LIMIT_SECONDS,
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    return done.returncode, done.stdout


def end_of(text: str, lines: int = 6) -> str:
    """The last lines of what a program said, as one."""
    kept = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(kept[-lines:])[-700:]


# compute-sanitizer -----------------------------------------------------------------------------


def sanitizer_jobs(settings: Settings) -> list[str]:
    """Each tool of the sanitizer on each group of cases."""
    groups = [*kept(SMALL, settings)][: 2 if settings.quick else None]
    return [f"{tool} {group}" for tool in ("memcheck", "racecheck") for group in groups]


def kept(groups: Mapping[str, list[str]], settings: Settings) -> dict[str, list[str]]:
    """The groups of cases without those of forms that are left out."""
    found = {
        name: [case for case in cases if case.split()[2] not in settings.without]
        for name, cases in groups.items()
    }
    return {name: cases for name, cases in found.items() if cases}


def small_groups(settings: Settings) -> list[str]:
    """The groups of cases that the sanitizer runs."""
    return list(dict.fromkeys(job.split()[1] for job in sanitizer_jobs(settings)))


def compile_small(group: str, here: Here) -> Row:
    """Run the cases of a group, so that the sanitizer meets no compiler."""
    return _run(kept(SMALL, here.settings)[group], here)


def sanitize(name: str, here: Here) -> Row:
    """The errors that a tool of the sanitizer counts on a group of cases."""
    tool, group = name.split()
    program = find("compute-sanitizer")
    here.begin(tool)
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    # One allocation for each tensor, so that reading past its end is seen.
    cases = kept(SMALL, here.settings)[group]
    command = [program, *options, *_command(cases)]
    code, text = call(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return {"cases": cases, "tool": program, **verdict(code, text)}


def verdict(code: int, text: str) -> Row:
    """What the sanitizer found: `errors`, or the reason why it says nothing."""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    if code not in (0, FOUND) or summary is None:
        return {"reason": f"exit code {code}: {end_of(text)}"}
    counted = re.search(r"SUMMARY: (\d+)", summary[0])
    errors = int(counted[1]) if counted else 1
    found = [line.strip("= \t") for line in text.splitlines() if line.startswith("=========")]
    row: Row = {"errors": errors, "summary": summary[0]}
    return row | ({"first": " | ".join(found[:12])[:1500]} if errors else {})


# ncu -------------------------------------------------------------------------------------------


def counter_jobs(settings: Settings) -> list[str]:
    """The groups of cases."""
    return [*kept(LARGE, settings)]


def compile_large(group: str, here: Here) -> Row:
    """Run the cases of a group, so that ncu meets no compiler."""
    return _run(kept(LARGE, here.settings)[group], here)


def count(group: str, here: Here) -> Row:
    """The counters of the launches of a group, by kernel."""
    program = find("ncu")
    here.begin("ncu")
    options = ["--kernel-name", "regex:^tilefold_", "--clock-control", "none"]
    options += ["--csv", "--page", "details"]
    options += [word for section in SECTIONS for word in ("--section", section)]
    cases = kept(LARGE, here.settings)[group]
    code, text = call([program, *options, *_command(cases)])
    metrics = metrics_of(text)
    row: Row = {"cases": cases, "tool": program, "metrics": metrics}
    return row if metrics and not code else row | {"reason": f"exit code {code}: {end_of(text)}"}


def metrics_of(text: str) -> dict[str, dict[str, str]]:
    """The metrics of ncu's CSV with their units: by launch, then by section and name."""
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[start:]):
        section, metric = row.get("Section Name"), row.get("Metric Name")
        if section and metric:
            launch = f"{row.get('ID')} {row.get('Kernel Name')}"
            value = f"{row.get('Metric Value', '')} {row.get('Metric Unit', '')}".strip()
            found.setdefault(launch, {})[f"{section}: {metric}"] = value
    return found


def _command(cases: Sequence[str]) -> list[str]:
    """The program that runs cases, as words."""
    words = itertools.chain(*(["--", *case.split()] for case in cases))
    return [sys.executable, *PROGRAM, *words]


def _run(cases: Sequence[str], here: Here) -> Row:
    for case in cases:
        here.begin(case)
        one.run(case.split(), here.stage)
    return {}


SANITIZER = Section(
    "sanitizer",
    0.12,
    sanitizer_jobs,
    sanitize,
    small_groups,
    compile_small,
    workers=min(8, processes()),
    stall_seconds=2 * LIMIT_SECONDS,
)
COUNTERS = Section(
    "counters",
    0.08,
    counter_jobs,
    count,
    counter_jobs,
    compile_large,
    stall_seconds=2 * LIMIT_SECONDS,
)
