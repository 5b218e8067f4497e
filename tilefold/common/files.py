"""Files written whole: readers see all of a file or nothing of it."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write the parts under a temporary name in the same folder, then rename. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        with temporary.open("xb") as file:
            for part in parts:
                file.write(part)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
