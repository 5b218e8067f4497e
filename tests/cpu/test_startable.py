"""Threads that cannot start: calls use fewer, and no runtime ends the process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import finding

from tilefold.backends.cpu import startable
from tilefold.backends.cpu.startable import Room


class System:
    """A system that starts `free` more threads, and lists what it was asked for."""

    def __init__(self) -> None:
        self.free, self.limits, self.asked = 8, 100, list[int]()

    def startable(self, wanted: int) -> int:
        self.asked.append(wanted)
        return min(wanted, self.free)


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    system = System()
    monkeypatch.setattr(startable, "startable", system.startable)
    monkeypatch.setattr(startable, "_limits", lambda: (system.limits,))
    monkeypatch.setattr(startable, "_warned", True)
    return system


def test_threads_are_tried_where_a_team_grows_and_once(system: System) -> None:
    room = Room()
    assert [room.admit(workers) for workers in (4, 2, 4, 3, 6, 6, 1, 6)] == [4, 2, 4, 3, 6, 6, 1, 6]
    assert system.asked == [4, 4], "three and a spare one, three more than the last run had"


def test_fewer_threads_make_a_smaller_team_until_it_is_tried_again(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, system.free = Room(), 3
    assert [room.admit(workers) for workers in (8, 8, 2, 8)] == [3, 3, 2, 3]
    assert system.asked == [8]
    system.free = 100
    monkeypatch.setattr(startable, "RETRY_SECONDS", 0.0)
    time_before = time.monotonic()
    monkeypatch.setattr(startable.time, "monotonic", lambda: time_before + 60)
    assert room.admit(8) == 8


def test_none_to_be_had_leaves_the_calling_thread(system: System) -> None:
    system.free = 0
    assert Room().admit(8) == 1


def test_threads_are_tried_anew_under_new_limits(system: System) -> None:
    room = Room()
    assert room.admit(6) == 6 and room.admit(2) == 2
    system.limits, system.free = 10, 2
    assert room.admit(6) == 3
    system.limits, system.free = 100, 9
    assert room.admit(6) == 6


@pytest.mark.usefixtures("system")
def test_each_calling_thread_has_a_team_to_try() -> None:
    room, sizes = Room(), list[int]()
    room.admit(4)
    thread = threading.Thread(target=lambda: sizes.append(room.size))
    thread.start()
    thread.join()
    assert (room.size, sizes) == (4, [1])


def test_it_is_said_once(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startable, "_warned", False)
    system.free = 2
    with pytest.warns(RuntimeWarning, match=r"^only 2 of 8 threads can start here"):
        Room().admit(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Room().admit(8)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which threads there are")
def test_threads_that_were_tried_are_gone() -> None:
    before = threading.active_count(), len([*Path("/proc/self/task").iterdir()])
    assert startable.startable(5) == 5
    assert (threading.active_count(), len([*Path("/proc/self/task").iterdir()])) == before


# The limit is set after a call on one thread has loaded everything, and is not zero: another
# user without other processes has one thread left, which runs.
LIMITED = """
import os, resource, warnings
import numpy as np
import tilefold
q = np.random.default_rng(0).standard_normal((1, 8, 256, 64), dtype=np.float32)
tilefold.set_num_threads(1)
one = tilefold.attention(q, q, q)
pages = int(open("/proc/self/statm").read().split()[0])
{limit}
tilefold.set_num_threads(9)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    same = all(np.array_equal(tilefold.attention(q, q, q), one) for _ in range(3))
print(same, *[str(each.message).partition(" threads")[0] for each in caught])
"""

LIMITS = {
    "processes": "os.setuid(54321); resource.setrlimit(resource.RLIMIT_NPROC, (4, 4))",
    "memory": "resource.setrlimit(resource.RLIMIT_AS, ((pages << 12) + (20 << 20),) * 2)",
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux")
@pytest.mark.parametrize("limit", LIMITS)
def test_attention_under_a_limit_of_threads(limit: str) -> None:
    if limit == "processes" and os.geteuid() != 0:
        pytest.skip("only root becomes a user without other processes")
    command = [sys.executable, "-c", LIMITED.format(limit=LIMITS[limit])]
    done = subprocess.run(command, capture_output=True, text=True, env=finding(__file__))
    assert done.returncode == 0, done.stderr
    same, *said = done.stdout.split(maxsplit=1)
    assert same == "True" and "".join(said).startswith("only ")
