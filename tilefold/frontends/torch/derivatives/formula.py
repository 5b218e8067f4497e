"""A modified score of all pairs at once, as one operation of autograd.

Its derivatives are those of the tree, as in kernels, and not those of torch's operations: what was
not chosen by `where`, and what has no weight, has no slope even where it is infinite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tilefold.frontends.torch.derivatives.modified import valued
from tilefold.frontends.torch.derivatives.sums import nested
from tilefold.masks.derivative import Derivatives, derivatives
from tilefold.masks.expression import Expression, Real, Several
from tilefold.masks.tables import Input


class Entry(NamedTuple):
    """An entry of an array: the array's number, the indices, and the derivative."""

    number: int
    at: tuple[Tensor, ...]
    slope: Tensor


@dataclass(frozen=True, eq=False)
class Formula:
    """A score F as a function of tensors: scores of pairs with some indices, and arrays.

    The indices b, h, q and k have as many axes as the scores, and broadcast to them. They are no
    tensors: these would belong to the transform of `torch.func` in which they are made.

    >>> from tilefold.masks.expression import (Index, ScoreValue)
    >>> indices = dict.fromkeys("bhqk", np.arange(2))
    >>> Formula(ScoreValue() * 2.0 + Index("k"), indices)(torch.ones(2))
    tensor([2., 3.])
    """

    score: Real
    indices: Mapping[str, NDArray[np.int64]]

    def __call__(self, s: Tensor, *arrays: Tensor) -> Tensor:
        """F of scores; arrays of its inputs are in the order of their numbers."""
        apply: Any = _Applied.apply
        found: Tensor = apply(self, s, *arrays)
        return found

    @cached_property
    def derivatives(self) -> Derivatives:
        """The derivatives of F."""
        return derivatives(self.score)

    def value(self, s: Tensor, arrays: Sequence[Tensor]) -> Tensor:
        """F, below autograd."""
        found: Tensor = self._valued(self.score, s, arrays)
        return s.clone() if found is s else found.expand_as(s)

    def slopes(self, s: Tensor, arrays: Sequence[Tensor]) -> tuple[Tensor, list[Entry]]:
        """dF/ds, and the derivatives with respect to entries of arrays."""
        every: list[Expression] = [self.derivatives.score]
        found = []
        for entry, slope in self.derivatives.entries:
            if isinstance(entry.table, Input):
                found.append((entry.table.number, len(entry.indices)))
                every += [*entry.indices, slope]
        values = iter(self._valued(Several(tuple(every)), s, arrays))
        of_score: Tensor = next(values)
        entries = [
            Entry(number, tuple([next(values) for _ in range(axes)]), next(values))
            for number, axes in found
        ]
        return of_score, entries

    def _valued(self, expression: Expression, s: Tensor, arrays: Sequence[Tensor]) -> Any:
        indices = {name: torch.tensor(x, device=s.device) for name, x in self.indices.items()}
        return valued(expression, s, indices, arrays)


class _Applied(torch.autograd.Function):
    @staticmethod
    def forward(formula: Formula, s: Tensor, *arrays: Tensor) -> Tensor:
        return formula.value(s, arrays)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.formula, *given = inputs
        ctx.save_for_backward(*given)
        ctx.save_for_forward(*given)

    @staticmethod
    def backward(ctx: Any, change: Tensor) -> Any:
        s, *arrays = ctx.saved_tensors
        slope, entries = ctx.formula.slopes(s, arrays)
        found = [x.new_zeros(x.shape, dtype=change.dtype) for x in arrays]
        for number, at, own in entries:
            found[number] = _added(found[number], at, _product(change, own))
        gradients = [x.to(array.dtype) for x, array in zip(found, arrays, strict=True)]
        return None, _product(change, slope), *gradients

    @staticmethod
    @nested
    def jvp(ctx: Any, saved: Sequence[Tensor], _: None, *tangents: Tensor | None) -> Tensor:
        s, *arrays = saved
        slope, entries = ctx.formula.slopes(s, arrays)
        total = torch.zeros_like(s) if tangents[0] is None else tangents[0] * slope
        for number, at, own in entries:
            moved = tangents[1 + number]
            if moved is not None:
                total = total + own * moved[at].to(s.dtype)
        return total

    @staticmethod
    def vmap(info: Any, in_dims: Any, formula: Formula, *given: Tensor) -> tuple[Tensor, int]:
        """Each entry by itself: only arrays that all share could be read at once."""
        found = [
            formula(
                *[
                    x if dim is None else x.select(dim, number)
                    for x, dim in zip(given, in_dims[1:], strict=True)
                ]
            )
            for number in range(info.batch_size)
        ]
        return torch.stack(found), 0


def _product(change: Tensor, slope: Tensor) -> Tensor:
    """Their product, and 0 where nothing changes, even if the slope is infinite there."""
    return torch.where(change == 0, change, change * slope)


def _added(total: Tensor, at: tuple[Tensor, ...], change: Tensor) -> Tensor:
    """`total` with changes of all pairs added to its entries at these indices."""
    if not at:
        return total + change.sum()
    shape = np.broadcast_shapes(*[tuple(index.shape) for index in at])
    every = (1,) * (change.dim() - len(shape)) + shape
    shared = [axis for axis, length in enumerate(every) if length == 1]
    summed = change.sum(shared, keepdim=True) if shared else change
    places: list[Tensor | None] = [index.expand(shape) for index in at]
    return total.index_put(places, summed.reshape(shape), accumulate=True)
