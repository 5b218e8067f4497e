"""Kernels of products for 64-bit Arm: compiled here, and run under an emulator, one at a time."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from emulated import COMPILER, DRIVER, EMULATOR
from numpy.typing import NDArray

from tilefold.backends.cpu import runtime
from tilefold.backends.cpu.matmul.arguments import _ADDRESSES, names

Array = NDArray[Any]


@dataclass
class Memory:
    """Scratch of a call, which the emulator knows."""

    size: int
    array: Array

    @property
    def pointer(self) -> int:
        """Where it begins."""
        return int(self.array.ctypes.data)


@dataclass
class Arm:
    """Runs kernels on one thread of another processor; it knows all arrays of a call."""

    folder: Path
    source: Callable[[Any], str]
    arrays: list[Array] = field(default_factory=list)
    programs: list[tuple[Any, Path]] = field(default_factory=list)

    def kernel(self, spec: Any, on: Any) -> runtime.Loaded:
        """A kernel as a program; its address is its number."""
        program = self.folder / f"kernel{len(self.programs)}"
        compiled = program.with_suffix(".o")
        compiled.write_bytes(runtime.compile(self.source(spec), on))
        options = ["-O1", "-static", f"-DKERNEL={spec.kernel}"]
        command = [COMPILER, *options, str(DRIVER), str(compiled), "-o", str(program)]
        subprocess.run(command, check=True, timeout=60)
        self.programs.append((spec, program))
        return runtime.Loaded(len(self.programs) - 1, spec.kernel, None)

    def memory(self, size: int) -> Memory:
        """New scratch, at the start of a cache line."""
        array = np.zeros(size + 64, np.uint8)
        start = -array.ctypes.data % 64
        self.arrays.append(array[start : start + size])
        return Memory(size, self.arrays[-1])

    def run(self, address: int, arguments: int, _workers: int) -> None:
        """Run a kernel: its arrays go there and come back."""
        spec, program = self.programs[address]
        words = list((ctypes.c_int64 * len(names(spec))).from_address(arguments))
        pointers = [
            (place, *self._find(words[place]))
            for place, name in enumerate(names(spec))
            if name in _ADDRESSES and words[place]
        ]
        head = [1, len(words), len(pointers), len(self.arrays), *words]
        head += [number for pointer in pointers for number in pointer]
        head += [array.nbytes for array in self.arrays]
        given, taken = self.folder / "given", self.folder / "taken"
        content = [np.array(head, np.int64).tobytes(), *(x.tobytes() for x in self.arrays)]
        given.write_bytes(b"".join(content))
        done = subprocess.run([EMULATOR, program, given, taken], cwd=self.folder, timeout=120)
        assert done.returncode == 0, f"{spec.kernel} ended with {done.returncode}"
        results = taken.read_bytes()
        for array in self.arrays:
            flat = np.frombuffer(results[: array.nbytes], np.uint8)
            ctypes.memmove(array.ctypes.data, flat.ctypes.data, array.nbytes)
            results = results[array.nbytes :]

    def _find(self, address: int) -> tuple[int, int]:
        for number, array in enumerate(self.arrays):
            if 0 <= address - array.ctypes.data < max(1, array.nbytes):
                return number, address - array.ctypes.data
        raise AssertionError(f"{address} points into no array of this call")
