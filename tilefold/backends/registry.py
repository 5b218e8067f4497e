"""The backends by name, and the machine of a device: one row each, imported at its first use."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from tilefold.backends.protocols import Backend, Machine
from tilefold.common.check import choice
from tilefold.common.first_use import imported


@dataclass(frozen=True, eq=False)
class Row:
    """A backend: its module with the functions of `Backend`, and the device it serves."""

    module: str
    device: str
    """The type of the device, as torch names it."""
    several: bool = False
    """True where a machine may have several such devices, which are counted from 0."""


BACKENDS = {
    "cpu": Row("tilefold.backends.cpu.calls", "cpu"),
    "metal": Row("tilefold.backends.metal.calls", "mps"),
    "triton": Row("tilefold.backends.triton.calls", "cuda", several=True),
}

DEVICES = {row.device: name for name, row in BACKENDS.items()}
"""The backends by the devices that they serve."""


@imported
def backend(name: str) -> Backend:
    """The functions of a backend."""
    found: Any = import_module(BACKENDS[name].module)
    return found  # type: ignore[no-any-return]  # a module has the functions of the protocol


def machine(device: Any) -> Machine:
    """The machine of a device: of a string such as "cpu", "mps", "cuda" or "cuda:1", or itself.

    Raises ValueError for devices without a backend, NotImplementedError for those not here.
    """
    try:
        known = _finders.get(device)
    except TypeError:  # it has no hash, and is refused below
        known = None
    if known is not None:
        return known()
    if isinstance(device, Machine):
        return device
    found = re.fullmatch(r"(\w+?)(?::(\d+))?", str(device))
    kind = found[1] if found else str(device)
    number = int(found[2] or 0) if found else 0
    row = BACKENDS[DEVICES[kind]] if kind in DEVICES else None
    choice("device", kind if row and (row.several or not number) else device, tuple(DEVICES))
    finder: Callable[..., Machine] = backend(DEVICES[kind]).machine
    if number:
        finder = partial(finder, number)
    _finders[device] = finder
    return finder()


_finders: dict[Any, Callable[[], Machine]] = {}
"""The finders of machines by device, for devices that were asked for: every call asks."""
