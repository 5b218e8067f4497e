"""What torch's attention costs where tilefold is enabled, beside torch's own.

Prints one JSON document of three parts:

- "small": the microseconds of small calls of `scaled_dot_product_attention`, with tilefold enabled
  and disabled, turn by turn in one process
- "masks": the milliseconds of calls with masks in memory that are rules, by tilefold.torch and by
  torch; of the same rules as rules; of looking for the rule; and of the first call of a mask
- "unlike": the same of masks that are no rules

    python benchmarks/torch_calls.py --save benchmarks/results/torch_calls.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tilefold.torch
from tilefold.frontends.torch import recognised
from tilefold.measuring.environment import environment

Job = Callable[[], Any]

SMALL = ((1, 1, 2, 8), (1, 8, 64, 64))
LENGTHS = (512, 2048, 8192)
HEADS, DIM, WINDOW = 8, 64, 256


def main() -> None:
    """Measure the chosen parts."""
    parts = {"small": small, "masks": masks, "unlike": unlike}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5, help="of each long job")
    parser.add_argument("--save", type=Path, help="write the document to this file too")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    document: dict[str, Any] = {**environment(), "threads": chosen.threads, "dtype": "float32"}
    for name in chosen.parts:
        document[name] = parts[name](chosen.turns)
    text = json.dumps(document, indent=1) + "\n"
    sys.stdout.write(text)
    if chosen.save:
        chosen.save.write_text(text, encoding="utf-8")


def small(turns: int) -> dict[str, Any]:
    """The least time of small calls, and by how much the override is slower."""
    found: dict[str, Any] = {}
    for shape in SMALL:
        q = torch.randn(shape)
        x, do = q.clone().requires_grad_(), torch.randn(shape)
        seen = torch.ones(shape[2], shape[2]).tril() > 0
        jobs: dict[str, Job] = {
            "inference": lambda q=q: F.scaled_dot_product_attention(q, q, q),
            "causal": lambda q=q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
            "with a mask": lambda q=q, seen=seen: F.scaled_dot_product_attention(q, q, q, seen),
            "recorded": lambda x=x: F.scaled_dot_product_attention(x, x, x),
            "with gradients": lambda x=x, do=do: torch.autograd.grad(
                F.scaled_dot_product_attention(x, x, x), x, do
            ),
        }
        best = {True: dict.fromkeys(jobs, 1.0), False: dict.fromkeys(jobs, 1.0)}
        for _ in range(12 * turns):
            for on in (False, True):
                (tilefold.torch.enable if on else tilefold.torch.disable)()
                for name, job in jobs.items():
                    best[on][name] = min(best[on][name], _mean(job, 50 if shape[2] < 9 else 5))
        tilefold.torch.disable()
        found[str(shape)] = {
            name: {
                "torch_us": round(best[False][name] * 1e6, 2),
                "enabled_us": round(best[True][name] * 1e6, 2),
                "more_us": round((best[True][name] - best[False][name]) * 1e6, 2),
            }
            for name in jobs
        }
    return found


def _mean(job: Job, number: int) -> float:
    job()
    begin = time.perf_counter()
    for _ in range(number):
        job()
    return (time.perf_counter() - begin) / number


def masks(turns: int) -> dict[str, Any]:
    """Masks that are causal, windows, and padded, of bool and of floats."""
    found: dict[str, Any] = {"shape": (1, HEADS, "tokens", DIM), "window": WINDOW}
    for length in LENGTHS:
        places = torch.arange(length)
        ahead = places[:, None] - places
        kinds = {
            "causal": (ahead >= 0, tilefold.causal()),
            "window": (
                (ahead >= 0) & (ahead < WINDOW),
                tilefold.causal() & tilefold.local(WINDOW),
            ),
        }
        found[str(length)] = {
            f"{name}, {kind}": _row(turns, mask, rule)
            for name, (seen, rule) in kinds.items()
            for kind, mask in (("bool", seen), ("float32", _added(seen)))
        }
    return found


def unlike(turns: int) -> dict[str, Any]:
    """Masks that are no rules: of bool, and floats."""
    found: dict[str, Any] = {}
    for length in LENGTHS[:2]:
        seen = torch.rand(length, length) > 0.5
        found[str(length)] = {
            kind: _row(turns, mask, None)
            for kind, mask in (("bool", seen), ("float32", torch.randn(length, length)))
        }
    return found


def _added(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


def _row(turns: int, mask: Tensor, rule: tilefold.Rule | None) -> dict[str, Any]:
    """The milliseconds of calls with a mask, forward, and with the gradients of q, k and v."""
    length = mask.shape[0]
    q, k, v, do = torch.randn(4, 1, HEADS, length, DIM).unbind()
    learned = [x.clone().requires_grad_() for x in (q, k, v)]
    sizes = 1, HEADS, length, length

    def step(function: Callable[..., Tensor], **options: Any) -> Job:
        return lambda: torch.autograd.grad(function(*learned, **options), learned, do)

    ours = tilefold.torch.scaled_dot_product_attention
    theirs = F.scaled_dot_product_attention
    jobs: dict[str, Job] = {
        "look": lambda: recognised.rule_of(mask[None, None], sizes, 2 * DIM),
        "tilefold": lambda: ours(q, k, v, mask),
        "torch": lambda: theirs(q, k, v, mask),
        "tilefold, with gradients": step(ours, attn_mask=mask),
        "torch, with gradients": step(theirs, attn_mask=mask),
    }
    if rule is not None:
        jobs["the rule itself"] = lambda: tilefold.attention(q, k, v, mask=rule)
        jobs["the rule itself, with gradients"] = step(tilefold.attention, mask=rule)
    recognised._seen.clear()
    jobs["tilefold"]()  # kernels are compiled, and threads started
    recognised._seen.clear()
    first = _mean_once(jobs["tilefold"])
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(max(2, 4096 * turns // length)):  # minima of short jobs need more turns
        for name, job in jobs.items():
            best[name] = min(best[name], _mean_once(job))
    found = {f"{name}_ms": round(value * 1e3, 3) for name, value in best.items()}
    return {
        **found,
        "first call_ms": round(first * 1e3, 3),
        "times as fast": round(best["torch"] / best["tilefold"], 2),
        "times as fast, with gradients": round(
            best["torch, with gradients"] / best["tilefold, with gradients"], 2
        ),
    }


def _mean_once(job: Job) -> float:
    begin = time.perf_counter()
    job()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
