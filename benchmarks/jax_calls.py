"""What attention costs in JAX's compiled programs, beside jax.nn's.

Prints one JSON document of four parts:

- "speed": the least milliseconds of compiled gradients of q, k and v, dense and causal, by tilefold
  and by `jax.nn.dot_product_attention`, turn by turn; tilefold in its own layout and in jax.nn's
- "small": the microseconds of a whole call on (1, 1, 8, 8) within a program: a chain of 21 calls
  less one call, over 20, turn by turn
- "eager": the microseconds of such a call outside of programs, and of `jnp.dot`
- "memory": the peak of resident memory of causal gradients, less what was there before, and of
  their derivative along a direction, by the number of tokens; each in a process of its own. Linux

    python benchmarks/jax_calls.py --save benchmarks/results/jax_calls.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from memory import CLEAR_REFS, MIB, resident

import tilefold.jax
from tilefold import causal, full
from tilefold.measuring.environment import environment
from tilefold.measuring.timing import turn_by_turn

Array = Any
Job = Callable[[], Any]

SHAPE = (1, 8, 2048, 64)
"""Batch, heads, tokens, dim; jax.nn has heads after tokens."""
SMALL = (1, 1, 8, 8)
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
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    tilefold.set_num_threads(chosen.threads)
    if chosen.child:
        sys.stdout.write(json.dumps(peak(chosen.child[0], int(chosen.child[1]))))
        return
    document: dict[str, Any] = {**environment(), "threads": chosen.threads, "dtype": "float32"}
    for name in chosen.parts:
        document[name] = parts[name](chosen.seconds)
    text = json.dumps(document, indent=1) + "\n"
    sys.stdout.write(text)
    if chosen.save:
        chosen.save.write_text(text, encoding="utf-8")


def normal(shape: tuple[int, ...], number: int) -> list[Array]:
    """Random arrays."""
    return [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), number)]


def least(jobs: dict[str, Job], seconds: float, unit: float) -> dict[str, float]:
    """The least time of each job, after one turn that is not counted."""
    for job in jobs.values():
        job()
    times = turn_by_turn(jobs, seconds=seconds)
    return {name: round(unit * min(found), 2) for name, found in times.items()}


def gradients(attend: Callable[..., Array], do: Array) -> Callable[..., Any]:
    """A function that makes the gradients of q, k and v, whose forward pass is computed too."""
    return jax.grad(lambda *given: (attend(*given) * do).sum(), (0, 1, 2))


def ours(mask: tilefold.Rule, layout: str = "bhnd") -> Callable[..., Array]:
    """Attention by tilefold."""
    return lambda q, k, v: tilefold.attention(q, k, v, mask=mask, layout=layout)


def theirs(is_causal: bool) -> Callable[..., Array]:
    """Attention by JAX, in its layout."""
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=is_causal)


def speed(seconds: float) -> dict[str, Any]:
    """Forward and backward pass beside jax.nn's."""
    every = normal(SHAPE, 4)
    turned = [x.swapaxes(1, 2).copy() for x in every]
    found: dict[str, Any] = {"shape": SHAPE}
    for name, mask, is_causal in (("dense", full(), False), ("causal", causal(), True)):
        jobs = {
            "tilefold": _step(ours(mask), every),
            "tilefold, bnhd": _step(ours(mask, "bnhd"), turned),
            "jax.nn": _step(theirs(is_causal), turned),
        }
        pairs = zip(jobs["tilefold, bnhd"](), jobs["jax.nn"](), strict=True)
        error = max(float(jnp.abs(x - y).max()) for x, y in pairs)
        best = least(jobs, seconds / 2, 1e3)
        ratios = {
            who: round(best["jax.nn"] / best[who], 2) for who in ("tilefold", "tilefold, bnhd")
        }
        found[name] = {
            "milliseconds": best,
            "largest difference": error,
            "times as fast as jax.nn": ratios,
        }
    return found


def _step(attend: Callable[..., Array], given: list[Array]) -> Job:
    *three, do = given
    return _finished(jax.jit(gradients(attend, do)), three)


def _finished(program: Callable[..., Any], given: list[Array]) -> Job:
    return lambda: jax.block_until_ready(program(*given))


def small(seconds: float) -> dict[str, float]:
    """One more small call in a program."""
    given = normal(SMALL, 3)

    def chain(length: int) -> Job:
        def run(q: Array, k: Array, v: Array) -> Array:
            for _ in range(length):
                q = tilefold.attention(q, k, v)
            return q

        return _finished(jax.jit(run), given)

    best = least({str(n): chain(n) for n in (1, CHAIN + 1)}, seconds, 1e6)
    each = (best[str(CHAIN + 1)] - best["1"]) / CHAIN
    return {"program of one call": best["1"], "each further call": round(each, 2)}


def eager(seconds: float) -> dict[str, float]:
    """A small call outside of programs."""
    q, k, v = normal(SMALL, 3)
    jobs: dict[str, Job] = {
        "tilefold.attention": lambda: jax.block_until_ready(tilefold.attention(q, k, v)),
        "jnp.dot": lambda: jax.block_until_ready(jnp.dot(q[0, 0], k[0, 0])),
    }
    return least(jobs, seconds, 1e6)


def memory(_: float) -> dict[str, Any]:
    """The peaks of each number of tokens, beside the scores of all pairs."""
    found: dict[str, Any] = {"shape": [1, 8, "tokens", 64]}
    for length in LENGTHS:
        row = {"score_matrix_mib": round(4 * 8 * length**2 / MIB, 1)}
        for what in ("gradients", "second"):
            if what == "second" and length > LENGTHS[0] * 2:
                continue  # it takes minutes
            command = [sys.executable, __file__, "--child", what, str(length)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row[f"{what}_mib"] = json.loads(done.stdout)
        found[str(length)] = row
    return found


def peak(what: str, length: int) -> float:
    """MiB of resident memory that a program takes more than its inputs, in this process."""
    *given, do = normal((1, 8, length, 64), 4)
    slopes = gradients(ours(causal()), do)

    def second(*given: Array) -> Any:
        return jax.jvp(slopes, given, given)[1]

    program = jax.jit(slopes if what == "gradients" else second).lower(*given).compile()
    jax.block_until_ready(given)
    CLEAR_REFS.write_text("5")  # the peak becomes what is resident now
    before = resident("VmRSS")
    jax.block_until_ready(program(*given))
    return round((resident("VmHWM") - before) / MIB, 1)


if __name__ == "__main__":
    main()
