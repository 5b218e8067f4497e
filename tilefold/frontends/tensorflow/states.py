"""The states of kernels: calls that are prepared for the shapes met so far.

They lie in memory as native code reads it, in words of 64 bits:

    state     [table of the C API, newest prepared call, `ask`, calls that run, dead,
               `native.runner()`, address of the generation]
    prepared  [next, number of words, words, record, number of results, operands, results]
    result    [type, rank, sizes, bytes]

The words of a call are the generation, then rank and sizes of each input. Python alone writes the
list, a word at a time. A call that leaves it may still be read by another thread: its memory is
kept until no other call runs.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tilefold.backends.cpu import native
from tilefold.common import generation
from tilefold.common.ending import visit
from tilefold.problems.attention import ITEM_BYTES

Shape = tuple[int, ...]

Array = tuple[Shape, str]
"""The shape and the name of the type of an array."""

ASK = ctypes.CFUNCTYPE(
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_int64),
    ctypes.c_int64,
    ctypes.c_void_p,
)
"""The type of what prepares a call: (state, context, words, their number, status) -> prepared."""

MOST = 128
"""Prepared calls of one kernel. The number is not tuned: a look-up reads the list of them."""

TYPES = {
    "float32": 1,
    "float64": 2,
    "int32": 3,
    "int64": 9,
    "bool": 10,
    "bfloat16": 14,
    "float16": 19,
}
"""TensorFlow's numbers of types."""

_BYTES = {**ITEM_BYTES, "int32": 4, "int64": 8, "bool": 1}

_HEAD, _ACTIVE, _DEAD = 1, 3, 4


class Ready(NamedTuple):
    """A call for inputs of certain shapes: the address of its record, and its results.

    The record takes the first `operands` inputs, and the results.
    """

    record: int
    results: Sequence[Array]
    operands: int
    kept: object
    """What keeps the record."""


class _Prepared:
    """A `Ready` in the memory that native code reads."""

    def __init__(self, words: tuple[int, ...], ready: Ready, following: int) -> None:
        self.words = words
        results = []
        self._kept: list[Any] = [ready.kept]
        for shape, dtype in ready.results:
            bytes_ = math.prod(shape) * _BYTES[dtype]
            results += [TYPES[dtype], len(shape), self._address(shape), bytes_]
        head = [following, len(words), self._address(words), ready.record]
        head += [len(ready.results), ready.operands]
        self.memory = (ctypes.c_int64 * (len(head) + len(results)))(*head, *results)
        self.address = ctypes.addressof(self.memory)

    def _address(self, numbers: Sequence[int]) -> int:
        array = (ctypes.c_int64 * max(1, len(numbers)))(*numbers)
        self._kept.append(array)
        return ctypes.addressof(array)


class State:
    """The state of a kernel: what it computes, and the calls that are prepared for it."""

    def __init__(self, prepare: Callable[[Sequence[Array]], Ready], table: int, ask: int) -> None:
        """A state in which `ask` prepares calls by `prepare`; `table` are functions of TF's."""
        numbers = (table, 0, ask, 0, 0, native.runner(), ctypes.addressof(generation.word))
        self.memory = (ctypes.c_int64 * len(numbers))(*numbers)
        self.address = ctypes.addressof(self.memory)
        self._prepare = prepare
        self._lock = threading.Lock()
        self._list: list[_Prepared] = []
        self._left: list[_Prepared] = []

    def renew_lock(self) -> None:
        """Make a new lock, in a forked child."""
        self._lock = threading.Lock()

    @property
    def is_dead(self) -> bool:
        """True once TensorFlow has deleted the kernel."""
        return bool(self.memory[_DEAD])

    def prepared(self, words: tuple[int, ...], dtypes: Sequence[str]) -> int:
        """The address of the call for inputs of these words, prepared if it is new."""
        with visit(), self._lock:
            for each in self._list:
                if each.words == words:
                    return each.address
            ready = self._prepare([*zip(_shapes(words), dtypes, strict=True)])
            made = _Prepared(words, ready, self.memory[_HEAD])
            self.memory[_HEAD] = made.address
            self._list.insert(0, made)
            self._shorten()
            return made.address

    def _shorten(self) -> None:
        """Take the oldest calls from the list; drop those that no other thread can be reading."""
        if len(self._list) > MOST:
            self._list[MOST - 1].memory[0] = 0
            self._left += self._list[MOST:]
            del self._list[MOST:]
        if self._left and self.memory[_ACTIVE] <= 1:  # the call that asks is one
            self._left.clear()


def _shapes(words: tuple[int, ...]) -> list[Shape]:
    """The shapes of all inputs, from the words after the generation."""
    shapes, place = [], 1
    while place < len(words):
        end = place + 1 + words[place]
        shapes.append(words[place + 1 : end])
        place = end
    return shapes
