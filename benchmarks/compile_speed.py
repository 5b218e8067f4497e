"""How long a kernel takes to write, to compile, and to come back from the cache on disk.

    python benchmarks/compile_speed.py [--json FILE]

One row per kernel, each measured with an empty cache and again with a full one (median of several).
The last rows are whole processes: the import of NumPy and tilefold, and the first call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tilefold
from tilefold.backends.cpu import runtime
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.kernel import emit
from tilefold.backends.cpu.plan import plan
from tilefold.backends.cpu.spec import KernelSpec
from tilefold.common import disk_cache
from tilefold.measuring.environment import environment
from tilefold.problems.attention import Problem

MASKS = {
    "full()": tilefold.full(),
    "causal()": tilefold.causal(),
    "causal() & (local(256) | prefix(4))": tilefold.causal()
    & (tilefold.local(256) | tilefold.prefix(4)),
}
CASES = [
    (mask, dtype, dim)
    for mask in MASKS
    for dtype, dim in (("float32", 64), ("float32", 128), ("float64", 64))
]
FIRST_CALL = """
import time
start = time.perf_counter()
import numpy, tilefold
imported = time.perf_counter()
q = k = v = numpy.ones((1, 8, 512, 64), numpy.float32)
tilefold.attention(q, k, v, mask=tilefold.causal())
print(imported - start, time.perf_counter() - imported)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = host()
    print(f"{device.name}, {device.isa}; seconds, median of {arguments.repeats}\n")
    print(f"{'kernel':58} {'write':>8} {'compile':>8} {'cached':>8} {'KiB':>5}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TILEFOLD_CACHE_DIR"] = str(Path(folder) / "kernels")
        rows = [row for case in CASES for row in measure(*case, repeats=arguments.repeats)]
        rows += first_call()
    if arguments.json:
        content = {**environment(), "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measure(mask: str, dtype: str, dim: int, *, repeats: int) -> list[dict[str, object]]:
    """The rows of one problem: its forward kernel and those of both forms of its backward pass."""
    problem = Problem(
        batch=1,
        heads_q=8,
        heads_kv=8,
        len_q=2048,
        len_k=2048,
        dim=dim,
        dim_v=dim,
        dtype=dtype,
        scale=dim**-0.5,
        mask=MASKS[mask],
    )
    specs: dict[str, KernelSpec] = {}
    for operation, form in (("forward", "auto"), ("backward", "fused"), ("backward", "split")):
        for launch in plan(problem, host(), operation, form).launches:
            specs.setdefault(launch.spec.kernel, launch.spec)
    rows = []
    for spec in specs.values():
        name = f"{spec.kernel} {dtype} {dim} {mask}"
        text = emit(spec)

        def load(text: str = text, symbol: str = spec.kernel) -> None:
            runtime.kernel(text, symbol, host())

        write = median(lambda spec=spec: emit(spec), repeats)
        cold = median(load, repeats, before=lambda: disk_cache.default().clear())
        warm = median(load, repeats)
        size = len(runtime.compile(text, host()))
        print(f"{name:58} {write:8.4f} {cold:8.4f} {warm:8.4f} {size / 1024:5.0f}")
        rows.append(
            {"kernel": name, "write_s": write, "compile_s": cold, "cached_s": warm, "bytes": size}
        )
    return rows


def median(
    run: Callable[[], object], repeats: int, before: Callable[[], object] | None = None
) -> float:
    """The median time of some runs, each after `before`."""
    seconds = []
    for _ in range(repeats):
        if before is not None:
            before()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def first_call() -> list[dict[str, object]]:
    """A process that imports tilefold and makes one call: with an empty cache and a full one."""
    disk_cache.default().clear()
    rows = []
    print(f"\n{'a fresh process':58} {'import':>8} {'1st call':>8}")
    for state in ("empty cache", "full cache"):
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, check=True
        )
        imported, called = (float(text) for text in done.stdout.split())
        print(f"{state:58} {imported:8.4f} {called:8.4f}")
        rows.append({"process": state, "import_s": imported, "first_call_s": called})
    return rows


if __name__ == "__main__":
    main()
