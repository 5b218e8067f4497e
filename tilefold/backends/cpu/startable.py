"""How many threads can start: tried, since no single limit says it.

An OpenMP runtime ends the process when it cannot start a thread. Limits of processes, of a control
group and of the address space, and other processes of the same user, all count. So before a team
grows, as many threads are started as it needs, and one to spare, and ended again. Where fewer
start, the team is smaller.
"""

from __future__ import annotations

import _thread
import sys
import threading
import time
import warnings
from pathlib import Path
from types import ModuleType

from tilefold.common.first_use import imported
from tilefold.common.settings import MAX_THREADS

RETRY_SECONDS = 1.0
"""After fewer threads started, so much later it is tried again."""

_PATIENCE = 1.0
"""Seconds to wait for the end of threads, which takes about 30 us each."""

_warned = False


class Room(threading.local):
    """The room for the team of one calling thread. Runtimes keep a team for each such thread.

    `size` is the number of threads of its last run. The runtime ends those beyond it.
    """

    size = 1

    def __init__(self) -> None:
        self._tried = 1
        self._limits: tuple[object, ...] = ()
        self._most, self._retry = MAX_THREADS, 0.0

    def admit(self, workers: int) -> int:
        """The number of threads for the next run, at most `workers`: all of them can start."""
        limits = _limits()
        if limits != self._limits or time.monotonic() >= self._retry:
            self._most = MAX_THREADS
        if limits != self._limits:
            self._limits, self._tried = limits, self.size
        admitted = min(workers, self._most)
        if admitted > max(self.size, self._tried):
            spare = startable(admitted - self.size + 1) - 1
            self._tried = admitted = min(admitted, self.size + max(spare, 0))
            if admitted < workers:
                self._most, self._retry = admitted, time.monotonic() + RETRY_SECONDS
                warn(admitted, workers)
        self.size = admitted
        return admitted


def startable(wanted: int) -> int:
    """Start threads, `wanted` at once, and end them; return how many started."""
    if sys.is_finalizing():
        return wanted  # no thread of Python can run any more
    gate, ids, started = threading.Lock(), list[int](), 0

    def wait() -> None:
        with gate:
            ids.append(threading.get_native_id())

    with gate:
        while started < wanted:
            try:
                _thread.start_new_thread(wait, ())
            except (RuntimeError, MemoryError):
                break
            started += 1
    end = time.monotonic() + _PATIENCE
    # The system counts a thread until it has left this folder, a little later than its last line.
    while time.monotonic() < end and (
        len(ids) < started or any(Path(f"/proc/self/task/{id}").exists() for id in ids)
    ):
        time.sleep(1e-4)
    return started


def warn(started: int, wanted: int) -> None:
    """Say once in a process that calls use fewer threads than they may."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"only {started} of {wanted} threads can start here, by a limit of processes or memory:"
            f" calls use {started}",
            RuntimeWarning,
            stacklevel=2,
        )


@imported
def _resource() -> ModuleType | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource


def _limits() -> tuple[object, ...]:
    """The limits of this process: threads were tried under them."""
    resource = _resource()
    if resource is None:
        return ()
    names = "RLIMIT_NPROC", "RLIMIT_AS"
    return tuple(resource.getrlimit(getattr(resource, name)) for name in names)
