"""What a call costs beside its kernel, and what a program's first one does.

    python benchmarks/call_cost.py [--json FILE] [--seconds 2]

- *overhead*: the median of cached calls less that of the kernel's own run, which is the same
  argument block handed to the same threads. All are timed turn by turn, one call each.
- *whole call*: cached calls of (1, 12, 64, 32) float32 beside torch's SDPA, turn by turn.
- *alone or together*: one thread and all threads on the same kernel, at sizes around the bound
  below which one thread works alone.
- *growing*: a decode loop, 1 query and 8 heads of dim 64, whose every call has one key more, beside
  calls of a length that was seen before, turn by turn.
- *first call*: fresh processes, with bytecode and kernel on disk and all of it in the page cache.
  `import_for_a_call` is what a program pays once, by its first use of `tilefold.attention`.

torch is measured where it is installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tilefold
from tilefold.backends.calls import calls as prepared
from tilefold.backends.cpu import dispatch, threads
from tilefold.measuring.environment import environment

TINY, SMALL = (1, 1, 8, 16), (1, 12, 64, 32)
WINDOW = tilefold.causal() & tilefold.local(256)
LENGTHS = (16, 32, 64, 96, 128, 192)
"""Queries and keys of 4 heads of dim 32: from 0.13 to 19 million operations."""

FIRST_CALL = """
import time
start = time.perf_counter()
import numpy
numpy_there = time.perf_counter()
import tilefold
there = time.perf_counter()
from tilefold import attention, causal
from tilefold.backends.cpu import calls as _
from tilefold.frontends import numpy as _
ready = time.perf_counter()
q = k = v = numpy.ones((1, 8, 128, 64), numpy.float32)
mask = causal()
begin = time.perf_counter()
attention(q, k, v, mask=mask)
first = time.perf_counter()
attention(q, k, v, mask=mask)
print(numpy_there - start, there - numpy_there, ready - there, first - begin,
      time.perf_counter() - first)
"""
STAGES = ("import_numpy", "import_tilefold", "import_for_a_call", "first_call", "second_call")

MASKS = {"full": tilefold.full(), "causal": tilefold.causal(), "window": WINDOW}

Timed = dict[str, list[float]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each group of calls")
    parser.add_argument("--processes", type=int, default=15, help="fresh ones, for the first call")
    options = parser.parse_args()
    content = environment() | {"threads": threads.get_num_threads()}
    content["overhead"] = [overhead(shape, options.seconds) for shape in (TINY, SMALL)]
    content["alone_or_together"] = [alone(length, options.seconds / 2) for length in LENGTHS]
    content["growing"] = [growing(name, mask) for name, mask in MASKS.items()]
    content["fresh_process"] = fresh_process(options.processes)
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def overhead(shape: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """One row: all ways to make a call, and its kernel alone."""
    q, k, v = np.random.default_rng(0).standard_normal((3, *shape), dtype=np.float32)
    mask = tilefold.causal()
    calls: dict[str, Callable[[], object]] = {
        "kernel": own_run(q, k, v),
        "NumPy": lambda: tilefold.attention(q, k, v),
        "NumPy, a mask made anew": lambda: tilefold.attention(q, k, v, mask=tilefold.full()),
        "NumPy, causal": lambda: tilefold.attention(q, k, v, mask=mask),
    }
    if importlib.util.find_spec("torch"):
        calls |= torch_calls(q, k, v)
    times = turn_by_turn(calls, seconds)
    row = {name: summary(each) for name, each in times.items()}
    own = row["kernel"]
    print(f"\n{shape}, microseconds, median (least tenth) of {len(times['kernel'])}, turn by turn")
    for name, (half, tenth) in row.items():
        more = f"   kernel + {half - own[0]:.1f} ({tenth - own[1]:.1f})"
        ours = name != "kernel" and "SDPA" not in name
        print(f"  {name:26} {half:8.2f} ({tenth:.2f}){more * ours}")
    return {"shape": shape, "median_and_least_tenth_us": row}


def summary(seconds: list[float]) -> tuple[float, float]:
    """Microseconds that half of the calls, and a tenth of them, stay below."""
    ordered = sorted(seconds)
    half, tenth = ordered[len(ordered) // 2], ordered[len(ordered) // 10]
    return round(1e6 * half, 2), round(1e6 * tenth, 2)


def own_run(*arrays: np.ndarray[Any, Any]) -> Callable[[], object]:
    """What a call hands to the threads, by itself: the kernel's own time."""
    handed: list[tuple[dispatch._Step, tuple[int, ...], int]] = []
    real = dispatch._Step.run

    def spy(step: dispatch._Step, pointers: tuple[int, ...], workers: int) -> None:
        handed.append((step, pointers, workers))

    dispatch._Step.run = spy  # type: ignore[assignment, method-assign]
    held = tilefold.attention(*arrays, return_lse=True)
    dispatch._Step.run = real  # type: ignore[method-assign]
    step, pointers, workers = handed[0]
    workers = min(workers, step.items)
    workspace = dispatch._Memory(workers * step.kernel.workspace_bytes)
    words = np.frombuffer(step.template, np.int64).copy()
    words[dispatch._WORKSPACE] = workspace.pointer
    for place, operand in step.places:
        words[place] = pointers[operand]
    address, block = step.kernel.loaded.address, words.ctypes.data

    def run(keep: object = (held, workspace, words, arrays)) -> None:
        words[:2] = 0  # the counters
        threads.run(address, block, workers)

    return run


def torch_calls(*arrays: np.ndarray[Any, Any]) -> dict[str, Callable[[], object]]:
    """The same calls of tensors, and torch's own."""
    import torch

    torch.set_num_threads(threads.get_num_threads())
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v = map(torch.from_numpy, arrays)
    wanted = q.clone().requires_grad_()
    return {
        "torch": lambda: tilefold.attention(q, k, v),
        "torch, gradients wanted": lambda: tilefold.attention(wanted, k, v),
        "SDPA": lambda: sdpa(q, k, v),
        "SDPA, gradients wanted": lambda: sdpa(wanted, k, v),
    }


def alone(length: int, seconds: float) -> dict[str, Any]:
    """One row: a kernel on one thread and on all, in microseconds; also after a pause."""
    arrays = np.random.default_rng(0).standard_normal((3, 1, 4, length, 32), dtype=np.float32)
    before = threads.get_num_threads()
    bound, dispatch._ALONE_FLOPS = dispatch._ALONE_FLOPS, 0.0
    prepared.clear()
    try:
        calls = {"all": own_run(*arrays)}
        threads.set_num_threads(1)
        calls["one"] = own_run(*arrays)
    finally:
        dispatch._ALONE_FLOPS = bound
        threads.set_num_threads(before)
        prepared.clear()
    row: dict[str, Any] = {"flops": 4 * 4 * length * length * 32}
    for label, pause in (("", 0.0), (" after 5 ms", 0.005)):
        for name, each in turn_by_turn(calls, seconds, pause).items():
            row[name + label] = summary(each)
    shown = ", ".join(
        f"{name} {value[0]:.1f} ({value[1]:.1f})" for name, value in row.items() if name != "flops"
    )
    print(f"{row['flops'] / 1e6:6.2f} Mflop, microseconds on threads: {shown}")
    return row


def growing(name: str, mask: tilefold.Rule, first: int = 1000, last: int = 1300) -> dict[str, Any]:
    """One row: calls of one key more each time, and of a seen number of keys, in microseconds."""
    random = np.random.default_rng(0)
    q = random.standard_normal((1, 8, 1, 64), dtype=np.float32)
    keys = random.standard_normal((1, 8, 4096, 64), dtype=np.float32)
    seen = keys[:, :, : (first + last) // 2]
    prepared.clear()
    for k in (keys[:, :, : first - 100], seen):
        tilefold.attention(q, k, k, mask=mask)
    times: Timed = {"new": [], "seen": []}
    for length in range(first, last):
        for kind, k in (("new", keys[:, :, :length]), ("seen", seen)):
            start = time.perf_counter()
            tilefold.attention(q, k, k, mask=mask)
            times[kind].append(time.perf_counter() - start)
    row = {kind: summary(each) for kind, each in times.items()}
    more = " ".join(f"{a - b:.1f}" for a, b in zip(row["new"], row["seen"], strict=True))
    print(f"{name}: a new number of keys {row['new']}, a seen one {row['seen']}: {more} more")
    return {"mask": str(mask), **row}


def turn_by_turn(
    calls: dict[str, Callable[[], object]], seconds: float, pause: float = 0.0
) -> Timed:
    """The seconds of each call in each round."""
    for call in calls.values():
        for _ in range(10):
            call()
    times: Timed = {name: [] for name in calls}
    gc.disable()
    end = time.perf_counter() + seconds
    order, shuffle = list(calls.items()), random.Random(0).shuffle
    while time.perf_counter() < end:
        shuffle(order)  # nobody always follows the same one, whose caches it finds
        for name, call in order:
            if pause:
                time.sleep(pause)
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    gc.enable()
    return times


def fresh_process(processes: int) -> dict[str, Any]:
    """Medians and minima in milliseconds of the stages of a program that makes one call."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "TILEFOLD_CACHE_DIR": str(Path(folder) / "kernels"),
            "PYTHONPYCACHEPREFIX": str(Path(folder) / "bytecode"),
            "PYTHONDONTWRITEBYTECODE": "",  # an installed package has its bytecode
        }
        rows = []
        for _ in range(processes + 1):
            command = [sys.executable, "-c", FIRST_CALL]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            )
            rows.append([1e3 * float(text) for text in done.stdout.split()])
    stages = list(zip(*rows[1:], strict=True))  # the first one compiled
    print(f"\nfresh process, milliseconds, median (least) of {processes}")
    row: dict[str, Any] = {}
    for name, each in zip(STAGES, stages, strict=True):
        row[name] = {
            "median_ms": round(statistics.median(each), 2),
            "least_ms": round(min(each), 2),
        }
        print(f"  {name:26} {row[name]['median_ms']:8.2f} ({row[name]['least_ms']:.2f})")
    return row


if __name__ == "__main__":
    main()
