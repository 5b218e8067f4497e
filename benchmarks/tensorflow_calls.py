"""What attention costs on TensorFlow's tensors, beside Keras' own attention.

Prints one JSON document of four parts:

- "speed": the least milliseconds of a `tf.function` with forward and backward pass, dense and
  causal, of tilefold and of `keras.ops.dot_product_attention`, turn by turn
- "small": the microseconds that one more call on (1, 1, 8, 8) takes in a `tf.function`: a chain
  of 21 calls less a single call, over 20, turn by turn; also in one that XLA compiles
- "eager": the least microseconds of an eager call of this size, and of `tf.matmul`
- "memory": the peak of resident memory of a causal forward and backward pass, less what was there
  before, by the number of tokens; each is of a process of its own. Linux only

    python benchmarks/tensorflow_calls.py --save benchmarks/results/tensorflow_calls.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import tilefold.tensorflow
from tilefold import causal, full
from tilefold.measuring.environment import environment
from tilefold.measuring.timing import turn_by_turn

Tensor = Any
Job = Callable[[], Any]

MIB = 2**20
LENGTHS = (4096, 8192, 16384)
CHAIN = 20


def main() -> None:
    """Measure the chosen parts."""
    parts = {"speed": speed, "small": small, "eager": eager, "memory": memory}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each part")
    parser.add_argument("--save", type=Path, help="write the document to this file too")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    tilefold.set_num_threads(chosen.threads)
    tf.config.threading.set_intra_op_parallelism_threads(chosen.threads)
    if chosen.child:
        print(peak(chosen.child))
        return
    document: dict[str, Any] = {**environment(), "threads": chosen.threads, "dtype": "float32"}
    document["versions"]["tensorflow"] = tf.__version__
    for name in chosen.parts:
        document[name] = parts[name](chosen.seconds)
    text = json.dumps(document, indent=1) + "\n"
    sys.stdout.write(text)
    if chosen.save:
        chosen.save.write_text(text, encoding="utf-8")


def least(jobs: dict[str, Job], seconds: float, unit: float) -> dict[str, float]:
    """The least time of each job, after one turn that is not counted."""
    for job in jobs.values():
        job()
    times = turn_by_turn(jobs, seconds=seconds)
    return {name: round(unit * min(found), 2) for name, found in times.items()}


def step(attend: Callable[..., Tensor]) -> Callable[..., Any]:
    """A function of q, k, v and do: o and the gradients of q, k and v."""

    @tf.function
    def run(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Any:
        with tf.GradientTape() as tape:
            tape.watch((q, k, v))
            o = attend(q, k, v)
        return o, *tape.gradient(o, (q, k, v), do)

    made: Callable[..., Any] = run
    return made


def ours(mask: tilefold.Rule) -> Callable[..., Tensor]:
    """Attention by tilefold, in Keras' layout."""
    return lambda q, k, v: tilefold.attention(q, k, v, mask=mask, layout="bnhd")


def theirs(is_causal: bool) -> Callable[..., Tensor]:
    """Attention by Keras."""
    return lambda q, k, v: keras.ops.dot_product_attention(q, k, v, is_causal=is_causal)


def speed(seconds: float) -> dict[str, Any]:
    """Forward and backward pass beside Keras' own."""
    shape = 1, 2048, 8, 64
    given = [tf.random.normal(shape, seed=number) for number in range(4)]
    found: dict[str, Any] = {"shape": shape}
    for name, mask, is_causal in (("dense", full(), False), ("causal", causal(), True)):
        steps = {"tilefold": step(ours(mask)), "keras": step(theirs(is_causal))}
        jobs = {who: (lambda run=run: run(*given)) for who, run in steps.items()}
        pairs = zip(jobs["tilefold"](), jobs["keras"](), strict=True)
        error = max(float(tf.reduce_max(tf.abs(x - y))) for x, y in pairs)
        best = least(jobs, seconds / 2, 1e3)
        found[name] = {
            "milliseconds": best,
            "largest difference": error,
            "keras_over_tilefold": round(best["keras"] / best["tilefold"], 2),
        }
    return found


def chain(length: int, compiled: bool) -> Job:
    """A function with some calls, one after the other."""

    @tf.function(jit_compile=compiled)
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(length):
            q = tilefold.attention(q, k, v)
        return q

    given = [tf.random.normal((1, 1, 8, 8)) for _ in range(3)]
    return lambda: run(*given)


def small(seconds: float) -> dict[str, float]:
    """One more small call in a graph."""
    found = {}
    for name, compiled in (("tf.function", False), ("jit_compile=True", True)):
        jobs = {str(length): chain(length, compiled) for length in (1, CHAIN + 1)}
        best = least(jobs, seconds / 2, 1e6)
        found[name] = round((best[str(CHAIN + 1)] - best["1"]) / CHAIN, 2)
    return found


def eager(seconds: float) -> dict[str, float]:
    """A small eager call."""
    q, k, v = (tf.random.normal((1, 1, 8, 8)) for _ in range(3))
    jobs: dict[str, Job] = {
        "tilefold.attention": lambda: tilefold.attention(q, k, v),
        "tf.matmul": lambda: tf.matmul(q, k, transpose_b=True),
    }
    return least(jobs, seconds, 1e6)


def memory(_: float) -> dict[str, Any]:
    """The peak of each number of tokens, beside the scores of all pairs."""
    found = {}
    for length in LENGTHS:
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(length)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        scores = 4 * 8 * length**2 / MIB
        found[str(length)] = {"peak_mib": float(done.stdout), "score_matrix_mib": round(scores, 1)}
    return {"shape": [1, "tokens", 8, 64], **found}


def peak(length: int) -> float:
    """MiB of resident memory that one step takes more than its inputs, in this process."""
    run = step(ours(causal()))
    run(*[tf.random.normal((1, 2048, 8, 64)) for _ in range(4)])  # compiles
    given = [tf.random.normal((1, length, 8, 64)) for _ in range(4)]
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run(*given)
    return round((resident("VmHWM") - before) / 1024, 1)


def resident(name: str) -> int:
    """KiB of resident memory: now (VmRSS), or the largest since it was reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


if __name__ == "__main__":
    main()
