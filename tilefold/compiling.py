"""Compiling ahead: kernels of problems that are known before their arrays are.

Threads in the background plan, write and compile. A call that needs a kernel before it is done
waits for it, and never compiles it again (see `once`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tilefold.backends import calls, registry
from tilefold.common.check import choice
from tilefold.planning.plan import OPERATIONS
from tilefold.problems.attention import Problem, check_problem
from tilefold.problems.request import check_layout

MOST_THREADS = 8
"""At most: LLVM compiles one kernel at a time, and PyTorch holds Python's lock while Metal does."""


def compile_async(
    problems: Iterable[Problem],
    *,
    operations: Iterable[str] = OPERATIONS,
    layout: str = "bhnd",
    device: Any = "cpu",
) -> list[Future[None]]:
    """Compile kernels in the background, for calls whose shapes are known ahead.

    >>> import tilefold
    >>> known = [tilefold.Problem.of((1, 2, length, 8)) for length in (64, 256)]
    >>> futures = tilefold.compile_async(known, operations=["forward"])
    >>> [future.result() for future in futures]
    [None, None]

    Nothing has to wait for the futures: a call that needs an unfinished kernel waits for that one
    alone. Where a compiler fails, so does the future, and so does the call, which tries again. A
    program that ends meanwhile waits for what is still to be compiled.

    Arguments:
        problems: what will be called, such as `Problem.of((1, 8, 2048, 64), mask=causal())`; the
            arrays are expected to be contiguous
        operations: "forward", "backward" or both
        layout: the order of the arrays' axes, as for `attention`
        device: "cpu", "mps" for the Apple GPU of this machine, "cuda" or "cuda:1" for one of
            NVIDIA's or AMD's, or what `tilefold.metal.emulated()` or `tilefold.triton.gpu()`
            returns

    Returns:
        One future for each problem, in order; their result is None

    Raises:
        TypeError: a problem is not a `Problem`
        ValueError: an operation, layout or device is not allowed
        NotImplementedError: there is no such device here

    On a GPU one kernel serves every length, batch and number of heads, so a list of lengths costs
    one compilation. How much goes on at the same time depends on the compilers: LLVM compiles one
    kernel at a time while Python writes the text of the next; PyTorch holds Python's lock while
    Metal compiles, which leaves the time to what runs outside of Python.
    """
    check_layout(layout)
    asked = [*operations]
    for operation in asked:
        choice("operations", operation, OPERATIONS)
    known = [*problems]
    for problem in known:
        check_problem(problem, "problems must be tilefold.Problem objects")
    machine = registry.machine(device)

    def work(problem: Problem) -> None:
        for operation in asked:
            calls.compile_ahead(machine, problem, operation, layout)

    threads = min(MOST_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tilefold-compile")
    futures = [pool.submit(work, problem) for problem in known]
    pool.shutdown(wait=False)  # its threads end with their work
    return futures
