"""The arguments of a kernel in their order: what the source declares and what a launch binds.

Arrays come first, each in a buffer of its own, then one list of integers (lengths, strides,
the mask's parameters) and the scale. So one compiled kernel serves every length and layout, and a
launch stays far below the 31 buffers that Metal binds.
"""

from __future__ import annotations

from typing import NamedTuple

from tilefold.backends.launching import AXES
from tilefold.backends.metal.kernels.storage import storage
from tilefold.backends.metal.spec import MetalSpec
from tilefold.masks.expression import Slot
from tilefold.planning.kernels import STRIDED

RUNS = ("order", "run_rows", "runs")
"""Which tiles are visited: see `tilefold.masks.runs.Runs`; `order` gives a threadgroup's
block row."""

SIZES = ("len_q", "len_k", "heads_q", "group", "row_b", "row_h", "splits")
"""Integers of every kernel: `group` query heads to a key head, `row_b` and `row_h` block rows
from one plane of the runs to the next (0 where all are alike)."""

TABLES = {"int32": "int", "bool": "uchar"}
"""The types of tables that a plan holds. Arrays of floats come with each call."""

DROPOUT = ("keep_from", "keep_bits")
"""The last integers where pairs fall out: the least word of a kept pair, and the bits of the factor
of a kept weight, a float."""

SINKS = ("sinks_count", "sinks_h", "sinks_n")
"""Integers of a kernel that reads sinks: how many a head has, and the strides of the array."""


class Argument(NamedTuple):
    """An array of a kernel: its name, its type in the source and whether the kernel writes it."""

    name: str
    type: str
    written: bool

    @property
    def const(self) -> str:
        """The qualifier before its type."""
        return "" if self.written else "const "

    @property
    def declaration(self) -> str:
        """The parameter, but for the number of its buffer."""
        return f"device {self.const}{self.type}* {variable(self.name)}"


def variable(name: str) -> str:
    """Name of an array in the source, where `do` is a keyword and `max` a function."""
    return {"do": "dO", "max": "row_max"}.get(name, name)


def arrays(spec: MetalSpec) -> tuple[Argument, ...]:
    """The arrays of a kernel, in the order of their buffers."""
    number = storage(spec.dtype, spec.bfloat).memory
    found = [
        Argument(
            name,
            number if name in STRIDED else "float",
            name in spec.row.writes or name in spec.row.may_write,
        )
        for name in spec.operands
    ]
    for name in spills(spec):
        found.append(Argument(name, "float", True))
    if spec.dropout and spec.row.visits:
        found.append(Argument("seed", "long", False))
    if spec.row.visits:
        found += [Argument(slot.name, element(slot, spec.bfloat), False) for slot in spec.inputs]
        found += [Argument(name, "long", False) for name in RUNS]
        slots = [slot for skeleton in spec.skeletons for slot in skeleton.slots]
        for slot in slots:
            if slot.dtype in TABLES:
                found.append(Argument(slot.name, element(slot, spec.bfloat), False))
    return tuple(found)


def element(slot: Slot, bfloat: bool) -> str:
    """The type of an entry of a table or an array in memory."""
    return TABLES.get(slot.dtype) or storage(slot.dtype, bfloat).memory


def spills(spec: MetalSpec) -> tuple[str, ...]:
    """Sums that are not kept in registers, as the names of their buffers: contiguous float32."""
    return tuple(f"{name}_spill" for name in spec.row.sums if name not in spec.cached)


def sizes(spec: MetalSpec) -> tuple[str, ...]:
    """The names of the integers, in their order: strides count elements."""
    names = list(SIZES)
    for name in spec.row.operands:
        if name in STRIDED:
            names += [f"{name}_{axis}" for axis in AXES]
    if spec.row.visits:
        for skeleton in spec.skeletons:
            names += [parameter.name for parameter in skeleton.parameters]
            for slot in skeleton.slots:
                names += slot.strides
    names += DROPOUT if spec.dropout else ()
    names += SINKS if "sinks" in spec.operands else ()
    names += [f"part_{axis}" for axis in range(spec.entries[0].rank)] if spec.entries else ()
    return (*names, *spec.row.sizes)


def position(spec: MetalSpec, name: str) -> int:
    """Where a number stands in `sizes`."""
    return sizes(spec).index(name)
