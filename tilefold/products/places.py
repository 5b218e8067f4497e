"""Where arrays lie in memory, and whether a result shares a byte with what is read for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu.matmul.spec import ITEM_BYTES, PackSpec

Array = NDArray[Any]

_MOST_WORK: Final = 10**5
"""Steps of the exact search for a common byte, at most 1 ms; it is made where ranges overlap."""


class OverlapError(ValueError):
    """The result of a call shares memory with one of its operands."""


class Form(NamedTuple):
    """How an array lies in memory: its type, its shape, and its strides in elements.

    `packed` says how it lies in panels, where it does.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    packed: PackSpec | None = None


class Place(NamedTuple):
    """Where elements lie, counted in bytes from the address of the first one.

    `mask` has the bits that are 0 in an aligned address.
    """

    low: int
    end: int
    mask: int
    interface: dict[str, Any]

    @classmethod
    def of(cls, form: Form) -> Place:
        """The place of an array. Nothing lies anywhere if there are no elements."""
        size = ITEM_BYTES[form.dtype]
        steps = [size * step for step in form.strides]
        ends = [(n - 1) * step for n, step in zip(form.shape, steps, strict=True)]
        low, end = sum(min(0, x) for x in ends), sum(max(0, x) for x in ends) + size
        if 0 in form.shape or form.packed:  # nothing of the caller's
            low, end = 0, 0
        known = {"shape": form.shape, "strides": tuple(steps), "typestr": f"|V{size}", "version": 3}
        return cls(low, end, 0 if form.packed else size - 1, known)

    def meets(self, address: int, other: Place, at: int) -> bool:
        """True if this place at an address has a byte of another, or if that is hard to tell."""
        if address + self.end <= at + other.low or at + other.end <= address + self.low:
            return False
        return overlap(self._view(address), other._view(at))

    def _view(self, address: int) -> Array:
        """An array at an address, which nobody reads."""
        interface = self.interface | {"data": (address, True)}
        return np.asarray(SimpleNamespace(__array_interface__=interface))


def overlap(one: Array, two: Array) -> bool:
    """True if two arrays have a byte in common, or if that is hard to tell."""
    try:
        work: Any = _MOST_WORK
        return np.shares_memory(one, two, max_work=work)
    except np.exceptions.TooHardError:
        return True


def check_apart(places: Mapping[str, Place], onto: bool, addresses: Mapping[str, int]) -> None:
    """Raises OverlapError if "out" shares memory with another place; `onto`: with c it may."""
    written, out = places["out"], addresses["out"]
    for name, place in places.items():
        if name == "out" or (name == "c" and onto and addresses["c"] == out):
            continue
        if written.meets(out, place, addresses[name]):
            more = ": c is out itself, or lies elsewhere" if name == "c" else ""
            raise OverlapError(f"out must not overlap {name}{more}")


def check_single(shape: Sequence[int], strides: Sequence[int], size: int = 1) -> None:
    """Raises ValueError unless every element of a result has a place of its own.

    Each axis must step over all that shorter steps reach. `size` is that of an element, in the unit
    of the strides.
    """
    if 0 in shape:
        return
    reach = size - 1
    for step, length in sorted((abs(s), n) for s, n in zip(strides, shape, strict=True)):
        if length > 1 and step <= reach:
            raise ValueError(
                "out is written, so no two elements may share a place in memory, got shape"
                f" {tuple(shape)} with strides {tuple(strides)}"
            )
        reach += step * (length - 1)
