"""Tuned blocks of this machine: `tilefold tune` measures them and keeps them in one file.

The planner looks here before it reads `tables`. Tuned blocks serve the machine, kernel, types, head
dims, mask and length class that they were measured for. A mask without tuned blocks takes the tuned
blocks of full() if the tables have the same row for both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tilefold.backends.cpu import tables
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.tables import Blocks, Family, RegisterTile
from tilefold.common.tuned_store import TunedStore

LONGEST_BLOCK = 4096
"""The largest number of traversed rows of a block that is accepted; at most 512 are measured."""
DENSE = "True"
"""The mask of full(), as the text of its skeleton."""


@dataclass(frozen=True)
class Processor:
    """The properties of a processor that the best blocks depend on."""

    name: str
    isa: str
    l1_bytes: int
    l2_bytes: int
    features: str

    @staticmethod
    def of(device: Device) -> Processor:
        """The processor of a device; its features are a checksum."""
        features = hashlib.sha256(f"{device.triple} {device.features}".encode()).hexdigest()[:12]
        return Processor(device.name, device.isa, device.l1_bytes, device.l2_bytes, features)


@dataclass(frozen=True)
class Key:
    """The properties of a kernel that a choice of blocks depends on, beside the processor.

    `unit` and `parts` say how the kernel multiplies: see `spec.Multiplier`. `mask` is the text of
    its skeleton. `length` is the class of the parallel axis: see `tables.length_class`.
    """

    kernel: str
    dtype: str
    unit: str
    parts: int
    dim: int
    dim_v: int
    mask: str
    length: int


@dataclass(frozen=True)
class Timed:
    """Blocks and the median of their measured seconds."""

    blocks: Blocks
    seconds: float


@dataclass(frozen=True)
class TunedBlocks:
    """The fastest blocks of one kernel, with the times of the table's and the worst blocks."""

    best: Timed
    table: Timed
    worst: Timed
    candidates: int
    shape: str
    threads: int
    date: str
    versions: Mapping[str, str]


def find(device: Device, key: Key, table: Blocks) -> TunedBlocks | None:
    """The tuned blocks of a key on a machine.

    Without them, the tuned blocks of full(), if the table has the same row for both masks.
    """
    kept = STORE.load().entries
    if not kept:
        return None
    machine = Processor.of(device)
    own, dense = kept.get((machine, key)), kept.get((machine, replace(key, mask=DENSE)))
    return own or (dense if dense and dense.table.blocks == table else None)


def here(device: Device) -> dict[Key, TunedBlocks]:
    """All tuned blocks of a machine by their keys."""
    machine, entries = Processor.of(device), STORE.load().entries
    return {key: record for (where, key), record in entries.items() if where == machine}


def _entry(where: tuple[Processor, Key], record: TunedBlocks) -> dict[str, Any]:
    machine, key = where
    return {"machine": asdict(machine), "key": asdict(key)} | asdict(record)


def _parse(entry: dict[str, Any]) -> tuple[tuple[Processor, Key], TunedBlocks]:
    """An entry of the file. Raises one of `tuned_store.UNUSABLE`."""
    machine, key = Processor(**entry["machine"]), Key(**entry["key"])
    family = tables.family(machine.isa, key.unit)
    timed = {name: _timed(entry[name], family) for name in ("best", "table", "worst")}
    rest = {name: value for name, value in entry.items() if name not in ("machine", "key")}
    record = TunedBlocks(**rest | timed)
    for part in (machine, key, record):
        for field in fields(part):
            if field.type in ("str", "int"):
                _check(type(getattr(part, field.name)).__name__ == field.type, field.name)
    return (machine, key), record


def _timed(value: Any, family: Family) -> Timed:
    tile = RegisterTile(**value["blocks"]["tile"])
    block, seconds = value["blocks"]["block_traverse"], float(value["seconds"])
    sizes = (tile.rows, tile.vectors, block)
    _check(all(type(size) is int and 1 <= size <= LONGEST_BLOCK for size in sizes), sizes)
    _check(family.allows(tile, block), sizes)
    _check(0 < seconds < float("inf"), seconds)
    return Timed(Blocks(tile, block), seconds)


def _check(holds: bool, value: object) -> None:
    if not holds:
        raise ValueError(value)


STORE = TunedStore(
    file=tables.TUNED, form="tilefold winners 1", noun="winners", parse=_parse, entry=_entry
)
"""The file of this machine's processors."""
