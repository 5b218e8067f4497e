"""Requests whose rule and score are spelled in plain constants, for graphs of `torch.compile`.

A rule or a score that was made inside of a compiled function is no constant of the graph, but what
it is made of is. So a compiler is given the constructor of a request that takes the spelling.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tilefold.masks import nodes, symbols
from tilefold.masks.coordinates import Coordinates
from tilefold.masks.position_rules import Causal, Chunked, Full, Local, Prefix
from tilefold.masks.rule import AllOf, AnyOf, Not, Window
from tilefold.masks.tables import Input
from tilefold.problems.request import Request
from tilefold.scores.modifications import Alibi, Bias, Softcap, Temperature
from tilefold.scores.relative import Clipped, Grid, Relative
from tilefold.scores.score import InOrder
from tilefold.scores.traced import Traced

_RULES = (Full, Causal, Local, Prefix, Chunked, AllOf, AnyOf, Not, Window, Coordinates)
_SCORES = (Softcap, Alibi, Bias, Temperature, Relative, Clipped, Grid, Traced, InOrder)
_NODES = tuple(
    [
        kind
        for kind in vars(nodes).values()
        if isinstance(kind, type) and issubclass(kind, symbols.Expression)
    ]
)
_KINDS = (*_RULES, *_SCORES)
_FIELDS = tuple([tuple([field.name for field in fields(kind)]) for kind in _KINDS])
"""The fields of each class that rules over positions, and scores, are made of."""

_SPELLED, _NODE, _INPUT = "spelled", "node", "input"


class Spelled(Request):
    """The constructor of a request that is spelled in plain constants; it is never made."""

    def __new__(  # type: ignore[misc]  # no instance
        cls,
        rule: Any,
        scale: Any,
        layout: Any,
        precision: Any,
        score: Any = None,
        *rest: Any,
    ) -> Request:
        """The request of a spelled rule and score, and of other options as `Request` takes them."""
        return Request(_read(rule), scale, layout, precision, _read(score), *rest)


def _read(spelled: Any) -> Any:
    """The value of a spelling that `spelling` made."""
    if not isinstance(spelled, tuple):
        return spelled
    if spelled[:1] == (_SPELLED,):
        kind: Any = _KINDS[spelled[1]]
        return kind(*map(_read, spelled[2:]))
    if spelled[:1] == (_NODE,):
        node: Any = _NODES[spelled[1]]
        return node.made(*map(_read, spelled[2:]))
    if spelled[:1] == (_INPUT,):
        return Input(*spelled[1:])
    return tuple(map(_read, spelled))


def spelling(value: Any) -> Any:
    """Rules over positions and forms of scores as nested tuples of plain constants.

    Other values stay as they are. The first call of a program may be a compiled one. Then its rule
    was made inside the graph before the classes of rules were registered.
    """
    if isinstance(value, (tuple, list)):
        return tuple([spelling(part) for part in value])
    if isinstance(value, Input):
        return (_INPUT, value.number, value.dtype, tuple([int(size) for size in value.shape]))
    if isinstance(value, symbols.Expression):
        place = _NODES.index(type(value))
        return (_NODE, place, spelling(value.label), spelling(value.children))
    for number, kind in enumerate(_KINDS):
        if isinstance(value, kind):
            parts = [spelling(getattr(value, name)) for name in _FIELDS[number]]
            return (_SPELLED, number, *parts)
    return value
