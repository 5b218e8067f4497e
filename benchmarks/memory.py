"""How much memory attention and its gradients take beyond their inputs and outputs.

Prints one JSON document: per pass the peak of resident memory during the call, less what was
resident before and less the results, in MiB, beside the size that the score matrix would have. The
kernels are compiled by a short call before: what the compiler takes is no part of it. Linux only,
since the peak is reset and read through /proc.

    python benchmarks/memory.py                                     # 1 x 8 x 65536 x 64, dense
    python benchmarks/memory.py --mask "causal() & local(64)"
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tilefold
from tilefold.common.array_files import element_type
from tilefold.masks.parse import parse
from tilefold.measuring.environment import environment
from tilefold.problems.attention import ITEM_BYTES

MIB = 2**20
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SHORT = 2048  # long enough for the same kernels as any longer sequence


def main() -> None:
    """Measure one forward and one backward pass."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", choices=tuple(ITEM_BYTES), default="float32")
    parser.add_argument("--mask", default="full()")
    parser.add_argument("--save", type=Path, help="write the document to this file too")
    chosen = parser.parse_args()
    mask = parse(chosen.mask)
    attend(arrays(chosen.heads, SHORT, chosen.dim, chosen.dtype), mask)
    passes = attend(arrays(chosen.heads, chosen.length, chosen.dim, chosen.dtype), mask)
    document = {
        **environment(),
        "threads": tilefold.get_num_threads(),
        "shape": [1, chosen.heads, chosen.length, chosen.dim],
        "dtype": chosen.dtype,
        "mask": str(mask),
        "score_matrix_mib": round(4 * chosen.heads * chosen.length**2 / MIB, 1),
        "passes": passes,
    }
    text = json.dumps(document, indent=1) + "\n"
    sys.stdout.write(text)
    if chosen.save:
        chosen.save.write_text(text, encoding="utf-8")


def arrays(heads: int, length: int, dim: int, dtype: str = "float32") -> list[Any]:
    """q, k, v and do, every page of them written to."""
    random, kind = np.random.default_rng(0), element_type(dtype)
    shape = (1, heads, length, dim)
    return [random.standard_normal(shape, np.float32).astype(kind, copy=False) for _ in range(4)]


def attend(given: list[Any], mask: tilefold.Rule) -> dict[str, dict[str, float]]:
    """Both passes, measured."""
    q, k, v, do = given
    (o, lse), forward = measured(
        lambda: tilefold.attention(q, k, v, mask=mask, return_lse=True),
    )
    _, backward = measured(lambda: tilefold.attention_backward(do, q, k, v, o, lse, mask=mask))
    return {"forward": forward, "backward": backward}


def measured(call: Callable[[], tuple[Any, ...]]) -> tuple[tuple[Any, ...], dict[str, float]]:
    """The arrays that a call makes, and what it took beyond them."""
    gc.collect()
    CLEAR_REFS.write_text("5")  # the peak becomes what is resident now
    before = resident("VmRSS")
    results = call()
    outputs = sum(array.nbytes for array in results)
    extra = resident("VmHWM") - before - outputs
    return results, {"outputs_mib": round(outputs / MIB, 2), "extra_mib": round(extra / MIB, 2)}


def resident(name: str) -> int:
    """A field of this process's status, in bytes."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {name}")


if __name__ == "__main__":
    main()
