"""What scores and dropout cost, beside causal attention, FlexAttention and torch.

Prints one JSON document of four parts, each job turn by turn with the others of its part:

- "variants": the least milliseconds of causal attention with each modification, forward and
  backward (without gradients of arrays), and the ratio to causal attention per live tile of 64 x 64
- "flex": softcap and a window of 1024 at (1, 8, 8192, 64), and compiled FlexAttention, forward
- "dropout": attention with dropout of 0.1, without, and torch's, forward and with backward
- "second": the second derivative of causal attention, and that of torch's math path

    python benchmarks/scores.py --save benchmarks/results/scores.json
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import tilefold
from tilefold import Score, causal, local
from tilefold.masks.position_rules import Rule
from tilefold.measuring.environment import environment
from tilefold.measuring.timing import turn_by_turn

Jobs = dict[str, Callable[[], Any]]

TILE = 64
WAYS = ("forward", "both")


def main() -> None:
    """Measure the chosen parts."""
    parts = {"variants": variants, "flex": flex, "dropout": dropout, "second": second}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each part")
    parser.add_argument("--save", type=Path, help="write the document to this file too")
    chosen = parser.parse_args()
    tilefold.set_num_threads(chosen.threads)
    torch.set_num_threads(chosen.threads)
    document: dict[str, Any] = {**environment(), "threads": chosen.threads, "dtype": "float32"}
    for name in chosen.parts:
        document[name] = parts[name](chosen.seconds)
        gc.collect()
    text = json.dumps(document, indent=1) + "\n"
    sys.stdout.write(text)
    if chosen.save:
        chosen.save.write_text(text, encoding="utf-8")


def least(jobs: Jobs, seconds: float) -> dict[str, float]:
    """The least milliseconds of each job, after one turn that is not counted."""
    for job in jobs.values():
        job()
    times = turn_by_turn(jobs, seconds=seconds)
    return {name: round(1e3 * min(found), 2) for name, found in times.items()}


def variants(seconds: float) -> dict[str, Any]:
    """Modifications and a window beside causal attention."""
    shape = batch, heads, length, _ = 1, 8, 2048, 64
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=random, requires_grad=True) for _ in range(3))
    do = torch.randn(shape, generator=random)
    temperatures = 0.5 + torch.rand((1, heads, 1, 1), generator=random)
    full = torch.randn((batch, heads, length, length), generator=random)
    calls: dict[str, tuple[Rule, Score | None]] = {
        "causal": (causal(), None),
        "softcap": (causal(), tilefold.softcap(30.0)),
        "alibi": (causal(), tilefold.alibi()),
        "temperature": (causal(), tilefold.temperature(temperatures)),
        "t5": (causal(), tilefold.relative_bias(torch.randn((heads, 32), generator=random))),
        "full bias": (causal(), tilefold.bias(full)),
        "window": (causal() & local(512), None),
    }
    jobs: Jobs = {}
    for name, (mask, score) in calls.items():
        jobs[f"{name}, forward"] = _forward(q, k, v, mask, score)
        jobs[f"{name}, backward"] = _backward((q, k, v), do, mask, score)
    jobs["reading the full bias"] = full.sum
    best = least(jobs, seconds)
    tiles = {name: _live(mask, length) for name, (mask, _) in calls.items()}
    ratios = {
        name: {
            way: round(
                best[f"{name}, {way}"] / best[f"causal, {way}"] * tiles["causal"] / tiles[name],
                3,
            )
            for way in ("forward", "backward")
        }
        for name in calls
    }
    return {"shape": shape, "milliseconds": best, "ratio per live tile": ratios}


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Rule, score: Any) -> Callable[[], Any]:
    given = [x.detach() for x in (q, k, v)]
    return lambda: tilefold.attention(*given, mask=mask, score=score)


def _backward(given: Any, do: Tensor, mask: Rule, score: Any) -> Callable[[], Any]:
    o = tilefold.attention(*given, mask=mask, score=score)
    return lambda: torch.autograd.grad(o, given, do, retain_graph=True)


def _live(mask: Rule, length: int) -> int:
    """The tiles in which a query sees a key."""
    counts = mask.blocks(length, length, TILE, TILE)
    return int(counts.full + counts.partial)


def flex(seconds: float) -> dict[str, Any]:
    """Softcap and a window, beside compiled FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape = 1, 8, 8192, 64
    window, cap = 1024, 30.0
    q, k, v = (torch.randn(shape) for _ in range(3))

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window)

    def capped(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return cap * torch.tanh(s / cap)

    blocks = create_block_mask(seen, None, None, shape[2], shape[2], device="cpu")
    compiled: Any = torch.compile(flex_attention)
    mask, score = causal() & local(window), tilefold.softcap(cap)
    jobs: Jobs = {
        "tilefold": lambda: tilefold.attention(q, k, v, mask=mask, score=score),
        "flex": lambda: compiled(q, k, v, score_mod=capped, block_mask=blocks),
    }
    error = float((jobs["tilefold"]() - jobs["flex"]()).abs().max())
    best = least(jobs, seconds)
    return {
        "shape": shape,
        "milliseconds": best,
        "largest difference": error,
        "flex_over_tilefold": round(best["flex"] / best["tilefold"], 2),
    }


def dropout(seconds: float) -> dict[str, Any]:
    """Dropout of 0.1, beside none and beside torch's."""
    shape, p = (1, 8, 2048, 64), 0.1
    given = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    plain, do = [x.detach() for x in given], torch.randn(shape)

    def both(o: Tensor) -> Any:
        return torch.autograd.grad(o, given, do)

    jobs: Jobs = {
        "none, forward": lambda: tilefold.attention(*plain),
        "dropout, forward": lambda: tilefold.attention(*plain, dropout=p),
        "none, both": lambda: both(tilefold.attention(*given)),
        "dropout, both": lambda: both(tilefold.attention(*given, dropout=p)),
        "torch, dropout, both": lambda: both(scaled_dot_product_attention(*given, dropout_p=p)),
    }
    best = least(jobs, seconds)
    ratios = {way: round(best[f"dropout, {way}"] / best[f"none, {way}"], 3) for way in WAYS}
    return {
        "shape": shape,
        "milliseconds": best,
        "ratio to none": ratios,
        "torch_over_tilefold": round(best["torch, dropout, both"] / best["dropout, both"], 2),
    }


def second(seconds: float) -> dict[str, Any]:
    """The second derivative of causal attention, beside torch's math path."""
    shape = 1, 8, 2048, 64
    given = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    do, *slopes = (torch.randn(shape) for _ in range(4))

    def of(o: Tensor) -> Any:
        first = torch.autograd.grad(o, given, do, create_graph=True)
        return torch.autograd.grad(first, given, slopes)

    def theirs() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return of(scaled_dot_product_attention(*given, is_causal=True))

    def ours() -> Any:
        return of(tilefold.attention(*given, mask=causal()))

    error = max(float((x - y).abs().max()) for x, y in zip(ours(), theirs(), strict=True))
    best = least({"tilefold": ours, "torch math": theirs}, seconds)
    return {
        "shape": shape,
        "milliseconds": best,
        "largest difference": error,
        "torch_over_tilefold": round(best["torch math"] / best["tilefold"], 2),
    }


if __name__ == "__main__":
    main()
