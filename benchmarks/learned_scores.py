"""Scores with arrays that learn: T5's bias and a full bias, forward and with all gradients.

Prints one JSON document: the least milliseconds of each job, taken turn by turn in one run. The
time of reading a bias is that of summing it with as many threads, a plain reduction of torch, which
waits for memory alone. T5's bias is compared with torch in eager mode: products, bias and softmax
as a model of T5 writes them, with autograd.

    python benchmarks/learned_scores.py --save benchmarks/results/learned_scores.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tilefold
from tilefold import Score
from tilefold.measuring.environment import environment

BUCKETS, FARTHEST = 32, 128

Jobs = dict[str, Callable[[], Any]]


def main() -> None:
    """Measure all jobs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", type=Path, help="write the document to this file too")
    chosen = parser.parse_args()
    tilefold.set_num_threads(chosen.threads)
    torch.set_num_threads(chosen.threads)
    shape = chosen.batch, chosen.heads, chosen.length, chosen.dim
    best = least(jobs(shape), chosen.rounds)
    document = {
        **environment(),
        "threads": chosen.threads,
        "shape": shape,
        "dtype": "float32",
        "rounds": chosen.rounds,
        "milliseconds": {name: round(1e3 * seconds, 1) for name, seconds in best.items()},
        "torch_over_tilefold": round(
            best["t5, torch eager, both"] / (best["t5, forward"] + best["t5, backward"]), 2
        ),
    }
    text = json.dumps(document, indent=1) + "\n"
    sys.stdout.write(text)
    if chosen.save:
        chosen.save.write_text(text, encoding="utf-8")


def jobs(shape: tuple[int, ...]) -> Jobs:
    """What is measured, by name; each backward pass takes the results of its forward pass."""
    random = np.random.default_rng(0)
    batch, heads, length, _ = shape
    q, k, v, do = (random.standard_normal(shape, np.float32) for _ in range(4))
    table = random.standard_normal((heads, BUCKETS), np.float32)
    full = random.standard_normal((batch, heads, length, length), np.float32)
    scores = {
        "plain": None,
        "t5": tilefold.relative_bias(table, max_distance=FARTHEST),
        "full bias": tilefold.bias(full),
    }
    results: dict[str, Any] = {}

    def forward(name: str, score: Score | None) -> None:
        results[name] = tilefold.attention(q, k, v, score=score, return_lse=True)

    def backward(name: str, score: Score | None) -> None:
        tilefold.attention_backward(do, q, k, v, *results[name], score=score)

    found: Jobs = {}
    for name, score in scores.items():
        found[f"{name}, forward"] = lambda name=name, score=score: forward(name, score)
        found[f"{name}, backward"] = lambda name=name, score=score: backward(name, score)
    summed = torch.from_numpy(full)
    found["reading the full bias"] = lambda: summed.sum()
    found["t5, torch eager, both"] = eager(q, k, v, do, table)
    return found


def eager(q: Any, k: Any, v: Any, do: Any, table: Any) -> Callable[[], None]:
    """Forward and backward of T5's attention in torch, with the usual scale."""
    length, scale = q.shape[2], q.shape[3] ** -0.5
    given = [torch.from_numpy(array).clone().requires_grad_() for array in (q, k, v, table.T)]
    gradient = torch.from_numpy(do)
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    near = BUCKETS // 4
    far = torch.log(distance.abs().clamp(min=1) / near) / np.log(FARTHEST / near)
    far = (near + far * near).long().clamp(max=BUCKETS // 2 - 1)
    buckets = torch.where(distance.abs() < near, distance.abs(), far)
    buckets = buckets + (distance > 0) * (BUCKETS // 2)

    def both() -> None:
        queries, keys, values, rows = given
        bias = torch.nn.functional.embedding(buckets, rows).permute(2, 0, 1)
        weights = (scale * queries @ keys.transpose(2, 3) + bias).softmax(dim=-1)
        (weights @ values).backward(gradient)
        for one in given:
            one.grad = None

    return both


def least(found: Jobs, rounds: int) -> dict[str, float]:
    """The least seconds of each job, after one turn that is not counted."""
    best = dict.fromkeys(found, float("inf"))
    for turn in range(rounds + 1):
        for name, job in found.items():
            start = time.perf_counter()
            job()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
