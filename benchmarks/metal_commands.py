"""What a list of calls saves on an Apple GPU: 1, 8 and 64 of them, eager and in a list.

    python benchmarks/metal_commands.py [--json FILE] [--rounds 50]

- *eager*: as many calls of `tilefold.attention`, and then the wait for the GPU.
- *prepared* and *launched*: the two parts of a `tilefold.metal.queue`, and then the wait.

Without an Apple GPU a machine that launches nothing stands in: the times are then Python's part
alone, which is what keeps a GPU waiting, and say nothing about one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tilefold
from tilefold.backends.metal import runtime
from tilefold.backends.metal.runtime import Mps
from tilefold.frontends.torch import tensors as below
from tilefold.measuring.environment import environment

COUNTS = (1, 8, 64)
SHAPE = (1, 8, 128, 64)


class Idle:
    """Kernels that do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values, **grid: None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    reason = runtime.missing()
    device = torch.device("cpu" if reason else "mps")
    machine = Mps(device, lambda text: Idle(), "apple9") if reason else runtime.gpu()
    if reason:
        below.machine_of = lambda tensor: machine  # type: ignore[assignment]  # calls go to it
        print(f"Python's part alone: {reason}")
    tensors = [torch.randn(SHAPE, device=device, dtype=torch.float16) for _ in range(3)]
    rows = [measured(count, machine, tensors, options.rounds) for count in COUNTS]
    for row in rows:
        print("  ".join(f"{name} {value:8.1f}" for name, value in row.items()))
    if options.json:
        content = environment() | {"without_gpu": reason, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measured(count: int, machine: Mps, tensors: list[torch.Tensor], rounds: int) -> dict[str, Any]:
    """Microseconds of a call, the median of rounds, each way in its turn."""
    eager, prepared, launched = [], [], []
    finish = torch.mps.synchronize if machine.device.type == "mps" else lambda: None
    for _ in range(rounds):
        finish()
        start = time.perf_counter()
        for _ in range(count):
            tilefold.attention(*tensors)
        finish()
        eager.append(time.perf_counter() - start)
        start = time.perf_counter()
        commands = tilefold.metal.queue(machine)
        for _ in range(count):
            commands.attention(*tensors)
        between = time.perf_counter()
        commands.launch()
        finish()
        prepared.append(between - start)
        launched.append(time.perf_counter() - between)
    times = {"eager": eager, "prepared": prepared, "launched": launched}
    return {
        "commands": count,
        **{f"{name}_us": statistics.median(value) / count * 1e6 for name, value in times.items()},
    }


if __name__ == "__main__":
    main()
