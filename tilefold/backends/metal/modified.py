"""What a launch is given of a modified score: arrays that come with the call, numbers, tables."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from tilefold.backends.metal.plan import Launch
from tilefold.backends.protocols import Strides
from tilefold.masks.expression import Slot
from tilefold.masks.tables import Input
from tilefold.problems.attention import contiguous


def called(launch: Launch) -> dict[str, str]:
    """The names of arrays that come with the call, by the names of the kernel's arguments."""
    found = {slot.name: table.name for slot, table in _read(launch) if isinstance(table, Input)}
    return found | ({"input_parts": launch.added.parts} if launch.added else {})


def numbers(launch: Launch, strides: Mapping[str, Strides]) -> dict[str, int]:
    """The numbers of the score, the strides of all that it reads, and those of a gradient's parts.

    `strides` are those of the call's operands.
    """
    found: dict[str, int] = {}
    if launch.scored is not None:
        parts = launch.scored.parts
        for parameter, value in zip(parts.skeleton.parameters, parts.parameters, strict=True):
            found[parameter.name] = bits(value) if parameter.dtype == "real" else value
    for slot, table in _read(launch):
        own = isinstance(table, Input)
        steps = strides[table.name] if own else contiguous(table.array.shape)
        found |= dict(zip(slot.strides, steps, strict=True))
    if launch.added is not None:
        shape = launch.added.given.shape
        found |= {"shared": launch.added.shared, "part_size": math.prod(shape)}
        found["block_rows"] = launch.runs.block_rows
        found |= {f"part_{axis}": step for axis, step in enumerate(contiguous(shape)) if shape}
    return found


def tables(launch: Launch) -> dict[str, NDArray[Any]]:
    """The tables of the score that a plan holds, by the names of the kernel's arguments."""
    return {slot.name: t.array for slot, t in _read(launch) if not isinstance(t, Input)}


def bits(number: float) -> int:
    """The bits of a number as a float.

    >>> hex(bits(1.0))
    '0x3f800000'
    """
    found: int = struct.unpack("<I", bytes(ctypes.c_float(number)))[0]
    return found


def _read(launch: Launch) -> list[tuple[Slot, Any]]:
    """The tables and arrays that the score reads, with their places in the kernel."""
    if launch.scored is None:
        return []
    parts = launch.scored.parts
    return list(zip(parts.skeleton.slots, parts.tables, strict=True))
