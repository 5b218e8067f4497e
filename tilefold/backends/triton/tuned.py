"""Blocks that were measured on this machine's GPU: what `tilefold.triton.tune` found, in one file.

The planner asks here before it reads `tables`. Blocks change results by rounding only, so nothing
but speed hangs on this file: an entry that is damaged is left out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tilefold.backends.triton.spec import Blocks
from tilefold.common import disk_cache, generation
from tilefold.common.files import write_atomically

FORMAT = "tilefold triton blocks 3"
"""The first entry of the file. The number goes up when kernels change so much that what was
measured before says nothing any more."""

FILE = "triton_tuned.json"


@dataclass(frozen=True)
class Key:
    """What the best blocks depend on; `mask` is the text of the rule's skeleton.

    `rows` are those of a block of the decode kernel, which follow from the queries; 0 for others.
    """

    architecture: str
    kernel: str
    dtype: str
    dim: int
    dim_v: int
    float32_mode: str
    mask: str
    rows: int = 0


_UNUSABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What reading a file raises that nobody of ours wrote."""


def find(key: Key) -> Blocks | None:
    """The blocks that were the fastest for a key, if any were measured."""
    return load().get(key)


def path() -> Path:
    """Where they are kept: in the folder of the kernel cache."""
    return disk_cache.default().directory / FILE


@functools.cache
def load() -> Mapping[Key, Blocks]:
    """All that is kept, read when this process first asks."""
    found = {}
    try:
        document = json.loads(path().read_bytes())
        entries = document["blocks"] if document["format"] == FORMAT else []
    except (OSError, *_UNUSABLE):
        return {}
    for entry in entries if isinstance(entries, list) else []:
        try:
            found[_key(entry["key"])] = Blocks(**entry["blocks"])
        except _UNUSABLE:
            continue
    return found


def check() -> None:
    """Raises OSError where nothing can be kept."""
    if problem := disk_cache.default().problem():
        raise OSError(f"blocks cannot be kept: {problem}")


def keep(new: Mapping[Key, Blocks]) -> None:
    """Add to the file, in place of older entries of the same keys. Raises OSError."""
    check()
    load.cache_clear()  # another process may have written since
    merged = {**load(), **new}
    entries = [{"key": asdict(key), "blocks": asdict(blocks)} for key, blocks in merged.items()]
    document = {"format": FORMAT, "blocks": entries}
    write_atomically(path(), (json.dumps(document, indent=1) + "\n").encode())
    _changed()


def forget() -> int:
    """Remove the file; return how many entries were in it. Raises OSError."""
    load.cache_clear()
    count = len(load())
    path().unlink(missing_ok=True)
    _changed()
    return count


def _changed() -> None:
    load.cache_clear()
    generation.advance()


def _key(entry: Mapping[str, Any]) -> Key:
    """A key of the file. Raises TypeError for fields that are not of their types."""
    key = Key(**entry)
    for name, value in asdict(key).items():
        if type(value) is not (int if name in ("dim", "dim_v", "rows") else str):
            raise TypeError(name)
    return key
