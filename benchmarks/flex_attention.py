"""What FlexAttention's masks and modifications cost, beside dense eager PyTorch and compiled Flex.

Prints one JSON document of three parts:

- "ports": the least milliseconds of a forward and a backward pass at 2,048 tokens, by tilefold and
  by dense eager operations of PyTorch, turn by turn, for masks and modifications of attention-gym
- "compiled": the least milliseconds of a forward pass at 8,192 tokens with a window of 256, by
  tilefold and by torch's `flex_attention` in `torch.compile`, turn by turn; it needs a C++ compiler
- "calls": the microseconds of a call on (1, 1, 16, 16), beside `tilefold.attention`

    python benchmarks/flex_attention.py --save benchmarks/results/flex_attention.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as theirs

import tilefold
import tilefold.torch
from tilefold.measuring.environment import environment
from tilefold.measuring.timing import turn_by_turn

Job = Callable[[], Any]
SHAPE = (1, 8, 2048, 64)
"""Batch, heads, tokens, dim."""
LONG = (1, 8, 8192, 64)
WINDOW = 256


class Port(NamedTuple):
    """A modification and a mask, and the floats that get a gradient."""

    score: Any = None
    mask: Any = None
    leaves: tuple[Tensor, ...] = ()


def main() -> None:
    """Measure the chosen parts."""
    parts = {"ports": ports, "compiled": compiled, "calls": calls}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each comparison")
    parser.add_argument("--save", type=Path, help="write the document to this file too")
    chosen = parser.parse_args()
    tilefold.set_num_threads(chosen.threads)
    torch.set_num_threads(chosen.threads)
    document: dict[str, Any] = {
        **environment(),
        "torch": torch.__version__,
        "threads": chosen.threads,
        "dtype": "float32",
    }
    for name in chosen.parts:
        document[name] = parts[name](chosen.seconds)
    text = json.dumps(document, indent=1) + "\n"
    sys.stdout.write(text)
    if chosen.save:
        chosen.save.write_text(text, encoding="utf-8")


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Each query sees its own key and those before."""
    return q >= k


def window(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Each query sees its own key and some before."""
    return (q >= k) & (q - k < WINDOW)


def cases() -> dict[str, Port]:
    """Ports of attention-gym's masks and modifications, at 2,048 tokens."""
    heads, length = SHAPE[1], SHAPE[2]
    ids = torch.arange(length) * 5 // length
    slopes = (2.0 ** -torch.arange(1.0, heads + 1)).requires_grad_()
    table = (torch.randn(heads, 2 * length) / 8).requires_grad_()

    def natten(b: Any, h: Any, q: Any, k: Any) -> Any:
        seen: Any = True
        for at_q, at_k, size in ((q // 64, k // 64, 32), (q % 64, k % 64, 64)):
            seen = seen & ((at_q.clamp(6, size - 7) - at_k).abs() <= 6)
        return seen

    return {
        "nothing": Port(),
        "causal": Port(mask=causal),
        "window": Port(mask=window),
        "prefix": Port(mask=theirs.or_masks(causal, lambda b, h, q, k: k < 512)),
        "documents": Port(mask=lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k)),
        "NATTEN": Port(mask=natten),
        "softcap": Port(lambda s, b, h, q, k: 30 * torch.tanh(s / 30), causal),
        "ALiBi, learned": Port(lambda s, b, h, q, k: s - slopes[h] * (q - k), causal, (slopes,)),
        "relative bias, learned": Port(
            lambda s, b, h, q, k: s + table[h, q - k + length], None, (table,)
        ),
    }


def dense(q: Tensor, k: Tensor, v: Tensor, port: Port) -> Tensor:
    """The definition, in operations of PyTorch that store all pairs."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    sizes = scores.shape
    axes = [
        torch.arange(n).view([n if i == j else 1 for j in range(4)]) for i, n in enumerate(sizes)
    ]
    if port.score is not None:
        scores = port.score(scores, *axes)
    if port.mask is not None:
        scores = scores.masked_fill(~port.mask(*axes), -math.inf)
    return torch.softmax(scores, -1) @ v


def ours(q: Tensor, k: Tensor, v: Tensor, port: Port) -> Tensor:
    """The same by tilefold."""
    found: Tensor = tilefold.torch.flex_attention(q, k, v, port.score, mask_mod=port.mask)
    return found


def least(jobs: dict[str, Job], seconds: float, unit: float) -> dict[str, float]:
    """The least time of each job, after one turn that is not counted."""
    for job in jobs.values():
        job()
    times = turn_by_turn(jobs, seconds=seconds)
    return {name: round(unit * min(found), 2) for name, found in times.items()}


def normal(shape: tuple[int, ...]) -> list[Tensor]:
    """Random q, k and v."""
    torch.manual_seed(0)
    return [torch.randn(shape) for _ in range(3)]


def ports(seconds: float) -> dict[str, Any]:
    """Forward and backward pass beside dense eager operations."""
    given = [x.requires_grad_() for x in normal(SHAPE)]
    do, found = torch.randn(SHAPE), {}
    for name, port in cases().items():
        leaves = (*given, *port.leaves)

        def step(attend: Any, port: Port = port, leaves: Any = leaves) -> Any:
            return torch.autograd.grad(attend(*given, port), leaves, do)

        pairs = zip(step(ours), step(dense), strict=True)
        error = max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
        best = least(
            {"tilefold": lambda: step(ours), "dense eager": lambda: step(dense)}, seconds, 1e3
        )
        ratio = round(best["dense eager"] / best["tilefold"], 2)
        found[name] = {"milliseconds": best, "largest error": error, "times as fast": ratio}
    return {"shape": SHAPE, **found}


def compiled(seconds: float) -> dict[str, Any]:
    """A forward pass beside torch's compiled function."""
    warnings.simplefilter("ignore")
    given, found = normal(LONG), {}
    length = LONG[2]
    flex = torch.compile(theirs.flex_attention)
    for name, mask in (("window", window), ("causal", causal)):
        blocks = theirs.create_block_mask(mask, None, None, length, length, device="cpu")
        rule = tilefold.torch.create_block_mask(mask, None, None, length, length)

        def run(attend: Any, mask: Any) -> Any:
            with torch.no_grad():
                return attend(*given, block_mask=mask)

        jobs = {
            "tilefold": lambda: run(tilefold.torch.flex_attention, rule),  # noqa: B023
            "compiled flex": lambda: run(flex, blocks),  # noqa: B023
        }
        error = float((jobs["tilefold"]() - jobs["compiled flex"]()).abs().max())
        best = least(jobs, seconds, 1e3)
        ratio = round(best["compiled flex"] / best["tilefold"], 2)
        found[name] = {"milliseconds": best, "largest difference": error, "times as fast": ratio}
    return {"shape": LONG, "window of keys": WINDOW, **found}


def calls(seconds: float) -> dict[str, float]:
    """A small call, whose functions are traced anew."""
    q, k, v = normal((1, 1, 16, 16))
    ids, slopes = torch.zeros(16, dtype=torch.int64), torch.ones(1)

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + slopes[h] * (k - q)

    def documents(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (ids[q] == ids[k]) & (q >= k)

    flex = tilefold.torch.flex_attention
    jobs: dict[str, Job] = {
        "tilefold.attention": lambda: tilefold.attention(q, k, v),
        "flex_attention": lambda: flex(q, k, v),
        "causal": lambda: flex(q, k, v, mask_mod=causal),
        "documents and ALiBi": lambda: flex(q, k, v, score, mask_mod=documents),
    }
    return least(jobs, seconds, 1e6)


if __name__ == "__main__":
    main()
