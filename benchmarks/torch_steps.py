"""A training step of PyTorch whose documents change with every step, compiled and not.

The model is that of `examples/train_language_model.py`: 2 layers of width 256, 8 heads, one
sequence of 1,024 tokens, a window of 512, learned sinks. The step is forward and backward, and its
mask is made inside of the model. The eager and the compiled model take each step turn by turn.
Graphs are counted after the second step and after the last: a new mask must compile nothing.

Prints one JSON document: milliseconds of a step, of the clock (least and median) and of the CPU,
which other programs disturb less; and the graphs.

    python benchmarks/torch_steps.py --save benchmarks/results/torch_steps.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional

from tilefold.measuring.environment import environment

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_language_model.py"


def main() -> None:
    """Measure, and print or save the document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--save", type=Path, help="write the document to this file too")
    chosen = parser.parse_args()
    shape = {"tokens": chosen.tokens, "window": 512, "width": 256, "layers": 2, "heads": 8}
    found = measured(chosen.tokens, chosen.steps, chosen.backend)
    document = {**environment(), "dtype": "float32", **shape, "backend": chosen.backend, **found}
    text = json.dumps(document, indent=2) + "\n"
    print(text, end="")
    if chosen.save:
        chosen.save.write_text(text, encoding="utf-8")


def measured(tokens: int, steps: int, backend: str) -> dict[str, Any]:
    """Milliseconds of a step in each way, and the number of graphs."""
    example = _example()
    ways: dict[str, Callable[[Tensor, Tensor], Any]] = {}
    graphs: dict[str, list[int]] = {}
    setting = example.Setting(context=tokens, window=512, size=256, layers=2, heads=8)
    for name in ("eager", "compiled"):
        torch.manual_seed(0)
        model = example.Model(setting)
        ways[name] = _step(torch.compile(model, backend=backend) if name == "compiled" else model)
        graphs[name] = []
    data = list(example.batches(example.Setting(context=tokens, steps=steps + 2)))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}
    for number, (text, documents) in enumerate(data):
        for name, step in ways.items():
            before = counters["stats"]["unique_graphs"]
            start, used = time.perf_counter(), time.process_time()
            step(text, documents)
            graphs[name].append(counters["stats"]["unique_graphs"] - before)
            if number > 1:
                seconds[name].append(time.perf_counter() - start)
                busy[name].append(time.process_time() - used)
    found: dict[str, Any] = {
        name: {
            "least_ms": round(1e3 * min(times), 2),
            "median_ms": round(1e3 * statistics.median(times), 2),
            "median_cpu_ms": round(1e3 * statistics.median(busy[name]), 2),
            "graphs_in_two_steps": sum(graphs[name][:2]),
            "graphs_later": sum(graphs[name][2:]),
        }
        for name, times in seconds.items()
    }
    for kind in ("least_ms", "median_ms", "median_cpu_ms"):
        found[f"compiled_over_eager_{kind}"] = round(
            found["compiled"][kind] / found["eager"][kind], 3
        )
    return found


def _step(model: Any) -> Callable[[Tensor, Tensor], None]:
    def step(text: Tensor, documents: Tensor) -> None:
        model.zero_grad()
        functional.cross_entropy(model(text[:-1], documents[:-1]), text[1:]).backward()

    return step


def _example() -> Any:
    """The example as a module."""
    spec: Any = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[EXAMPLE.stem] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
