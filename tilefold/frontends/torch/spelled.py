"""Requests as PyTorch's operators take them: a text, numbers, and tensors.

The text has the structure of rules and of a score, as `frontends.written` writes it. Whole numbers
of a rule, and its arrays, are arguments of the operator of their own. So a graph of `torch.compile`
has them as inputs: another window, or other lengths, run the same graph. The text outlives the
process, so exported programs may be saved.

`torch.compile` traces the functions here, with rules that were made inside or outside of its graph.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilefold.common.foreign_arrays import constant_of
from tilefold.common.lru import LruCache
from tilefold.frontends import written
from tilefold.frontends.torch.observed import faked
from tilefold.masks.nodes import RealConstant
from tilefold.masks.symbols import Expression
from tilefold.masks.tables import Given, Input, Table
from tilefold.masks.traced import Inlined, Traced
from tilefold.problems.request import OPTIONS, Request


class Spelled(NamedTuple):
    """A request taken apart: what `text_of` takes, the numbers and the arrays of its mask."""

    options: tuple[Any, ...]
    numbers: tuple[int, ...]
    data: tuple[Tensor, ...]

    @property
    def text(self) -> str:
        """The structure, as operators take it."""
        return text_of((len(self.data), self.options))

    def as_request(self) -> Request:
        """The request again. Raises what the constructors of its rules raise."""
        return request_of(self.text, self.numbers, self.data)

    @property
    def layout(self) -> str:
        """The order of the axes."""
        return str(self.options[2])

    @property
    def sinks(self) -> int:
        """The number of sinks of each head."""
        return int(self.options[5])

    def changed(self, sinks: int) -> Spelled:
        """With another number of sinks."""
        return self._replace(options=(*self.options[:5], sinks, *self.options[6:]))

    def extended(self, score: Any, sinks: int, dropout: float) -> Spelled:
        """With a form of a score, a number of sinks, and dropout."""
        data = [*self.data]
        form = _spelled(score, None, data)
        return Spelled((*self.options[:4], form, sinks, dropout), self.numbers, tuple(data))


def whole(request: Any) -> Any:
    """The request itself, where one frame of a program was compiled and the next one is not.

    Where tracers and modes have tensors without values, operators take what was taken apart.
    """
    if not isinstance(request, Spelled) or torch.compiler.is_compiling():
        return request
    unknown = torch._C._get_tracing_state() is not None or faked()
    return request if unknown else request.as_request()


def spelled(mask: Any, scale: Any, layout: str, precision: str) -> Spelled:
    """The request of these options."""
    numbers = [0]  # AOTInductor of PyTorch 2.13 takes no empty list of integers
    data: list[Tensor] = []
    rule = _spelled(mask, numbers, data)
    return Spelled((rule, scale, layout, precision, None, 0, 0.0), tuple(numbers), tuple(data))


@lru_cache(maxsize=16)
def spelled_request(request: Request) -> Spelled:
    """The same of a request."""
    mask, scale, layout, precision, *rest = (getattr(request, name) for name in OPTIONS)
    return spelled(mask, scale, layout, precision).extended(*rest)


def _spelled(value: Any, numbers: list[int] | None, data: list[Tensor]) -> Any:
    """A part of a request in plain constants, but for rules of a user's own.

    Its integers and arrays are added to lists; without a list of numbers they stay constants.
    """
    if value is None or isinstance(value, (str, float)):
        return value
    if isinstance(value, (bool, torch.SymBool)):  # a comparison of sizes is a symbol
        return constant_of(value)
    if isinstance(value, int):
        if numbers is None:
            return int(value)
        numbers.append(value)
        return {"number": len(numbers) - 1}
    if isinstance(value, (tuple, list)):
        return [_spelled(part, numbers, data) for part in value]
    if isinstance(value, (Table, Given)):
        tensor = torch.from_numpy(value.memory) if isinstance(value, Table) else value.held
        for number, other in enumerate(data):
            if other is tensor:
                return {"data": number}
        data.append(tensor)
        return {"data": len(data) - 1}
    if isinstance(value, Inlined):
        return {"Rule": [_spelled(value.expression, numbers, data), list(value.parameters)]}
    if isinstance(value, Input):
        return {"input": [value.number, value.dtype, [constant_of(size) for size in value.shape]]}
    if isinstance(value, RealConstant):  # compiled for each number, which the text has
        value = RealConstant(constant_of(value.value))
    if isinstance(value, Expression):
        parts = (_spelled(part, numbers, data) for part in (value.label, value.children))
        return {"node": [type(value).__name__, *parts]}
    for kind, name, names in _KINDS:
        if isinstance(value, kind):
            return {name: [_spelled(getattr(value, each), numbers, data) for each in names]}
    return value


_KINDS = tuple(
    [
        (kind, name, names)
        for name, (kind, names) in written.fields_of_parts().items()
        if kind is not Traced
    ]
)
"""The classes that rules and scores are made of, their names in texts, and their fields."""


def text_of(structure: tuple[int, tuple[Any, ...]]) -> str:
    """The text of a structure: the number of arrays of the mask, and the options."""
    count, options = structure
    return written.text_of([count, written.written(options)])


text_of._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a graph has the text


class Options(NamedTuple):
    """What is known of a request without its numbers and arrays."""

    data: int
    layout: str
    sinks: int
    dropout: float


@lru_cache(maxsize=64)
def options_of(text: str) -> Options:
    """What a text says by itself. Raises ValueError for another text."""
    count, values = _parsed(text)
    return Options(count, values[2], values[5], values[6])


def request_of(text: str, numbers: Sequence[int], data: Sequence[Tensor]) -> Request:
    """The request of an operator's arguments; the arrays are read, wherever they lie.

    Raises what the constructors of its rules raise, and ValueError for another text.
    """
    if not data:
        return _plain(text, tuple(numbers))
    arrays = [x.detach().cpu().numpy() for x in data]
    key = text, (*numbers,), *[(x.dtype.str, x.shape, x.tobytes()) for x in arrays]
    found = _kept.get(key)
    if found is None:
        made = written.read(_parsed(text)[1], written.Holes(tuple(numbers), arrays))
        found = _kept.put(key, made, 2 * sum(x.nbytes for x in arrays))
    return found


@lru_cache(maxsize=64)
def _plain(text: str, numbers: tuple[int, ...]) -> Request:
    return written.read(_parsed(text)[1], written.Holes(numbers))


@lru_cache(maxsize=64)
def _parsed(text: str) -> tuple[int, Any]:
    try:
        count, values = json.loads(text)
        if (
            type(count) is int
            and count >= 0
            and type(values) is list
            and len(values) == len(OPTIONS)
        ):
            return count, values
    except (ValueError, TypeError, RecursionError):
        pass
    raise ValueError("this is no text of a request of tilefold")


_kept: LruCache[Request] = LruCache(most=32, most_bytes=64 * 2**20)
"""The newest requests with arrays: all layers of a model have the same, forward and backward."""
