"""Run one kernel on several threads at once.

An OpenMP runtime is the fastest team of threads (a few microseconds per call). If one is already in
the process, above all torch's, it is shared: two runtimes would keep two teams spinning on the same
cores. Otherwise the system's libgomp is loaded; macOS has `dispatch_apply_f`; Python threads come
last. Kernels take their work from a counter in their arguments, so a smaller team than asked for
still finishes the work. ctypes releases the interpreter lock meanwhile.

A team does not survive `fork`. A child process never touches an inherited runtime, and starts
threads of its own.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import sys
import threading
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from tilefold.backends.cpu.device import usable_cores
from tilefold.backends.cpu.teams import DispatchTeam, OpenMPTeam, PythonTeam, Team, function
from tilefold.common import settings

_requested: int | None = None


def get_num_threads() -> int:
    """The number of threads that a call may use.

    >>> import tilefold
    >>> tilefold.get_num_threads() >= 1
    True

    It is the first of these numbers that there is:

    1. the number given to `set_num_threads`
    2. the environment variable TILEFOLD_NUM_THREADS
    3. if the program has imported torch: the number of `torch.get_num_threads()`. So
       `torch.set_num_threads` counts, and a worker process of torch's DataLoader uses one thread.
       Torch's number counts up to the larger one of the next two
    4. the environment variable OMP_NUM_THREADS; of a list such as "4,2", the first number
    5. the number of cores that this process may use: the cores of its affinity mask, within the
       quota of its control group. A later change of the mask counts from 0.05 s on

    OMP_THREAD_LIMIT bounds the numbers 3 to 5. Values of OMP variables that are no numbers are
    ignored, as OpenMP ignores them. Variables are read at the first call. If the system cannot
    start so many threads, a call uses fewer, and a RuntimeWarning says so once. The results of a
    call do not depend on the number, not even in the last bit.

    Raises:
        ValueError: TILEFOLD_NUM_THREADS is not an integer from 1 to 1024
    """
    _refresh()
    return number()


def set_num_threads(n: int) -> None:
    """Set the number of threads that each later call in this process may use.

    >>> import tilefold
    >>> before = tilefold.get_num_threads()
    >>> tilefold.set_num_threads(2)
    >>> tilefold.get_num_threads()
    2
    >>> tilefold.set_num_threads(before)

    Arguments:
        n: an integer from 1 to 1024; it may be larger than the number of cores

    Raises:
        ValueError: n is not an integer from 1 to 1024
    """
    global _requested
    _requested = checked(n)
    if _process.shared[1]:
        share()


def checked(n: int) -> int:
    """A number of threads as an int. Raises ValueError unless it is from 1 to 1024."""
    whole = hasattr(n, "__index__") and not isinstance(n, bool)
    if not whole or not 1 <= n.__index__() <= settings.MAX_THREADS:
        raise ValueError(f"n must be an integer from 1 to {settings.MAX_THREADS}, not {n!r}")
    return n.__index__()


def share() -> None:
    """Note for calls without Python how many threads they use, and the team's entry point.

    Such calls see the number of this moment. It is noted when a call is prepared and by
    `set_num_threads`. In a forked child they use one thread.
    """
    process, team, wanted = _process, _current_team(), number()
    process.noted = wanted
    entry, most = team.entry(wanted)
    if process.inherited or not entry:
        entry, most = 0, 1
    process.shared[1] = entry
    process.shared[0] = most


def follow() -> bool:
    """Note the number of this moment, and tell if calls without Python can use so many threads."""
    wanted = number()
    if wanted != _process.noted:
        share()
    return wanted == 1 or _process.shared[1] != 0


def shared_address() -> int:
    """The address of [threads, entry point of the team, memory that the last call left]."""
    return ctypes.addressof(_process.shared)


def parallel_call() -> str:
    """The line of LLVM that calls the entry point of this process's team."""
    return _current_team().native


def run(address: int, arguments: int, workers: int) -> None:
    """Call `void f(void *arguments)`, at an address, on `workers` threads at once, and wait.

    The calling thread is one of them. Calls from several threads at once are safe.
    """
    if workers <= 1:
        function(address)(arguments)
    else:
        _current_team().run(address, arguments, workers)


def describe() -> str:
    """Return the name of the team, such as `libgomp (torch)`; the first call chooses the team."""
    return _current_team().name


class _Usual(NamedTuple):
    """The number of threads without `set_num_threads`: valid until a time.

    `most` bounds torch's number; 0: torch is not asked.
    """

    until: float
    number: int
    most: int


_usual = _Usual(0.0, 1, 0)

_VALID_SECONDS = 0.05
"""To ask for the affinity mask takes 0.4 us with 2 cores, and 5 us with 256 cores."""


def number() -> int:
    """The number of threads of a call; a change of the affinity mask may be seen a little late."""
    if _requested is not None:
        return _requested
    usual = _usual if monotonic() < _usual.until else _refresh()
    torch = usual.most and sys.modules.get("torch")
    if torch and (asked := getattr(torch, "get_num_threads", None)):  # not while it is imported
        found: int = asked()
        return found if found < usual.most else usual.most
    return usual.number


def _refresh() -> _Usual:
    global _usual
    until = monotonic() + _VALID_SECONDS
    own, openmp, limit = _environment()
    if own is not None:
        _usual = _Usual(until, own, 0)
    else:
        cores = usable_cores()
        _usual = _Usual(until, min(openmp or cores, limit), min(max(openmp or 0, cores), limit))
    return _usual


@functools.lru_cache(maxsize=1)
def _environment() -> tuple[int | None, int | None, int]:
    """The numbers of TILEFOLD_NUM_THREADS, OMP_NUM_THREADS and OMP_THREAD_LIMIT."""
    limit = settings.OMP_THREAD_LIMIT.get() or settings.MAX_THREADS
    return settings.NUM_THREADS.get(), settings.OMP_NUM_THREADS.get(), limit


class _Process:
    """The state of one process, which must not be used in a forked child."""

    def __init__(self, inherited: bool) -> None:
        self.inherited = inherited
        self.lock = threading.RLock()  # a signal handler may call while the team is chosen
        self.team: Team | None = None
        self.shared = _shared
        self.noted = 0  # the number of threads that `shared` was made for


_shared = (ctypes.c_int64 * 3)(1)
"""What calls without Python read: see `shared_address`."""

_process = _Process(inherited=False)


def _in_child() -> None:
    global _process
    _process = _Process(inherited=True)
    _shared[0] = 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _current_team() -> Team:
    process = _process
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
        # It may have been used before the fork. Then it would wait for ever for threads that the
        # child does not have.
        return PythonTeam()
    for path in [*mapped, "libgomp.so.1"]:
        try:
            return OpenMPTeam(ctypes.CDLL(path), _runtime_name(path))
        except (OSError, AttributeError):
            continue
    return PythonTeam()


def _mapped_runtimes(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """The OpenMP runtimes in this process, in the order of preference: torch's, then GNU's."""
    try:
        text = maps.read_text(errors="surrogateescape")
    except OSError:
        return []
    found = set(re.findall(r"(/.*/lib(?:gomp|iomp5|omp)\b[^/\n]*\.so[^/\n]*)$", text, re.MULTILINE))
    return sorted(found, key=lambda path: ("/torch/" not in path, "/libgomp" not in path, path))


def _runtime_name(path: str) -> str:
    """The name of a runtime from the path of its library, such as `libgomp (torch)`."""
    library = re.split(r"[-.]", path.rpartition("/")[2])[0]
    package = re.search(r"/(?:site|dist)-packages/([^/]+?)(?:\.libs)?/", path)
    return f"{library} ({package[1] if package else 'system'})"


def _forked_without_exec() -> bool:
    """True if this process was forked without starting a program of its own (Linux only).

    It matters if tilefold is first imported in the child, since no process id was noted before.
    """
    try:
        text = Path("/proc/self/stat").read_text()
    except OSError:
        return False
    flags = text.rpartition(")")[2].split()[6]
    return bool(int(flags) & 0x40)
