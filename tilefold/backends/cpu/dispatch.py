"""Runs plans: a call is prepared once for the strides of its operands, then run on any pointers.

Each run of a prepared call does little: it copies a template of each argument block, writes the
pointers into it, and passes it to the threads. Each run owns its argument blocks and each thread
owns its workspace, so any number of threads may run one prepared call at the same time.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu import claims, growth, threads
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.kernel import CpuKernel, double_bits, kernel
from tilefold.backends.cpu.kernels.arguments import WORK, axes, factors
from tilefold.backends.cpu.launches import Launch
from tilefold.backends.cpu.plan import CpuPlan, plan
from tilefold.backends.protocols import Array, Arrays, Strides
from tilefold.common.copies import changed
from tilefold.masks.tables import Given, Input
from tilefold.planning.plan import Scratch
from tilefold.problems import dropout
from tilefold.problems.attention import STATISTICS, Problem, contiguous
from tilefold.problems.buffer import Buffer

_ALONE_FLOPS = 1e6
"""Calls with fewer operations than this run on one thread.

The value lies between two bounds measured on Zen 4 (EPYC, two cores, float32). Calls that follow
each other gain from a second thread from 0.3e6 on, since a spinning team takes 1.6 us to start.
After a pause of 5 ms the team sleeps and takes about 35 us to wake, which pays from 6e6 on.
`benchmarks/call_cost.py` measures both.
"""

_ALONE_BYTES = 2**18
"""Such calls also move fewer bytes than this: 10 us of a core at 25 GB/s. It is not tuned."""

KEPT_BYTES = 2**26
"""A thread keeps scratch up to this size for its next call. It is not tuned."""

_EXTRA = ("max", "dlse", "dsinks")
"""Operands of which a plan has to know whether they are there."""

WORKSPACE, _RUNS, _LEN_K = map(WORK.index, ("workspace", "runs", "len_k"))


@dataclass(frozen=True, eq=False)
class Call:
    """A plan prepared for operands of certain strides; only pointers and threads are missing.

    `strides` has the operands in the order of their pointers.
    """

    plan: CpuPlan
    steps: tuple[_Step, ...]
    alone: bool
    strides: Mapping[str, Strides]

    @property
    def data_bytes(self) -> int:
        """The size of the mask's tables and of the runs, in bytes."""
        return self.plan.data_bytes

    def launch(self, arrays: Arrays, operands: Sequence[Array]) -> None:
        """Run the kernels in order; `operands` are in the order of `strides`."""
        self.run(*map(arrays.pointer, operands))

    def compile(self) -> None:
        """Do nothing: the kernels of a call are already loaded."""

    def with_keys(self, problem: Problem, strides: Mapping[str, Strides]) -> Call | None:
        """See `protocols.Prepared`: the argument block with other runs, length and strides."""
        plan = growth.with_keys(self.plan, problem)
        if plan is None:
            return None
        every = {**self.strides, **strides}
        if problem.score is not None:  # its numbers may be others
            return prepare(plan, every)
        (launch,), (step,) = plan.launches, self.steps
        order = list(every)
        words = np.frombuffer(step.template, np.int64).copy()
        words[_RUNS], words[_LEN_K] = launch.runs.runs.ctypes.data, problem.len_k
        for place, operand in step.places:
            name = order[operand] if operand < len(order) else ""
            if name in strides:
                words[place + 1 : place + 5] = strides[name]
        step = changed(step, template=words.tobytes())
        return Call(plan, (step,), _is_alone(plan), every)

    def run(self, *pointers: int) -> None:
        """Run the kernels in order on operands at these addresses, in the order of `strides`.

        The caller keeps the operands alive meanwhile.
        """
        made = [_allocate(name, scratch) for name, scratch in self.plan.buffers.items()]
        pointers += tuple([buffer.pointer for buffer in made])
        workers = 1 if self.alone else threads.number()
        for step in self.steps:
            step.run(pointers, workers)


@dataclass(frozen=True, eq=False)
class _Step:
    """One kernel of a call: its argument block without workspace and addresses of operands.

    `places` says which word of the block takes which pointer of the call.
    """

    kernel: CpuKernel
    workspace_bytes: int
    items: int
    words: type[ctypes.Array[ctypes.c_int64]]
    template: bytes
    places: tuple[tuple[int, int], ...]

    def run(self, pointers: Sequence[int], workers: int) -> None:
        workers = min(workers, self.items)
        workspace = _workspace(workers * self.workspace_bytes)
        block = self.words.from_buffer_copy(self.template)
        block[WORKSPACE] = workspace.pointer
        for place, operand in self.places:
            block[place] = pointers[operand]
        threads.run(self.kernel.loaded.address, ctypes.addressof(block), workers)
        if workspace.size <= KEPT_BYTES:
            _local.workspace = workspace


def call(problem: Problem, device: Device, operation: str, strides: Mapping[str, Strides]) -> Call:
    """The call of a problem for operands of these strides, in canonical axes."""
    extra = tuple([name for name in strides if name in _EXTRA])
    if operation == "backward":
        in_place = strides["dq"][3] == 1
        inputs = tuple([int(name[6:]) for name in strides if name.startswith("dinput")])
        made = plan(problem, device, operation, in_place=in_place, extra=extra, inputs=inputs)
        return prepare(made, strides)
    if operation == "key_mass":
        return prepare(plan(problem, device, operation), strides)
    heads_interleaved = all(
        0 < abs(strides[name][1]) < abs(strides[name][2]) for name in ("k", "v")
    )
    form = "interleaved" if heads_interleaved else "auto"
    return prepare(plan(problem, device, operation, form, extra=extra), strides)


def run(plan: CpuPlan, operands: Mapping[str, Buffer]) -> None:
    """Run the kernels of a plan in order on operands by their names in the kernels."""
    strides = {name: buffer.strides for name, buffer in operands.items()}
    prepare(plan, strides).run(*[buffer.pointer for buffer in operands.values()])


def prepare(plan: CpuPlan, strides: Mapping[str, Strides]) -> Call:
    """The loaded kernels of a plan, and their argument blocks for operands of these strides.

    The axes of `strides` are canonical. The call takes pointers in the order of `strides`.
    """
    made = {name: contiguous(scratch.shape) for name, scratch in plan.buffers.items()}
    steps = tuple(_step(plan, launch, {**strides, **made}) for launch in plan.launches)
    return Call(plan, steps, _is_alone(plan), dict(strides))


def _is_alone(plan: CpuPlan) -> bool:
    """True for a call so small that it runs on one thread."""
    problem = plan.problem
    flops = 2 * problem.pairs * (problem.dim + problem.dim_v)
    return flops < _ALONE_FLOPS and problem.bytes(plan.operation) < _ALONE_BYTES


def _items_per_claim(plan: CpuPlan, launch: Launch) -> int:
    """How many items a worker takes at a time."""
    problem, items = plan.problem, max(1, launch.items)
    flops = 2 * problem.pairs * (problem.dim + problem.dim_v) / items
    size = problem.bytes(plan.operation) / items
    most = min(claims.FLOPS / (flops or 1), claims.BYTES / (size or 1))
    return claims.items_per_claim(most, items, threads.number())


def _step(plan: CpuPlan, launch: Launch, strides: Mapping[str, Strides]) -> _Step:
    """The step of a launch; `strides` has all operands, in the order of the pointers."""
    problem, spec, runs = plan.problem, launch.spec, launch.runs
    function = kernel(spec, plan.device)
    workspace_bytes = function.workspace_bytes + launch.scratch_bytes
    row_b = runs.planes_h * launch.block_rows if runs.planes_b > 1 else 0
    words = [
        0,
        0,
        launch.items,
        _items_per_claim(plan, launch),
        launch.order.ctypes.data,
        len(launch.order),
        runs.rows.ctypes.data,
        runs.runs.ctypes.data,
        row_b,
        launch.block_rows if runs.planes_h > 1 else 0,
        launch.item_rows,
        len(launch.owners) if spec.in_turn else launch.block_rows,
        launch.owners.ctypes.data,
        0,
        workspace_bytes,
        launch.heads,
        problem.heads_q // problem.heads_kv,
        launch.heads_per_item,
        problem.len_q,
        problem.len_k,
        *map(double_bits, factors(problem.scale, STATISTICS[problem.dtype])),
    ]
    order = list(strides)
    places = []
    for name in spec.arguments:
        actual = launch.buffers.get(name, name)
        if actual in order:
            places.append((len(words), order.index(actual)))
        else:
            assert name in spec.row.optional, name
        words += [0, *strides.get(actual, (0,) * len(axes(name)))]
    words += plan.parameters
    for table in plan.tables:
        if isinstance(table, Given):
            places.append((len(words), order.index(table.name)))
            words += [0, *strides[table.name]]
        else:
            words += _words_of_tables([table])
    if spec.score is not None:
        parts = plan.scores[spec.score]
        words += [double_bits(x) if isinstance(x, float) else x for x in parts.parameters]
        for table in parts.tables:
            if isinstance(table, Input):
                places.append((len(words), order.index(table.name)))
                words += [0, *strides[table.name]]
            else:
                words += _words_of_tables([table])
    for number, shape in enumerate(launch.shapes):
        places.append((len(words), order.index(launch.buffers[f"target{number}"])))
        words += [0, *contiguous(shape), *shape]
    if spec.dropout:
        places.append((len(words), order.index("seed")))
        chance = problem.dropout
        words += [0, dropout.threshold(chance), double_bits(dropout.factor(chance))]
    assert len(words) == len(function.names), (len(words), function.names)
    words += [0] * launch.counters
    template = np.array(words, np.int64).tobytes()
    kind = ctypes.c_int64 * len(words)
    return _Step(function, workspace_bytes, launch.items, kind, template, tuple(places))


def _words_of_tables(tables: Iterable[Any]) -> list[int]:
    """The addresses and strides of tables that a plan holds."""
    words = []
    for table in tables:
        item = table.array.itemsize
        words += [table.array.ctypes.data, *(stride // item for stride in table.array.strides)]
    return words


def _allocate(name: str, scratch: Scratch) -> _Memory:
    """Memory for a plan's buffer, from the start of a cache line; tests use `name`."""
    return _Memory(scratch.bytes)


class _Memory:
    """Memory of `size` bytes from the start of a cache line."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._array = np.empty(size + 64, np.uint8)
        first = ctypes.c_char.from_buffer(self._array)  # type: ignore[arg-type]  # it is one
        start = ctypes.addressof(first)
        self.pointer = -(-start // 64) * 64

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """The memory as an array."""
        start = -self._array.ctypes.data % 64
        return self._array[start : start + self.size]


_NONE = _Memory(0)


class _Local(threading.local):
    workspace = _NONE


_local = _Local()


def _workspace(size: int) -> _Memory:
    """This thread's scratch, taken out of its place; a larger one is made if it is too small.

    The caller puts it back when the kernel has ended. A signal handler or a finaliser that calls in
    the same thread meanwhile finds the place empty, and makes scratch of its own.
    """
    if size > KEPT_BYTES:
        return _Memory(size)
    held, _local.workspace = _local.workspace, _NONE
    return held if held.size >= size else _Memory(size)
