"""The arguments of a launch in memory, and the regions that hold them.

A region is the range from the lowest to the highest byte that a view reaches; all other bytes are
out of bounds. Views that share memory share a region if one of them is written.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.metal.emulator.fault import Fault
from tilefold.backends.metal.emulator.signature import Entry, Parameter

MOST_LIST_BYTES = 4096
"""The largest size of a list in bytes, the limit of Metal's `setBytes`."""

CASTS = {"fp16": "e", "bf16": "", "int32": "i", "int16": "h", "int8": "b", "uint8": "B"}
"""The formats of `struct` for the names in `arg_casts`; bf16 is the upper half of a float."""

_FLOATS = {"float": "float32", "half": "float16", "bfloat": "bfloat16"}
_WHOLE = {"int": 4, "uint": 4, "long": 8, "ulong": 8, "short": 2, "ushort": 2, "char": 1,
          "uchar": 1, "int64_t": 8, "int32_t": 4, "uint32_t": 4, "bool": 1}  # fmt: skip


@dataclass(frozen=True)
class View:
    """An array of the caller: the address of its first element, its shape and strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    dtype: str
    writable: bool
    owner: object

    @property
    def low(self) -> int:
        """The address of the lowest byte."""
        return self.address + sum(min(0, (n - 1) * s) for n, s in self._axes())

    @property
    def size(self) -> int:
        """The number of bytes from the lowest to the highest."""
        if 0 in self.shape:
            return 0
        return self.itemsize + sum((n - 1) * abs(s) for n, s in self._axes())

    @property
    def first(self) -> int:
        """The offset of the first element from the lowest byte."""
        return self.address - self.low

    def _axes(self) -> list[tuple[int, int]]:
        return [] if 0 in self.shape else list(zip(self.shape, self.strides, strict=True))

    def over(self, memory: Any, offset: int) -> NDArray[Any]:
        """The elements as bits, in other memory where the first one begins at byte `offset`."""
        kind = np.dtype(f"V{self.itemsize}")
        elements: NDArray[Any] = np.ndarray(self.shape, kind, memory, offset, self.strides)
        return elements

    def elements(self) -> NDArray[Any]:
        """The caller's own elements as bits."""
        return self.over((ctypes.c_ubyte * self.size).from_address(self.low), self.first)


@dataclass
class Region:
    """Memory of the emulated device: its bytes, and the offsets of the arguments in it."""

    content: bytes
    places: dict[int, int]


def view(value: object, parameter: Parameter) -> View | None:
    """The view of an array; None if the value is no array."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"{parameter.name} must be on the CPU, not on {value.device}")
        size = value.element_size()
        strides = tuple(size * stride for stride in value.stride())
        dtype = str(value.dtype).removeprefix("torch.")
        return View(value.data_ptr(), tuple(value.shape), strides, size, dtype, True, value)
    if isinstance(value, np.ndarray):
        address = int(value.__array_interface__["data"][0])
        return View(
            address,
            value.shape,
            value.strides,
            value.itemsize,
            value.dtype.name,
            bool(value.flags.writeable),
            value,
        )
    return None


def checked(entry: Entry, found: View, parameter: Parameter) -> View:
    """The same view. Raises unless the parameter may be bound to it."""
    if parameter.written and not found.writable:
        raise ValueError(f"{entry.name}: {parameter.name} is written, and the array is read-only")
    wanted = _FLOATS.get(parameter.element)
    if wanted and found.dtype in _FLOATS.values() and found.dtype != wanted:
        _mismatch(entry, parameter, f"an array of {found.dtype}")
    return found


def scalars(entry: Entry, value: object, parameter: Parameter, cast: str | None) -> bytes:
    """The bytes of a number or a list of numbers, as `torch.mps` binds them."""
    numbers: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    if not numbers or not all(isinstance(each, (int, float)) for each in numbers):
        raise TypeError(
            f"{entry.name}: {parameter.name} must be an array, a number or a list of numbers,"
            f" not {value!r}"
        )
    whole = all(isinstance(each, int) for each in numbers)
    if parameter.written:
        _mismatch(entry, parameter, "a number, which cannot be written to")
    if cast is not None and cast not in CASTS:
        raise ValueError(f"arg_casts must be of {', '.join(CASTS)}, not {cast!r}")
    if cast == "bf16":
        halves = np.array(numbers, np.float32).view(np.uint32)
        return ((halves + 0x7FFF + (halves >> 16 & 1)) >> 16).astype(np.uint16).tobytes()
    form = CASTS[cast] if cast else ("q" if whole else "f")
    if cast is None and (parameter.element in _FLOATS) == whole:
        _mismatch(entry, parameter, "integers" if whole else "floats")
    content = struct.pack(f"<{len(numbers)}{form}", *numbers)
    if len(content) > MOST_LIST_BYTES:
        raise Fault(
            "argument",
            f"{entry.name}: {parameter.name} has {len(content)} bytes where a list may have"
            f" {MOST_LIST_BYTES}",
        )
    # A kernel may read 4 bytes of a scalar that is bound as 8 bytes.
    if len(content) < _WHOLE.get(parameter.element, 0):
        _mismatch(entry, parameter, f"{len(content)} bytes")
    return content


def cast_of(casts: str | Mapping[int, str] | None, index: int) -> str | None:
    """The cast of an argument in `arg_casts`; None if there is none."""
    return casts if casts is None or isinstance(casts, str) else casts.get(index)


def regions(bound: Sequence[View | bytes], parameters: Sequence[Parameter]) -> list[Region]:
    """The regions that hold all arguments. Overlapping views share one if one view is written."""
    found = []
    for group in _overlapping(bound, parameters):
        views = {index: bound[index] for index in group}
        first = views[group[0]]
        if isinstance(first, bytes):
            found.append(Region(first, {group[0]: 0}))
            continue
        spans = {i: each for i, each in views.items() if isinstance(each, View)}
        low = min(each.low for each in spans.values())
        end = max(each.low + each.size for each in spans.values())
        content = ctypes.string_at(low, end - low) if end > low else b""
        found.append(Region(content, {i: each.address - low for i, each in spans.items()}))
    return found


def _overlapping(bound: Sequence[View | bytes], parameters: Sequence[Parameter]) -> list[list[int]]:
    groups: list[list[int]] = [[i] for i, each in enumerate(bound) if isinstance(each, bytes)]
    views = [(each.low, each.size, i) for i, each in enumerate(bound) if isinstance(each, View)]
    run: list[int] = []
    end = 0
    for low, size, index in sorted(views):
        if run and low < end:
            run.append(index)
        else:
            groups += _split(run, parameters)
            run = [index]
        end = max(end, low + size)
    return groups + _split(run, parameters)


def _split(run: list[int], parameters: Sequence[Parameter]) -> list[list[int]]:
    if any(parameters[index].written for index in run):
        return [run]
    return [[index] for index in run]


def _mismatch(entry: Entry, parameter: Parameter, what: str) -> None:
    raise Fault(
        "argument", f"{entry.name}: {parameter.name} is `{parameter.type}`, but is given {what}"
    )
