"""From functions of scalar tensors to a rule, a score, and the tensors that they read.

The functions are called in every call, with symbols, so nothing that they read can become stale.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode

from tilefold.frontends.torch.flex.entries import number, read
from tilefold.frontends.torch.flex.functions import applied
from tilefold.frontends.torch.flex.symbols import Symbol, Tracing
from tilefold.masks.expression import (
    Boolean,
    Expression,
    Index,
    Logic,
    Real,
    RealConstant,
    ScoreValue,
    Where,
    as_real,
)

PARAMETERS = ("b", "h", "q", "k")

Symbol.applied = staticmethod(applied)


class Traced(NamedTuple):
    """A truth and a score, None where they change nothing, and the tensors of their tables.

    `known` tells whether the tensors have values.
    """

    mask: Boolean | None
    score: Real | None
    tables: list[Tensor]
    inputs: list[Tensor]
    known: bool


_INDEXING = Tensor.__getitem__, operator.getitem
"""`tensor[index]`, as PyTorch calls it, and as its compiler does where `torch.export` is strict."""


class _Reading(TorchFunctionMode):
    """Symbols as indices of tensors, which PyTorch would ask for a value."""

    def __torch_function__(
        self, function: Any, types: Any, given: Any = (), options: Any = None
    ) -> Any:
        if function in _INDEXING:
            indices = given[1] if isinstance(given[1], tuple) else (given[1],)
            if any(isinstance(index, Symbol) for index in indices):
                return read(*given)
        return function(*given, **(options or {}))


def traced(
    score_mod: Callable[..., Any] | None,
    mask_mod: Callable[..., Any] | None,
    sizes: tuple[int, int, int, int],
) -> Traced:
    """What functions of FlexAttention say of pairs; `sizes` are batch, heads, queries and keys.

    Raises NotImplementedError for operations that the language of kernels has not.
    """
    tracing = Tracing()
    indices = [_index(tracing, *each) for each in zip(PARAMETERS, sizes, strict=True)]
    seen = scored = None
    with _Reading():
        if mask_mod is not None:
            seen = _scalar(tracing, "mask_mod", mask_mod(*indices))
        if score_mod is not None:
            s = Symbol(tracing, "real", ScoreValue)
            scored = _scalar(tracing, "score_mod", score_mod(s, *indices))
    if seen is not None and seen.kind != "bool":
        raise TypeError("flex_attention: mask_mod must return a truth, got a number")
    if scored is not None and scored.kind == "bool":
        raise TypeError("flex_attention: score_mod must return a number, got a truth")
    truths = [] if seen is None else _parts(seen.node)
    score: Real = ScoreValue() if scored is None else as_real(scored.node)
    truths, score = _parted(truths, score)
    mask = None if not truths else truths[0] if len(truths) == 1 else Logic("&", tuple(truths))
    changed = None if isinstance(score, ScoreValue) else score
    return Traced(mask, changed, tracing.tables, tracing.inputs, tracing.known)


def _index(tracing: Tracing, name: str, size: int) -> Symbol:
    return Symbol(tracing, "int", lambda: Index(name), (0, max(size - 1, 0)))


def _scalar(tracing: Tracing, name: str, value: Any) -> Symbol:
    """What a function returned, as a symbol."""
    if value is None:
        raise TypeError(f"flex_attention: {name} returned None; is `return` missing?")
    if not isinstance(value, (Symbol, Tensor, bool, int, float)):
        raise TypeError(
            f"flex_attention: {name} must return a scalar tensor, got {type(value).__name__}"
        )
    return number(tracing, value)


def _parts(truth: Boolean) -> list[Boolean]:
    """The truths that are joined by `&`."""
    if isinstance(truth, Logic) and truth.operator == "&":
        return [part for operand in truth.operands for part in _parts(operand)]
    return [truth]


def _parted(truths: list[Boolean], score: Real) -> tuple[list[Boolean], Real]:
    """The truths over integers, which tiles are skipped for, and a score that hides the rest."""
    while isinstance(score, Where):
        if _is_hidden(score.otherwise) and not is_real(score.truth):
            truths, score = [*truths, score.truth], score.then
        elif _is_hidden(score.then) and not is_real(score.truth):
            truths, score = [*truths, ~score.truth], score.otherwise
        else:
            break
    for truth in truths:
        if is_real(truth):
            score = Where(truth, score, RealConstant(-math.inf))
    return [truth for truth in truths if not is_real(truth)], score


def _is_hidden(node: Real) -> bool:
    return isinstance(node, RealConstant) and node.value == -math.inf


def is_real(node: Expression) -> bool:
    """True for an expression that computes with real numbers."""
    return isinstance(node, Real) or any(is_real(child) for child in node.children)
