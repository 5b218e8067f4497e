"""Functions of one tile, a block of queries and a block of keys, and how they are differentiated.

A function takes rows of the queries (rows, width) and rows of the keys, for some heads at once, and
gives what the tile adds to sums over all keys of a query ("q") or over all queries of a key ("k").
What pairs read of the arrays of a score are arguments too, and their gradients are results. So the
derivative of such a sum is the sum of the tile's derivative. `Pulled` and `Pushed` make it of any
function.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilefold.frontends.torch.derivatives.arguments import OfPairs
from tilefold.frontends.torch.derivatives.walk import Pairs

Kind = str | OfPairs
"""Rows of queries ("q") or of keys ("k"), or what pairs read."""

Kinds = tuple[Kind, ...]
Flags = tuple[bool, ...]


class Tile(ABC):
    """A function of one tile, with the kinds of its arguments and of its results.

    `indexed`: it asks for the indices of pairs, as a modified score does.
    """

    @property
    @abstractmethod
    def given(self) -> Kinds:
        """The kinds of the arguments."""

    @property
    @abstractmethod
    def made(self) -> Kinds:
        """The kinds of the results."""

    @property
    @abstractmethod
    def indexed(self) -> bool:
        """True where the function asks for the indices of pairs."""

    @abstractmethod
    def widths(self, given: Sequence[int]) -> list[int]:
        """The widths of the results that are rows, from those of the arguments; others are 0."""

    @abstractmethod
    def run(self, given: Sequence[Tensor], pairs: Pairs) -> list[Tensor]:
        """The results: rows are (heads, rows, width), others as the argument of their kind."""

    def pulled(self, slopes: Flags, wanted: Flags) -> Tile:
        """The gradients with respect to the wanted arguments, from those of some results."""
        return Pulled(self, slopes, wanted)

    def pushed(self, moved: Flags) -> Tile:
        """The derivatives of all results, from those of the arguments that move."""
        return Pushed(self, moved)


@dataclass(frozen=True)
class Pulled(Tile):
    """The gradients of a function of a tile, by torch's autograd within the tile."""

    inner: Tile
    slopes: Flags
    wanted: Flags

    @property
    def indexed(self) -> bool:
        """As the function does."""
        return self.inner.indexed

    @property
    def given(self) -> Kinds:
        """The arguments of the function, and the gradients of some of its results."""
        return self.inner.given + chosen(self.inner.made, self.slopes)

    @property
    def made(self) -> Kinds:
        """The wanted arguments."""
        return chosen(self.inner.given, self.wanted)

    def widths(self, given: Sequence[int]) -> list[int]:
        """Those of the wanted arguments."""
        return [*chosen(given[: len(self.wanted)], self.wanted)]

    def run(self, given: Sequence[Tensor], pairs: Pairs) -> list[Tensor]:
        """The gradients; they can be differentiated if an argument asks for it."""
        again = torch.is_grad_enabled() and any(x.requires_grad for x in given)
        count = len(self.wanted)
        with torch.enable_grad():
            inner = [
                x.view_as(x) if x.requires_grad else x.detach().requires_grad_(wanted)
                for x, wanted in zip(given[:count], self.wanted, strict=True)
            ]
            made = chosen(self.inner.run(inner, pairs), self.slopes)
            return [
                *torch.autograd.grad(
                    made,
                    chosen(inner, self.wanted),
                    given[count:],
                    create_graph=again,
                    materialize_grads=True,
                )
            ]


@dataclass(frozen=True)
class Pushed(Tile):
    """The derivatives of a function of a tile along a direction.

    They are the gradient of the gradient: (J^T u) . t is linear in u, and its gradient is J t.
    """

    inner: Tile
    moved: Flags

    @property
    def indexed(self) -> bool:
        """As the function does."""
        return self.inner.indexed

    @property
    def given(self) -> Kinds:
        """The arguments of the function, and the directions of those that move."""
        return self.inner.given + chosen(self.inner.given, self.moved)

    @property
    def made(self) -> Kinds:
        """The results of the function."""
        return self.inner.made

    def widths(self, given: Sequence[int]) -> list[int]:
        """Those of the function."""
        return self.inner.widths(given[: len(self.moved)])

    def run(self, given: Sequence[Tensor], pairs: Pairs) -> list[Tensor]:
        """The derivatives; they can be differentiated if an argument asks for it."""
        count = len(self.moved)
        again = torch.is_grad_enabled() and any(x.requires_grad for x in given)
        slopes = tuple([True] * len(self.inner.made))
        with torch.enable_grad():
            made = self.inner.run(given[:count], pairs)
            dummies = [torch.zeros_like(x, requires_grad=True) for x in made]
            pulled = Pulled(self.inner, slopes, self.moved).run([*given[:count], *dummies], pairs)
            return [
                *torch.autograd.grad(
                    pulled, dummies, given[count:], create_graph=again, materialize_grads=True
                )
            ]


def chosen(values: Sequence[Any], flags: Flags) -> tuple[Any, ...]:
    """The values whose flag is set."""
    return tuple([value for value, flag in zip(values, flags, strict=True) if flag])
