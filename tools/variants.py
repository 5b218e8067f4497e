"""Draw the pictures of docs/variants.md from the code of that page, into docs/images/variants/."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

import tilefold
from tilefold.masks.picture import MARKS, Picture
from tilefold.scores import picture

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "variants.md"
FOLDER = ROOT / "docs" / "images" / "variants"
HEAD = 2  # of a picture


def main() -> int:
    """Write all pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, data in pictures().items():
        (FOLDER / f"{name}.png").write_bytes(data)
    return 0


def codes() -> dict[str, str]:
    """The pieces of code by the name of their section; the first one, "", prepares the others."""
    text = PAGE.read_text(encoding="utf-8")
    parts = re.split(r"^## .* \{ #(\w+) \}$", text, flags=re.MULTILINE)
    names = ["", *parts[1::2]]
    fences = [re.findall(r"```python\n(.*?)```", part, re.DOTALL) for part in parts[::2]]
    return {name: "\n".join(each) for name, each in zip(names, fences, strict=True)}


def calls() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The options of the call of each section, and the names that it has seen."""
    first, *others = codes().items()
    found = {}
    for name, code in others:
        known: dict[str, Any] = {}
        exec(first[1], known)
        seen: dict[str, Any] = {}
        known["attention"] = lambda *arrays, seen=seen, **options: seen.update(options)
        exec(code, known)
        found[name] = (seen, known)
    return found


def pictures() -> dict[str, bytes]:
    """The files of all sections."""
    return {name: _drawn(name, options) for name, (options, _) in calls().items()}


def _drawn(name: str, options: dict[str, Any]) -> bytes:
    mask, score = options.get("mask"), options.get("score")
    if score is None:
        return _mask(tilefold.picture(mask, 64, block_q=8, block_k=8))
    place = np.arange(64)
    large = 100 - 4 * abs(place[:, None] - place) if name == "softcap" else None
    made = tilefold.picture(mask, 64, score=score, scores=large, heads=8, h=HEAD)
    return picture.png(made)  # type: ignore[arg-type]  # a score gives a heat map


def _mask(drawn: Any) -> bytes:
    """A mask with lines between its tiles."""
    assert isinstance(drawn, Picture)
    cell, line = 7, len(MARKS)
    pixels = drawn.marks.astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    pixels[:: cell * drawn.block_q] = line
    pixels[:, :: cell * drawn.block_k] = line
    return picture.image(pixels, [*(mark.colour for mark in MARKS), "#ffffff"], drawn.title)


if __name__ == "__main__":
    sys.exit(main())
