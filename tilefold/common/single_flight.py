"""Values that are made once: a thread that needs a value which another thread is making waits.

Compiled kernels are such values. `functools.lru_cache` would make a value twice when two threads
ask at the same time, as they do when kernels are compiled ahead in the background.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, ParamSpec, TypeVar

from tilefold.common.first_use import is_awaited
from tilefold.common.lru import LruCache

Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")


class _Slot(Generic[Value]):
    """The place of one value. Who makes it holds the lock, who waits for it waits for the lock.

    Python's own locks in `with` statements stay held after no interrupt (Ctrl-C), wherever it
    arrives. Conditions, events and futures, which are written in Python, may.
    """

    __slots__ = ("error", "lock", "made", "thread", "value")
    value: Value
    error: Exception

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made = False
        self.thread = 0


class _Making(threading.local):
    """The number of values that this thread is making: one inside another."""

    depth = 0


_making = _Making()


PATIENCE = 5.0
"""Seconds that a thread waits for another one while it makes a value itself."""


class SingleFlight(Generic[Value]):
    """The values of the `most` keys that were used last.

    When making a value fails, every waiting thread gets the error, and the next call tries again.

    A signal handler or a finaliser can interrupt a thread amid the making of a value, and ask for
    the same value, or for one that another thread makes and cannot finish before this thread goes
    on. So a thread that makes a value never waits for itself, and not for ever for another thread:
    then it makes the value a second time.
    """

    def __init__(self, most: int) -> None:
        self._slots: LruCache[_Slot[Value]] = LruCache(most, most_bytes=0)
        _all.add(self)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value under a key; `make` makes it unless it exists or is being made already."""
        slot = self._slots.get(key) or self._slots.setdefault(key, _Slot(), size=0)
        if slot.made:
            return slot.value
        if (_making.depth or is_awaited()) and _held(slot):
            return make()
        with slot.lock:
            if slot.made:
                return slot.value
            if hasattr(slot, "error"):  # it failed while this thread waited
                raise slot.error
            return self._make(key, slot, make)

    def clear(self) -> None:
        """Forget all values; a value that is being made still reaches the threads that wait."""
        self._slots.clear()

    def forget_unfinished(self) -> None:
        """Start afresh in a forked child, where the threads that made values do not exist."""
        keys = self._slots.keys()
        for key in keys:
            slot = self._slots.get(key)
            if slot is not None and not slot.made:
                self._slots.discard(key, slot)

    def _make(self, key: Hashable, slot: _Slot[Value], make: Callable[[], Value]) -> Value:
        slot.thread = threading.get_ident()
        _making.depth += 1
        try:
            slot.value = make()
        except Exception as error:  # after an interrupt, the next thread that waits makes the value
            slot.error = error
            self._slots.discard(key, slot)
            raise
        finally:
            _making.depth -= 1
            slot.thread = 0
        slot.made = True
        return slot.value


def _held(slot: _Slot[Any]) -> bool:
    """True if this thread makes the value, or another one does for as long as patience lasts."""
    end = time.monotonic() + PATIENCE
    while slot.lock.locked():
        if slot.thread == threading.get_ident() or time.monotonic() > end:
            return True
        time.sleep(0.001)
    return False


_all: weakref.WeakSet[SingleFlight[Any]] = weakref.WeakSet()


def _after_fork() -> None:
    for once in _all:
        once.forget_unfinished()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Function(Generic[Parameters, Value]):
    """A function whose values are made once and kept under its hashable arguments."""

    def __init__(self, function: Callable[Parameters, Value], most: int) -> None:
        self.__wrapped__ = function
        self._values: SingleFlight[Value] = SingleFlight(most)
        self.__doc__ = function.__doc__

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Value:
        """The value for these arguments."""
        key = (args, *kwargs.items())
        return self._values.get(key, lambda: self.__wrapped__(*args, **kwargs))

    def cache_clear(self) -> None:
        """Forget all values."""
        self._values.clear()


def once(
    most: int,
) -> Callable[[Callable[Parameters, Value]], Function[Parameters, Value]]:
    """Decorate a function: each value is made once, and the last `most` used ones are kept.

    >>> @once(most=2)
    ... def square(x: int) -> int:
    ...     print("making", x)
    ...     return x * x
    >>> square(3), square(3)
    making 3
    (9, 9)
    """
    return lambda function: Function(function, most)
