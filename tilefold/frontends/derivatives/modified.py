"""Modified scores in operations of torch, which autograd can differentiate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tilefold.masks.derivative import derivatives
from tilefold.masks.expression import (
    AnyTable,
    Expression,
    Interpretation,
    Real,
    Several,
    Table,
    evaluate,
)
from tilefold.masks.tables import Input


class Modification:
    """A score F that reads no arrays, and its derivative, as functions of tensors."""

    def __init__(self, score: Real) -> None:
        self._both = Several((score, derivatives(score).score))

    def __call__(self, s: Tensor, indices: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """F and dF/ds for scores s of pairs with these indices."""
        value, slope = evaluate(self._both, _Tensors(s, indices))
        return value.expand_as(s), slope.expand_as(s)


def valued(
    expression: Expression,
    s: Tensor,
    indices: Mapping[str, Tensor],
    arrays: Sequence[Tensor] = (),
) -> Any:
    """The value of an expression for scores s; `arrays` are those of its inputs, by number."""
    return evaluate(expression, _Tensors(s, indices, arrays))


class _Tensors(Interpretation[Any]):
    """The value of a node is a tensor; all of them broadcast."""

    def __init__(
        self, s: Tensor, indices: Mapping[str, Tensor], arrays: Sequence[Tensor] = ()
    ) -> None:
        self._s, self._indices, self._arrays = s, indices, arrays

    def index(self, name: str) -> Any:
        return self._indices[name]

    def constant(self, value: int) -> Any:
        return torch.tensor(value, device=self._s.device)

    def truth(self, value: bool) -> Any:
        return torch.tensor(value, device=self._s.device)

    def lookup(self, table: AnyTable, indices: tuple[Any, ...]) -> Any:
        if isinstance(table, Input):
            return self._arrays[table.number][indices].to(self._s.dtype)
        assert isinstance(table, Table)
        entries = torch.tensor(table.array, device=self._s.device)[indices]
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
        return torch.tensor(value, dtype=self._s.dtype, device=self._s.device)

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
