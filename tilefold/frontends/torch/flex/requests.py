"""From traced functions to requests of kernels.

A request is kept by the text of what was traced, with the tables that it was made of. A call whose
tables have the same entries finds it again, planned and compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tilefold.backends.extra import NOTHING, Extra
from tilefold.common.lru import LruCache
from tilefold.frontends.torch import operators
from tilefold.frontends.torch.flex.tracing import PARAMETERS, Traced, traced
from tilefold.masks import traced as rules
from tilefold.masks.expression import AnyTable, Boolean, Expression, Rebuild, Table, evaluate
from tilefold.masks.rule import Rule
from tilefold.masks.tables import Given
from tilefold.problems.request import Request
from tilefold.scores import traced as scores

Sizes = tuple[int, int, int, int]

_requests: LruCache[tuple[Request, list[Table]]] = LruCache(most=64, most_bytes=2**28)


def request_of(found: Traced, scale: float) -> tuple[Request, Extra]:
    """The request of traced functions, and the arrays beside q, k and v."""
    request = _kept(found, scale) if found.known else _inlined(found, scale)
    if not found.inputs:
        return request, NOTHING
    names = tuple([f"input{place}" for place in range(len(found.inputs))])
    return request, Extra(names, tuple(found.inputs))


def _inlined(found: Traced, scale: float) -> Any:
    """The request in a graph that a compiler makes: its tables are inputs of the graph."""
    mask = None if found.mask is None else rules.Inlined(found.mask, PARAMETERS)
    request: Any = operators.traced_request(mask, scale, "bhnd", "highest")
    if found.score is None:
        return request
    return request.extended(scores.Traced(found.score, ("s", *PARAMETERS)), 0, 0.0)


def _kept(found: Traced, scale: float) -> Request:
    key = f"{found.mask} {found.score} {scale}"
    kept = _requests.get(key)
    tables = [*map(_entries, found.tables)]
    if kept is None or not all(map(_same, kept[1], tables)):
        held = [Table(x) for x in tables]
        kept = _requests.put(key, (_made(found, scale, held), held), sum(x.nbytes for x in tables))
    return kept[0]


def rule_of(mask_mod: Callable[..., Any], sizes: Sizes) -> Rule:
    """The rule of a function of pairs. Raises NotImplementedError for one over real numbers."""
    found = traced(None, mask_mod, sizes)
    if found.score is not None:
        raise NotImplementedError(
            "a mask_mod that compares real numbers has no blocks; it can be asked in flex_attention"
        )
    tables = [Table(_entries(x)) for x in found.tables]
    return Request(_rule(found.mask, tables)).mask


def _made(found: Traced, scale: float, tables: list[Table]) -> Request:
    score = None
    if found.score is not None:
        score = scores.Traced(_filled(found.score, tables), ("s", *PARAMETERS))
    return Request(_rule(found.mask, tables), scale, "bhnd", "highest", score)


def _rule(mask: Boolean | None, tables: list[Table]) -> Rule | None:
    return None if mask is None else rules.Traced(_filled(mask, tables), PARAMETERS)


class _Fill(Rebuild):
    """An expression with the entries of its tables."""

    def __init__(self, tables: list[Table]) -> None:
        self.tables = tables

    def lookup(self, table: AnyTable, indices: tuple[Expression, ...]) -> Expression:
        known = self.tables[table.number] if isinstance(table, Given) else table
        return super().lookup(known, indices)


def _filled(expression: Any, tables: list[Table]) -> Any:
    return evaluate(expression, _Fill(tables))


def _entries(tensor: Tensor) -> NDArray[Any]:
    """The entries of a tensor as tables have them."""
    dtype = torch.bool if tensor.dtype == torch.bool else torch.int32
    return tensor.detach().to("cpu", dtype).numpy()


def _same(table: Table, entries: NDArray[Any]) -> bool:
    return table.array is entries or np.array_equal(table.array, entries)
