"""Products with quantised matrices: beside the rate of reading, and beside torch, turn by turn.

- 4096 x 11008 (groups of 128 for int4) with 1, 8 and 128 rows: the bytes of codes and scales per
  second, beside the rate at which this machine reads an array; and torch's float32 product. Several
  matrices take turns, so that none stays in a cache
- linear layers at batches of 1 to 64: torch's float32, its dynamic int8, and tilefold's
- `generate` of a small random Llama, tokens per second

    python benchmarks/quantized.py --threads 1 --save benchmarks/results/quantized.json

Prints one JSON document: the least and the median time of each row.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import tilefold
import tilefold.torch
from tilefold.backends.cpu import peak
from tilefold.backends.cpu.device import host
from tilefold.measuring.environment import environment
from tilefold.measuring.timing import turn_by_turn
from tilefold.products.schemes import SCHEMES

K, N = 4096, 11008
ROWS = (1, 8, 128)
BYTES = 96 << 20  # of the matrices of a row that take turns
LAYERS = ((384, 1536), (1536, 384), (2048, 2048))
BATCHES = (1, 4, 16, 64)
TOKENS = 48

Run = Callable[[], Any]


def main() -> None:
    """Measure all three."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each row")
    parser.add_argument("--save", type=Path, help="write the document to this file too")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's dynamic int8 is to be replaced
    torch.set_num_threads(chosen.threads)
    tilefold.set_num_threads(chosen.threads)
    with torch.inference_mode():
        document = {
            **environment(),
            "threads": chosen.threads,
            "products": products(chosen.threads, chosen.seconds),
            "layers": layers(chosen.seconds),
            "llama": llama(chosen.seconds),
        }
    text = json.dumps(document, indent=1) + "\n"
    sys.stdout.write(text)
    if chosen.save:
        chosen.save.write_text(text, encoding="utf-8")


def compared(runs: dict[str, Run], seconds: float) -> dict[str, list[float]]:
    """The least and the median milliseconds of runs that take turns."""
    for run in runs.values():
        run()
    times = turn_by_turn(runs, seconds=seconds)
    return {
        name: [round(1e3 * pick(each), 4) for pick in (min, statistics.median)]
        for name, each in times.items()
    }


def products(threads: int, seconds: float) -> dict[str, Any]:
    """Each scheme with some rows."""
    w = np.random.default_rng(0).standard_normal((K, N), np.float32)
    plain = [torch.from_numpy(w), torch.from_numpy(w.copy())]
    data = np.ones(BYTES // 4, np.float32)
    reading = peak.reader(host(), data, threads)
    rows = {}
    for scheme in SCHEMES:
        q = tilefold.quantize(w, scheme)
        arrays = [
            {name: array.copy() for name, array in q.arrays.items()}
            for _ in range(max(2, BYTES // q.nbytes))
        ]
        turns = [tilefold.QuantizedMatrix(scheme, q.shape, q.group_size, **each) for each in arrays]
        for m in ROWS:
            x = torch.randn(m, K)
            found = compared(
                {
                    "read": reading,
                    "torch float32": taking_turns(lambda w, x=x: x @ w, plain),
                    "tilefold": taking_turns(lambda w, x=x: tilefold.qgemm(x, w), turns),
                },
                seconds,
            )
            rate = q.nbytes / found["tilefold"][0] / (data.nbytes / found["read"][0])
            rows[f"{scheme}, {m}"] = {
                "milliseconds": found,
                "bytes": q.nbytes,
                "of_the_rate_of_reading": round(rate, 3),
            }
    return rows


def taking_turns(call: Callable[[Any], Any], matrices: list[Any]) -> Run:
    """A call of the next matrix."""
    turns = itertools.cycle(matrices)
    return lambda: call(next(turns))


def dynamic_int8(model: nn.Module) -> nn.Module:
    """The model with torch's dynamic int8."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def layers(seconds: float) -> dict[str, Any]:
    """Linear layers, milliseconds."""
    rows = {}
    for (k, n), m in itertools.product(LAYERS, BATCHES):
        own, x = nn.Linear(k, n), torch.randn(m, k)
        made = tilefold.torch.QuantizedLinear.from_linear
        models = {
            "torch float32": own,
            "torch dynamic int8": dynamic_int8(nn.Sequential(own)),
            "int8": made(own, "int8"),
            "int8, dynamic": made(own, "int8", dynamic=True),
            "int4": made(own, "int4"),
        }
        runs = {name: (lambda each=each, x=x: each(x)) for name, each in models.items()}
        rows[f"{k} x {n}, {m}"] = compared(runs, seconds / 2)
    return rows


def llama(seconds: float) -> dict[str, Any]:
    """Tokens per second of a random Llama with 4 layers of 1024."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    models = {"torch float32": model, "torch dynamic int8": dynamic_int8(model)}
    for scheme in ("int8", "int4"):
        models[scheme] = copy.deepcopy(model)
        tilefold.torch.quantize_(models[scheme], scheme)
    ids = torch.randint(1, 4096, (1, 16))
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    shown = torch.ones_like(ids)
    runs = {
        name: (lambda each=each: each.generate(ids, attention_mask=shown, **options))
        for name, each in models.items()
    }
    found = compared(runs, 4 * seconds)
    return {name: round(1e3 * TOKENS / least, 1) for name, (least, _) in found.items()}


if __name__ == "__main__":
    main()
