"""Implementations of attention timed in processes of their own, warm and cold, by turns.

A team of threads spins for milliseconds after its work, on cores that the next implementation
needs. Within one process ONNX Runtime's team made tilefold look a tenth slower than it is. So each
implementation has a process, one of them works at a time, and a turn begins when the threads of
the others sleep.

- *warm*: the call is repeated, so its arrays are in the caches as far as they fit, and its threads
  are awake. This is what a loop over one call shows.
- *cold*: before each call other memory is read, more than the caches hold, and the threads sleep.
  This is what the first call after other work finds.

The layers of a model lie between the two: q, k and v were just written by a product, and are warm
if they are small; the keys of a decoding step were written long ago, and are cold.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from tilefold.backends.cpu import peak, threads
from tilefold.backends.cpu.device import host
from tilefold.measuring import baselines, workload
from tilefold.measuring.timing import Row, first_call, start
from tilefold.measuring.workload import Call, Case
from tilefold.planning.roofline import visible_pairs

ROUNDS = 3
"""The turns of each implementation. The one with the least median counts."""
PAUSE = 0.05
"""The seconds of rest before a turn. OpenBLAS's threads spin for 20 ms and more after their work,
GNU's OpenMP's for about 7 ms."""
WAKING = 3
"""The calls of a warm turn that are not counted: they wake the threads and fill the caches."""


class Apart:
    """Processes of implementations by name, `tilefold` or keys of `baselines.BASELINES`.

    Use it in a `with` block; the processes end with it. Raises RuntimeError if one of them dies.

        with Apart(["tilefold", "torch"]) as apart:
            rows = apart.measure(case, seconds=2)
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        context = multiprocessing.get_context("spawn")
        self.processes: dict[str, BaseProcess] = {}
        self._pipes: dict[str, Connection] = {}
        for name in self.names:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, name), daemon=True)
            process.start()
            theirs.close()
            self.processes[name], self._pipes[name] = process, ours

    def measure(
        self, case: Case, *, seconds: float = 2.0, names: Sequence[str] | None = None
    ) -> list[Row]:
        """A row for each implementation, or for some; all turns together take about `seconds`.

        An implementation that cannot do the case, or computes something else, has the reason.
        """
        pairs = visible_pairs(case.problem)
        chosen = self.names if names is None else names
        prepared = {name: self._ask(name, "prepare", case) for name in chosen}
        able = [name for name in chosen if prepared[name].reason is None]
        share = seconds / ROUNDS / max(1, len(able)) / 2
        warm: dict[str, list[list[float]]] = {name: [] for name in able}
        cold: dict[str, list[float]] = {name: [] for name in able}
        for number in range(ROUNDS):
            first = number % max(1, len(able))
            for name in able[first:] + able[:first]:
                time.sleep(PAUSE)
                warm[name].append(self._ask(name, "warm", share))
                cold[name] += self._ask(name, "cold", share)
        return [
            Row(
                case,
                name,
                tuple(min(warm[name], key=statistics.median)) if name in warm else (),
                pairs,
                prepared[name].first,
                prepared[name].reason,
                prepared[name].prepare,
                tuple(cold.get(name, ())),
            )
            for name in chosen
        ]

    def _ask(self, name: str, question: str, *arguments: Any) -> Any:
        try:
            self._pipes[name].send((question, arguments))
            return self._pipes[name].recv()
        except (EOFError, OSError) as error:
            self.processes[name].join()
            ended = self.processes[name].exitcode
            raise RuntimeError(f"the process of {name} ended with {ended}") from error

    def close(self) -> None:
        """End the processes."""
        for name, pipe in self._pipes.items():
            pipe.close()
            self.processes[name].join()

    def __enter__(self) -> Apart:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


# ----------------------------------------------------------------- in the process of one of them


def _serve(pipe: Connection, name: str) -> None:
    """Answer questions of the parent until it hangs up."""
    if name != "tilefold":
        baselines.BASELINES[name].load()
    child = _Child(name)
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            question, arguments = pipe.recv()
            pipe.send(getattr(child, question)(*arguments))


class _Prepared(NamedTuple):
    """The seconds before the first call and of it, or the reason why there is no call."""

    prepare: float
    first: float
    reason: str | None


class _Child:
    """What one process does when it is asked."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._call: Call | None = None
        self._evict: Call = _evictor()

    def prepare(self, case: Case) -> _Prepared:
        """Make the call of a case, and compare its result with tilefold's."""
        self._call = None  # its arrays go before the next ones come
        threads.set_num_threads(case.threads)
        inputs = workload.arrays(case)
        own = workload.own(case, inputs)
        if self._name == "tilefold":
            self._call = own
            return _Prepared(0.0, first_call(own)[0], None)
        make = partial(baselines.BASELINES[self._name].prepare, case, inputs)
        started = start(case, {self._name: make}, own())
        self._call = started.calls.get(self._name)
        return _Prepared(
            started.prepared.get(self._name, 0.0),
            started.firsts.get(self._name, math.nan),
            started.reasons.get(self._name),
        )

    def warm(self, seconds: float) -> list[float]:
        """The times of calls one after another, for so many seconds."""
        during(0, self._timed, least=WAKING)
        return during(seconds, self._timed)

    def cold(self, seconds: float) -> list[float]:
        """The times of calls after which other memory was read and the threads slept."""

        def one() -> float:
            self._evict()
            time.sleep(PAUSE)
            return self._timed()

        return during(seconds, one)

    def _timed(self) -> float:
        assert self._call
        begin = time.perf_counter()
        self._call()
        return time.perf_counter() - begin


def during(seconds: float, timed: Callable[[], float], least: int = 1) -> list[float]:
    """What `timed` returns in so many seconds, and at least so many times."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < least or time.perf_counter() < end:
        found.append(timed())
    return found


def _evictor() -> Call:
    """A call that reads more memory than the caches hold, on every core."""
    return peak.reader(host(), np.ones(peak.uncached_bytes(host()), np.int8), host().cores)
