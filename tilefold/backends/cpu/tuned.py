"""Block sizes that were measured here: what `tilefold tune` found, in one file beside the kernels.

The planner asks here before it reads `tables`. A winner serves the machine, kernel, types, head
dims, mask and length class that it was measured for; a mask without a winner of its own takes that
of full() where the tables have the same row for both. Block sizes change results by rounding only,
so nothing but speed hangs on this file: one that is damaged is left out, with the reason for
`tilefold doctor`.

The file is read once per process. `keep` and `forget` replace it and begin a new generation.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tilefold.backends.cpu import tables
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.tables import Family, RegisterTile
from tilefold.common import disk_cache, generation
from tilefold.common.files import write_atomically

FORMAT = "tilefold winners 1"
"""The first entry of the file. The number goes up when the generators change so much that what was
measured before says nothing any more.
"""
FILE = "tuned.json"
LONG = 256
"""Parallel elements above which all lengths are alike (few lanes of the last block are idle), so
that fewer kernels compile.
"""
LONGEST_BLOCK = 4096
"""Traversed rows of a block that are believed; 512 is the most that is ever measured."""
DENSE = "True"
"""The mask of full(), as the text of its skeleton."""


@dataclass(frozen=True)
class Processor:
    """A processor, as far as the best blocks depend on it."""

    name: str
    isa: str
    l1_bytes: int
    l2_bytes: int
    features: str

    @staticmethod
    def of(device: Device) -> Processor:
        """The machine of a device; its features by a checksum."""
        features = hashlib.sha256(f"{device.triple} {device.features}".encode()).hexdigest()[:12]
        return Processor(device.name, device.isa, device.l1_bytes, device.l2_bytes, features)


@dataclass(frozen=True)
class Key:
    """What a choice of blocks depends on, beside the machine.

    `unit` and `parts` say how the kernel multiplies: see `plan.KernelSpec`. `mask` is the text of
    its skeleton. `length` is that of the parallel axis: see `length_class`.
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
class Blocks:
    """A register tile, and how many rows are traversed at a time."""

    tile: RegisterTile
    block_traverse: int

    def __str__(self) -> str:
        return f"{self.tile} by {self.block_traverse}"


@dataclass(frozen=True)
class Timed:
    """Blocks and the median of their measured seconds."""

    blocks: Blocks
    seconds: float


@dataclass(frozen=True)
class TunedBlocks:
    """The fastest blocks of one kernel, and what the table's and the worst ones cost."""

    best: Timed
    table: Timed
    worst: Timed
    candidates: int
    shape: str
    threads: int
    date: str
    versions: Mapping[str, str]


_UNUSABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
"""What reading an entry raises that nobody of ours wrote."""

Winners = dict[tuple[Processor, Key], TunedBlocks]


@dataclass(frozen=True)
class TunedFile:
    """The content of a file: winners by machine and key, and what was wrong with the rest."""

    winners: Winners
    problem: str | None = None


def length_class(length: int, lanes: int) -> int:
    """The parallel axis in elements of whole vectors; 0 where it is long.

    >>> length_class(100, 16), length_class(112, 16), length_class(2048, 16)
    (112, 112, 0)
    """
    return 0 if length > LONG else -(-length // lanes) * lanes


def find(device: Device, key: Key, table: Blocks) -> TunedBlocks | None:
    """The winner for a key on a machine, else that of full() if the table's row is the same."""
    kept = load().winners
    if not kept:
        return None
    machine = Processor.of(device)
    own, dense = kept.get((machine, key)), kept.get((machine, replace(key, mask=DENSE)))
    return own or (dense if dense and dense.table.blocks == table else None)


def here(device: Device) -> dict[Key, TunedBlocks]:
    """All winners of a machine."""
    machine = Processor.of(device)
    return {key: winner for (where, key), winner in load().winners.items() if where == machine}


def path() -> Path:
    """Where the winners are kept: in the folder of the kernel cache."""
    return disk_cache.default().directory / FILE


@functools.cache
def load() -> TunedFile:
    """What is kept, read when this process first asks."""
    place = path()
    try:
        content = place.read_bytes()
    except FileNotFoundError:
        return TunedFile({})
    except OSError as error:
        return TunedFile({}, f"{place} cannot be read: {error.strerror or error}")
    import json  # where there is something to read; a first call counts its milliseconds

    try:
        document = json.loads(content)
        entries = document["winners"] if document["format"] == FORMAT else None
    except (*_UNUSABLE, RecursionError):
        entries = None
    if not isinstance(entries, list):
        return TunedFile({}, f"{place} is not a file of this version's winners")
    return _parse_all(entries, place)


def check() -> None:
    """Raises OSError where winners cannot be kept."""
    problem = disk_cache.default().problem()
    if problem:
        raise OSError(f"winners cannot be kept: {problem}")


def keep(new: Mapping[tuple[Processor, Key], TunedBlocks]) -> None:
    """Add winners to the file, in place of older ones of the same keys. Raises OSError."""
    check()
    load.cache_clear()  # another process may have written since
    merged = load().winners | dict(new)
    import json

    document = {"format": FORMAT, "winners": [_entry(*item) for item in merged.items()]}
    write_atomically(path(), (json.dumps(document, indent=1) + "\n").encode())
    _changed()


def forget() -> int:
    """Remove the file and return how many winners were in it. Raises OSError."""
    load.cache_clear()
    count = len(load().winners)
    path().unlink(missing_ok=True)
    _changed()
    return count


def _changed() -> None:
    load.cache_clear()
    generation.advance()


def _parse_all(entries: Iterable[Any], place: Path) -> TunedFile:
    winners: Winners = {}
    wrong = 0
    for entry in entries:
        try:
            machine, key, winner = _parse(entry)
        except _UNUSABLE:
            wrong += 1
        else:
            winners[machine, key] = winner
    problem = f"{wrong} of the winners in {place} cannot be used" if wrong else None
    return TunedFile(winners, problem)


def _entry(where: tuple[Processor, Key], winner: TunedBlocks) -> dict[str, Any]:
    machine, key = where
    return {"machine": asdict(machine), "key": asdict(key)} | asdict(winner)


def _parse(entry: dict[str, Any]) -> tuple[Processor, Key, TunedBlocks]:
    """An entry of the file. Raises one of `_UNUSABLE`."""
    machine, key = Processor(**entry["machine"]), Key(**entry["key"])
    family = tables.family(machine.isa, key.unit)
    timed = {name: _timed(entry[name], family) for name in ("best", "table", "worst")}
    rest = {name: value for name, value in entry.items() if name not in ("machine", "key")}
    winner = TunedBlocks(**rest | timed)
    for part in (machine, key, winner):
        for field in fields(part):
            if field.type in ("str", "int"):
                _check(type(getattr(part, field.name)).__name__ == field.type, field.name)
    return machine, key, winner


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
