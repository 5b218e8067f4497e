"""Modified scores in operations of torch, which autograd can differentiate.

Entries of arrays are arguments of their own. So derivatives with respect to them are found within a
tile, and added to the arrays afterwards: no tile costs as much as a whole array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tilefold.masks.derivative import ONE, ZERO, derivatives
from tilefold.masks.expression import (
    AnyTable,
    Expression,
    Interpretation,
    Real,
    RealBinary,
    RealLookup,
    RealUnary,
    Several,
    evaluate,
    names,
)
from tilefold.masks.graph import ordered
from tilefold.masks.hiding import may_hide
from tilefold.masks.tables import Input, Table

Indices = Mapping[str, Tensor]
"""The indices b, h, q and k of pairs, as tensors that broadcast."""


class Modified(NamedTuple):
    """A score F of some pairs, and its derivatives: with respect to s, and to each entry.

    Without a `slope` it is 1.
    """

    value: Tensor
    slope: Tensor | None
    slopes: tuple[Tensor, ...]


class Curves(NamedTuple):
    """The second derivatives of F: rows for s and each entry, in columns of the same; None is 0."""

    rows: tuple[tuple[Tensor | None, ...], ...]

    def of_score(self, x: Tensor, entries: Sequence[Tensor | None]) -> Tensor | None:
        """The change of dF/ds where scores change by x, and entries so; None is 0."""
        return self.of_entry(-1, x, entries)

    def of_entry(self, number: int, x: Tensor, entries: Sequence[Tensor | None]) -> Tensor | None:
        """The change of the derivative with respect to an entry."""
        total: Tensor | None = None
        for change, curve in zip((x, *entries), self.rows[1 + number], strict=False):
            if change is not None and curve is not None:
                total = change * curve if total is None else total + change * curve
        return total


class Modification:
    """A score F as a function of tensors: of the scores s, and of the entries of arrays.

    `lookups` are the places where F reads an array, each an argument. `hides`: F may be -inf.
    """

    def __init__(self, score: Real) -> None:
        self._score, self.hides = score, may_hide(score)
        self.lookups = [
            node
            for node, _ in ordered(score)
            if isinstance(node, RealLookup) and isinstance(node.table, Input)
        ]

    @cached_property
    def _slopes(self) -> list[Real]:
        return self._derivatives(self._score)

    @cached_property
    def _curves(self) -> list[list[Real]]:
        return [self._derivatives(slope) for slope in self._slopes]

    def _derivatives(self, value: Real) -> list[Real]:
        """Those with respect to s, and to each entry."""
        found = derivatives(value)
        slopes = {id(entry): slope for entry, slope in found.entries}
        return [found.score, *[slopes.get(id(lookup), ZERO) for lookup in self.lookups]]

    def value(self, s: Tensor, indices: Indices, entries: Sequence[Tensor]) -> Tensor:
        """F of the scores s of pairs with these indices."""
        value: Tensor = evaluate(self._score, _Tensors(indices, s), self._known(entries))
        return value.expand_as(s)

    def both(self, s: Tensor, indices: Indices, entries: Sequence[Tensor]) -> Modified:
        """F and its derivatives."""
        found = evaluate(self._first, _Tensors(indices, s), self._known(entries))
        value, slope, *slopes = found
        own = None if self._slopes[0] is ONE else slope
        return Modified(value.expand_as(s), own, tuple(slopes))

    def curves(self, s: Tensor, indices: Indices, entries: Sequence[Tensor]) -> Curves:
        """The second derivatives of F."""
        values = iter(evaluate(self._second, _Tensors(indices, s), self._known(entries)))
        rows = [
            tuple([None if node is ZERO else next(values) for node in row]) for row in self._curves
        ]
        return Curves(tuple(rows))

    def visible(self, indices: Indices, hidden: Tensor) -> Indices:
        """Indices with those of one visible pair in place of all hidden ones.

        A hidden pair has the weight 0. But F may be NaN there, as a logarithm of the distance is,
        and 0 * NaN is NaN.
        """
        first = int(hidden.to(torch.uint8).argmin())
        place = [int(n) for n in np.unravel_index(first, tuple(hidden.shape))]
        if not self._may_be_nan or hidden[tuple(place)]:
            return indices
        own = {
            name: x[tuple([n if size > 1 else 0 for n, size in zip(place, x.shape, strict=True)])]
            for name, x in indices.items()
        }
        return {name: torch.where(hidden, own[name], x) for name, x in indices.items()}

    @cached_property
    def _may_be_nan(self) -> bool:
        """True where functions that are not finite everywhere are asked for queries and keys."""
        found = [
            node
            for node, _ in ordered(self._score)
            if (isinstance(node, RealUnary) and node.operator in ("log", "sqrt", "exp"))
            or (isinstance(node, RealBinary) and node.operator == "/")
        ]
        return any(names(node) & {"q", "k"} for node in found)

    @cached_property
    def _first(self) -> Several:
        return Several((self._score, *self._slopes))

    @cached_property
    def _second(self) -> Several:
        return Several(tuple([node for row in self._curves for node in row if node is not ZERO]))

    def _known(self, entries: Sequence[Tensor]) -> dict[int, Any]:
        return {id(node): entry for node, entry in zip(self.lookups, entries, strict=True)}


def places(lookup: RealLookup, indices: Indices) -> tuple[Tensor, ...]:
    """The places along each axis of the array of a look-up that pairs read."""
    fold = _Tensors(indices)
    return tuple([evaluate(index, fold) for index in lookup.indices])


def valued(
    expression: Expression, s: Tensor, indices: Indices, arrays: Sequence[Tensor] = ()
) -> Any:
    """The value of an expression for scores s; `arrays` are those of its inputs, by number."""
    return evaluate(expression, _Tensors(indices, s, arrays))


class _Tensors(Interpretation[Any]):
    """The value of a node is a tensor; all of them broadcast."""

    def __init__(
        self, indices: Indices, s: Tensor | None = None, arrays: Sequence[Tensor] = ()
    ) -> None:
        self._indices, self._arrays = indices, arrays
        self._device = indices["k"].device
        self._s: Any = s

    def index(self, name: str) -> Any:
        return self._indices[name]

    def constant(self, value: int) -> Any:
        return torch.tensor(value, device=self._device)

    def truth(self, value: bool) -> Any:
        return torch.tensor(value, device=self._device)

    def lookup(self, table: AnyTable, indices: tuple[Any, ...]) -> Any:
        if isinstance(table, Input):
            return self._arrays[table.number][indices].to(self._s.dtype)
        assert isinstance(table, Table)
        entries = torch.tensor(table.array, device=self._device)[indices]
        return entries if table.dtype == "bool" else entries.long()

    def unary(self, operator: str, operand: Any) -> Any:
        return operand.abs() if operator == "abs" else -operand

    def binary(self, operator: str, left: Any, right: Any) -> Any:
        return _OPERATORS[operator](left, right)

    def compare(self, operator: str, left: Any, right: Any) -> Any:
        return _COMPARE[operator](left, right)

    def logic(self, operator: str, operands: tuple[Any, ...]) -> Any:
        if operator == "~":
            return ~operands[0]
        total = operands[0]
        for operand in operands[1:]:
            total = total & operand if operator == "&" else total | operand
        return total

    def score(self) -> Any:
        return self._s

    def real(self, value: float) -> Any:
        return torch.tensor(value, dtype=self._s.dtype, device=self._device)

    def from_integer(self, operand: Any) -> Any:
        return operand.to(self._s.dtype)

    def real_unary(self, operator: str, operand: Any) -> Any:
        return -operand if operator == "-" else getattr(torch, operator)(operand)

    def real_binary(self, operator: str, left: Any, right: Any) -> Any:
        return _OPERATORS[operator](left, right)

    def where(self, truth: Any, then: Any, otherwise: Any) -> Any:
        return torch.where(truth, then, otherwise)

    def several(self, parts: tuple[Any, ...]) -> Any:
        return parts


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": torch.add,
    "-": torch.sub,
    "*": torch.mul,
    "/": torch.div,
    "//": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "%": torch.remainder,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": torch.lt,
    "<=": torch.le,
    ">": torch.gt,
    ">=": torch.ge,
    "==": torch.eq,
    "!=": torch.ne,
}
