"""Blocks that were measured on this machine's GPU: what `tilefold.triton.tune` found, in one file.

The planner asks here before it reads `tables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tilefold.backends.triton.spec import Blocks
from tilefold.common.tuned_store import TunedStore


@dataclass(frozen=True)
class Key:
    """All that the best blocks depend on; `mask` is the text of the rule's skeleton.

    `rows` counts the rows of a block of the decode kernel, which follow from the queries; it is 0
    for other kernels.
    """

    architecture: str
    kernel: str
    dtype: str
    dim: int
    dim_v: int
    float32_mode: str
    mask: str
    rows: int = 0


def find(key: Key) -> Blocks | None:
    """The blocks that were the fastest for a key, if any were measured."""
    return STORE.load().entries.get(key)


def _entry(key: Key, blocks: Blocks) -> dict[str, Any]:
    return {"key": asdict(key), "blocks": asdict(blocks)}


def _parse(entry: Mapping[str, Any]) -> tuple[Key, Blocks]:
    """An entry of the file. Raises one of `tuned_store.UNUSABLE`."""
    return _key(entry["key"]), Blocks(**entry["blocks"])


def _key(entry: Mapping[str, Any]) -> Key:
    """A key of the file. Raises TypeError for fields that are not of their types."""
    key = Key(**entry)
    for name, value in asdict(key).items():
        if type(value) is not (int if name in ("dim", "dim_v", "rows") else str):
            raise TypeError(name)
    return key


STORE = TunedStore(
    file="triton_tuned.json",
    form="tilefold triton blocks 3",
    noun="blocks",
    parse=_parse,
    entry=_entry,
)
"""The file of this machine's GPUs."""
