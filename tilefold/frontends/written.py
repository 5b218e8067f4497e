"""Requests as text that outlives the process: rules, scores and their tables in plain JSON.

Compiled graphs keep what they call as text: in caches, exports and saved models. So the text names
classes and never an address, and reading it runs no code but the constructors named here.
"""

from __future__ import annotations

import base64
import json
from dataclasses import fields
from typing import Any

import numpy as np

from tilefold.masks import nodes, traced
from tilefold.masks.coordinates import Coordinates
from tilefold.masks.data_rules import Dense, Documents, Lengths
from tilefold.masks.position_rules import Causal, Chunked, Full, Local, Prefix
from tilefold.masks.repeated import Repeated
from tilefold.masks.rule import AllOf, AnyOf, Not, Window
from tilefold.masks.symbols import Expression
from tilefold.masks.tables import DTYPES, Given, Input, Table
from tilefold.problems.request import OPTIONS, Request
from tilefold.scores.modifications import Alibi, Bias, Softcap, Temperature
from tilefold.scores.relative import Clipped, Grid, Relative
from tilefold.scores.score import InOrder
from tilefold.scores.traced import Traced

_PARTS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(Full, Causal, Local, Prefix, Chunked, Coordinates),
        *(Documents, Lengths, Dense),
        *(AllOf, AnyOf, Not, Window, Repeated),
        *(Softcap, Alibi, Bias, Temperature, Relative, Clipped, Grid, Traced, InOrder),
    )
} | {"Rule": traced.Traced}
"""What is made of its fields, by the names in texts."""

_NODES: dict[str, Any] = {
    name: kind
    for name, kind in vars(nodes).items()
    if isinstance(kind, type) and issubclass(kind, Expression) and not name.startswith("_")
}

_NAMES = {kind: name for name, kind in _PARTS.items()}


def write(request: Request) -> Any:
    """The request in values that JSON has. Raises TypeError for a class of a user's own."""
    return [_written(getattr(request, name)) for name in OPTIONS]


def read(values: Any) -> Request:
    """The request of values that `write` made. Raises ValueError for other values."""
    try:
        return Request(*map(_read, values))
    except (TypeError, KeyError, IndexError, AttributeError, AssertionError) as error:
        raise ValueError(f"this is no request of tilefold: {error}") from None


def text_of(values: Any) -> str:
    """JSON in one line."""
    return json.dumps(values, separators=(",", ":"))


def _written(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_written(part) for part in value]
    if isinstance(value, Table):
        data = base64.b64encode(np.ascontiguousarray(value.array).tobytes()).decode()
        return {"table": [value.dtype, list(value.shape), data]}
    if isinstance(value, Given):
        return {"given": [list(value.shape), value.dtype, value.low, value.high, value.number]}
    if isinstance(value, Input):
        return {"input": [value.number, value.dtype, list(value.shape)]}
    if isinstance(value, Expression):
        name = type(value).__name__
        return {"node": [name, _written(value.label), _written(value.children)]}
    name = _NAMES.get(type(value), "")
    if not name:
        raise TypeError(
            f"{value!r} is of a class of its own, {type(value).__name__}, which no graph can hold;"
            " write it as tilefold.rule(function) or tilefold.score(function)"
        )
    return {name: [_written(getattr(value, each.name)) for each in fields(value)]}


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return tuple([_read(part) for part in value])
    if not isinstance(value, dict):
        return value
    ((name, parts),) = value.items()
    if name == "table":
        dtype, shape, data = parts
        if dtype not in DTYPES:
            raise ValueError(f"a table must be of {' or '.join(DTYPES)}, got {dtype}")
        return Table(np.frombuffer(base64.b64decode(data), dtype).reshape(shape))
    if name == "given":
        shape, *rest = parts
        return Given(tuple(shape), *rest)
    if name == "input":
        number, dtype, shape = parts
        return Input(number, dtype, tuple(shape))
    if name == "node":
        kind, label, children = parts
        return _NODES[kind].made(_read(label), _read(children))
    return _PARTS[name](*map(_read, parts))
