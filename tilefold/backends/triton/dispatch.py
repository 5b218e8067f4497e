"""Runs plans of Triton kernels on a machine: binds their arguments and launches them in order.

Launches follow each other on the current stream, without a synchronisation between them, and
nothing here waits for the device. A machine keeps the runs and tables of plans, which are copied to
it once.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tilefold.backends.launching import mask_arguments, runs_on, stride_arguments, tables_on
from tilefold.backends.protocols import Arrays, Strides
from tilefold.backends.triton import module, resources, source
from tilefold.backends.triton.finish import finish
from tilefold.backends.triton.kernels import arguments, frame, hopper_launch
from tilefold.backends.triton.kernels.arguments import RUNS, SINKS, SIZES
from tilefold.backends.triton.launch import Launch, TritonPlan
from tilefold.backends.triton.machine import ALIGNED, Machine, ResourceError, is_aligned16
from tilefold.backends.triton.spec import TritonSpec
from tilefold.masks.tables import Input
from tilefold.planning.entries import Added
from tilefold.planning.kernels import STRIDED
from tilefold.planning.masked import Scored
from tilefold.problems import dropout
from tilefold.problems.attention import ITEM_BYTES, Problem
from tilefold.problems.request import LAYOUTS

if TYPE_CHECKING:
    from torch import Tensor

L2_BYTES = 32 * 2**20
"""The bytes of keys and values that programs may read at the same time: most of an H100's 50 MB of
L2 cache. It is not tuned.
"""


@dataclass(frozen=True, eq=False)
class Call:
    """A plan prepared for operands of certain strides; only the operands are missing.

    `finishes`: some results are made by tensor operations when the kernels have run.
    """

    machine: Machine
    plan: TritonPlan
    steps: tuple[_Step, ...]
    order: tuple[str, ...]
    axes: tuple[int, int, int, int] = LAYOUTS["bhnd"]
    finishes: bool = False

    @property
    def data_bytes(self) -> int:
        """The size of the mask's tables and of the runs, in bytes."""
        return self.plan.data_bytes

    def launch(self, arrays: Arrays, operands: Sequence[Tensor]) -> None:
        """Launch the kernels in order on tensors in the caller's layout, with new scratch.

        `operands` are in the order of `order`.
        """
        axes = self.axes
        with self.machine.active():
            self.run(
                {
                    name: tensor.permute(axes) if name in STRIDED else tensor
                    for name, tensor in zip(self.order, operands, strict=True)
                }
            )

    def run(self, operands: Mapping[str, Tensor]) -> None:
        """Launch the kernels in order on operands with canonical axes, with new scratch."""
        self.launch_on(self.scratch(operands))

    def scratch(self, operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The operands and new scratch, by name."""
        given = dict(operands)
        for name, scratch in self.plan.buffers.items():
            given[name] = self.machine.empty(scratch.shape, scratch.dtype)
            if name in self.plan.cleared:
                given[name].zero_()
        return given

    def launch_on(self, given: Mapping[str, Tensor]) -> None:
        """Launch the kernels in order on operands and scratch."""
        for step in self.steps:
            step.launch(given)
            self.machine.launched(step.data)
        if self.finishes:
            finish(self.plan, given)

    def with_keys(self, problem: Problem, strides: Mapping[str, Strides]) -> None:
        """None: every number of keys is planned from the beginning."""

    def compile(self) -> None:
        """Compile the kernels for operands that begin at multiples of 16 bytes."""
        with self.machine.active():
            for step in self.steps:
                step.compile(self.machine)


@dataclass(frozen=True, eq=False)
class _Step:
    """One launch: the kernel, the names of its operands, and its constant arguments."""

    function: Any
    spec: TritonSpec
    operands: tuple[str, ...]
    constants: tuple[Any, ...]
    data: tuple[Tensor, ...]
    programs: int
    tma: tuple[TmaTile, ...]
    options: Mapping[str, int]

    def compile(self, machine: Machine) -> None:
        """Compile without a launch; arrays of one element stand for the operands."""
        if not hasattr(self.function, "warmup"):  # in the interpreter
            return
        kinds = arguments.arrays(self.spec)
        given = [machine.empty((1,), kinds[name]) for name in self.spec.operands]
        tma = [
            tiles.descriptor(machine.empty((1, 1, *tiles.block[2:]), self.spec.dtype))
            for tiles in self.tma
        ]
        self.function.warmup(*given, *self.constants, *tma, grid=(1,), **self.options)

    def launch(self, operands: Mapping[str, Tensor]) -> None:
        given: list[Any] = [operands[name] for name in self.operands]
        blocks = self.spec.blocks
        tma = [tiles.descriptor(operands[tiles.operand]) for tiles in self.tma]
        try:
            self.function[(self.programs,)](*given, *self.constants, *tma, **self.options)
        except Exception as error:
            if type(error).__name__ != "OutOfResources":
                raise
            raise ResourceError(
                f"{self.spec.kernel} with blocks of {blocks} does not fit this GPU: {error};"
                " choose smaller ones (tilefold.triton.plan, blocks=) or tune them"
                " (tilefold.triton.tune)"
            ) from error


def execute(plan: TritonPlan, machine: Machine, operands: Mapping[str, Tensor]) -> None:
    """Run a plan on operands by their names in the kernels, their axes in the canonical order."""
    strides = {name: tuple(tensor.stride()) for name, tensor in operands.items()}
    prepare(plan, machine, strides, is_aligned16(operands)).run(operands)


def prepare(
    plan: TritonPlan,
    machine: Machine,
    strides: Mapping[str, Strides],
    aligned16: bool,
    axes: tuple[int, int, int, int] = LAYOUTS["bhnd"],
) -> Call:
    """The kernels of a plan, and their arguments for operands of these strides in canonical axes.

    `aligned16` is the result of `is_aligned16` for the operands. `axes` are the positions of the
    canonical axes in the caller's layout. Raises ValueError if a launch needs more programs than a
    grid can have.
    """
    steps = tuple(_step(plan, launch, machine, strides, aligned16) for launch in plan.launches)
    finishes = any(name.startswith(("dinput", "dsinks")) for name in strides)
    return Call(machine, plan, steps, tuple(strides), axes, finishes)


def fitted(
    spec: TritonSpec, plan: TritonPlan, strides: Mapping[str, Strides], aligned16: bool
) -> TritonSpec:
    """The spec for operands of these strides and this alignment, which a plan does not know."""
    given = {name: strides[name] for name in spec.row.operands if name in STRIDED}
    longest = max(spec.blocks.parallel, spec.blocks.traverse)
    reach = [
        longest * abs(along_n) + spec.width(name) * abs(along_d)
        for name, (_, _, along_n, along_d) in given.items()
    ]
    wide = max(reach, default=0) >= 2**31
    tma = [name for name in given if name in ("q", "k", "v", "do")]
    kind = resources.kind(spec.dtype, spec.float32_mode)
    descriptors = (
        resources.tma(plan.architecture, spec.kernel, kind, spec.blocks)
        and aligned16
        and all(_describable(given[name], spec.dtype) for name in tma)
    )
    return replace(spec, wide=wide, descriptors=descriptors)


def _describable(strides: Strides, dtype: str) -> bool:
    """True if a tensor descriptor can describe an operand with these strides."""
    *along, last = strides
    item = ITEM_BYTES[dtype]
    return last == 1 and all(step > 0 and step * item % ALIGNED == 0 for step in along)


@dataclass(frozen=True, eq=False)
class TmaTile:
    """The description of a tensor descriptor of an operand, in blocks of (1, 1, rows, columns).

    `layout` is the layout of its tiles in shared memory, which Gluon asks for.
    """

    operand: str
    block: list[int]
    layout: Any = None

    def descriptor(self, tensor: Tensor) -> Any:
        """The descriptor over a tensor with canonical axes."""
        sizes = tensor, list(tensor.shape), list(tensor.stride()), self.block
        if self.layout is None:
            from triton.tools.tensor_descriptor import TensorDescriptor

            return TensorDescriptor(*sizes)
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as InGluon

        return InGluon(*sizes, self.layout)


def _tma_tiles(spec: TritonSpec) -> tuple[TmaTile, ...]:
    """The descriptors of a kernel, in the order of its arguments."""
    if not spec.gluon:
        return tuple(
            TmaTile(operand, [1, 1, rows, columns])
            for _, (operand, rows, columns) in frame.descriptors(spec)
        )
    from triton.experimental.gluon.language import NVMMASharedLayout

    return tuple(
        TmaTile(tiles.operand, tiles.block, tiles.layout(NVMMASharedLayout))
        for tiles in hopper_launch.descriptors(spec)
    )


def _step(
    plan: TritonPlan,
    launch: Launch,
    machine: Machine,
    strides: Mapping[str, Strides],
    aligned16: bool,
) -> _Step:
    """The step of a launch, with all arguments except the operands."""
    if launch.programs >= 2**31:
        raise ValueError(
            f"{launch.spec.kernel} would take {launch.programs} programs, and a grid has"
            f" {2**31 - 1}: split the batch or the heads into several calls"
        )
    spec = fitted(launch.spec, plan, strides, aligned16)
    if launch.spec.gluon and (reason := _not_gluon(machine, spec)):
        if launch.plain is None:
            raise ValueError(f"form 'hopper' is not possible: {reason}")
        return _step(plan, launch.plain, machine, strides, aligned16)
    data = _data(machine, plan, launch)
    known: dict[str, Any] = {**data, **_numbers(plan, launch), **stride_arguments(strides, STRIDED)}
    known["scale"] = _number(spec, plan.problem.scale)
    if launch.scored is not None and spec.row.visits:
        tables = _score_tables(machine, plan, launch.scored, spec)
        data = data | tables
        known |= tables | _of_score(launch.scored, spec, strides)
    if "sinks" in spec.extra:
        known |= dict(zip(SINKS, (plan.problem.sinks, *strides["sinks"]), strict=True))
    if launch.added is not None:
        known |= _of_parts(launch.added)
    if spec.dropout:
        known |= _dropout(spec, plan.problem.dropout)
    names, programs = arguments.names(spec), launch.programs
    if launch.persistent:
        known |= _places(plan.problem, launch.block_rows)
        names = (*names, *hopper_launch.ROW_BLOCKS)
        programs = min(programs, machine.multiprocessors)
    operands, called = spec.operands, _called(launch)
    return _Step(
        machine.function(source.emit(spec), spec.entry),
        spec,
        tuple([called.get(name, name) for name in operands]),
        tuple(known[name] for name in names[len(operands) :]),
        tuple(data.values()),
        programs,
        _tma_tiles(spec),
        module.launch_options(
            plan.architecture.kind, spec.dtype, spec.blocks.warps, spec.blocks.stages
        ),
    )


def _number(spec: TritonSpec, number: float) -> float:
    """A number as an argument: Triton passes only float32, so a float64 is passed as its bits."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits if spec.dtype == "float64" else float(number)


def _called(launch: Launch) -> dict[str, str]:
    """The names of arrays that come with the call, by the names of the kernel's arguments."""
    found = {}
    if launch.scored is not None:
        parts = launch.scored.parts
        for slot, table in zip(parts.skeleton.slots, parts.tables, strict=True):
            if isinstance(table, Input):
                found[slot.name] = table.name
    if launch.added is not None:
        found["input_parts"] = launch.added.parts
    return found


def _of_score(scored: Scored, spec: TritonSpec, strides: Mapping[str, Strides]) -> dict[str, float]:
    """The numbers of a modified score, and the strides of all that it reads."""
    parts = scored.parts
    found: dict[str, float] = {}
    for parameter, value in zip(parts.skeleton.parameters, parts.parameters, strict=True):
        found[parameter.name] = _number(spec, value) if parameter.dtype == "real" else value
    for slot, table in zip(parts.skeleton.slots, parts.tables, strict=True):
        if isinstance(table, Input):
            steps = strides[table.name]
        else:
            array = np.ascontiguousarray(table.array)
            steps = tuple([step // array.itemsize for step in array.strides])
        found |= dict(zip(slot.strides, steps, strict=True))
    return found


def _score_tables(
    machine: Machine, plan: TritonPlan, scored: Scored, spec: TritonSpec
) -> dict[str, Tensor]:
    """The tables of a modified score that stay, copied to a machine, by their names."""
    held = {}
    for slot, table in zip(scored.parts.skeleton.slots, scored.parts.tables, strict=True):
        if not isinstance(table, Input):
            wide = arguments.wide_tables(spec) and table.dtype == "bool"
            held[slot.name] = table.array.astype(np.int32) if wide else table.array
    kept, key = machine.kept.data, (plan, scored)
    return runs_on(machine, kept, key, [*held], [*held.values()]) if held else {}


def _of_parts(added: Added) -> dict[str, int]:
    """The arguments of a kernel that sums up the gradient of an array."""
    shape = added.given.shape
    found = {"part_size": math.prod(shape), "shared": added.shared}
    return found | {f"part_{i}": math.prod(shape[i + 1 :]) for i in range(len(shape))}


def _dropout(spec: TritonSpec, chance: float) -> dict[str, float]:
    """The arguments of dropout; the least word of a kept pair as a signed number."""
    least = dropout.threshold(chance)
    least = least - 2**32 if least >= 2**31 else least
    return {"keep_from": least, "keep_factor": _number(spec, dropout.factor(chance))}


def _not_gluon(machine: Machine, spec: TritonSpec) -> str | None:
    """The reason why a kernel in Gluon cannot be launched; None if it can."""
    if not machine.gluon:
        return "this machine takes no kernels in Gluon"
    if not spec.descriptors:
        return (
            "it moves whole tiles, so the rows of q, k and v must lie next to each other, from and"
            f" in steps of {ALIGNED} bytes"
        )
    return None


def _places(problem: Problem, block_rows: int) -> dict[str, int]:
    """The row blocks over all heads, and the number of heads that share the L2 cache.

    See `kernels/hopper.py`.
    """
    group = problem.heads_q // problem.heads_kv
    row = (problem.dim + problem.dim_v) * ITEM_BYTES[problem.dtype]
    near = group * max(1, L2_BYTES // max(1, problem.len_k * row))
    planes = problem.batch * problem.heads_q
    return {"places": block_rows * planes, "near": min(near, planes)}


def _numbers(plan: TritonPlan, launch: Launch) -> dict[str, int]:
    """The integers of a launch that do not depend on the operands' strides and addresses."""
    problem, (planes_b, planes_h) = plan.problem, launch.planes
    rows = launch.visited_rows
    sizes = (
        problem.len_q,
        problem.len_k,
        launch.heads,
        problem.heads_q // problem.heads_kv,
        planes_h * rows if planes_b > 1 else 0,
        rows if planes_h > 1 else 0,
        launch.block_rows,
        launch.splits,
        problem.batch * problem.heads_q * problem.len_q,
    )
    found = dict(zip(SIZES, sizes, strict=True))
    return found | mask_arguments(plan)


def _data(machine: Machine, plan: TritonPlan, launch: Launch) -> dict[str, Tensor]:
    """The runs of a launch and the tables of the mask, copied to a machine, by their names."""
    if not launch.spec.row.visits:
        return {}
    kept, visited = machine.kept.data, (launch.order, launch.run_rows, launch.runs)
    tables = tables_on(machine, kept, plan, wide=arguments.wide_tables(launch.spec))
    return runs_on(machine, kept, launch, RUNS, visited) | tables
