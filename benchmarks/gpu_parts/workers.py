"""Runs the jobs of a section in processes that may hang, crash or lose the GPU.

A process is spawned, not forked: it makes its own context on the GPU. It is sent one job at a time,
says which part of it runs, and returns a row. One that says nothing for too long is killed, with
what it started; its job is tried again in a new process without the part that it was at.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from gpu_parts.section import Here, Lost, Row, Settings, said

Measure = Callable[[str, Here], Row]

TRIES = 4
"""How often a job is begun, at most."""

START_SECONDS = 60.0
"""How long a process may take until it is there: it imports before it can say anything."""

GRACE_SECONDS = 20.0
"""How long after the deadline a job that has begun may go on."""


@dataclass
class Outcome:
    """The rows of a section in the order of its jobs, the jobs that no time was left for, and the
    parts that must not run again, with reasons.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    undone: list[str] = field(default_factory=list)
    never: dict[str, str] = field(default_factory=dict)


def work(measure: Measure, settings: Settings, log: str, link: Any) -> None:
    """The life of a process: jobs come, rows go, until None comes or the GPU is lost.

    A dozen processes may compile at once, so Inductor starts no pool of its own in each.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if "hopper" in settings.without:
        os.environ["TILEFOLD_HOPPER"] = "0"  # "auto" takes another form then
    with contextlib.suppress(OSError, AttributeError):
        os.setsid()  # so that what it starts can be ended with it
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(written, stream)
    here = Here(settings, tell=lambda part: link.send(("part", part)))
    with contextlib.suppress(EOFError):
        while (job := link.recv()) is not None:
            name, here.avoid = job
            here.tell("")
            try:
                link.send(("row", answer(measure, name, here)))
            except Lost as lost:
                link.send(("lost", str(lost)))
                return


def answer(measure: Measure, name: str, here: Here) -> Row:
    """The row of a job; its failure is a row too. Raises Lost."""
    start = time.monotonic()
    try:
        row = measure(name, here)
    except Lost:
        raise
    except Exception as error:
        row = {"reason": here.survive(error)}
    return {"job": name, **row, "row_seconds": round(time.monotonic() - start, 3)}


class _Worker:
    """A process, the job that it has, the part of it that runs, and since when it is silent."""

    def __init__(self, measure: Measure, settings: Settings, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.link, other = context.Pipe()
        self._log = Path(folder) / os.urandom(4).hex()
        given = (measure, settings, str(self._log), other)
        self.process = context.Process(target=work, args=given, daemon=False)
        self.process.start()
        other.close()
        self.job, self.part, self.heard = "", "", time.monotonic()
        self.there = False

    def give(self, job: str, avoid: Mapping[str, str]) -> bool:
        """Send it a job; False where there is nobody any more."""
        self.job, self.part, self.heard = job, "", time.monotonic()
        try:
            self.link.send((job, dict(avoid)))
        except OSError:
            return False
        return True

    def end(self, *, kill: bool = False) -> None:
        """Let it go, or end it with all that it started."""
        if kill:
            with contextlib.suppress(OSError):
                own = os.getpgid(self.process.pid or 0) == self.process.pid
                if own:
                    os.killpg(self.process.pid or 0, signal.SIGKILL)
            self.process.kill()
        else:
            with contextlib.suppress(OSError):
                self.link.send(None)
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(10)
        self.link.close()

    def last_words(self) -> str:
        """The end of what it printed."""
        with contextlib.suppress(OSError), self._log.open(errors="replace") as lines:
            kept = deque((line.strip() for line in lines if line.strip()), maxlen=4)
            return " | ".join(kept)[-500:]
        return ""


class _Pool:
    """The processes of a section and what they are to do."""

    def __init__(
        self,
        measure: Measure,
        settings: Settings,
        *,
        patience: int,
        stall_seconds: float,
        keep: Callable[[Row], None],
    ) -> None:
        self._measure, self._settings = measure, settings
        self._patience, self._stall, self._keep = patience, stall_seconds, keep
        self._waiting: deque[str] = deque()
        self._begun: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()
        self._avoid: dict[str, dict[str, str]] = {}
        self._workers: list[_Worker] = []
        self.outcome = Outcome()

    def run(self, jobs: Sequence[str], workers: int, deadline: float) -> Outcome:
        """Do the jobs until the deadline, by `time.monotonic`."""
        self._waiting.extend(jobs)
        with tempfile.TemporaryDirectory() as folder:
            try:
                self._loop(workers, deadline, folder)
            finally:
                for worker in self._workers:
                    worker.end(kill=bool(worker.job))
        done = self.outcome.rows
        self.outcome.rows = {name: done[name] for name in jobs if name in done}
        self.outcome.undone = [name for name in jobs if name not in done]
        return self.outcome

    def _loop(self, workers: int, deadline: float, folder: str) -> None:
        while True:
            now = time.monotonic()
            if now < deadline:
                self._deal(workers, folder)
            busy = [worker for worker in self._workers if worker.job]
            if not busy or now > deadline + GRACE_SECONDS:
                return
            connection.wait([worker.link for worker in busy], timeout=0.2)
            for worker in busy:
                self._hear(worker)

    def _deal(self, workers: int, folder: str) -> None:
        """Give jobs that wait to processes that are free, or new."""
        for worker in [each for each in self._workers if not each.job]:
            if self._waiting:
                self._give(worker)
        while self._waiting and len(self._workers) < workers:
            worker = _Worker(self._measure, self._settings, folder)
            self._workers.append(worker)
            self._give(worker)

    def _give(self, worker: _Worker) -> None:
        job = self._waiting.popleft()
        self._begun[job] += 1
        worker.give(job, {**self.outcome.never, **self._avoid.get(job, {})})

    def _hear(self, worker: _Worker) -> None:
        """Take what a process has said; notice that it is gone or silent."""
        try:
            while worker.job and worker.link.poll():
                kind, value = worker.link.recv()
                worker.heard, worker.there = time.monotonic(), True
                if kind == "part":
                    worker.part = value
                elif kind == "row":
                    self._finish(worker.job, value)
                    worker.job = ""
                else:
                    self._gone(worker, f"the GPU was lost: {value}")
                    return
        except (EOFError, OSError):
            worker.process.join(5)
            words = worker.last_words()
            self._gone(worker, f"its process ended with {worker.process.exitcode}: {words}")
            return
        limit = self._stall if worker.there else max(self._stall, START_SECONDS)
        if worker.job and time.monotonic() - worker.heard > limit:
            self._gone(worker, f"nothing was heard for {limit:.0f} s: {worker.last_words()}")

    def _finish(self, job: str, row: Row) -> None:
        self.outcome.rows[job] = row
        self._keep(row)

    def _gone(self, worker: _Worker, reason: str) -> None:
        """End a process; its job waits again, without the part that was running."""
        job, part = worker.job, worker.part
        worker.end(kill=True)
        self._workers.remove(worker)
        print(f"  {job}, {part or 'before any part'}: {reason}", file=sys.stderr, flush=True)
        known = self._avoid.setdefault(job, {})
        if not part or part in known or self._begun[job] >= TRIES:
            self._finish(job, {"job": job, "reason": reason, "part": part})
            return
        known[part] = reason
        self._ended[part] += 1
        if self._ended[part] >= self._patience:
            self.outcome.never[part] = (
                f"left out, since it ended {self._patience} processes: {reason}"
            )
        self._waiting.appendleft(job)


def run(
    measure: Measure,
    jobs: Sequence[str],
    settings: Settings,
    *,
    workers: int,
    deadline: float,
    patience: int = 2,
    stall_seconds: float = 120.0,
    never: Mapping[str, str] | None = None,
    keep: Callable[[Row], None] = lambda row: None,
) -> Outcome:
    """Do jobs in so many processes at a time, until a deadline, without the parts of `never`.

    `keep` is given each row as soon as it is there.
    """
    pool = _Pool(measure, settings, patience=patience, stall_seconds=stall_seconds, keep=keep)
    pool.outcome.never.update(never or {})
    try:
        return pool.run(jobs, workers, deadline)
    except OSError as error:  # no process could be started
        pool.outcome.rows[""] = {"job": "", "reason": said(error)}
        keep(pool.outcome.rows[""])
        return pool.outcome
