"""From a spec to a function in memory: emit, find in the cache or compile, load.

A kernel's name on disk is the hash of its source. If the same files of this package emitted the
source of the same spec before, that name was noted. Then no source is emitted and no generator is
imported, which would take most of the time of a first call.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tilefold.backends.cpu import runtime
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.kernels.arguments import names
from tilefold.backends.cpu.spec import KernelSpec
from tilefold.common.first_use import imported, undisturbed
from tilefold.common.single_flight import once
from tilefold.masks.skeleton import Skeleton
from tilefold.planning.kernels import emitter
from tilefold.problems.attention import ITEM_BYTES, STATISTICS

_PACKAGE = Path(__file__).parents[2]
_SOURCES = tuple(
    _PACKAGE / name
    for name in (
        "common",
        "masks",
        "scores",
        "problems",
        "planning",
        "backends/cpu",
        "backends/cpu/kernels",
        "backends/cpu/matmul",
    )
)
"""The folders of all modules that a generator can import."""


@dataclass(frozen=True)
class CpuKernel:
    """A loaded kernel, the names of the words of its argument block, and one worker's scratch."""

    loaded: runtime.Loaded
    names: tuple[str, ...]
    workspace_bytes: int


def emit(spec: KernelSpec) -> str:
    """The LLVM source of a kernel; it can be emitted on every machine."""
    return emitter(spec.row, "tilefold.backends.cpu.kernels")(spec)


@once(most=512)
def kernel(spec: KernelSpec, device: Device) -> CpuKernel:
    """The kernel of a spec, compiled for the device unless the disk cache has it."""
    # An interrupt between the lines of llvmlite would leave its lock held, or a module of LLVM open
    # whose context is closed, which ends the process.
    loaded, scratch_bytes = undisturbed(lambda: _loaded(spec, device))
    return CpuKernel(loaded, names(spec), scratch_bytes)


def _loaded(spec: KernelSpec, device: Device) -> tuple[runtime.Loaded, int]:
    """The code of a kernel, and one worker's scratch."""
    return noted(spec, device, lambda: (emit(spec), workspace_bytes(spec)))


def noted(
    spec: Any, device: Device, write: Callable[[], tuple[str, int]]
) -> tuple[runtime.Loaded, int]:
    """The code of the kernel of a spec, a dataclass with its name, and a number that belongs to it.

    `write` returns its source and the number. It is called unless the same files wrote it before.
    """
    written_by = _loaded_sources()
    question = f"{written_by}\n{_spelt(spec)}"
    found = runtime.recall(question, spec.kernel, device) if written_by else None
    if found is None:
        source, number = write()
        found = runtime.kernel(source, spec.kernel, device), number
        if written_by and written_by == sources():  # otherwise a generator is being edited
            runtime.note(question, source, device, number)
    return found


def sources() -> str:
    """A checksum of all code that kernels depend on; empty if the code cannot be read."""
    digest = hashlib.sha256()
    try:
        for path in sorted(path for folder in _SOURCES for path in folder.iterdir()):
            if path.is_file():  # sources, or bytecode in a package without sources
                content = path.read_bytes()
                name = path.relative_to(path.parents[1]).as_posix().encode()
                digest.update(b"%s %d\n%s" % (name, len(content), content))
    except OSError:  # the package is in an archive
        return ""
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _loaded_sources() -> str:
    """The checksum of the sources when this process first read them."""
    return sources()


def _spelt(spec: Any) -> str:
    """All fields of a spec as text, of which its own text may leave some out.

    A mask is its text, which defines its equality.
    """
    values = ((field.name, getattr(spec, field.name)) for field in fields(spec))
    return "\n".join(
        f"{name} {value.text if isinstance(value, Skeleton) else repr(value)}"
        for name, value in values
    )


@imported
def _scratch() -> tuple[ModuleType, ModuleType]:
    """The modules that know the scratch of kernels; a first call from the disk cache needs none."""
    from tilefold.backends.cpu.kernels import block, state

    return block, state


def workspace_bytes(spec: KernelSpec) -> int:
    """The scratch of one worker: a multiple of 64 bytes, one page apart from the next scratch."""
    block, state = _scratch()
    item_bytes = ITEM_BYTES[STATISTICS[spec.dtype]]
    regions = state.regions if spec.row.by_query else block.regions
    size: int = -(-sum(regions(spec).values()) * item_bytes // 64) * 64
    return size


def double_bits(number: float) -> int:
    """A double as the 64-bit integer with the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
