"""Teams of threads: all the work is done once, by whoever is there, before and after a fork."""

from __future__ import annotations

import _thread
import ctypes
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from interrupts import interrupted_at
from paths import ROOT, finding

from tilefold.backends.cpu import runtime, startable, teams, threads
from tilefold.backends.cpu.device import host, usable_cores
from tilefold.common import settings

# Takes items from a counter, as attention kernels do, and marks each one that it got:
# the arguments are the next item, the number of items, the address of the marks, and who came.
TAKE = """
define void @take(ptr %arguments) {
entry:
  %came_at = getelementptr i64, ptr %arguments, i64 3
  %came = atomicrmw add ptr %came_at, i64 1 seq_cst
  %items_at = getelementptr i64, ptr %arguments, i64 1
  %items = load i64, ptr %items_at
  %marks_at = getelementptr i64, ptr %arguments, i64 2
  %address = load i64, ptr %marks_at
  %marks = inttoptr i64 %address to ptr
  br label %loop
loop:
  %item = atomicrmw add ptr %arguments, i64 1 monotonic
  %there = icmp slt i64 %item, %items
  br i1 %there, label %work, label %done
work:
  %mark = getelementptr i64, ptr %marks, i64 %item
  %before = atomicrmw add ptr %mark, i64 1 monotonic
  br label %loop
done:
  ret void
}
"""


def take(team: Callable[[int, int, int], None], workers: int, items: int = 5000) -> int:
    """Run the kernel; return how many threads came. Every item must have been taken once."""
    loaded = runtime.kernel(TAKE, "take", host())
    marks = np.zeros(items, np.int64)
    arguments = np.array([0, items, marks.ctypes.data, 0], np.int64)
    team(loaded.address, arguments.ctypes.data, workers)
    assert (marks == 1).all()
    return int(arguments[3])


def in_a_fresh_process(code: str, **environment: str) -> str:
    """Run code in a new interpreter that finds this file; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", f"from test_threads import *\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=finding(__file__, **environment),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Every team -----------------------------------------------------------------------------------


@pytest.mark.feature("T08")
@pytest.mark.parametrize("workers", [1, 2, 4, 9])
def test_the_team_in_use_takes_every_item_once(workers: int) -> None:
    assert 1 <= take(threads.run, workers) <= workers


@pytest.mark.parametrize("workers", [1, 2, 4, 9])
def test_python_threads_take_every_item_once(workers: int) -> None:
    team = teams.PythonTeam()
    for _ in range(50):
        assert 1 <= take(team.run, workers, items=200) <= workers


def test_one_worker_is_the_calling_thread() -> None:
    seen = []
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
        lambda arguments: seen.append((arguments, threading.get_ident()))
    )
    threads.run(ctypes.cast(function, ctypes.c_void_p).value or 0, 42, 1)
    assert seen == [(42, threading.get_ident())]


@pytest.mark.parametrize("team", [threads.run, teams.PythonTeam().run], ids=["chosen", "python"])
def test_several_threads_work_at_the_same_time(team: Callable[[int, int, int], None]) -> None:
    # Two callers meet inside the function: a team of one thread would wait in vain.
    meeting = threading.Barrier(2)
    met = []

    def meet(_: int) -> None:
        try:
            meeting.wait(timeout=20)
            met.append(threading.get_ident())
        except threading.BrokenBarrierError:
            pass

    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(meet)
    team(ctypes.cast(function, ctypes.c_void_p).value or 0, 0, 2)
    assert len(set(met)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("team", [threads.run, teams.PythonTeam().run], ids=["chosen", "python"])
def test_calls_from_four_threads_at_once(team: Callable[[int, int, int], None]) -> None:
    barrier = threading.Barrier(4)

    def call(_: int) -> None:
        barrier.wait(timeout=20)
        for _ in range(50):
            take(team, 3, items=100)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))


# Python threads -------------------------------------------------------------------------------


def test_no_more_threads_to_be_had_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    monkeypatch.setattr(startable, "_warned", False)
    with pytest.warns(RuntimeWarning, match=r"^only 1 of 8 threads can start here"):
        assert take(teams.PythonTeam().run, 8) == 1


def test_a_thread_that_ends_before_its_first_line_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, started = _thread.start_new_thread, []

    def lost(function: Callable[..., object], arguments: tuple[object, ...]) -> int:
        started.append(function)
        return real(function, arguments) if len(started) < 3 else real(int, ())

    monkeypatch.setattr(_thread, "start_new_thread", lost)
    monkeypatch.setattr(teams, "_PATIENCE", 0.05)
    monkeypatch.setattr(startable, "_warned", False)
    with pytest.warns(RuntimeWarning, match=r"^only 3 of 8 threads can start here"):
        assert take(teams.PythonTeam().run, 8) <= 3


def test_threads_are_kept() -> None:
    team = teams.PythonTeam()
    take(team.run, 4)
    before = _thread._count()
    for _ in range(20):
        take(team.run, 4)
    assert _thread._count() == before


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an interval timer")
def test_an_interrupted_call_waits_for_its_helpers() -> None:
    caller = threading.get_ident()
    inside, released = threading.Event(), threading.Event()
    left = []

    def work(_: int) -> None:
        if threading.get_ident() == caller:
            inside.wait(timeout=20)
        else:
            inside.set()
            released.wait(timeout=20)
            time.sleep(0.05)
            left.append(True)

    def interrupt(*_: object) -> None:
        released.set()
        raise KeyboardInterrupt

    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        # The signal arrives while the caller waits for the helper, which then goes on for a while.
        threading.Timer(0.1, signal.setitimer, (signal.ITIMER_REAL, 0.01)).start()
        with pytest.raises(KeyboardInterrupt):
            teams.PythonTeam().run(ctypes.cast(function, ctypes.c_void_p).value or 0, 0, 2)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert left == [True]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an interval timer")
def test_a_signal_handler_calls_while_its_thread_waits_for_helpers() -> None:
    caller, team = threading.get_ident(), teams.PythonTeam()
    inside, released = threading.Event(), threading.Event()
    came = []

    def work(_: int) -> None:
        if threading.get_ident() == caller:
            inside.wait(timeout=20)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            inside.set()
            released.wait(timeout=20)

    def handler(*_: object) -> None:
        came.append(take(team.run, 3))
        released.set()

    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)
    take(team.run, 1)  # loads the kernel
    before = signal.signal(signal.SIGALRM, handler)
    try:
        team.run(ctypes.cast(function, ctypes.c_void_p).value or 0, 0, 2)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(came) == 1 and 1 <= came[0] <= 3


def test_a_signal_handler_calls_while_threads_are_hired(monkeypatch: pytest.MonkeyPatch) -> None:
    team, real, came = teams.PythonTeam(), _thread.start_new_thread, []

    def start(function: Callable[..., object], arguments: tuple[object, ...]) -> int:
        if not came:
            came.append(0)
            came[0] = take(team.run, 3)
        return real(function, arguments)

    monkeypatch.setattr(_thread, "start_new_thread", start)
    outer = threading.Thread(target=take, args=(team.run, 2), daemon=True)
    outer.start()
    outer.join(20)
    assert not outer.is_alive() and came[0]


def test_an_interrupt_at_any_line_leaves_no_helper_inside() -> None:
    team, inside = teams.PythonTeam(), set[int]()
    caller = threading.get_ident()

    def work(_: int) -> None:
        if threading.get_ident() != caller:
            inside.add(threading.get_ident())
            time.sleep(0.002)
            inside.discard(threading.get_ident())

    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    team.run(address, 0, 3)
    for line in itertools.count(1):
        with interrupted_at(line, teams.__file__) as interrupted:
            team.run(address, 0, 3)
        assert not inside
        if not interrupted:
            break
    assert line > 10
    assert 1 <= take(team.run, 3) <= 3


# How many -------------------------------------------------------------------------------------


@pytest.fixture
def default_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_requested", None)


@pytest.mark.usefixtures("default_number")
def test_the_number_of_threads_can_be_set() -> None:
    threads.set_num_threads(3)
    assert threads.get_num_threads() == 3
    threads.set_num_threads(host().cores + 5)
    assert threads.get_num_threads() == host().cores + 5
    threads.set_num_threads(np.int64(2))  # type: ignore[arg-type]  # any integer will do
    assert threads.get_num_threads() == 2


@pytest.mark.feature("T15")
@pytest.mark.usefixtures("default_number")
@pytest.mark.parametrize("n", [0, -1, 1025, 2.0, "4", None, True])
def test_a_bad_number_of_threads_is_refused(n: object) -> None:
    before = threads.get_num_threads()
    with pytest.raises(ValueError) as raised:
        threads.set_num_threads(n)  # type: ignore[arg-type]  # the point of the test
    assert str(raised.value) == f"n must be an integer from 1 to 1024, not {n!r}"
    assert threads.get_num_threads() == before


@pytest.fixture
def four_cores(default_number: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Four cores, an empty environment and no torch; the list holds the number of cores."""
    cores = [4]
    monkeypatch.setattr(threads, "usable_cores", lambda: cores[0])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for setting in (settings.NUM_THREADS, settings.OMP_NUM_THREADS, settings.OMP_THREAD_LIMIT):
        monkeypatch.delenv(setting.name, raising=False)
    monkeypatch.setattr(threads, "_usual", threads._Usual(0.0, 1, 0))
    threads._environment.cache_clear()
    yield cores
    threads._environment.cache_clear()


# What the environment says, what torch says (0: it is not imported), and the number on four cores.
SAID = [
    ({}, 0, 4),
    ({"OMP_NUM_THREADS": "1"}, 0, 1),
    ({"OMP_NUM_THREADS": " 3,2"}, 0, 3),
    ({"OMP_NUM_THREADS": "7"}, 0, 7),
    ({"OMP_NUM_THREADS": "99999"}, 0, 1024),
    ({"OMP_NUM_THREADS": "garbage"}, 0, 4),
    ({"OMP_NUM_THREADS": "0"}, 0, 4),
    ({"OMP_NUM_THREADS": "-2"}, 0, 4),
    ({"OMP_NUM_THREADS": ""}, 0, 4),
    ({"OMP_THREAD_LIMIT": "2"}, 0, 2),
    ({"OMP_THREAD_LIMIT": "2", "OMP_NUM_THREADS": "3"}, 0, 2),
    ({"OMP_THREAD_LIMIT": "many"}, 0, 4),
    ({"TILEFOLD_NUM_THREADS": "6", "OMP_NUM_THREADS": "3", "OMP_THREAD_LIMIT": "2"}, 1, 6),
    ({}, 1, 1),
    ({}, 3, 3),
    ({}, 64, 4),  # torch knows neither quotas nor later affinity
    ({"OMP_NUM_THREADS": "1"}, 2, 2),
    ({"OMP_NUM_THREADS": "7"}, 7, 7),
    ({"OMP_THREAD_LIMIT": "2"}, 3, 2),
]


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(("environment", "torch", "number"), SAID)
def test_the_number_is_the_first_that_somebody_said(
    environment: dict[str, str], torch: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if torch:
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda: torch))
    assert threads.get_num_threads() == threads.number() == number
    threads.set_num_threads(5)
    assert threads.get_num_threads() == threads.number() == 5


@pytest.mark.usefixtures("four_cores")
def test_a_torch_that_is_being_imported_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    assert threads.get_num_threads() == 4


def test_a_later_change_of_the_affinity_is_seen(
    four_cores: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert threads.number() == 4
    four_cores[0] = 1
    assert threads.get_num_threads() == threads.number() == 1, "whoever asks is told at once"
    four_cores[0] = 3
    monkeypatch.setattr(threads, "monotonic", lambda: threads._usual.until)
    assert threads.number() == 3, "a call looks again after a while"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_the_affinity_of_this_process_counts() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.slow
def test_the_number_of_torch_counts_and_so_do_its_workers() -> None:
    pytest.importorskip("torch")
    code = """
import torch
import tilefold
class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, _):
        return torch.tensor(tilefold.get_num_threads())
worker = torch.utils.data.DataLoader(Numbers(), num_workers=1, multiprocessing_context="fork")
print(*[int(number) for number in worker])
torch.set_num_threads(1)
print(tilefold.get_num_threads())
"""
    environment = {"OMP_NUM_THREADS": "3"}  # more than one, whatever the machine
    assert in_a_fresh_process(code, **environment).split() == ["1", "1"]


# One core and more threads than cores. A quota stands for a control group's, which only root makes.
CONFINED = {
    "one core": ("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})", {}, 1),
    "a quota below one core": ("device._quota = lambda: 0.5", {}, 1),
    "more threads than cores": ("", {"TILEFOLD_NUM_THREADS": "64"}, 64),
    "more threads than the one core": (
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})",
        {"TILEFOLD_NUM_THREADS": "64"},
        64,
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
@pytest.mark.parametrize("confined", CONFINED)
def test_attention_on_a_confined_machine(confined: str) -> None:
    how, environment, number = CONFINED[confined]
    code = f"""
import tilefold
from compare import assert_near
from tilefold.backends.cpu import device
from tilefold.problems import reference
{how}
q = np.random.default_rng(1).standard_normal((2, 3, 200, 40), dtype=np.float32)
mask = tilefold.causal()
exact = reference.attention(q, q, q, mask=mask)
found = tilefold.attention(q, q, q, mask=mask, return_lse=True)
assert_near("o", found[0], exact[0], 1e-5)
gradients = tilefold.attention_backward(q, q, q, q, *found, mask=mask)
wanted = reference.attention_backward(q, q, q, q, *exact, mask=mask)
for name, found, expected in zip(("dq", "dk", "dv"), gradients, wanted, strict=True):
    assert_near(name, found, expected, 1e-4)
print(threads.get_num_threads(), host().cores)
"""
    threads_used, cores = map(int, in_a_fresh_process(code, **environment).split())
    assert threads_used == number
    assert cores == 1 or not how


# Which team -----------------------------------------------------------------------------------

MAPS = """\
7f00-7f01 r-xp 00000000 08:01 1  /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0
7f01-7f02 r--p 00000000 08:01 1  /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0
7f02-7f03 r-xp 00000000 08:01 2  /opt/my env/lib/python3.12/site-packages/torch/lib/libgomp.so.1
7f03-7f04 r-xp 00000000 08:01 3  /env/site-packages/scikit_learn.libs/libgomp-a34b3233.so.1.0.0
7f04-7f05 r-xp 00000000 08:01 4  /env/lib/libiomp5.so
7f05-7f06 r-xp 00000000 08:01 5  /env/lib/libomptarget.so
7f06-7f07 r-xp 00000000 08:01 6  /env/lib/libompi.so.40
7f07-7f08 rw-p 00000000 00:00 0  [stack]
"""


def test_runtimes_of_the_process_are_found_torch_first(tmp_path: Path) -> None:
    (tmp_path / "maps").write_text(MAPS)
    found = threads._mapped_runtimes(tmp_path / "maps")
    assert [threads._runtime_name(path) for path in found] == [
        "libgomp (torch)",
        "libgomp (scikit_learn)",
        "libgomp (system)",
        "libiomp5 (system)",
    ]
    assert threads._mapped_runtimes(tmp_path / "absent") == []


def test_without_a_runtime_python_threads_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    host()  # asks the system for AMX, by way of ctypes too
    monkeypatch.setattr(threads, "_mapped_runtimes", list)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    team = threads._choose(forked=False)
    assert team.name == "Python threads"
    take(team.run, 3)


def test_a_child_takes_no_runtime_that_it_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_mapped_runtimes", lambda: ["/usr/lib/libgomp.so.1"])
    assert threads._choose(forked=True).name == "Python threads"


@pytest.mark.slow
def test_the_runtime_of_torch_is_shared() -> None:
    pytest.importorskip("torch")
    code = "import torch; torch.ones(300, 300) @ torch.ones(300, 300)\n"
    code += "print(threads.describe(), take(threads.run, 4))"
    *name, came = in_a_fresh_process(code).split()
    mapped = "(torch)" in name or name == ["Python", "threads"]
    assert mapped, name
    assert 1 <= int(came) <= 4


@pytest.mark.slow
def test_torch_may_come_later() -> None:
    pytest.importorskip("torch")
    code = """
before = threads.describe()
take(threads.run, 4)
import torch
torch.set_num_threads(4)
for _ in range(20):
    take(threads.run, 4)
    assert (torch.ones(500, 500) @ torch.ones(500, 500) == 500).all()
    assert torch.ones(1 << 20).sum() == 1 << 20
print(threads.describe() == before)
"""
    assert in_a_fresh_process(code) == "True"


# Fork -----------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.mark.slow
@needs_fork
def test_a_forked_child_works_and_so_does_its_parent() -> None:
    code = """
take(threads.run, 4)
threads.set_num_threads(3)
child = os.fork()
if child == 0:
    for _ in range(20):
        take(threads.run, 4)
    grandchild = os.fork()
    if grandchild == 0:
        take(threads.run, 4)
        os._exit(30 + threads.get_num_threads() + (threads.describe() == "Python threads"))
    _, status = os.waitpid(grandchild, 0)
    os._exit(os.waitstatus_to_exitcode(status) + 1)
_, status = os.waitpid(child, 0)
take(threads.run, 4)
print(os.waitstatus_to_exitcode(status))
"""
    assert in_a_fresh_process(code) == "35"


@needs_fork
@pytest.mark.slow
def test_attention_after_a_fork() -> None:
    code = """
import tilefold
q = np.random.default_rng(1).standard_normal((2, 3, 200, 40), dtype=np.float32)
tilefold.set_num_threads(4)
expected = tilefold.attention(q, q, q, mask=tilefold.causal()).tobytes()
child = os.fork()
same = tilefold.attention(q, q, q, mask=tilefold.causal()).tobytes() == expected
if child == 0:
    os._exit(17 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same)
"""
    assert in_a_fresh_process(code) == "17 True"


@needs_fork
@pytest.mark.slow
def test_forked_worker_processes_work() -> None:
    code = """
import multiprocessing
take(threads.run, 4)
def work(number):
    return take(threads.run, 4) >= 1
if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(3) as pool:
        print(pool.map(work, range(12)) == [True] * 12)
"""
    assert in_a_fresh_process(code) == "True"


@needs_fork
@pytest.mark.slow
def test_a_fork_while_other_threads_are_inside() -> None:
    code = """
going = True
def keep_busy():
    number = 0
    while going:
        number += 1
        take(threads.run, 3, items=100)
        runtime.compile(TAKE.replace("@take", f"@take{number}"), host())
others = [threading.Thread(target=keep_busy) for _ in range(2)]
for other in others:
    other.start()
codes = []
for number in range(10):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        take(threads.run, 3)
        runtime.compile(TAKE.replace("@take", f"@child{number}"), host())
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
going = False
for other in others:
    other.join()
print(set(codes))
"""
    assert in_a_fresh_process(code) == "{0}"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux only")
@pytest.mark.slow
def test_first_imported_in_a_forked_child_it_is_known_to_be_one() -> None:
    code = """
from multiprocessing import get_context
print(threads._forked_without_exec())
child = os.fork()
if child == 0:
    print(threads._forked_without_exec(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    assert set(in_a_fresh_process(code).split()) == {"True", "False"}
