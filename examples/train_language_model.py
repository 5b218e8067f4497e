"""A transformer of bytes that learns to write Python's documentation, on a processor.

    python examples/train_language_model.py                 # 100 steps, a few minutes on two cores
    python examples/train_language_model.py --compare       # the same with torch's own attention
    python examples/train_language_model.py --quick         # seconds

A step reads 8,192 bytes of documents one after the other. A token sees the last 512 tokens of its
own document, so every step has another mask, and each head has a learned sink: a logit without a
value, by which it may look at nothing. This is what GPT-OSS does. `--compare` trains both models in
processes of their own, from the same numbers on the same bytes, turn by turn. `--picture FILE`
draws losses, time per step and memory.

The text is what every Python has: the topics of its `help()`, and the docstrings of its modules.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import tilefold
from tilefold import causal, documents, local


@dataclass(frozen=True)
class Setting:
    """What is trained, and how long."""

    attention: str = "tilefold"
    steps: int = 100
    context: int = 8192
    window: int = 512
    size: int = 128
    layers: int = 4
    heads: int = 4
    rate: float = 4e-3
    seed: int = 0
    compile: bool = False
    sources: bool = True


QUICK = {"steps": 12, "context": 384, "window": 64, "size": 32, "layers": 2, "sources": False}


def texts(*, sources: bool) -> list[bytes]:
    """Documents: a topic of `help()` each, and with `sources` the docstrings of a module each."""
    from pydoc_data.topics import topics

    found = list(topics.values())
    for file in sorted(Path(os.__file__).parent.glob("*.py")) if sources else ():
        nodes = ast.walk(ast.parse(file.read_bytes()))
        kinds = ast.Module, ast.ClassDef, ast.FunctionDef
        said = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        found.append("\n\n".join(filter(None, said)))
    return [text.encode() for text in found if text]


def batches(setting: Setting) -> Iterator[tuple[Tensor, Tensor]]:
    """For each step the bytes (context + 1,) and the number of the document of each."""
    order = random.Random(setting.seed)
    parts = texts(sources=setting.sources)
    order.shuffle(parts)
    data = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8).long()
    lengths = torch.tensor([len(part) for part in parts])
    numbers = torch.arange(len(parts)).repeat_interleave(lengths)
    for _ in range(setting.steps):
        start = order.randrange(len(data) - setting.context)
        piece = slice(start, start + setting.context + 1)
        yield data[piece], numbers[piece]


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Rows (batch, length, heads, dim), whose pairs of numbers are turned by their position."""
    one, other = x.chunk(2, -1)
    cos, sin = turns.cos(), turns.sin()
    return torch.cat([one * cos - other * sin, one * sin + other * cos], -1)


class ByTilefold:
    """Attention whose mask is a rule: what it hides is not computed, and no mask is stored."""

    @staticmethod
    def mask(numbers: Tensor, window: int) -> Any:
        """The last `window` tokens of the own document."""
        return causal() & local(window) & documents(numbers)

    @staticmethod
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, sinks: Tensor) -> Tensor:
        """o of q, k and v (batch, length, heads, dim)."""
        o: Tensor = tilefold.attention(q, k, v, mask=mask, sinks=sinks, layout="bnhd")
        return o


class BySdpa:
    """The same by torch's own attention, which has no sinks: they are a key of one more number."""

    @staticmethod
    def mask(numbers: Tensor, window: int) -> Tensor:
        """True where a token (row) sees a token (column); every token sees the last column."""
        place = torch.arange(len(numbers))
        back = place[:, None] - place
        seen = (back >= 0) & (back < window) & (numbers[:, None] == numbers)
        return functional.pad(seen, (0, 1), value=True)

    @staticmethod
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
        """o of q, k and v (batch, length, heads, dim)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5
        logits = (sinks / scale)[:, None, None].expand(*q.shape[:3], 1)
        key = torch.zeros_like(q[:, :, :1]), torch.ones_like(logits[:, :, :1])
        k = torch.cat([functional.pad(k, (0, 1)), torch.cat(key, -1)], 2)
        v = functional.pad(v, (0, 1, 0, 1))
        attend = functional.scaled_dot_product_attention
        o = attend(torch.cat([q, logits], -1), k, v, attn_mask=mask, scale=scale)
        return o[..., :-1].transpose(1, 2)


WAYS: dict[str, Any] = {"tilefold": ByTilefold, "sdpa": BySdpa}


class Block(nn.Module):
    """Attention, then two linear layers."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        size, self.heads, self.way = setting.size, setting.heads, WAYS[setting.attention]
        self.before, self.between = nn.RMSNorm(size), nn.RMSNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.sinks = nn.Parameter(torch.zeros(setting.heads))
        self.wide, self.narrow = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: Tensor, mask: Any, turns: Tensor) -> Tensor:
        """The rows (batch, length, size) after the block."""
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        o = self.way.run(rotated(q, turns), rotated(k, turns), v, mask, self.sinks)
        x = x + self.out(o.flatten(2))
        return x + self.narrow(functional.gelu(self.wide(self.between(x))))


class Model(nn.Module):
    """A transformer of bytes."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.window, self.way = setting.window, WAYS[setting.attention]
        self.embedding = nn.Embedding(256, setting.size)
        self.blocks = nn.ModuleList([Block(setting) for _ in range(setting.layers)])
        self.last = nn.RMSNorm(setting.size)
        half = setting.size // setting.heads // 2
        speeds = 10000.0 ** -(torch.arange(half) / half)
        turns = torch.arange(setting.context)[:, None, None] * speeds
        self.register_buffer("turns", turns, persistent=False)
        self.head = nn.Linear(setting.size, 256, bias=False)

    def forward(self, tokens: Tensor, numbers: Tensor) -> Tensor:
        """The logits of the next byte, (length, 256)."""
        mask = self.way.mask(numbers, self.window)
        x = self.embedding(tokens)[None]
        for block in self.blocks:
            x = block(x, mask, self.turns)
        logits: Tensor = self.head(self.last(x)[0])
        return logits


def trained(setting: Setting, tell: Callable[[float, float], None]) -> dict[str, Any]:
    """Train, and return losses (nats per byte), seconds of each step, and the peak of memory.

    Seconds of the CPU say less than those of the clock, and other programs disturb them less.

    `tell` hears of each step: its loss and seconds.
    """
    torch.manual_seed(setting.seed)
    plain = Model(setting)
    model: Any = torch.compile(plain) if setting.compile else plain
    optimizer = torch.optim.AdamW(plain.parameters(), lr=setting.rate, betas=(0.9, 0.95))
    warm = max(1, setting.steps // 10)
    losses, seconds, busy = [], [], []
    for step, (data, numbers) in enumerate(batches(setting)):
        start, used = time.perf_counter(), time.process_time()
        done = (step - warm) / max(1, setting.steps - warm)
        share = (step + 1) / warm if step < warm else 0.55 + 0.45 * math.cos(math.pi * done)
        for group in optimizer.param_groups:
            group["lr"] = setting.rate * share
        inside = numbers[1:] == numbers[:-1]  # the first byte of a document follows from nothing
        loss = functional.cross_entropy(model(data[:-1], numbers[:-1])[inside], data[1:][inside])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - used)
        tell(losses[-1], seconds[-1])
    return {
        "setting": asdict(setting),
        "parameters": sum(x.numel() for x in plain.parameters()),
        "losses": losses,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "median_cpu_seconds": statistics.median(busy),
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """The most memory that the process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def progress() -> Progress:
    """Lines that show how far runs are, and their `news`."""
    columns = TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[news]}"))


def news(setting: Setting, loss: float, seconds: float) -> str:
    """What is told of a step."""
    return f"loss {loss:.3f}, {seconds:.2f} s, {setting.context / seconds:,.0f} tokens/s"


def alone(setting: Setting) -> dict[str, Any]:
    """`trained`, with a line that shows how far it is."""
    with progress() as shown:
        task = shown.add_task(setting.attention, total=setting.steps, news="")

        def tell(loss: float, seconds: float) -> None:
            shown.update(task, advance=1, news=news(setting, loss, seconds))

        return trained(setting, tell)


def in_turns(setting: Setting) -> dict[str, Any]:
    """`trained`, which tells its parent of each step in a line, and goes on when that answers."""

    def tell(*step: float) -> None:
        print(json.dumps(step), flush=True)
        sys.stdin.readline()

    return trained(setting, tell)


def compared(setting: Setting) -> list[dict[str, Any]]:
    """What a fresh process finds for each way of attention; they take their steps turn by turn."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryDirectory() as folder, progress() as shown:
        children = {}
        for way in WAYS:
            options = json.dumps(asdict(setting) | {"attention": way})
            command = [sys.executable, __file__, "--child", options]
            child = subprocess.Popen([*command, "--json", f"{folder}/{way}.json"], **pipes)
            children[way] = child, shown.add_task(way, total=setting.steps, news="")
            told = child.stdout.readline()
            shown.update(children[way][1], advance=1, news=news(setting, *json.loads(told)))
        for _ in range(setting.steps - 1):
            for child, task in children.values():
                print(file=child.stdin, flush=True)
                told = json.loads(child.stdout.readline())
                shown.update(task, advance=1, news=news(setting, *told))
        for child, _ in children.values():
            child.communicate("\n")
        files = [Path(folder, f"{way}.json") for way in WAYS]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def show(found: Sequence[dict[str, Any]]) -> None:
    """Print a line for each run."""
    table = Table("attention", "first loss", "last losses", "median s", "peak memory")
    for run in found:
        last = statistics.mean(run["losses"][-10:])
        table.add_row(
            run["setting"]["attention"],
            f"{run['losses'][0]:.3f}",
            f"{last:.3f}",
            f"{run['median_seconds']:.2f}",
            f"{run['peak_bytes'] / 2**30:.2f} GiB",
        )
    Console().print(table)


def draw(found: Sequence[dict[str, Any]], file: Path) -> None:
    """Losses by step, and beside them time per step and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 3, figsize=(10, 3.4), width_ratios=[2.2, 1, 1], layout="constrained"
    )
    colours = {"tilefold": "#1f77b4", "sdpa": "#ff7f0e"}
    for number, run in enumerate(found):
        name = run["setting"]["attention"]
        style: dict[str, Any] = {"color": colours[name], "label": name}
        lines = {"linewidth": 4.0 - 2.8 * number, "alpha": 0.6 + 0.4 * number}
        axes[0].plot(run["losses"], **style, **lines)
        for axis, value, text in (
            (axes[1], run["median_seconds"], "{:.2f} s"),
            (axes[2], run["peak_bytes"] / 2**30, "{:.2f} GiB"),
        ):
            axis.bar_label(axis.bar(name, value, color=colours[name]), [text.format(value)])
    first = found[0]["setting"]
    axes[0].set(
        xlabel="step",
        ylabel="loss, nats per byte",
        title=f"{first['context']:,} tokens, window {first['window']}, new documents each step",
    )
    axes[0].legend(frameon=False)
    axes[1].set_title("median time of a step")
    axes[2].set_title("peak memory")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)
    for axis in axes[1:]:
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--attention", choices=WAYS)
    parser.add_argument("--compare", action="store_true", help="both, each in a fresh process")
    parser.add_argument("--quick", action="store_true", help="a small model, for seconds")
    parser.add_argument("--compile", action="store_true", default=None, help="by torch.compile")
    for name in ("steps", "context", "window", "size", "layers", "heads", "seed"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--json", type=Path, help="a file for what was found")
    parser.add_argument("--picture", type=Path, help="a file for the curves")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = vars(parser.parse_args(arguments))
    options = {name: given[name] for name in asdict(Setting()) if given.get(name) is not None}
    setting = Setting(**(given["child"] or (QUICK if given["quick"] else {}) | options))
    found = compared(setting) if given["compare"] else []
    if not found:
        found = [in_turns(setting) if given["child"] else alone(setting)]
    if given["json"]:
        told: Any = found if given["compare"] else found[0]
        given["json"].write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if given["picture"]:
        draw(found, given["picture"])
    if not given["child"]:
        show(found)
    return found


if __name__ == "__main__":
    main()
