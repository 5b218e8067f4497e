"""Kernels for another processor, run under qemu: the engine's own calls, each in its own process.

The engine fills its argument blocks as always. The arrays that they point to travel to `driver.c`
and back in a file.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from blocks import block_at
from numpy.typing import NDArray
from trial import Memory

from tilefold.backends.cpu import dispatch, runtime, threads
from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.kernel import CpuKernel, emit, workspace_bytes
from tilefold.backends.cpu.kernels.arguments import names
from tilefold.backends.cpu.plan import CpuPlan
from tilefold.backends.cpu.spec import KernelSpec
from tilefold.planning.plan import Scratch

Array = NDArray[Any]
DRIVER = Path(__file__).with_name("driver.c")
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
PACKAGES = "qemu-user, gcc-aarch64-linux-gnu and libc6-dev-arm64-cross"


def missing() -> list[str]:
    """The tools that are missing here."""
    absent = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if not absent:
        command = [COMPILER, "-print-file-name=libc.a"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
        absent = [] if Path(found).is_absolute() else ["libc.a of the compiler"]
    return absent


MISSING = missing()


@dataclass
class Emulator(Memory):
    """Memory whose arrays are copied to the emulator and back.

    There they are adjacent to a page "before" or "after" them that must not be touched. The last
    element of the array named `cut` is not copied.
    """

    folder: Path
    side: str = "after"
    cut: str | None = None
    arrays: dict[str, Array] = field(default_factory=dict)
    programs: dict[tuple[KernelSpec, str], Path] = field(default_factory=dict)
    loaded: list[tuple[KernelSpec, Path]] = field(default_factory=list)

    def allocate(self, name: str, elements: int, dtype: str) -> Array:
        """See `Memory.allocate`."""
        self.arrays[name] = super().allocate(name, elements, dtype)
        return self.arrays[name]

    def move(self, plan: CpuPlan) -> CpuPlan:
        """See `Memory.move`."""
        tables = []
        for number, table in enumerate(plan.tables):
            contiguous = np.ascontiguousarray(table.array)
            self.arrays[f"table {number}"] = contiguous
            tables.append(replace(table, array=contiguous))
        for number, launch in enumerate(plan.launches):
            self.arrays[f"order {number}"] = launch.order
            self.arrays[f"owners {number}"] = launch.owners
            self.arrays[f"rows {number}"] = launch.runs.rows
            self.arrays[f"runs {number}"] = launch.runs.runs
        return replace(plan, tables=tuple(tables))

    def kernel(self, spec: KernelSpec, device: Device) -> CpuKernel:
        """Compile and link a kernel; its address is its number in the order of requests."""
        key = (spec, device.features)
        if key not in self.programs:
            program = self.folder / f"kernel{len(self.programs)}"
            kernel = program.with_suffix(".o")
            kernel.write_bytes(runtime.compile(emit(spec), device))
            options = ["-O1", "-Wall", "-Werror", "-static", f"-DKERNEL={spec.kernel}"]
            command = [COMPILER, *options, str(DRIVER), str(kernel), "-o", str(program)]
            subprocess.run(command, check=True, timeout=60)
            self.programs[key] = program
        self.loaded.append((spec, self.programs[key]))
        number = runtime.Loaded(len(self.loaded) - 1, spec.kernel, None)
        return CpuKernel(number, names(spec), workspace_bytes(spec))

    def run(self, address: int, arguments: int, _workers: int) -> None:
        """Run a kernel of `kernel` on one thread."""
        spec, program = self.loaded[address]
        words = list(block_at(spec, arguments))
        arrays = list(self.arrays.values())
        pointers = [
            (place, *_find(words[place], arrays))
            for place, name in enumerate(names(spec))
            if _is_pointer(name, spec) and (words[place] or name not in spec.row.optional)
        ]
        given, taken = self.folder / "given", self.folder / "taken"
        numbers = [self.side == "after", len(words), len(pointers), len(arrays), *words]
        numbers += [number for pointer in pointers for number in pointer]
        sizes = [
            array.nbytes - (array.itemsize if name == self.cut else 0)
            for name, array in self.arrays.items()
        ]
        numbers += sizes
        parts = [array.tobytes()[:size] for array, size in zip(arrays, sizes, strict=True)]
        given.write_bytes(np.array(numbers, np.int64).tobytes() + b"".join(parts))
        command = [EMULATOR, str(program), str(given), str(taken)]
        code = subprocess.run(
            command,
            timeout=120,
            capture_output=True,
            cwd=self.folder,  # a crash may write a core file
        ).returncode
        ended = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
        assert code == 0, f"{spec.kernel} {ended}"
        results = memoryview(taken.read_bytes())
        for array in arrays:
            result = np.frombuffer(results[: array.nbytes], array.dtype).reshape(array.shape)
            if array.flags.writeable:
                array[...] = result
            results = results[array.nbytes :]


def _is_pointer(name: str, spec: KernelSpec) -> bool:
    table = name[0] == "t" and name[1:].isdigit()
    return table or name in (
        "order",
        "rows",
        "runs",
        "owners",
        "seed",
        "workspace",
        *spec.row.arguments,
    )


def _find(address: int, arrays: list[Array]) -> tuple[int, int]:
    """The index of the array that holds an address, and the address's offset in it in bytes."""
    for number, array in enumerate(arrays):
        offset = address - array.ctypes.data
        if 0 <= offset < max(1, array.nbytes):
            return number, offset
    raise AssertionError(f"{address} points into no array that this call was given")


@contextmanager
def emulated(folder: Path) -> Iterator[Emulator]:
    """A context in which the engine runs its kernels under the emulator."""
    emulator = Emulator(folder)

    def workspace(size: int) -> SimpleNamespace:
        return SimpleNamespace(
            size=0, pointer=emulator.allocate("workspace", size, "uint8").ctypes.data
        )

    def allocate(name: str, scratch: Scratch) -> SimpleNamespace:
        array = emulator.allocate(name, math.prod(scratch.shape), scratch.dtype)
        return SimpleNamespace(pointer=array.ctypes.data, owner=array)

    with (
        mock.patch.object(dispatch, "kernel", emulator.kernel),
        mock.patch.object(threads, "run", emulator.run),
        mock.patch.object(dispatch, "_workspace", workspace),
        mock.patch.object(dispatch, "_allocate", allocate),
    ):
        yield emulator
