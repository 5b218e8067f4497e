"""Which GPU it is, what it is driven by, and two ceilings that were measured in the same run."""

from __future__ import annotations

import importlib.metadata
import statistics
import subprocess
from typing import Any

from gpu_parts import timing
from gpu_parts.section import Here, Row

ASKED = (
    *("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw"),
    *("power.limit", "temperature.gpu"),
)
"""What nvidia-smi is asked for."""

COPIED_BYTES = 4 * 2**30
SQUARE = 8192


def describe(job: str, here: Here) -> Row:
    """The GPU, the driver, versions, clocks, and the ceilings."""
    import torch

    stage = here.stage
    if not stage.on_gpu:
        return {"name": "Triton's interpreter", "versions": versions(), "clocks": {}}
    found = torch.cuda.get_device_properties(stage.device)
    row: Row = {
        "name": found.name,
        "architecture": stage.machine.architecture,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": getattr(found, "L2_cache_size", None),
        "versions": versions(),
        "clocks": clocks(),
    }
    reasons: dict[str, str] = {}
    row["ceilings"] = here.attempt("ceilings", lambda: ceilings(here), reasons) or reasons
    row["clocks_after"] = clocks()
    return row


def ceilings(here: Here) -> Row:
    """What a large product and a large copy reach."""
    import torch

    device = here.stage.device
    a, b = (torch.randn(SQUARE, SQUARE, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.ones(COPIED_BYTES, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = timing.turn_by_turn(here.stage, calls, 0.5)
    median = {name: statistics.median(each) for name, each in times.items()}
    return {
        "product_tflops": 2 * SQUARE**3 / median["product"] / 1e12,
        "product": f"bfloat16, {SQUARE} x {SQUARE} x {SQUARE}, by torch",
        "copy_bytes_per_second": 2 * COPIED_BYTES / median["copy"],
    }


def versions() -> dict[str, Any]:
    """Versions of what compiles and launches."""
    import torch

    found: dict[str, Any] = {"torch": str(torch.__version__)}
    found |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    if torch.version.cuda:
        found["cudnn"] = torch.backends.cudnn.version()
    for name in ("triton", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # imported from a folder
            found[name] = None
    return {name: version for name, version in found.items() if version is not None}


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; why it says nothing under "reason"."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"reason": f"nvidia-smi: {error}"}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(ASKED):
        return {"reason": f"nvidia-smi: {(done.stderr or done.stdout).strip()[:200]}"}
    return dict(zip(ASKED, values, strict=True))
