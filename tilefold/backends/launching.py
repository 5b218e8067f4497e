"""The common parts of launches on GPUs: integers by name, and data that is copied once."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.protocols import Array, Strides
from tilefold.common.lru import LruCache
from tilefold.masks.expression import Declared, Table

AXES = "bhnd"
"""The letters of the canonical axes in the names of arguments."""


class MaskData(Protocol):
    """The part of a plan with the parameters and tables of its mask."""

    @property
    def parameters(self) -> tuple[int, ...]:
        """The integers of the mask."""

    @property
    def tables(self) -> tuple[Table | Declared, ...]:
        """The arrays of the mask."""


class Host(Protocol):
    """A machine with memory of its own."""

    def upload(self, array: NDArray[Any]) -> Array:
        """A copy of an array in memory that kernels can read."""


def check_held(name: str, array: Array) -> None:
    """Raises ValueError for a tensor whose memory was freed; an array of NumPy has its own."""
    tensor: Any = getattr(sys.modules.get("torch"), "Tensor", ())
    if isinstance(array, tensor):
        from tilefold.backends.arrays import torch

        torch.check_held(name, array)


def stride_arguments(strides: Mapping[str, Strides], strided: Iterable[str]) -> dict[str, int]:
    """The strides of the operands named in `strided`, by names of arguments such as "q_n".

    >>> stride_arguments({"q": (8, 4, 2, 1), "lse": (4, 2, 1)}, ["q", "k"])
    {'q_b': 8, 'q_h': 4, 'q_n': 2, 'q_d': 1}
    """
    return {
        f"{name}_{axis}": stride
        for name in strided
        if name in strides
        for axis, stride in zip(AXES, strides[name], strict=True)
    }


def mask_arguments(plan: MaskData) -> dict[str, int]:
    """The parameters of the mask and the strides of its tables, by the names of arguments."""
    found = {f"p{number}": value for number, value in enumerate(plan.parameters)}
    for number, table in enumerate(plan.tables):
        held = unbroadcast(table.array)
        spans = [stride // held.itemsize for stride in np.ascontiguousarray(held).strides]
        for axis, (length, span) in enumerate(zip(held.shape, spans, strict=True)):
            found[f"t{number}_{axis}"] = span if length > 1 else 0
    return found


def unbroadcast(table: NDArray[Any]) -> NDArray[Any]:
    """A table with one entry along each broadcast axis."""
    return table[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in table.strides)]


def tables_on(
    machine: Host, kept: LruCache[dict[str, Array]], plan: MaskData, *, wide: bool = False
) -> dict[str, Array]:
    """The tables of a plan's mask on a machine, by their names; they are copied once.

    `wide`: tables of bytes are copied as 32-bit integers.
    """
    held = {f"t{number}": unbroadcast(table.array) for number, table in enumerate(plan.tables)}
    if wide:
        held = {
            name: array.astype(np.int32) if array.itemsize == 1 else array
            for name, array in held.items()
        }
    return _copied(machine, kept, plan, held)


def runs_on(
    machine: Host,
    kept: LruCache[dict[str, Array]],
    launch: Hashable,
    names: Sequence[str],
    visited: Sequence[NDArray[Any]],
) -> dict[str, Array]:
    """The runs of a launch on a machine, by their names; they are copied once."""
    return _copied(machine, kept, launch, dict(zip(names, visited, strict=True)))


def _copied(
    machine: Host, kept: LruCache[dict[str, Array]], key: Any, held: dict[str, NDArray[Any]]
) -> dict[str, Array]:
    found = kept.get(key)
    if found is None:
        made = {name: machine.upload(plain(array)) for name, array in held.items()}
        found = kept.put(key, made, sum(array.nbytes for array in held.values()))
    return found


def plain(array: NDArray[Any]) -> NDArray[Any]:
    """An array as kernels read it: a bool is a byte, and there is at least one element."""
    plain = np.ascontiguousarray(array)
    plain = plain.view(np.uint8) if plain.dtype == np.bool_ else plain
    return plain if plain.size else np.zeros(1, plain.dtype)
