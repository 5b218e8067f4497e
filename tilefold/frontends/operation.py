"""What a graph of another framework computes: a pass of attention and its request, as text.

A graph names an operation by its text, and describes arrays by shape and type. From both follow the
results, and a call without Python: see `backends.cpu.native`.

A rule that holds traced arrays is no part of a request. It travels as a `Holding` from the making
of a request to the call, where its arrays become operands.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tilefold.backends import calls, extra
from tilefold.backends.arrays import described
from tilefold.backends.arrays.described import Described
from tilefold.backends.cpu.native import NativeCall, filled_by_python, filled_call, native_call
from tilefold.backends.extra import Extra
from tilefold.backends.protocols import BACKWARD, FORWARD, Pass
from tilefold.backends.registry import machine
from tilefold.common import generation
from tilefold.common.check import shown
from tilefold.common.computed import computed
from tilefold.common.lru import LruCache
from tilefold.frontends import written
from tilefold.masks.given import form_of, operands_of, renamed
from tilefold.masks.tables import Given, Input
from tilefold.problems.attention import ITEM_BYTES, Shape
from tilefold.problems.request import Request, as_rule
from tilefold.scores.score import Score

_PASSES = {FORWARD.operation: FORWARD, BACKWARD.operation: BACKWARD}
_VERSION = 1

Array = Any
Descriptions = Sequence[tuple[Shape, str]]


@dataclass(frozen=True)
class Operation:
    """A pass of attention with its request.

    >>> from tilefold import causal
    >>> operation = Operation(FORWARD, Request(causal()))
    >>> Operation.read(operation.text) == operation
    True
    >>> operation.results([((1, 2, 5, 8), "float16")] * 3)
    (((1, 2, 5, 8), 'float16'), ((1, 2, 5), 'float32'))
    """

    wanted: Pass
    request: Request

    @computed
    def text(self) -> str:
        """The operation in one line of JSON. Raises TypeError for rules that no text can hold."""
        wanted = self.wanted
        values = {
            "tilefold": _VERSION,
            "operation": wanted.operation,
            "given": wanted.given,
            "results": wanted.results,
            "request": written.write(self.request),
        }
        return written.text_of(values)

    @staticmethod
    def read(text: str) -> Operation:
        """The operation of a text. Raises ValueError for a text that `text` did not make."""
        return _read(text)

    def check(self) -> None:
        """Raises ValueError unless the operands are those that the request reads and writes."""
        wanted, request, usual = self.wanted, self.request, _PASSES[self.wanted.operation]
        forward = usual is FORWARD
        low, last = (
            (name,) if name in wanted.given and not forward else () for name in ("lse_low", "dlse")
        )
        count = len(wanted.given) - len((*usual.given, *low, *last))
        names = extra.names_of(request, count)
        further = ("lse_low", "max") if forward else Extra(names, ()).gradients
        read = sum(name.startswith("input") for name in names)
        inputs = () if request.score is None else request.score.inputs
        fits = (
            wanted.given == (*usual.given, *low, *names, *last)
            and wanted.results == (*usual.results, *[x for x in further if x in wanted.results])
            and {given.number for given in inputs} == {*range(read)}
        )
        if not fits:
            raise ValueError("the operands of the operation are not those of its request")

    def results(self, given: Descriptions) -> tuple[tuple[Shape, str], ...]:
        """The shapes and types of the results of arrays, given by shape and name of the type.

        Raises TypeError or ValueError as `tilefold.attention` does.
        """
        request = self._fitted(given)
        arrays = _described(given)
        return calls.described(machine("cpu"), self.wanted, request, described, arrays).results

    def native(self, given: Descriptions) -> NativeCall:
        """The call of contiguous arrays as a record: see `native.runner`.

        Calls are kept, so the same arguments may give the same record.
        """
        return _native(self, tuple([(tuple(shape), dtype) for shape, dtype in given]))

    def _fitted(self, given: Descriptions) -> Request:
        """The request with the sizes of extra arrays: a graph need not know them."""
        shapes = dict(zip(self.wanted.given, [tuple(shape) for shape, _ in given], strict=True))
        types = dict(zip(self.wanted.given, [dtype for _, dtype in given], strict=True))
        request = self.request

        def table(old: Given) -> Given:
            shape = shapes[old.name]
            if len(shape) != len(old.shape):
                raise ValueError(f"an array of mask must have {len(old.shape)} axes, got {shape}")
            return Given(shape, old.dtype, old.low, old.high, old.number)

        def entry(old: Input) -> Input:
            return Input(old.number, old.dtype, shapes[old.name])

        for number, (dtype, fixed) in operands_of(request.mask).items():
            now = types[f"data{number}"], shapes[f"data{number}"]
            if now[0] != dtype or fixed not in (None, now[1]):
                wanted = f"of {dtype}" + (f" and of shape {fixed}" if fixed else "")
                raise ValueError(f"array {number} of mask must be {wanted}, got {now}")
        if "data0" in shapes:
            request = request.changed(mask=renamed(request.mask, table))
        if "input0" in shapes and request.score is not None:
            request = request.changed(score=request.score.renamed(entry))
        return request


_KEPT_TEXT = 2**14
"""Longer texts hold tables. They are read anew, since a cache of them would hold much memory."""


def _read(text: str) -> Operation:
    return _read_kept(text) if len(text) <= _KEPT_TEXT else _read_anew(text)


def _read_anew(text: str) -> Operation:
    try:
        values = json.loads(text)
        version, operation = values["tilefold"], _PASSES[values["operation"]]
        given, results = tuple(values["given"]), tuple(values["results"])
        request = values["request"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(_NO_TEXT) from None
    if version != _VERSION:
        raise ValueError(
            f"the operation was written by another version of tilefold, in format {shown(version)};"
            f" this one reads format {_VERSION}"
        )
    first, made = len(operation.given), len(operation.results)
    if given[:first] != operation.given or results[:made] != operation.results:
        raise ValueError(_NO_TEXT)
    found = Operation(operation.plus(given[first:], results[made:]), written.read(request))
    found.check()
    return found


_read_kept = lru_cache(maxsize=256)(_read_anew)
_NO_TEXT = "this is no text of an operation of tilefold"

_kept: LruCache[NativeCall] = LruCache(most=128, most_bytes=64 * 2**20)


def _native(operation: Operation, given: tuple[tuple[Shape, str], ...]) -> NativeCall:
    key = operation, given, generation.number
    found = _kept.get(key)
    return found or _kept.put(key, *_new(operation, given))


def _new(operation: Operation, given: tuple[tuple[Shape, str], ...]) -> tuple[NativeCall, int]:
    """A call, and the bytes of its plan's data."""
    request, arrays = operation._fitted(given), _described(given)
    call = calls.find(machine("cpu"), described, operation.wanted, arrays, request)
    results = [Described(*result) for result in call.results]
    every = [*arrays, *results]
    if call.prepared is not None:
        made = native_call(call.prepared, len(every))  # type: ignore[arg-type]  # of a processor
        return made, call.prepared.data_bytes
    if not request.sinks:
        made = filled_call(
            [
                (place, prod(array.shape), ITEM_BYTES[array.dtype], _bits(name, array.dtype))
                for place, name, array in zip(
                    range(len(arrays), len(every)), operation.wanted.results, results, strict=True
                )
            ]
        )
        return made, 0

    def fill(addresses: Sequence[int]) -> None:
        views = [_view(*pair) for pair in zip(addresses, every, strict=True)]
        calls.fill(call, tuple(views[: len(arrays)]), tuple(views[len(arrays) :]))

    return filled_by_python(fill, len(every)), 0


def _bits(name: str, dtype: str) -> int:
    """The bits of what fills a result where no query meets a key: 0 or -inf."""
    if name not in calls.EMPTY:
        return 0
    kind = np.dtype(dtype)
    return int(np.array([calls.EMPTY[name]], kind).view(f"i{kind.itemsize}")[0])


def _view(address: int, array: Described) -> Any:
    """Memory at an address as an array of NumPy; of bfloat16 as whole numbers."""
    dtype = np.dtype("uint16" if array.dtype == "bfloat16" else array.dtype)
    count = int(np.prod(array.shape, dtype=np.int64))
    if not count:
        return np.empty(array.shape, dtype)
    memory = (ctypes.c_ubyte * (count * dtype.itemsize)).from_address(address)
    return np.ctypeslib.as_array(memory).view(dtype).reshape(array.shape)


def _described(given: Descriptions) -> tuple[Described, ...]:
    return tuple([Described(tuple(shape), dtype) for shape, dtype in given])


class Holding(NamedTuple):
    """A request, and the arrays of its mask, which a framework traces."""

    request: Request
    data: tuple[Array, ...]


def request_of(mask: Any, scale: Any, layout: Any, precision: Any) -> Request | Holding:
    """The request of a call: `request_of` of frontends that trace arrays."""
    rule, data = form_of(as_rule(mask))
    request = Request(rule, scale, layout, precision)
    return Holding(request, data) if data else request


def extended_request(
    request: Request | Holding, score: Score | None, sinks: int, dropout: float
) -> tuple[Request | Holding, tuple[Array, ...]]:
    """The request with a score, sinks and dropout; the score's arrays: see `backends.extra`."""
    plain, data = _apart(request)
    changed, arrays = extra.extended_request(plain, score, sinks, dropout)
    return Holding(changed, data) if data else changed, arrays


def taken(request: Request | Holding, more: Extra) -> tuple[Request, Extra]:
    """The request, and all extra arrays: those of the mask come first."""
    plain, data = _apart(request)
    names = tuple([f"data{number}" for number in range(len(data))])
    return plain, Extra(names + more.names, data + more.arrays)


def _apart(request: Request | Holding) -> tuple[Request, tuple[Array, ...]]:
    return (request.request, request.data) if isinstance(request, Holding) else (request, ())
