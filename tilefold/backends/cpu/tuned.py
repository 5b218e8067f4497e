"""Tuned blocks of this machine: `tilefold tune` measures them and keeps them in one file.

The planner looks here before it reads `tables`. Tuned blocks serve the machine, kernel, types, head
dims, mask and length class that they were measured for. A mask without tuned blocks takes the tuned
blocks of full() if the tables have the same row for both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Generic, TypeVar

from tilefold.backends.cpu import tables
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.tables import Blocks, RegisterTile
from tilefold.common.tuned_store import TunedStore

B = TypeVar("B")
K = TypeVar("K")

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
class Timed(Generic[B]):
    """Blocks and the median of their measured seconds."""

    blocks: B
    seconds: float


@dataclass(frozen=True)
class TunedBlocks(Generic[B]):
    """The fastest blocks of one kernel, with the times of the table's and the worst blocks."""

    best: Timed[B]
    table: Timed[B]
    worst: Timed[B]
    candidates: int
    shape: str
    threads: int
    date: str
    versions: Mapping[str, str]


def find(device: Device, key: Key, table: Blocks) -> TunedBlocks[Blocks] | None:
    """The tuned blocks of a key on a machine.

    Without them, the tuned blocks of full(), if the table has the same row for both masks.
    """
    kept = STORE.load().entries
    if not kept:
        return None
    machine = Processor.of(device)
    own, dense = kept.get((machine, key)), kept.get((machine, replace(key, mask=DENSE)))
    return own or (dense if dense and dense.table.blocks == table else None)


def here(
    device: Device, store: TunedStore[tuple[Processor, K], TunedBlocks[B]]
) -> dict[K, TunedBlocks[B]]:
    """All tuned blocks of a machine in a store by their keys."""
    machine, entries = Processor.of(device), store.load().entries
    return {key: record for (where, key), record in entries.items() if where == machine}


def entry_of(where: tuple[Processor, Any], record: TunedBlocks[Any]) -> dict[str, Any]:
    """The entry of a file for a record; `parsed` is its inverse."""
    machine, key = where
    return {"machine": asdict(machine), "key": asdict(key)} | asdict(record)


def parsed(
    entry: dict[str, Any], key: Callable[..., K], blocks: Callable[[Any, Processor, K], B]
) -> tuple[tuple[Processor, K], TunedBlocks[B]]:
    """An entry of a file. `blocks` makes blocks of their values.

    Raises one of `tuned_store.UNUSABLE`.
    """
    machine, found = Processor(**entry["machine"]), key(**entry["key"])
    rest = {name: value for name, value in entry.items() if name not in ("machine", "key")}
    for name in ("best", "table", "worst"):
        seconds = float(rest[name]["seconds"])
        check(0 < seconds < float("inf"), seconds)
        rest[name] = Timed(blocks(rest[name]["blocks"], machine, found), seconds)
    record: TunedBlocks[B] = TunedBlocks(**rest)
    for part in (machine, found, record):
        check_types(part)
    return (machine, found), record


def check_types(part: Any) -> None:
    """Raises ValueError unless each text, number and flag of a dataclass is one."""
    for field in fields(part):
        if field.type in ("str", "int", "bool"):
            check(type(getattr(part, field.name)).__name__ == field.type, field.name)


def check_sizes(sizes: Iterable[Any], most: int) -> None:
    """Raises ValueError unless all are integers from 1 to `most`."""
    sizes = tuple(sizes)
    check(all(type(size) is int and 1 <= size <= most for size in sizes), sizes)


def check(holds: bool, value: object) -> None:
    """Raises ValueError with a value unless something holds for it."""
    if not holds:
        raise ValueError(value)


def _blocks(value: Any, machine: Processor, key: Key) -> Blocks:
    family = tables.family(machine.isa, key.unit)
    tile, block = RegisterTile(**value["tile"]), value["block_traverse"]
    check_sizes((tile.rows, tile.vectors, block), LONGEST_BLOCK)
    check(family.allows(tile, block), value)
    return Blocks(tile, block)


STORE: TunedStore[tuple[Processor, Key], TunedBlocks[Blocks]] = TunedStore(
    file=tables.TUNED,
    form="tilefold winners 1",
    noun="winners",
    parse=lambda entry: parsed(entry, Key, _blocks),
    entry=entry_of,
)
"""The file of this machine's processors."""
