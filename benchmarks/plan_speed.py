"""How long planning takes: masks over a million tokens, and masks that skip nothing.

Prints one JSON document: per mask, direction and block size the best time of some runs in
milliseconds, the peak of memory in MiB (of a separate run), and what was planned. Needs nothing but
tilefold: `python benchmarks/plan_speed.py`.
"""

from __future__ import annotations

import json
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from tilefold import causal, dense, documents, full, lengths, local, prefix, rule
from tilefold.masks.position_rules import Rule
from tilefold.masks.runs import Counts, Runs, count, runs
from tilefold.measuring.environment import environment

MILLION = 1 << 20
BLOCK_PARALLEL = 64
REPEATS = 5
LIMIT_MS, LIMIT_MIB = 100, 100  # what is promised of PROMISED
PROMISED = causal() & local(4096)

SPARSE = (
    PROMISED,
    causal(),
    full(),
    documents(np.arange(MILLION) // 1000) & causal(),
    causal() & (local(1024) | prefix(4)),
    local(4096, stride=2, causal=True),
    causal(grid_q=(1024, 1024)),
    local(9, grid_q=(1024, 1024)),
    lengths([MILLION // 2, MILLION // 3]) & causal(),
)
DENSE = (
    dense(np.random.default_rng(0).random((4096, 4096)) < 0.5),
    rule(lambda q, k: (q - k) % 3 == 0),
    rule(lambda h, q, k: (q - k) % 3 == h % 3),
)


def plan(made: Rule, length: int, parallel: str, block: int) -> Runs:
    """Bind a rule and cut it into runs, as every new call of attention does."""
    return runs(
        made.bind(length, length),
        parallel=parallel,
        batch=2,
        heads=4,
        len_parallel=length,
        len_traverse=length,
        block_parallel=BLOCK_PARALLEL,
        block_traverse=block,
    )


def milliseconds(work: Callable[[], Any]) -> float:
    """The best time of some repeats."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


def mebibytes(work: Callable[[], Any]) -> float:
    """The peak of what Python and NumPy allocate during the work."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def row(made: Rule, length: int, parallel: str, block: int) -> dict[str, Any]:
    """One line of the result."""

    def work() -> Runs:
        return plan(made, length, parallel, block)

    found = work()
    counts: Counts = count(found, length, block)
    return {
        "mask": repr(made),
        "length": length,
        "parallel": parallel,
        "block_parallel": BLOCK_PARALLEL,
        "block_traverse": block,
        "milliseconds": round(milliseconds(work), 2),
        "peak_mib": round(mebibytes(work), 1),
        "runs": len(found.runs),
        "tiles": counts._asdict(),
    }


def main() -> int:
    """Measure, print, and fail if the promise is broken."""
    rows = [row(PROMISED, MILLION, parallel, block) for parallel in "qk" for block in (32, 64, 128)]
    kept = all(r["milliseconds"] < LIMIT_MS and r["peak_mib"] < LIMIT_MIB for r in rows)
    rows += [row(made, MILLION, "q", 64) for made in SPARSE[1:]]
    rows += [row(made, 4096, "q", 64) for made in DENSE]
    print(
        json.dumps(
            {
                **environment(),
                "promise": f"{PROMISED!r}: < {LIMIT_MS} ms, < {LIMIT_MIB} MiB",
                "kept": kept,
                "rows": rows,
            },
            indent=1,
        )
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
