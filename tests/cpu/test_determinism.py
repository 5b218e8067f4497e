"""The same bits whatever the threads, run after run, from several callers at once, after a fork."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import RULES, Sizes
from compare import assert_same
from paths import finding
from trial import PASSES, Array, Trial, numbers, planned, problem, run
from variants import score_of

import tilefold
from tilefold import Rule, causal, documents, full
from tilefold.backends.cpu import dispatch, threads
from tilefold.backends.cpu import plan as planning
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.launches import Launch
from tilefold.backends.cpu.plan import CpuPlan

BATCH, HEADS, LENGTH = 2, (4, 2), 300

MASKS: dict[str, Rule] = {
    "full": full(),
    "causal": causal(),
    "documents of batch": documents(np.sort(np.arange(2 * LENGTH).reshape(2, -1) * 7 % 4, axis=1)),
    "heads differ": RULES["heads-differ"](Sizes(BATCH, HEADS[0], LENGTH, LENGTH)),
}


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many threads each kernel was run on; the number set before the test comes back after."""
    seen: list[int] = []
    real = threads.run

    def counted(address: int, arguments: int, workers: int) -> None:
        seen.append(workers)
        real(address, arguments, workers)

    monkeypatch.setattr(threads, "run", counted)
    before = threads.get_num_threads()
    yield seen
    threads.set_num_threads(before)


def a_trial(mask: str = "causal", dtype: str = "float32", length: int = LENGTH) -> Trial:
    """Grouped queries, two sequences, long enough for several block rows and several threads."""
    sizes = problem(length, length, 40, MASKS[mask], dtype, dim_v=24, batch=BATCH, heads=HEADS)
    return Trial(sizes)


def a_scored_trial() -> Trial:
    """The same with a modified score and sinks."""
    score = score_of("several in order", Sizes(BATCH, HEADS[0], LENGTH, LENGTH))
    options = {"batch": BATCH, "heads": HEADS, "score": score, "sinks": 2}
    return Trial(problem(LENGTH, LENGTH, 40, causal(), "float32", **options), score=score)


# Threads and runs -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.feature("T08", "M04", "M05")
@pytest.mark.parametrize(
    ("mask", "dtype"),
    [
        *zip(MASKS, itertools.cycle(["float64", "float32"])),
        *[("scored", "float32"), ("causal", "bfloat16"), ("heads differ", "float16")],
    ],
)
def test_the_same_bits_on_any_number_of_threads(mask: str, dtype: str, workers: list[int]) -> None:
    trial = a_scored_trial() if mask == "scored" else a_trial(mask, dtype)
    given = numbers(trial)
    for operation, form in PASSES:
        workers.clear()
        tilefold.set_num_threads(1)
        first = run(trial, given, operation, form)
        assert set(workers) == {1}
        for count in (2, 4, 4, 2, 1, 3):
            workers.clear()
            tilefold.set_num_threads(count)
            again = run(trial, given, operation, form)
            assert max(workers) == count  # so several threads did take part
            for name, array in first.items():
                assert_same(f"{name} of {operation} {form} on {count} threads", again[name], array)


@pytest.mark.slow
@pytest.mark.feature("T08")
def test_workers_take_several_small_items_at_a_time(
    workers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    claims: list[tuple[int, int]] = []
    real = dispatch._items_per_claim

    def noted(plan: CpuPlan, launch: Launch) -> int:
        claims.append((real(plan, launch), launch.items))
        return claims[-1][0]

    monkeypatch.setattr(dispatch, "_items_per_claim", noted)
    trial = Trial(problem(9, 9, 40, causal(), batch=331, heads=(5, 5)))
    given = numbers(trial)
    for count in (2, 3):
        tilefold.set_num_threads(count)
        for operation, form in PASSES:
            run(trial, given, operation, form)  # compares with the reference
        assert max(workers) == count
    assert all(1 < claim <= items // 8 for claim, items in claims)
    assert any(items % claim for claim, items in claims)  # and the last one takes fewer


@pytest.mark.slow
@pytest.mark.feature("T08")
def test_the_same_bits_from_run_to_run(workers: list[int]) -> None:
    trial = a_trial("documents of batch")
    given = numbers(trial)
    tilefold.set_num_threads(4)
    for operation, form in PASSES:
        first = run(trial, given, operation, form)
        for _ in range(10):
            for name, array in run(trial, given, operation, form).items():
                assert_same(name, array, first[name])


@pytest.mark.feature("T08")
def test_work_is_spread_over_batch_heads_and_sequence() -> None:
    def items(batch: int, heads: tuple[int, int], len_q: int, len_k: int) -> dict[str, int]:
        sizes = problem(len_q, len_k, 8, causal(), batch=batch, heads=heads)
        launches = [
            launch
            for operation, form in PASSES
            if form != "fused"
            for launch in planned(sizes, host(), operation, form).launches
        ]
        return {launch.spec.kernel: launch.items for launch in launches}

    one = items(1, (1, 1), 1000, 1000)
    assert items(3, (4, 2), 1000, 1000) == {
        "forward": 12 * one["forward"],
        "delta": 12 * one["delta"],
        "backward_dq": 12 * one["backward_dq"],
        "backward_dkv": 6 * one["backward_dkv"],  # its owners are keys, and key heads are half
        "backward": 6 * one["backward"],  # here each key head has three owners
        "reduce_dq": 12 * one["reduce_dq"],
    }
    assert one["backward"] == 3
    longer = items(1, (1, 1), 4000, 2000)
    assert longer["forward"] >= 3 * one["forward"] >= 12
    assert longer["backward_dq"] >= 3 * one["backward_dq"] >= 12
    assert longer["backward_dkv"] >= 1.5 * one["backward_dkv"] >= 6


@pytest.mark.feature("T08")
@pytest.mark.parametrize(("operation", "form"), PASSES)
@pytest.mark.slow
def test_four_workers_share_the_work(
    operation: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A team may come late and find all work done. Here four meet first, then all enter.
    came = []

    def together(address: int, arguments: int, workers: int) -> None:
        meeting = threading.Barrier(workers)
        kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

        def work(_: int) -> None:
            meeting.wait(timeout=20)
            kernel(arguments)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, range(workers)))
        came.append((ctypes.c_int64 * 2).from_address(arguments)[1])  # the counter of workers

    monkeypatch.setattr(threads, "run", together)
    before = threads.get_num_threads()
    threads.set_num_threads(4)
    try:
        trial = a_trial()
        run(trial, numbers(trial), operation, form)
    finally:
        threads.set_num_threads(before)
    assert set(came) == {4}


# Several callers at once ----------------------------------------------------------------------


def call(seed: int, length: int = 200) -> list[Array]:
    """Attention and its gradients through the public calls; what they are depends on the seed."""
    random = np.random.default_rng(seed)
    dim = 8 + 8 * (seed % 3)
    q, k, v, do = random.normal(size=(4, 1, 2, length + seed, dim)).astype(np.float32)
    mask = [causal(), full(), documents(np.arange(length + seed) // 50)][seed % 3]
    o, lse = tilefold.attention(q, k, v, mask=mask, return_lse=True)
    return [o, lse, *tilefold.attention_backward(do, q, k, v, o, lse, mask=mask)]


def same(found: list[Array], expected: list[Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.feature("T08")
def test_calls_from_several_python_threads_at_once() -> None:
    # The first calls of all threads compile the same kernels at the same time.
    meeting = threading.Barrier(6)

    def calls(seed: int) -> list[list[Array]]:
        meeting.wait(timeout=20)
        return [call(seed % 3) for _ in range(8)]

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(calls, range(6)))
    expected = [call(seed) for seed in range(3)]
    for seed, found in enumerate(results):
        assert all(same(one, expected[seed % 3]) for one in found), seed


def test_scratch_belongs_to_a_thread_and_to_a_call() -> None:
    first = dispatch._workspace(4096)
    assert dispatch._workspace(4096).pointer != first.pointer, "the first is in use"
    dispatch._local.workspace = first
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(dispatch._workspace, 4096).result() is not first
    assert dispatch._workspace(4096) is first


def test_large_scratch_is_not_kept() -> None:
    kept = dispatch._local.workspace
    assert dispatch._workspace(dispatch.KEPT_BYTES + 1).size > dispatch.KEPT_BYTES
    assert dispatch._local.workspace is kept


# After a fork ---------------------------------------------------------------------------------


def in_a_fresh_process(code: str) -> list[str]:
    """Run code in a new interpreter that has imported this file; return the lines it printed."""
    done = subprocess.run(
        [sys.executable, "-c", f"from test_determinism import *\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
        env=finding(__file__),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def in_a_fork(work: Callable[[], bool], seconds: float = 30) -> str:
    """What becomes of work in a forked child: "right", "wrong" or "hangs"."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return "right" if status == 0 else "wrong"
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"


def fork_after_use(imported: str) -> None:
    """Use the team on four threads, fork, and call in the child: known kernels and a new one."""
    if imported:
        __import__(imported)
    tilefold.set_num_threads(4)
    expected = [call(seed) for seed in range(3)]
    print(threads._current_team().name)
    print(in_a_fork(lambda: all(same(call(seed), expected[seed]) for seed in range(3))))
    print(in_a_fork(lambda: in_a_fork(lambda: same(call(1), expected[1])) == "right"))
    odd = np.ones((1, 2, 300, 27), np.float32)
    print(in_a_fork(lambda: np.allclose(tilefold.attention(odd, odd, odd), odd)))
    print("right" if same(call(2), expected[2]) else "wrong")


@pytest.mark.slow
@pytest.mark.feature("T08")
@pytest.mark.parametrize("imported", ["", "torch"])
def test_calls_after_a_fork(imported: str) -> None:
    team, *fates = in_a_fresh_process(f"fork_after_use({imported!r})")
    assert fates == ["right"] * 4
    if imported:
        assert "torch" in team  # its OpenMP runtime was in use, which does not survive a fork


def pool_after_use() -> None:
    tilefold.set_num_threads(4)
    expected = [call(seed) for seed in range(3)]
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.map_async(call, [0, 1, 2] * 4).get(timeout=60)
    print(all(same(one, expected[number % 3]) for number, one in enumerate(found)))


@pytest.mark.slow
@pytest.mark.feature("T08")
def test_calls_in_a_pool_of_forked_processes() -> None:
    assert in_a_fresh_process("pool_after_use()") == ["True"]


def fork_among_callers() -> None:
    """Fork again and again while other threads are somewhere inside of calls."""
    tilefold.set_num_threads(2)
    expected = call(0)
    stop = threading.Event()

    def busy(seed: int) -> None:
        while not stop.is_set():
            call(seed, 40)

    callers = [threading.Thread(target=busy, args=[seed]) for seed in range(3)]
    for caller in callers:
        caller.start()
    print({in_a_fork(lambda: same(call(0), expected)) for _ in range(40)})
    stop.set()
    for caller in callers:
        caller.join()


@pytest.mark.slow
def test_a_fork_while_other_threads_are_calling() -> None:
    assert in_a_fresh_process("fork_among_callers()") == ["{'right'}"]


def fork_while_plans_are_looked_up() -> None:
    expected = call(0)
    held, release = threading.Event(), threading.Event()

    class Slow:
        """A key that takes its time: the one who looks it up stands in the midst of the table."""

        def __hash__(self) -> int:
            held.set()
            release.wait()
            return 0

    thread = threading.Thread(target=planning._recent.get, args=[Slow()])
    thread.start()
    held.wait()
    print(in_a_fork(lambda: same(call(0), expected), seconds=10))
    release.set()
    thread.join()


@pytest.mark.slow
def test_a_fork_while_a_plan_is_looked_up() -> None:
    assert in_a_fresh_process("fork_while_plans_are_looked_up()") == ["right"]
