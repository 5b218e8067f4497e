"""The look-ups of a score whose gradients a kernel sums, and the scratch that they take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tilefold.backends.cpu.spec import Entry, KernelSpec
from tilefold.masks.expression import Expression, Index, RealConstant, names


class Read:
    """A look-up of the score: its slope and its indices among what is computed."""

    def __init__(self, number: int, entry: Entry, slope: Any, indices: Sequence[Any]) -> None:
        self.number, self.entry = number, entry
        self.target, self.way = entry
        self.slope, self.indices = slope, tuple(indices)
        self.found = [names(index) for index in self.indices]
        self.varying = [axis for axis, found in enumerate(self.found) if found & {"q", "k"}]

    @property
    def plain(self) -> bool:
        """True where F changes as the entry does."""
        return isinstance(self.slope, RealConstant) and self.slope.value == 1

    @property
    def by_batch(self) -> bool:
        """True where an index that is the same for all pairs depends on the batch entry."""
        return any("b" in found and not found & {"q", "k"} for found in self.found)

    @property
    def changes(self) -> str:
        """The region of what a tile changes."""
        return "ds" if self.plain else f"change{self.number}"

    @property
    def places(self) -> str:
        """The region of where it changes it."""
        return f"places{self.number}"

    def axis(self, name: str) -> int:
        """The axis that an index alone goes along."""
        return next(
            axis
            for axis, index in enumerate(self.indices)
            if isinstance(index, Index) and index.name == name
        )


def reads(spec: KernelSpec) -> list[Read]:
    """The look-ups of a spec's score."""
    assert spec.score is not None
    values: tuple[Expression, ...] = spec.score.expression.parts
    found, place = [], 1
    for number, entry in enumerate(spec.entries):
        rank = spec.targets[entry.target].rank - 1
        slope, *indices = values[place : place + 1 + rank]
        found.append(Read(number, entry, slope, indices))
        place += 1 + rank
    return found


def regions(spec: KernelSpec, tile: int) -> dict[str, int]:
    """Scratch of one worker beside that of dQ, in elements; `tile` is what a tile of scores has."""
    width, doubles = spec.block_parallel, 1 if spec.dtype == "float64" else 2
    found = {"offsets": width * doubles}
    for read in reads(spec):
        found[read.changes] = tile
        if read.way == "sums":
            found[f"sums{read.number}"] = width * doubles
        elif read.way in ("slots", "scattered"):
            found[read.places] = tile * doubles
    return found
