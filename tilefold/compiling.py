"""Compiling ahead: kernels of problems that are known before their arrays are.

Threads in the background plan, emit and compile. A call that needs an unfinished kernel waits for
it and never compiles it a second time (see `once`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from tilefold.backends import calls, registry
from tilefold.common.check import choice
from tilefold.planning.plan import OPERATIONS
from tilefold.problems.attention import Problem, check_problem
from tilefold.problems.request import check_layout

MOST_THREADS = 8
"""The largest number of threads. More would wait: LLVM compiles one kernel at a time, and PyTorch
holds Python's lock while Metal compiles.
"""


def compile_async(
    problems: Iterable[Problem],
    *,
    operations: Iterable[str] = OPERATIONS,
    layout: str = "bhnd",
    device: Any = "cpu",
) -> list[Future[None]]:
    """Compile the kernels of known problems in the background, before they are called.

    >>> import tilefold
    >>> known = [tilefold.Problem.of((1, 2, length, 8)) for length in (64, 256)]
    >>> futures = tilefold.compile_async(known, operations=["forward"])
    >>> [future.result() for future in futures]
    [None, None]

    You need not wait for the futures: a call that needs an unfinished kernel waits for that kernel
    only. If a compiler fails, its future holds the error, and a call tries to compile again. A
    program that ends in the meantime first waits for all compilations. If the system can start no
    thread, the kernels are compiled before this function returns.

    Arguments:
        problems: the problems to be called, such as `Problem.of((1, 8, 2048, 64), mask=causal())`.
            Their arrays are expected to be contiguous
        operations: "forward", "backward" or both
        layout: the order of the arrays' axes, as for `attention`
        device: "cpu", "mps" for the Apple GPU of this machine, "cuda" or "cuda:1" for a GPU of
            NVIDIA or AMD, or a machine from `tilefold.metal.emulated()` or `tilefold.triton.gpu()`

    Returns:
        One future for each problem, in order; the result of each is None

    Raises:
        TypeError: a problem is not a `Problem`
        ValueError: an operation, layout or device is not allowed
        NotImplementedError: there is no such device here

    On a GPU one kernel serves every length, batch and number of heads, so a list of lengths costs
    one compilation. The compilers limit the parallel work. LLVM compiles one kernel at a time,
    while Python emits the source of the next one. PyTorch holds Python's lock while Metal compiles,
    so only code outside of Python runs meanwhile.
    """
    check_layout(layout)
    asked = [*operations]
    for operation in asked:
        choice("operations", operation, OPERATIONS)
    known = [*problems]
    for problem in known:
        check_problem(problem, "problems must be tilefold.Problem objects")
    machine = registry.machine(device)

    futures: list[Future[None]] = [Future() for _ in known]
    waiting: SimpleQueue[tuple[Future[None], Problem]] = SimpleQueue()
    for pair in zip(futures, known, strict=True):
        waiting.put(pair)

    def work() -> None:
        while not waiting.empty():
            with contextlib.suppress(Empty):  # another thread took the last one
                compile_one(*waiting.get_nowait())

    def compile_one(future: Future[None], problem: Problem) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            for operation in asked:
                calls.compile_ahead(machine, problem, operation, layout)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    try:
        for number in range(min(MOST_THREADS, os.cpu_count() or 1, len(known))):
            Thread(target=work, name=f"tilefold-compile-{number}").start()
    except RuntimeError:  # the system starts no more: those that started do the work
        if number == 0:
            work()
    return futures
