"""Attention at the shapes of ten real models, beside the best of the installed peers.

    python benchmarks/models.py [--seconds 3] [--save benchmarks/results] [--only Llama]

Attention alone, in float32, on all cores; backward too where a model of that shape is trained on
such machines. Each peer has a process of its own, and they take turns (`tilefold bench` does the
same). Warm is a loop over one call, cold a call after other memory was read.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures

from tilefold.backends.cpu.device import host
from tilefold.commands import terminal
from tilefold.masks import parse
from tilefold.measuring.apart import Apart
from tilefold.measuring.roofline_share import RooflineShares, percent
from tilefold.measuring.timing import Row
from tilefold.measuring.workload import Case
from tilefold.problems.attention import Problem, default_scale


@dataclass(frozen=True)
class Model:
    """The attention of a layer: sizes as in the model's configuration."""

    name: str
    batch: int
    heads: int
    length: int
    dim: int
    mask: str = "full()"
    heads_kv: int | None = None
    trained: bool = False

    def cases(self) -> Iterator[Case]:
        """What is timed."""
        problem = Problem(
            batch=self.batch,
            heads_q=self.heads,
            heads_kv=self.heads_kv or self.heads,
            len_q=self.length,
            len_k=self.length,
            dim=self.dim,
            dim_v=self.dim,
            dtype="float32",
            scale=default_scale(self.dim),
            mask=parse.parse(self.mask),
        )
        for operation in ("forward", "backward") if self.trained else ("forward",):
            yield Case(problem, operation, host().cores)


MODELS = (
    Model("BERT base, 8 texts of 128 tokens", 8, 12, 128, 64, trained=True),
    Model("MiniLM-L6, 32 texts of 128 tokens", 32, 12, 128, 32),
    Model("ViT-B/16, 8 images of 224", 8, 12, 197, 64, trained=True),
    Model("CLIP ViT-L/14, 4 images of 224", 4, 16, 257, 64),
    Model("Whisper tiny, encoder, 30 s", 1, 6, 1500, 64),
    Model("GPT-2, 1024 tokens", 1, 12, 1024, 64, "causal()", trained=True),
    Model("Llama 3.2 1B, 512 tokens", 1, 32, 512, 64, "causal()", 8),
    Model("Llama 3.2 1B, 4096 tokens", 1, 32, 4096, 64, "causal()", 8),
    Model("Mistral 7B, 6144 tokens, window 4096", 1, 32, 6144, 128, "causal() & local(4096)", 8),
    Model("Stable Diffusion UNet, 64 x 64", 2, 8, 4096, 40),
)


def record(model: Model, rows: Sequence[Row], shares: RooflineShares) -> dict[str, Any]:
    """What was measured of one model and pass."""
    own = rows[0]
    share, binding = shares.of(own.case, own.median, own.pairs)
    found: dict[str, Any] = {
        "model": model.name,
        "operation": own.case.operation,
        "shape": own.case.shape,
        "mask": str(own.case.problem.mask),
        "threads": own.case.threads,
        "share": share,
        "binding": binding,
        "seconds": {row.name: row.median for row in rows if row.reason is None},
        "cold_seconds": {row.name: row.cold_median for row in rows if row.reason is None},
        "reasons": {row.name: row.reason for row in rows if row.reason},
    }
    for kind, times in (("ratio", found["seconds"]), ("cold_ratio", found["cold_seconds"])):
        peers = {name: time for name, time in times.items() if name != "tilefold"}
        if peers:
            best = min(peers, key=lambda name: peers[name])
            found[kind], found[f"{kind}_peer"] = peers[best] / times["tilefold"], best
    return found


COLUMNS = ("", ">tilefold", ">best peer", ">ratio", ">cold", ">roofline")


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    own, peer = row["seconds"]["tilefold"], row.get("ratio_peer")
    return [
        row["model"] + (", backward" if row["operation"] == "backward" else ""),
        terminal.seconds(own),
        f"{terminal.seconds(row['seconds'][peer])} {peer}" if peer else "-",
        f"{row['ratio']:.2f}" if peer else "-",
        f"{row['cold_ratio']:.2f}" if peer else "-",
        percent(row["share"]),
    ]


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="per row (default 3)")
    parser.add_argument("--save", type=Path, help="write models.json into this folder")
    parser.add_argument("--only", default="", help="models whose name has this text")
    options = parser.parse_args()
    shares, rows = RooflineShares(), []
    with Apart(["tilefold", *figures.rivals()]) as apart, terminal.progress() as bar:
        chosen = [model for model in MODELS if options.only in model.name]
        for model in bar.track(chosen, description="Measuring"):
            for case in model.cases():
                found = apart.measure(case, seconds=options.seconds)
                rows.append(record(model, found, shares))
            if options.save:  # some rows take minutes, and a run may be cut
                figures.save(options.save / "models.json", rows)
    title = f"{host().name}, {host().isa}, {host().cores} cores, float32"
    terminal.out().print(terminal.table(title, COLUMNS, map(cells, rows)))
    terminal.out().print("ratio: best peer / tilefold, warm; cold: after other memory was read")


if __name__ == "__main__":
    main()
