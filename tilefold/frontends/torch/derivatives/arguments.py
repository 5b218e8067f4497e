"""Arguments of a tile that are no rows of queries or of keys, but made for its pairs.

Such an argument is an array of the call with an axis of copies before its own axes. A tile sees
what its pairs read of it: entries of an array of a score, or which pairs dropout keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tilefold.frontends.torch.derivatives.modified import places
from tilefold.frontends.torch.derivatives.walk import Pairs
from tilefold.masks.expression import RealLookup
from tilefold.masks.tables import Input
from tilefold.problems.dropout import MULTIPLIERS, ROUNDS, WEYL, threshold


class OfPairs(ABC):
    """An argument that is made for the pairs of a tile."""

    @abstractmethod
    def read(self, array: Tensor, pairs: Pairs) -> Tensor:
        """What the pairs read of (copies, ...), which broadcasts to the pairs."""

    def add(self, total: Tensor, slopes: Tensor, pairs: Pairs) -> None:
        """Add to the gradient of the array that of what the pairs read."""
        raise NotImplementedError(f"{type(self).__name__} has no gradient")


@dataclass(frozen=True, eq=False)
class Entries(OfPairs):
    """The entries of an array at a look-up of a score. Equal places are added in their order."""

    lookup: RealLookup

    @property
    def number(self) -> int:
        """The number of the array."""
        table = self.lookup.table
        assert isinstance(table, Input)
        return table.number

    def read(self, array: Tensor, pairs: Pairs) -> Tensor:
        """The entries; one copy serves all."""
        return array[self._places(array, pairs)]

    def add(self, total: Tensor, slopes: Tensor, pairs: Pairs) -> None:
        """Add to entries: `index_add_` of one axis."""
        first, *rest = self._places(total, pairs)
        place = first
        for size, index in zip(total.shape[1:], rest, strict=True):
            place = place * size + index
        total.view(-1).index_add_(0, place.expand_as(slopes).reshape(-1), slopes.reshape(-1))

    def _places(self, array: Tensor, pairs: Pairs) -> tuple[Tensor, ...]:
        assert pairs.copies is not None
        copies = pairs.copies if array.shape[0] > 1 else pairs.copies.new_zeros(())
        return copies, *places(self.lookup, pairs.indices)


@dataclass(frozen=True)
class Kept(OfPairs):
    """Which pairs dropout keeps, from its seed: `tilefold.problems.dropout` in torch's integers."""

    chance: float

    def read(self, array: Tensor, pairs: Pairs) -> Tensor:
        """True for kept pairs. The first key of a tile is a multiple of 4."""
        assert pairs.copies is not None
        seed = array[pairs.copies if array.shape[0] > 1 else pairs.copies[:1] * 0, 0]
        at = pairs.indices
        counter = at["q"], at["k"][..., ::4] >> 2, at["h"], at["b"]
        words = torch.stack([*torch.broadcast_tensors(*_philox(counter, seed))], -1)  # type: ignore[no-untyped-call]
        return (words >= threshold(self.chance)).flatten(-2)[..., : at["k"].shape[-1]]


def _philox(counter: tuple[Tensor, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """The four words of a counter; integers have 64 bits, so products wrap as words of 64 do."""
    c0, c1, c2, c3 = counter
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    for number in range(ROUNDS):
        k0, k1 = ((key + number * step) & _WORD for key, step in zip(keys, WEYL, strict=True))
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            ((second >> 32) & _WORD) ^ c1 ^ k0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
    return c0, c1, c2, c3


_WORD = 2**32 - 1
