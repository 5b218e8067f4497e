"""Work of a first call that nothing cuts in two: no fork, no signal handler, no interrupt.

A call imports what it needs when it first needs it, and Python holds a lock for each module
meanwhile. A child that is forked then inherits such a lock, and nobody releases it. A signal
handler that comes then meets half a module, and an interrupt (Ctrl-C) leaves one behind.

So these imports take one more lock, which a fork waits for. The main thread, the only one where
Python runs signal handlers, leaves them to a thread of their own.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")

LONGEST_WAIT = 60.0
"""Seconds that a fork waits for an import. Then it goes on: the import may wait for the fork."""


def imported(function: Callable[Parameters, Value]) -> Callable[Parameters, Value]:
    """Decorate a function that imports: it runs once for each list of arguments.

    >>> @imported
    ... def sine():
    ...     print("importing")
    ...     from math import sin
    ...     return sin
    >>> sine()(0.0), sine()(0.0)
    importing
    (0.0, 0.0)
    """
    values: dict[Hashable, Value] = {}

    @wraps(function)
    def found(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Value:
        key = (args, *kwargs.items())
        if key not in values:
            values[key] = _behind_gate(lambda: function(*args, **kwargs))
        return values[key]

    # Where torch.compile traces a first call, it runs the function and keeps the value.
    found._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions have attributes
    return found


def _behind_gate(work: Callable[[], Value]) -> Value:
    if _gate.owner == threading.get_ident():
        return work()
    return undisturbed(lambda: _gate.run(work))


def undisturbed(work: Callable[[], Value]) -> Value:
    """What a function returns that runs in a thread where no signal handler comes."""
    if threading.current_thread() is not threading.main_thread() or sys.is_finalizing():
        return work()
    thread = _Undisturbed(work)
    try:
        thread.start()
    except RuntimeError:  # neither the system nor a program that ends starts a thread for everybody
        return work()
    thread.join()
    if thread.error is not None:
        raise thread.error
    value: Value = thread.value
    return value


def is_awaited() -> bool:
    """True in a thread of `undisturbed`: another thread waits for it, and holds what it holds."""
    return isinstance(threading.current_thread(), _Undisturbed)


class _Undisturbed(threading.Thread):
    """A thread that runs a function, and keeps what it returns or raises."""

    value: Any
    error: BaseException | None = None

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(name="tilefold-first-use")
        self._work = work

    def run(self) -> None:
        """See `threading.Thread.run`."""
        try:
            self.value = self._work()
        except BaseException as error:
            self.error = error


class _Gate:
    """The lock that a thread holds while it imports, and that a fork waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.owner = 0

    def run(self, work: Callable[[], Value]) -> Value:
        """Run a function while this thread holds the lock."""
        with self._lock:
            self.owner = threading.get_ident()
            try:
                return work()
            finally:
                self.owner = 0

    def close(self) -> None:
        """Wait until no thread imports, and let none begin until `open`."""
        here = threading.get_ident()
        # A second time there is nothing to do, and an imported module may fork.
        if here not in (self._closed_by, self.owner) and self._lock.acquire(timeout=LONGEST_WAIT):
            self._closed_by = here

    def open(self) -> None:
        """Let threads import again."""
        if self._closed_by == threading.get_ident():
            self._closed_by = 0
            self._lock.release()

    _closed_by = 0


_gate = _Gate()


def _in_child() -> None:
    """Begin anew in a forked child, unless its one thread imports."""
    global _gate
    if _gate.owner != threading.get_ident():
        _gate = _Gate()


def forks_wait() -> None:
    """Let forks wait for imports before they wait for what was registered until now.

    A thread that imports may wait for a lock that a fork takes, too: a fork that held this lock and
    then waited for the import would wait for ever.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lambda: _gate.close(),
            after_in_parent=lambda: _gate.open(),
            after_in_child=_in_child,
        )


forks_wait()
