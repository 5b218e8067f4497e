"""Imports at first use: forks, signal handlers and interrupts come before or after, never amid."""

from __future__ import annotations

import doctest
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from paths import ROOT

from tilefold.common import first_use
from tilefold.common.first_use import imported

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module whose import takes a while; then it has `whole`."""
    name = f"slow_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text("import time\ntime.sleep(0.2)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def until_begun(name: str) -> None:
    end = time.monotonic() + 20
    while name not in sys.modules:
        assert time.monotonic() < end
        time.sleep(0.001)


def amid(function: Callable[[], object], begun: threading.Event) -> threading.Thread:
    """A thread that is inside a function, which says so."""
    thread = threading.Thread(target=function)
    thread.start()
    assert begun.wait(30)
    return thread


def test_examples() -> None:
    outcome = doctest.testmod(first_use, raise_on_error=False)
    assert outcome.attempted and not outcome.failed


@pytest.mark.slow
@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_waits_for_the_import_of_another_thread(slow: str) -> None:
    load = imported(import_module)
    thread = threading.Thread(target=load, args=(slow,))
    thread.start()
    until_begun(slow)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(17 if load(slow).whole and imported(import_module)("json") else 1)
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_waits_no_longer_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "LONGEST_WAIT", 0.05)
    begun, go = threading.Event(), threading.Event()

    @imported
    def stuck() -> bool:
        begun.set()
        return go.wait(30)

    thread = amid(stuck, begun)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(17 if imported(import_module)("json") else 1)
    go.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    assert imported(import_module)("json")


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_waits_for_an_import_before_it_takes_the_lock_of_llvm() -> None:
    """An import that calls LLVM, in `llvmlite` or in a finaliser, ends before the fork."""
    binding = pytest.importorskip("llvmlite.binding")
    from tilefold.backends.cpu import kernel

    assert kernel
    begun = threading.Event()

    @imported
    def slow() -> float:
        begun.set()
        time.sleep(0.1)
        binding.get_process_triple()
        return time.monotonic()

    thread = amid(slow, begun)
    child = os.fork()
    if child == 0:
        os._exit(17)
    assert slow() < time.monotonic() < slow() + 20
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17


@needs_fork
def test_an_imported_module_may_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "forks.py").write_text(
        "import os, signal\nfrom tilefold.common.first_use import imported\n"
        "from importlib import import_module\nchild = os.fork()\n"
        "if child == 0:\n    signal.alarm(20)\n    imported(import_module)('json')\n"
        "    os._exit(17)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    child = imported(import_module)("forks").child
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an interval timer")
@pytest.mark.parametrize("interrupt", [False, True], ids=["handler", "interrupt"])
def test_a_signal_amid_an_import_meets_and_leaves_no_half_module(
    slow: str, interrupt: bool
) -> None:
    load, met = imported(import_module), list[ModuleType]()

    def handler(*_: object) -> None:
        assert slow in sys.modules
        if interrupt:
            raise KeyboardInterrupt
        met.append(load(slow))
        assert met[0].whole

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        found = load(slow)
        assert not interrupt and met == [found]
    except KeyboardInterrupt:
        assert interrupt
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert load(slow).whole


def test_an_error_is_raised_and_the_next_call_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = imported(import_module)
    with pytest.raises(ModuleNotFoundError, match="comes_later"):
        load("comes_later")
    (tmp_path / "comes_later.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert load("comes_later").__name__ == "comes_later"


def test_without_another_thread_the_main_thread_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert imported(lambda: imported(threading.get_ident)())() == threading.get_ident()


CALLS = """
import sys, threading
import numpy as np
{framework}
import tilefold
from tilefold.common import first_use

class Watching:
    def find_spec(self, name, path=None, target=None):
        if first_use._gate.owner != threading.get_ident():
            print(name)

sys.meta_path.insert(0, Watching())
q = np.ones((1, 2, 40, 8), np.float32)
{array}
for mask in (None, tilefold.causal()):
    o, lse = tilefold.attention(q, q, q, mask=mask, return_lse=True)
    tilefold.attention_backward(o, q, q, q, o, lse, mask=mask)
known = [tilefold.Problem.of((1, 2, 64, 24), mask=tilefold.local(4))]
for future in tilefold.compile_async(known):
    future.result()
"""


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["numpy", pytest.param("torch", marks=pytest.mark.slow)])
def test_all_imports_of_first_calls_are_such_imports(framework: str, tmp_path: Path) -> None:
    pytest.importorskip(framework)
    code = CALLS.format(
        framework=f"import {framework}",
        array="q = torch.from_numpy(q)" if framework == "torch" else "",
    )
    environment = {**os.environ, "TILEFOLD_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.slow
@needs_fork
def test_a_fork_amid_a_first_call_and_amid_compiling_ahead(tmp_path: Path) -> None:
    """A tenth of a second is inside of the imports, and later ones are inside of LLVM."""
    code = """
import os, signal, threading, time
import numpy as np
import tilefold
x = np.ones((1, 1, 8, 8), np.float32)
known = [tilefold.Problem.of((1, 2, 64, dim)) for dim in range(3, 7)]
thread = threading.Thread(target=lambda: tilefold.attention(x, x, x))
futures, children = [], []
def fork():
    children.append(os.fork())
    if children[-1] == 0:
        signal.alarm(30)
        tilefold.attention(x, x, x)
        os._exit(17)
thread.start()
for pause in (0.0, 0.01, 0.02, 0.04):
    time.sleep(pause)
    fork()
thread.join()
futures = tilefold.compile_async(known, operations=["forward"])
for pause in (0.0, 0.02):
    time.sleep(pause)
    fork()
[future.result() for future in futures]
print({os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children})
"""
    environment = {**os.environ, "TILEFOLD_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "{17}\n", done.stderr


@pytest.mark.slow
def test_a_compiled_function_may_make_the_first_call() -> None:
    pytest.importorskip("torch", "2.12")
    code = """
import sys, torch, tilefold
assert "tilefold.frontends.torch.calls" not in sys.modules
call = torch.compile(lambda q: tilefold.attention(q, q, q), fullgraph=True, backend="eager")
q = torch.ones(1, 2, 20, 8)
assert call(q).equal(tilefold.attention(q, q, q))
"""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
