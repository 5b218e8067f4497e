"""Values that are made once: a thread that needs a value which another thread is making waits.

Compiled kernels are such values. `functools.lru_cache` would make a value twice when two threads
ask at the same time, as they do when kernels are compiled ahead in the background.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future
from typing import Any, Generic, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")


class _Making(Future[Value]):
    """A value that a thread is making."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()


class SingleFlight(Generic[Value]):
    """The values of the `most` keys that were used last.

    When making a value fails, every waiting thread gets the error, and the next call tries again.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._made: OrderedDict[Hashable, _Making[Value]] = OrderedDict()
        self._lock = threading.RLock()
        _all.add(self)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value under a key; `make` makes it unless it exists or is being made already."""
        while True:
            with self._lock:
                found = self._made.get(key)
                future = self._made.setdefault(key, found or _Making())
                self._made.move_to_end(key)
                if len(self._made) > self._most:
                    self._made.popitem(last=False)
            if found is None:
                return self._make(key, future, make)
            if not found.done() and found.thread == threading.get_ident():
                return make()  # a finaliser asks while this thread makes it: waiting never ends
            try:
                return found.result()
            except CancelledError:
                continue  # the thread that made it was interrupted

    def clear(self) -> None:
        """Forget all values; a value that is being made still reaches the threads that wait."""
        with self._lock:
            self._made.clear()

    def forget_unfinished(self) -> None:
        """Start afresh in a forked child, where the threads that made values do not exist."""
        self._lock = threading.RLock()
        for key, future in [*self._made.items()]:
            if not future.done():
                del self._made[key]

    def _make(self, key: Hashable, future: _Making[Value], make: Callable[[], Value]) -> Value:
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                if self._made.get(key) is future:
                    del self._made[key]
            if isinstance(error, Exception):
                future.set_exception(error)
            else:
                future.cancel()
            raise
        future.set_result(value)
        return value


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
