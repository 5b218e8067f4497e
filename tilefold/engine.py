"""Runs a plan on buffers: fills the argument blocks, hands them to the threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu import threads
from tilefold.backends.cpu.arguments import OPERANDS
from tilefold.backends.cpu.kernel import double_bits, kernel
from tilefold.buffer import Buffer
from tilefold.device import host
from tilefold.plan import Launch, Plan, Scratch, plan
from tilefold.problem import Problem

_ALONE_FLOPS = 1e6
"""Below this one thread works: 10 us of a core at 100 GFLOP/s (not tuned)."""

_local = threading.local()


def forward(problem: Problem, q: Buffer, k: Buffer, v: Buffer, o: Buffer, lse: Buffer) -> None:
    """Write o and lse."""
    run(plan(problem, host(), "forward"), {"q": q, "k": k, "v": v, "o": o, "lse": lse})


def backward(
    problem: Problem,
    do: Buffer,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    o: Buffer,
    lse: Buffer,
    dq: Buffer,
    dk: Buffer,
    dv: Buffer,
) -> None:
    """Write dq, dk and dv.

    The fused kernel adds to whole rows of dq, so it needs them contiguous; the split form takes any
    strides.
    """
    form = "auto" if dq.strides[3] == 1 else "split"
    run(
        plan(problem, host(), "backward", form),
        {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv},
    )


def run(plan: Plan, operands: Mapping[str, Buffer]) -> None:
    """Run the kernels of a plan in order; `operands` by their names in the kernels."""
    buffers = dict(operands)
    for name, scratch in plan.buffers.items():
        buffers[name] = _allocate(name, scratch)
    problem = plan.problem
    pairs = problem.batch * problem.heads_q * problem.len_q * problem.len_k
    small = 2 * pairs * (problem.dim + problem.dim_v) < _ALONE_FLOPS
    for launch in plan.launches:
        _launch(plan, launch, buffers, 1 if small else threads.get_num_threads())


def _allocate(name: str, scratch: Scratch) -> Buffer:
    """Memory of a plan's buffer, from the start of a cache line; `name` is for who watches it."""
    itemsize = np.dtype(scratch.dtype).itemsize
    size = math.prod(scratch.shape) * itemsize
    held = np.empty(size + 64, np.uint8)
    strides = [1]
    for length in reversed(scratch.shape[1:]):
        strides.insert(0, strides[0] * length)
    address = _aligned(held.ctypes.data)
    return Buffer(address, scratch.shape, tuple(strides), scratch.dtype, held)


def _launch(plan: Plan, launch: Launch, buffers: Mapping[str, Buffer], workers: int) -> None:
    problem, spec, runs = plan.problem, launch.spec, launch.runs
    function = kernel(spec, plan.device)
    workers = max(1, min(workers, launch.items))
    row_b = runs.planes_h * launch.block_rows if runs.planes_b > 1 else 0
    words = [
        0,
        0,
        launch.items,
        launch.order.ctypes.data,
        len(launch.order),
        runs.rows.ctypes.data,
        runs.runs.ctypes.data,
        row_b,
        launch.block_rows if runs.planes_h > 1 else 0,
        launch.item_rows,
        launch.block_rows,
        _workspace(workers * function.workspace_bytes),
        function.workspace_bytes,
        launch.heads,
        problem.heads_q // problem.heads_kv,
        problem.len_q,
        problem.len_k,
        double_bits(problem.scale),
    ]
    for name in OPERANDS[spec.operation]:
        buffer = buffers[name]
        words.append(buffer.pointer)
        words.extend(buffer.strides)
    words.extend(plan.parameters)
    for table in plan.tables:
        words.append(table.array.ctypes.data)
        item = table.array.itemsize
        words.extend(stride // item for stride in table.array.strides)
    assert len(words) == len(function.names), (len(words), function.names)
    block = np.array(words, np.int64)
    threads.run(function.loaded.address, block.ctypes.data, workers)


def _workspace(size: int) -> int:
    """The address of this thread's scratch, aligned to a cache line; grown when it is too small."""
    held: NDArray[np.uint8] | None = getattr(_local, "workspace", None)
    if held is None or held.size < size + 64:
        held = _local.workspace = np.empty(size + 64, np.uint8)
    return _aligned(held.ctypes.data)


def _aligned(address: int) -> int:
    return -(-address // 64) * 64
