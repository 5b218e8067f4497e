"""Threads that run one function together: of an OpenMP runtime, of macOS, or of Python."""

from __future__ import annotations

import _thread
import ctypes
import functools
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from tilefold.backends.cpu import startable


@functools.lru_cache(maxsize=4096)
def function(address: int) -> Callable[[int], None]:
    """The function `void f(void *arguments)` at an address."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


class Team(ABC):
    """Threads that run one function together."""

    name: str

    native = ""
    """The line of LLVM that runs `%kernel(%block)` by `%parallel`; empty where Python is needed."""

    def entry(self, workers: int) -> tuple[int, int]:
        """The address of what `native` calls, or 0, and how many of the workers can start."""
        return 0, 1

    @abstractmethod
    def run(self, address: int, arguments: int, workers: int) -> None:
        """Run the function at an address on at most `workers` threads; return when all finished."""


class OpenMPTeam(Team):
    """The threads of an OpenMP runtime, through the entry point that GNU compilers call.

    The runtimes of LLVM and Intel have the same entry point.
    """

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.name = name
        self._parallel = library.GOMP_parallel
        self._parallel.restype = None
        self._parallel.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_uint,
            ctypes.c_uint,
        ]
        self._room = startable.Room()

    native = "call void %parallel(ptr %kernel, ptr %block, i32 %team_32, i32 0)"

    def entry(self, workers: int) -> tuple[int, int]:
        """See `Team.entry`."""
        return address_of(self._parallel), self._room.admit(workers)

    def run(self, address: int, arguments: int, workers: int) -> None:
        """See `Team.run`."""
        if workers != self._room.size:
            workers = self._room.admit(workers)
        self._parallel(address, arguments, workers, 0)


class DispatchTeam(Team):
    """Grand Central Dispatch on macOS, written from its manual and not yet run on a Mac."""

    name = "dispatch_apply_f"
    native = "call void %parallel(i64 %team, ptr null, ptr %block, ptr %kernel)"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._apply = library.dispatch_apply_f
        self._apply.restype = None
        self._apply.argtypes = [
            ctypes.c_size_t,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]

    def entry(self, workers: int) -> tuple[int, int]:
        """See `Team.entry`."""
        return address_of(self._apply), workers

    def run(self, address: int, arguments: int, workers: int) -> None:
        """See `Team.run`."""
        # A null queue lets the system choose. The function is called as f(arguments, iteration): by
        # the calling conventions of Apple's processors it may ignore the second argument.
        self._apply(workers, None, arguments, address)


def address_of(entry: Any) -> int:
    """The address of a function of a library."""
    return ctypes.cast(entry, ctypes.c_void_p).value or 0


_PATIENCE = 5.0
"""Seconds to wait for the first line of a thread, which takes about 50 us."""


class PythonTeam(Team):
    """Python threads that start when first needed and stay."""

    name = "Python threads"

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._threads = 0

    def run(self, address: int, arguments: int, workers: int) -> None:
        """See `Team.run`.

        After an interrupt (Ctrl-C) it still waits for the threads inside, since they write to
        arrays that the caller may free.
        """
        call = _Call(function(address), arguments)
        helpers = self._hire(workers - 1)
        interruption: BaseException | None = None
        while True:
            try:
                if not call.begun:
                    call.begun = True
                    for _ in range(helpers):
                        self._calls.put(call)
                    call.function(arguments)
                call.close()
                break
            except BaseException as error:
                interruption = error
        if interruption is not None:
            raise interruption

    def _hire(self, wanted: int) -> int:
        """Have `wanted` threads, or as many as the system starts; return their number."""
        with self._lock:
            while self._threads < wanted:
                if not self._start():
                    startable.warn(self._threads + 1, wanted + 1)
                    break
                self._threads += 1
            return min(wanted, self._threads)

    def _start(self) -> bool:
        """Start a thread; return whether it runs.

        A thread for which no memory is left may end before its first line, and `threading.Thread`
        would wait for that line for ever.
        """
        begun = threading.Lock()
        begun.acquire()
        try:
            _thread.start_new_thread(self._work, (begun,))
        except (RuntimeError, MemoryError):
            return False
        return begun.acquire(timeout=_PATIENCE)

    def _work(self, begun: threading.Lock) -> None:
        begun.release()
        while True:
            self._calls.get().join()


class _Call:
    """One run of a function by a team of Python threads.

    When the caller's own run of the function ends, all work has been taken by some thread. So the
    caller closes the call: threads that come later find it closed, and the caller waits only for
    threads that are inside.

    A signal handler can interrupt the caller anywhere and call in the same thread. That is another
    call, so it waits for no lock of this one.
    """

    def __init__(self, function: Callable[[int], None], arguments: int) -> None:
        self.function = function
        self.arguments = arguments
        self.begun = False
        self._lock = threading.Lock()
        self._closed = False
        self._inside = 0
        self._left = threading.Lock()  # the last thread to leave a closed call releases it
        self._left.acquire()

    def join(self) -> None:
        """Run the function too, unless the call is closed."""
        with self._lock:
            if self._closed:
                return
            self._inside += 1
        self.function(self.arguments)
        with self._lock:
            self._inside -= 1
            last = self._closed and self._inside == 0
        if last:
            self._left.release()

    def close(self) -> None:
        """Admit no more threads, and wait for the threads inside.

        If it is interrupted, it can be called again.
        """
        with self._lock:
            self._closed = True
            empty = self._inside == 0
        if not empty:
            self._left.acquire()
