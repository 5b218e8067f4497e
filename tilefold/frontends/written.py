"""Requests as text that outlives the process: rules, scores and their tables in plain JSON.

Compiled graphs keep what they call as text: in caches, exports and saved models. So the text names
classes and never an address, and reading it runs no code but the constructors named here.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from tilefold.common.check import one_line, shown
from tilefold.masks import nodes, traced
from tilefold.masks.arrays import INT32, key_counts
from tilefold.masks.coordinates import Coordinates
from tilefold.masks.data_rules import Dense, Documents, Lengths, dense, documents, lengths
from tilefold.masks.parts import Part
from tilefold.masks.position_rules import Causal, Chunked, Full, Local, Prefix
from tilefold.masks.repeated import Repeated
from tilefold.masks.rule import AllOf, AnyOf, Not, Window
from tilefold.masks.symbols import Expression, Integer
from tilefold.masks.tables import DTYPES, Given, Input, Table, given_table
from tilefold.problems.request import OPTIONS, Request
from tilefold.scores.functions import FLOATS
from tilefold.scores.modifications import Alibi, Bias, Softcap, Temperature
from tilefold.scores.relative import Clipped, Grid, Relative
from tilefold.scores.score import InOrder
from tilefold.scores.traced import Traced

_PARTS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(Full, Causal, Local, Prefix, Chunked, Coordinates),
        *(Documents, Lengths, Dense),
        *(AllOf, AnyOf, Not, Window, Repeated, Part),
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


def fields_of_parts() -> dict[str, tuple[Any, tuple[str, ...]]]:
    """The classes that rules and scores are made of, and their fields, by the names in texts."""
    return {
        name: (kind, tuple([each.name for each in fields(kind)])) for name, kind in _PARTS.items()
    }


def write(request: Request) -> Any:
    """The request in values that JSON has. Raises TypeError for a class of a user's own."""
    return [written(getattr(request, name)) for name in OPTIONS]


class Holes(NamedTuple):
    """What stands for `{"number": n}` and `{"data": n}` in values that a compiler made."""

    numbers: Sequence[int] = ()
    data: Sequence[NDArray[Any]] = ()


_NONE = Holes()


def read(values: Any, holes: Holes = _NONE) -> Request:
    """The request of values that `write` made. Raises ValueError for other values.

    Values of another origin are not trusted: kernels read tables by what the values say. What
    fills a hole is checked as what a user gives.
    """
    try:
        return Request(*[_read(value, holes) for value in values])
    except (
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ValueError(f"this is no request of tilefold: {one_line(error)}") from None


def text_of(values: Any) -> str:
    """JSON in one line."""
    return json.dumps(values, separators=(",", ":"))


def written(value: Any) -> Any:
    """A value of a request in values that JSON has; see `write`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [written(part) for part in value]
    if isinstance(value, dict):
        return {name: written(part) for name, part in value.items()}
    if isinstance(value, Table):
        data = base64.b64encode(np.ascontiguousarray(value.array).tobytes()).decode()
        return {"table": [value.dtype, list(value.shape), data]}
    if isinstance(value, Given):
        return {"given": [list(value.shape), value.dtype, value.low, value.high, value.number]}
    if isinstance(value, Input):
        return {"input": [value.number, value.dtype, list(value.shape)]}
    if isinstance(value, Expression):
        name = type(value).__name__
        return {"node": [name, written(value.label), written(value.children)]}
    name = _NAMES.get(type(value), "")
    if not name:
        raise TypeError(
            f"{value!r} is of a class of its own, {type(value).__name__}, which no graph can hold;"
            " write it as tilefold.rule(function) or tilefold.score(function)"
        )
    return {name: [written(getattr(value, each.name)) for each in fields(value)]}


class _Data(NamedTuple):
    """An array that fills a hole."""

    array: NDArray[Any]


def _read(value: Any, holes: Holes) -> Any:
    if isinstance(value, list):
        return tuple([_read(part, holes) for part in value])
    if not isinstance(value, dict):
        return value
    ((name, parts),) = value.items()
    if name == "number":
        return holes.numbers[parts]
    if name == "data":
        return _Data(holes.data[parts])
    if name == "table":
        dtype, shape, data = parts
        _require(dtype in DTYPES, f"a table of {dtype}")
        return Table(np.frombuffer(base64.b64decode(data), dtype).reshape(shape))
    if name == "given":
        shape, dtype, _, _, number = parts
        _require(dtype in DTYPES and type(number) is int, f"an array of {dtype}")
        return given_table("an array", _Described(tuple(shape), dtype)).numbered(number)
    if name == "input":
        number, dtype, shape = parts
        _require(dtype in FLOATS and type(number) is int, f"an array of {dtype}")
        return Input(number, dtype, tuple(shape))
    if name == "node":
        kind, label, children = parts
        label = tuple([_table(part) for part in _read(label, holes)])
        return _checked_node(_NODES[kind].made(label, _read(children, holes)))
    every = [_read(part, holes) for part in parts]
    if any(isinstance(part, _Data) for part in every):
        given = [part.array if isinstance(part, _Data) else part for part in every]
        return _MAKERS[name](*given)
    made = _PARTS[name](*every)
    hints = _hints(type(made))
    for each in fields(made):
        value = getattr(made, each.name)
        _require(_fits(value, hints[each.name]), f"{name} with {each.name}={shown(value)}")
    _check_tables(name, made)
    return made


def _table(part: Any) -> Any:
    """The table of an array that fills a hole. Raises ValueError for integers beyond 32 bits."""
    if not isinstance(part, _Data):
        return part
    array = part.array
    if array.dtype.kind in "iu" and array.size:
        low, high = array.min(), array.max()
        if low < INT32.min or high > INT32.max:
            raise ValueError(f"integers must fit 32 bits, got numbers from {low} to {high}")
    return Table(array.astype(np.int32) if array.dtype.kind in "iu" else array)


def _ending(align: str, sync: None, grid_q: None, grid_k: None, lengths: Any) -> Coordinates:
    return Coordinates(align, sync, grid_q, grid_k, key_counts("lengths", lengths))


_MAKERS: dict[str, Any] = {
    "Documents": documents,
    "Lengths": lengths,
    "Dense": dense,
    "Coordinates": _ending,
}
"""What makes a part of arrays, and checks them."""


class _Described(NamedTuple):
    shape: tuple[int, ...]
    dtype: str


_TABLES = {
    "Documents": ("int32", (1, 2)),
    "Lengths": ("int32", (0, 1)),
    "Coordinates": ("int32", (0, 1)),
    "Dense": ("bool", (0, 1, 2, 3, 4)),
}
"""The type and the ranks of the tables of a part: a kernel reads them so."""

_OPERATORS = {
    "Unary": ("-", "abs"),
    "RealUnary": ("-", "abs", "exp", "log", "tanh", "sigmoid", "sqrt"),
    "Binary": ("+", "-", "*", "minimum", "maximum", "//", "%"),
    "RealBinary": ("+", "-", "*", "/", "minimum", "maximum"),
    "Compare": ("<", "<=", ">", ">=", "==", "!="),
    "Logic": ("&", "|", "~"),
    "Index": ("b", "h", "q", "k"),
}
"""What nodes may be labelled with."""


def _check_tables(name: str, made: Any) -> None:
    """Raises ValueError for tables that kernels would read beyond their ends."""
    if name in _TABLES:
        dtype, ranks = _TABLES[name]
        for each in fields(made):
            table = getattr(made, each.name)
            if isinstance(table, Table | Given):
                fits = table.dtype == dtype and len(table.shape) in ranks
                _require(fits, f"{name} of {table}")


_LOOKUPS = (nodes.Lookup, nodes.TruthLookup, nodes.RealLookup)


def _checked_node(node: Any) -> Any:
    """The node. Raises ValueError for one that Python's operators would not have made."""
    name: str = type(node).__name__
    first: Any = (*node.label, None)[0]
    if name in _OPERATORS:
        _require(first in _OPERATORS[name], f"{name} of {shown(first)}")
    elif name in ("Constant", "Truth", "RealConstant"):
        kinds: Any = {"Constant": int, "Truth": bool, "RealConstant": float}[name]
        _require(type(node.value) is kinds, f"{name} of {shown(first)}")
    elif isinstance(node, _LOOKUPS):
        kind: Any = Input if name == "RealLookup" else Table
        wanted = {"Lookup": "int32", "TruthLookup": "bool"}.get(name, getattr(first, "dtype", ""))
        fits = isinstance(first, kind) and first.dtype == wanted
        _require(fits and len(node.indices) == len(first.shape), f"{name} of {shown(first)}")
        _require(all(isinstance(at, Integer) for at in node.indices), f"{name} by no integers")
    if name == "Binary" and first in ("//", "%"):
        divisor = node.right
        fits = isinstance(divisor, nodes.Constant) and divisor.value > 0
        _require(fits, f"`{first}` by what is no positive constant")
    _require(not isinstance(node, nodes._Received | nodes.Several), name)
    hints = _hints(type(node))
    for each in fields(node):
        value = getattr(node, each.name)
        _require(_fits(value, hints[each.name]), f"{name} with {each.name}={shown(value)}")
    _require(not isinstance(node, Integer) or _are(Integer, node), f"{name} of real numbers")
    return node


def _hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, in its own copy of a module that was loaded twice."""
    return get_type_hints(kind, kind.__init__.__globals__)


def _are(kind: Any, node: Any) -> bool:
    return all(isinstance(child, kind) for child in node.children)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type."""
    if hint is Any:
        return True
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(parts) == 2 and parts[1] is Ellipsis:
            return all(_fits(part, parts[0]) for part in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint in (int, float, bool, str):
        return type(value) is hint or (hint is float and type(value) is int)
    return isinstance(value, hint)


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"this is no request of tilefold: it has {what}")
