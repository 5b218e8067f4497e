"""The page on what stands around a call of PyTorch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_page_runs() -> None:
    page = (ROOT / "docs" / "torch_training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}  # later blocks go on from earlier ones
    for block in blocks:
        exec(block, names)
