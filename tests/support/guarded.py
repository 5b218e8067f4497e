"""Memory between two forbidden pages: an access outside of an array ends the process.

Every array of a call is adjacent to the page before it or after it: arguments (which become
read-only), results, the mask's tables, the plan's lists, the argument block, the scratch.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from blocks import block_at
from numpy.typing import NDArray
from trial import Memory

from tilefold.backends.cpu import dispatch, threads
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.kernel import CpuKernel
from tilefold.backends.cpu.plan import CpuPlan
from tilefold.backends.cpu.spec import KernelSpec
from tilefold.masks.expression import Table
from tilefold.planning.plan import Scratch

Array = NDArray[Any]
PAGE = mmap.PAGESIZE
SIDES = ("before", "after")

_NO_ACCESS, _READ_ONLY = 0, 1  # PROT_NONE and PROT_READ on every system

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class GuardedMemory(Memory):
    """Arrays adjacent to the forbidden page "before" or "after" them; `close` frees them all.

    `short` names an array whose outermost element lies on the forbidden page: a kernel that touches
    every element must crash, or this harness overlooks overruns.
    """

    def __init__(self, side: str, short: str | None = None) -> None:
        self._side = side
        self._short = short
        self._pages: dict[str, tuple[int, int]] = {}
        self._old: list[tuple[int, int]] = []

    def allocate(self, name: str, elements: int, dtype: str) -> Array:
        """See `Memory.allocate`."""
        size = elements * np.dtype(dtype).itemsize
        inside = -(-size // PAGE) * PAGE
        first = self._map(name, inside)
        ctypes.memset(first, 0xFF, inside)
        start = first if self._side == "before" else first + inside - size
        raw = (ctypes.c_ubyte * size).from_address(start)
        return np.frombuffer(raw, np.uint8).view(dtype) if size else np.empty(0, dtype)

    def address(self, name: str, array: Array) -> int:
        """See `Memory.address`."""
        return array.__array_interface__["data"][0] + self._shift(name, array.itemsize)

    def freeze(self, names: Iterable[str]) -> None:
        """See `Memory.freeze`."""
        for name in names:
            _protect(*self._pages[name], _READ_ONLY)

    def copy(self, name: str, array: Array, *, frozen: bool = True) -> Array:
        """The same elements in this memory, contiguous, and read-only if `frozen`."""
        array = np.ascontiguousarray(array)
        copy = self.allocate(name, array.size, str(array.dtype))
        address = self.address(name, copy)
        flat = array.reshape(-1)
        if name == self._short:  # the elements that fit keep their places, counted from its start
            flat = flat[1:] if self._side == "before" else flat[:-1]
        where = max(address, self._pages[name][0])
        ctypes.memmove(where, flat.ctypes.data, flat.nbytes)
        if frozen:
            self.freeze([name])
        view = (ctypes.c_ubyte * array.nbytes).from_address(address)
        return np.frombuffer(view, np.uint8).view(array.dtype).reshape(array.shape)

    def scratch(self, name: str, elements: int, dtype: str) -> int:
        """The address of new memory with all bits set."""
        shift = self._shift(name, 64 if name == "workspace" else np.dtype(dtype).itemsize)
        return self.allocate(name, elements, dtype).ctypes.data + shift

    def move(self, plan: CpuPlan) -> CpuPlan:
        """See `Memory.move`."""
        tables = [Table(self.copy(f"table {i}", t.array)) for i, t in enumerate(plan.tables)]
        launches = []
        for launch in plan.launches:
            runs = replace(
                launch.runs,
                rows=self.copy("rows", launch.runs.rows),
                runs=self.copy("runs", launch.runs.runs) if len(launch.runs.runs) else EMPTY_RUNS,
            )
            order = self.copy("order", launch.order)
            owners = self.copy("owners", launch.owners)
            launches.append(replace(launch, runs=runs, order=order, owners=owners))
        return replace(plan, tables=tuple(tables), launches=tuple(launches))

    def close(self) -> None:
        """Free the memory; no array in it may be used any more."""
        for first, inside in (*self._old, *self._pages.values()):
            _libc.munmap(first - PAGE, inside + 2 * PAGE)
        self._old, self._pages = [], {}

    def _map(self, name: str, inside: int) -> int:
        if name in self._pages:
            self._old.append(self._pages[name])
        access = mmap.PROT_READ | mmap.PROT_WRITE
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = _libc.mmap(None, inside + 2 * PAGE, access, kind, -1, 0)
        assert base not in (None, ctypes.c_void_p(-1).value), ctypes.get_errno()
        first = int(base) + PAGE
        _protect(first - PAGE, PAGE, _NO_ACCESS)
        _protect(first + inside, PAGE, _NO_ACCESS)
        self._pages[name] = (first, inside)
        return first

    def _shift(self, name: str, size: int) -> int:
        if name != self._short:
            return 0
        return -size if self._side == "before" else size


EMPTY_RUNS = np.empty((0, 3), np.int64)


@contextmanager
def guarded(side: str, short: str | None = None) -> Iterator[GuardedMemory]:
    """Guarded memory, which also holds the engine's scratch and argument blocks meanwhile."""
    memory = GuardedMemory(side, short)
    specs: dict[int, KernelSpec] = {}

    def kernel(spec: KernelSpec, device: Device) -> CpuKernel:
        found = real_kernel(spec, device)
        specs[found.loaded.address] = spec
        return found

    def run(address: int, arguments: int, workers: int) -> None:
        block = np.frombuffer(block_at(specs[address], arguments), np.int64)
        copy = memory.copy("argument block", block, frozen=False)  # its counters count
        real_run(address, copy.ctypes.data, workers)

    def workspace(size: int) -> SimpleNamespace:
        return SimpleNamespace(size=0, pointer=memory.scratch("workspace", size, "uint8"))

    def allocate(name: str, scratch: Scratch) -> SimpleNamespace:
        pointer = memory.scratch(name, math.prod(scratch.shape), scratch.dtype)
        return SimpleNamespace(pointer=pointer)

    real_kernel, real_run = dispatch.kernel, threads.run
    with (
        mock.patch.object(dispatch, "kernel", kernel),
        mock.patch.object(threads, "run", run),
        mock.patch.object(dispatch, "_workspace", workspace),
        mock.patch.object(dispatch, "_allocate", allocate),
    ):
        yield memory
    memory.close()


def _protect(first: int, size: int, access: int) -> None:
    if _libc.mprotect(first, size, access):
        raise OSError(ctypes.get_errno(), "mprotect failed")
