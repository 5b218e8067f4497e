"""Paths of the project, and the environment in which a child process finds the file of a test."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
_SUPPORT = Path(__file__).parent


def finding(file: str, **more: str) -> dict[str, str]:
    """The environment of a child process that imports a test file by its name."""
    folders = ROOT, _SUPPORT, Path(file).parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), **more}
