"""The example that trains a language model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def example() -> Any:
    spec: Any = importlib.util.spec_from_file_location(
        "train_language_model", ROOT / "examples" / "train_language_model.py"
    )
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    return module


def test_the_mask_of_both_ways_is_the_same(example: Any) -> None:
    numbers = torch.tensor([3, 3, 3, 3, 0, 0, 7, 7, 7])
    rule = example.ByTilefold.mask(numbers, 3).to_dense(9, 9)
    assert torch.equal(example.BySdpa.mask(numbers, 3)[:, :-1], torch.from_numpy(rule))


@pytest.mark.slow
def test_the_loss_falls_as_with_torch_s_own_attention(example: Any, tmp_path: Path) -> None:
    runs = []
    for way in example.WAYS:
        file = tmp_path / f"{way}.json"
        example.main(["--quick", "--attention", way, "--json", str(file)])
        runs.append(json.loads(file.read_text()))
    ours, other = (run["losses"] for run in runs)
    assert ours == pytest.approx(other, rel=1e-4)
    assert ours[-1] < ours[0] - 0.8
    example.draw(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
