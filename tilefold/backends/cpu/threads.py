"""Run one kernel on several threads at once.

An OpenMP runtime is the fastest team to hire (a few microseconds per call), and one that is already
in the process, torch's above all, is shared: two runtimes would keep two teams spinning on the same
cores. Otherwise the system's libgomp is loaded; macOS has `dispatch_apply_f`; Python threads come
last. Kernels pull their work from a counter in their arguments, so a team of fewer threads than
asked for still finishes the work, and ctypes releases the interpreter while they do.

A team does not survive `fork`: a child process notices that its process id is new, never touches a
runtime that it inherited, and starts threads of its own.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import queue
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from tilefold.backends.cpu.device import host
from tilefold.common import settings

_requested: int | None = None


def get_num_threads() -> int:
    """How many threads a call may use.

    >>> import tilefold
    >>> tilefold.get_num_threads() >= 1
    True

    That is the number given to `set_num_threads`, else TILEFOLD_NUM_THREADS, else the cores that
    this process may use: those of its affinity mask, within the quota of its control group.
    Results do not depend on it, to the last bit.

    Raises
        ValueError: TILEFOLD_NUM_THREADS is no integer from 1 to 1024
    """
    return _requested or _default_num_threads()


def set_num_threads(n: int) -> None:
    """Set how many threads each following call may use, in this process.

    >>> import tilefold
    >>> before = tilefold.get_num_threads()
    >>> tilefold.set_num_threads(2)
    >>> tilefold.get_num_threads()
    2
    >>> tilefold.set_num_threads(before)

    Arguments
        n: an integer from 1 to 1024; more than there are cores is fine

    Raises
        ValueError: n is anything else
    """
    global _requested
    whole = hasattr(n, "__index__") and not isinstance(n, bool)
    if not whole or not 1 <= n.__index__() <= settings.MAX_THREADS:
        raise ValueError(f"n must be an integer from 1 to {settings.MAX_THREADS}, not {n!r}")
    _requested = n.__index__()


def run(address: int, arguments: int, workers: int) -> None:
    """Call `void f(void *arguments)`, at an address, on `workers` threads at once, and wait.

    The calling thread is one of them. Calls from several threads at once are safe.
    """
    if workers <= 1:
        _function(address)(arguments)
    else:
        _current_team().run(address, arguments, workers)


def describe() -> str:
    """Return the name of the team in use, such as `libgomp (torch)`; chooses one if none is yet."""
    return _current_team().name


@functools.lru_cache(maxsize=1)
def _default_num_threads() -> int:
    return settings.NUM_THREADS.get() or min(host().cores, settings.MAX_THREADS)


@functools.lru_cache(maxsize=4096)
def _function(address: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


class Team(ABC):
    """Threads that run one function together."""

    name: str

    @abstractmethod
    def run(self, address: int, arguments: int, workers: int) -> None:
        """Run the function at an address on at most `workers` threads; return when all are done."""


class OpenMPTeam(Team):
    """The threads of an OpenMP runtime, through the entry point that GNU compilers emit calls of.

    LLVM's and Intel's runtimes offer the same entry point.
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

    def run(self, address: int, arguments: int, workers: int) -> None:
        """See `Team.run`."""
        self._parallel(address, arguments, workers, 0)


class DispatchTeam(Team):
    """Grand Central Dispatch on macOS. Written from its manual; not yet run on a Mac."""

    name = "dispatch_apply_f"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._apply = library.dispatch_apply_f
        self._apply.restype = None
        self._apply.argtypes = [
            ctypes.c_size_t,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]

    def run(self, address: int, arguments: int, workers: int) -> None:
        """See `Team.run`."""
        # A null queue lets the system choose. The function is called as f(arguments, iteration): by
        # the calling conventions of Apple's processors it may ignore the second argument.
        self._apply(workers, None, arguments, address)


class PythonTeam(Team):
    """Python threads that are started when first needed and kept."""

    name = "Python threads"

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0

    def run(self, address: int, arguments: int, workers: int) -> None:
        """See `Team.run`."""
        call = _Call(_function(address), arguments)
        try:
            for _ in range(self._hire(workers - 1)):
                self._calls.put(call)
            call.function(arguments)
        finally:
            call.close()

    def _hire(self, wanted: int) -> int:
        """Make sure of `wanted` threads, or of as many as the system gives; return how many."""
        with self._lock:
            while self._threads < wanted:
                name = f"tilefold-{self._threads + 1}"
                try:
                    threading.Thread(target=self._work, name=name, daemon=True).start()
                except RuntimeError:
                    break
                self._threads += 1
            return min(wanted, self._threads)

    def _work(self) -> None:
        while True:
            self._calls.get().join()


class _Call:
    """One run of a function by a team of Python threads.

    When the caller's own run of the function ends, all work has been taken by someone. So the
    caller closes the call: helpers that come later find it closed, and the caller waits only for
    those that are inside.
    """

    def __init__(self, function: Callable[[int], None], arguments: int) -> None:
        self.function = function
        self.arguments = arguments
        self._lock = threading.Lock()
        self._closed = False
        self._inside = 0
        self._left = threading.Event()

    def join(self) -> None:
        """Run the function too, unless the call is closed."""
        with self._lock:
            if self._closed:
                return
            self._inside += 1
        self.function(self.arguments)
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._left.set()

    def close(self) -> None:
        """Let no helper in any more, and wait for those inside.

        Interrupted (by Ctrl-C), it still waits: they write to arrays that the caller may free.
        """
        interruption: BaseException | None = None
        while True:
            try:
                with self._lock:
                    self._closed = True
                    self._left.clear()
                    empty = self._inside == 0
                if empty:
                    break
                self._left.wait()
            except BaseException as error:
                interruption = error
        if interruption is not None:
            raise interruption


class _Process:
    """What belongs to one process and must not be used in a forked child."""

    def __init__(self, inherited: bool) -> None:
        self.id = os.getpid()
        self.inherited = inherited
        self.lock = threading.Lock()
        self.team: Team | None = None


_process = _Process(inherited=False)


def _current_team() -> Team:
    global _process
    process = _process
    if process.id != os.getpid():
        process = _process = _Process(inherited=True)
    if process.team is None:
        with process.lock:
            if process.team is None:
                process.team = _choose(process.inherited or _forked_without_exec())
    return process.team


def _choose(forked: bool) -> Team:
    """Choose the team of a process."""
    if platform.system() == "Darwin" and not forked:
        return DispatchTeam(ctypes.CDLL(None))
    mapped = _mapped_runtimes()
    if forked and mapped:
        # Whether it was used before the fork cannot be seen, and if it was it would wait for ever
        # for threads that the child does not have.
        return PythonTeam()
    for path in [*mapped, "libgomp.so.1"]:
        try:
            return OpenMPTeam(ctypes.CDLL(path), _runtime_name(path))
        except (OSError, AttributeError):
            continue
    return PythonTeam()


def _mapped_runtimes(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """The OpenMP runtimes in this process, the one to prefer first: torch's, then GNU's."""
    try:
        text = maps.read_text(errors="surrogateescape")
    except OSError:
        return []
    found = set(re.findall(r"(/.*/lib(?:gomp|iomp5|omp)\b[^/\n]*\.so[^/\n]*)$", text, re.MULTILINE))
    return sorted(found, key=lambda path: ("/torch/" not in path, "/libgomp" not in path, path))


def _runtime_name(path: str) -> str:
    """`libgomp (torch)` from a library's path."""
    library = re.split(r"[-.]", path.rpartition("/")[2])[0]
    package = re.search(r"/(?:site|dist)-packages/([^/]+?)(?:\.libs)?/", path)
    return f"{library} ({package[1] if package else 'system'})"


def _forked_without_exec() -> bool:
    """Whether this process is a fork of a program rather than a program started afresh (Linux).

    It matters where tilefold is first imported in the child: no process id was noted before.
    """
    try:
        text = Path("/proc/self/stat").read_text()
    except OSError:
        return False
    flags = text.rpartition(")")[2].split()[6]
    return bool(int(flags) & 0x40)
