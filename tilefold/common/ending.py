"""Visits of Python from threads of other libraries, and the end of the interpreter.

A compiler of another library calls Python from a thread of its own. If the interpreter ends
meanwhile, the thread never comes back, and what it holds is never given free: a lock of LLVM, for
example, for which the end then waits for ever. So the end waits for visits, and lets no more begin.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_WAIT = 60.0
"""Seconds that the end waits for visits. Then it goes on."""


class _Visits:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._number = 0
        self._over = False

    def begin(self) -> None:
        with self._changed:
            if self._over:
                raise RuntimeError("the program ends, so no call is prepared any more")
            self._number += 1

    def end(self) -> None:
        with self._changed:
            self._number -= 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._over = True
            self._changed.wait_for(lambda: not self._number, LONGEST_WAIT)


_visits = _Visits()
atexit.register(lambda: _visits.close())


def _in_child() -> None:
    """Begin anew: threads that visited are not in a forked child."""
    global _visits
    _visits = _Visits()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@contextmanager
def visit() -> Iterator[None]:
    """A visit of a thread of another library. Raises RuntimeError where the interpreter ends.

    >>> with visit():
    ...     print("inside")
    inside
    """
    visits = _visits
    visits.begin()
    try:
        yield
    finally:
        visits.end()
