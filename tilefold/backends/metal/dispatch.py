"""Runs plans of Metal kernels on a machine: binds their arguments and launches them in order.

A machine compiles a source and calls its kernels as `torch.mps.compile_shader` does: an Apple GPU
through PyTorch, or the emulator, which runs the same source on the CPU. Launches follow each other
without a synchronisation between them, since both machines run kernels in the order of the calls.

A machine keeps its compiled kernels by their sources. It also keeps the runs and tables of a plan,
which are copied to it once.
"""

from __future__ import annotations

import math
import sys
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tilefold.backends import protocols
from tilefold.backends.launching import (
    check_held,
    mask_arguments,
    runs_on,
    stride_arguments,
    tables_on,
)
from tilefold.backends.metal import emulate, families, modified, source
from tilefold.backends.metal.kernels.arguments import RUNS, SINKS, arrays, sizes
from tilefold.backends.metal.plan import Launch, MetalPlan
from tilefold.backends.metal.spec import SIDE, MetalSpec, whole
from tilefold.backends.protocols import Array, Arrays, Strides
from tilefold.common.check import shown
from tilefold.common.lru import LruCache
from tilefold.common.single_flight import SingleFlight
from tilefold.planning.kernels import STRIDED
from tilefold.problems import dropout
from tilefold.problems.attention import Problem

Spec = TypeVar("Spec", bound=Hashable)

WIDEST_MOVE = 4
"""The largest number of elements that a thread moves at once: 16 bytes of float32."""

MOST_BUFFERS = 31
"""The largest number of buffers that Metal binds to one kernel."""

MOST_NUMBERS = 4096 // 8
"""The largest number of 64-bit integers that `setBytes` takes."""


class CompileError(RuntimeError):
    """Metal made no kernel of a source; the message names the file with the source."""


class MachineCache:
    """The cache of a machine: its kernels, and the data of the newest plans."""

    def __init__(self) -> None:
        self.libraries: SingleFlight[Any] = SingleFlight(most=512)
        self.kernels: SingleFlight[Callable[..., None]] = SingleFlight(most=512)
        self.data: LruCache[dict[str, Array]] = LruCache(most=128, most_bytes=256 * 2**20)


class Machine(protocols.Machine):
    """A machine that compiles Metal sources and runs their kernels."""

    family: str
    """The family of the GPU whose tables and limits plans follow: see `families`."""
    kept: MachineCache
    """The cache of compiled kernels and copied data."""

    backend = "metal"
    aligned = WIDEST_MOVE
    reads_dlse = True

    @abstractmethod
    def compile(self, text: str) -> Any:
        """An object whose attributes are the kernels of a source. Raises SyntaxError.

        To ask for an attribute runs the back end of Metal's compiler, and raises RuntimeError.
        """

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A contiguous array whose elements are not set."""

    @abstractmethod
    def upload(self, array: NDArray[Any]) -> Array:
        """A copy of an array where kernels can read it."""

    def add_parts(self, parts: Array, into: Array) -> None:
        """Write the sum of parts, along their first axis."""
        into[...] = parts.sum(0)

    def alignment(self, arrays: Mapping[str, Array]) -> int:
        """The number of elements of every array that may be moved at once, by their addresses."""
        return alignment_of(arrays)


@dataclass(frozen=True, eq=False)
class Emulated(Machine):
    """The emulator as a machine: kernels run on the CPU, on NumPy arrays and on CPU tensors.

    `checks` and `tensor_layout` are the arguments of `tilefold.metal.emulate.compile_shader`.
    """

    family: str = "apple9"
    checks: str = "fast"
    tensor_layout: int = 0
    kept: MachineCache = field(default_factory=MachineCache)

    def __post_init__(self) -> None:
        families.family(self.family)  # raises ValueError for an unknown family

    def compile(self, text: str) -> Any:
        """The kernels of a source, compiled by the system's C++ compiler."""
        return emulate.compile_shader(text, self.checks, self.tensor_layout)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """An array whose elements are not set."""
        return np.empty(shape, dtype)

    def upload(self, array: NDArray[Any]) -> Array:
        """The array itself, since host and emulator share memory."""
        return array

    def add_parts(self, parts: Array, into: Array) -> None:
        """Write the sum of parts to an array or a tensor."""
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.asarray(parts.sum(0))
            own = isinstance(into, np.ndarray)
            into[...] = total if own else sys.modules["torch"].from_numpy(total)

    def check(self, **arrays: Array) -> None:
        """Raises TypeError unless all are tensors on the CPU, or NumPy arrays in its byte order."""
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray) and not getattr(array, "is_cpu", False):
                raise TypeError(
                    f"{name} must be a NumPy array or a tensor on the CPU, where Metal kernels are"
                    f" emulated, got {shown(array)}"
                )
            if isinstance(array, np.ndarray) and not array.dtype.isnative:
                raise TypeError(
                    f"{name} must be in the byte order of this machine: pass"
                    f" {name}.astype('{array.dtype.name}')"
                )
            check_held(name, array)


@dataclass(frozen=True, eq=False)
class Call:
    """A plan prepared for operands of certain strides; only the operands are missing.

    `gradients` are those of a score's arrays, which are made of parts.
    """

    machine: Machine
    plan: MetalPlan
    steps: tuple[_Step, ...]
    order: tuple[str, ...]
    gradients: tuple[str, ...] = ()

    @property
    def data_bytes(self) -> int:
        """The size of the mask's tables and of the runs, in bytes."""
        return self.plan.data_bytes

    def launch(self, arrays: Arrays, operands: Sequence[Array]) -> None:
        """Launch the kernels in order; `operands` are in the order of `order`."""
        self.run(dict(zip(self.order, operands, strict=True)))

    def with_keys(self, problem: Problem, strides: Mapping[str, Strides]) -> None:
        """None: every number of keys is planned from the beginning."""

    def compile(self) -> None:
        """Do nothing: the kernels of a call are already compiled."""

    def run(self, operands: Mapping[str, Array]) -> None:
        """Launch the kernels in order on operands by their names, with new scratch."""
        made = {
            name: self.machine.empty(scratch.shape, scratch.dtype)
            for name, scratch in self.plan.buffers.items()
        }
        for name in self.plan.cleared:
            made[name][...] = 0
        for step in self.steps:
            step.launch({**operands, **made})
        for name in self.gradients:
            parts = made.get(f"{name}_parts")
            if parts is None:  # no pair reads the array
                operands[name][...] = 0
            else:
                self.machine.add_parts(parts, operands[name])


@dataclass(frozen=True, eq=False)
class _Step:
    """One launch: the kernel, the names of its operands, and its constant arguments."""

    kernel: Callable[..., None]
    operands: tuple[str, ...]
    constants: tuple[Any, ...]
    threads: tuple[int, int, int]
    group_size: tuple[int, int, int]

    def launch(self, operands: Mapping[str, Array]) -> None:
        given = [operands[name] for name in self.operands]
        self.kernel(*given, *self.constants, threads=self.threads, group_size=self.group_size)


def execute(plan: MetalPlan, machine: Machine, operands: Mapping[str, Array]) -> None:
    """Run a plan on operands by their names in the kernels, their axes in the canonical order."""
    strides = {name: strides_of(name, array) for name, array in operands.items()}
    prepare(plan, machine, strides, alignment_of(operands)).run(operands)


def strides_of(name: str, array: Array) -> Strides:
    """The strides of a NumPy array or a tensor, in elements.

    Raises ValueError if a stride is no multiple of the item size.

    >>> strides_of("q", np.zeros((2, 3), np.float32).T)
    (1, 3)
    """
    if not isinstance(array, np.ndarray):
        strides: Strides = array.stride()
        return strides
    if any(
        step % array.itemsize and length > 1
        for length, step in zip(array.shape, array.strides, strict=True)
    ):
        raise ValueError(f"{name} must have strides of whole elements, got {array.strides} bytes")
    return tuple([step // array.itemsize for step in array.strides])


def check_written(name: str, array: Array) -> None:
    """Raises ValueError if a kernel cannot write an array: it is broadcast or read-only."""
    strides = strides_of(name, array)
    if any(step == 0 < length - 1 for length, step in zip(array.shape, strides, strict=True)):
        raise ValueError(f"{name} is written, so no axis of it may be broadcast")
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"{name} is written, but it is read-only")


def alignment_of(operands: Mapping[str, Array]) -> int:
    """The number of elements that may be moved at once, by the operands' addresses: 1, 2 or 4."""
    found = WIDEST_MOVE
    for name, array in operands.items():
        if protocols.is_extra(name.removeprefix("d")):  # they are read one by one
            continue
        if isinstance(array, np.ndarray):
            first, size = array.__array_interface__["data"][0], array.itemsize
        else:  # a Metal buffer begins at a page; a tensor's offset in it counts elements
            size = array.element_size()
            first = array.data_ptr() if array.is_cpu else array.storage_offset() * size
        found = math.gcd(found, first // size) if first % size == 0 else 1
    return found


def prepare(
    plan: MetalPlan, machine: Machine, strides: Mapping[str, Strides], alignment: int
) -> Call:
    """The compiled kernels of a plan, and their arguments for operands of these strides.

    Strides count elements and are in canonical axes (batch, heads, sequence, dim). `alignment` is
    the result of `alignment_of` for the operands.
    """
    steps = tuple(_step(plan, launch, machine, strides, alignment) for launch in plan.launches)
    gradients = tuple([name for name in strides if name.startswith("dinput")])
    return Call(machine, plan, steps, tuple(strides), gradients)


def kernel(
    machine: Machine, spec: Spec, emit: Callable[[Spec], str], entry: str
) -> Callable[..., None]:
    """The kernel of a spec on a machine; its source is emitted and compiled at the first call.

    The handle is kept, since each look-up in a torch library makes a new one. Raises
    `CompileError`.
    """

    def make() -> Callable[..., None]:
        text = emit(spec)
        library = library_of(machine, text)
        try:
            function: Callable[..., None] = getattr(library, entry)
        except RuntimeError as error:
            raise CompileError(_explain(text, str(error))) from error
        return function

    return machine.kept.kernels.get(spec, make)


def library_of(machine: Machine, text: str) -> Any:
    """The kernels of a source on a machine, compiled at the first call. Raises `CompileError`."""

    def make() -> Any:
        try:
            return machine.compile(text)
        except SyntaxError as error:
            raise CompileError(_explain(text, str(error))) from error

    return machine.kept.libraries.get(text, make)


def _explain(text: str, log: str) -> str:
    """A message with the compiler's first error, and the files with the source and the log."""
    folder = Path(tempfile.mkdtemp(prefix="tilefold-"))
    file = folder / "kernel.metal"
    file.write_text(text, encoding="utf-8")
    (folder / "kernel.log").write_text(log, encoding="utf-8")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
    return f"Metal rejected an emitted kernel: {first}; the source is {file}, the log beside it"


def _step(
    plan: MetalPlan,
    launch: Launch,
    machine: Machine,
    strides: Mapping[str, Strides],
    alignment: int,
) -> _Step:
    """The step of a launch, with all arguments except the operands."""
    spec = fitted(launch.spec, strides, alignment)
    names = [argument.name for argument in arrays(spec)]
    also = " and score" if spec.score else ""
    if len(names) + 2 > MOST_BUFFERS:
        raise NotImplementedError(
            f"Metal binds {MOST_BUFFERS} buffers to a kernel, and {spec.kernel} with this"
            f" mask{also} takes {len(names) + 2}: join their tables into fewer, or use the CPU"
        )
    data = _data(machine, plan, launch)
    called = modified.called(launch)
    given = tuple([called.get(name, name) for name in names if name not in data])
    known = {**sizes_of(plan, launch), **stride_arguments(strides, STRIDED)}
    known |= modified.numbers(launch, strides)
    if "sinks" in spec.operands:
        known |= dict(zip(SINKS, (plan.problem.sinks, *strides["sinks"]), strict=True))
    numbers = [int(known[name]) for name in sizes(spec)]
    if len(numbers) > MOST_NUMBERS:
        raise NotImplementedError(
            f"Metal takes {MOST_NUMBERS} integers beside the arrays, and {spec.kernel} with"
            f" this mask{also} has {len(numbers)}: give the mask's numbers as a table"
            " (tilefold.dense, documents), or run it on the CPU"
        )
    threads = spec.threads
    groups, heads, batch = launch.grid
    return _Step(
        kernel(machine, spec, source.emit, spec.entry),
        given,
        (*[data[name] for name in names if name in data], numbers, float(plan.problem.scale)),
        (groups * threads, heads, batch),
        (threads, 1, 1),
    )


def fitted(spec: MetalSpec, strides: Mapping[str, Strides], alignment: int) -> MetalSpec:
    """The spec for operands of these strides and this alignment, which a plan does not know.

    Offsets of 64 bits stay where the plan asks for them.
    """
    given = {name: strides[name] for name in spec.row.operands if name in STRIDED}
    longest = max(spec.blocks.parallel, spec.blocks.traverse) + SIDE
    reach = [
        longest * abs(along_n) + whole(spec.width(name)) * abs(along_d)
        for name, (_, _, along_n, along_d) in given.items()
    ]
    unit = all(given[name][3] == 1 or spec.width(name) == 1 for name in given)
    rows = [step for *along, _ in given.values() for step in along]
    widths = [spec.width(name) for name in given]
    vector = math.gcd(alignment, *rows, *widths) if unit else 1
    wide = spec.wide or max(reach, default=0) >= 2**31
    return replace(spec, unit=unit, wide=wide, vector=vector)


def sizes_of(plan: MetalPlan, launch: Launch) -> dict[str, int]:
    """The integers of a launch that do not depend on the operands' strides and addresses."""
    problem, runs = plan.problem, launch.runs
    rows = runs.block_rows
    found = {
        "len_q": problem.len_q,
        "len_k": problem.len_k,
        "heads_q": problem.heads_q,
        "group": problem.heads_q // problem.heads_kv,
        "row_b": runs.planes_h * rows if runs.planes_b > 1 else 0,
        "row_h": rows if runs.planes_h > 1 else 0,
        "splits": launch.splits,
        "batch": problem.batch,
        "keep_from": dropout.threshold(problem.dropout),
        "keep_bits": modified.bits(dropout.factor(problem.dropout)),
    }
    return found | mask_arguments(plan)


def _data(machine: Machine, plan: MetalPlan, launch: Launch) -> dict[str, Array]:
    """The runs of a launch and the tables of the mask, copied to a machine, by their names."""
    kept, visited = machine.kept.data, (launch.order, launch.runs.rows, launch.runs.runs)
    found = runs_on(machine, kept, launch, RUNS, visited) | tables_on(machine, kept, plan)
    if held := modified.tables(launch):
        found |= runs_on(machine, kept, (plan, launch.scored), [*held], [*held.values()])
    return found
