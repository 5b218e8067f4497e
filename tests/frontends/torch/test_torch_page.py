"""The pages on what stands around a call of PyTorch, and on compiled functions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of its serialisation
@pytest.mark.parametrize(("name", "number"), [("torch_training", 4), ("torch_compile", 3)])
def test_the_page_runs(name: str, number: int) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == number
    names: dict[str, Any] = {}  # later blocks go on from earlier ones
    for block in blocks:
        exec(block, names)
