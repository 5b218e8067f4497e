"""Kernels of products for 64-bit Arm: compiled here, run under an emulator."""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from emulated import COMPILER, DRIVER, EMULATOR, MISSING, PACKAGES
from gemm_cases import CASES, TYPES, Case, arrays, assert_right, operand
from levels import device
from numpy.typing import NDArray

from tilefold.backends.cpu import runtime, threads
from tilefold.backends.cpu.matmul import calls
from tilefold.backends.cpu.matmul.arguments import _ADDRESSES, names
from tilefold.problems.matmul import Product

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
    arrays: list[Array] = field(default_factory=list)
    programs: list[tuple[Any, Path]] = field(default_factory=list)

    def kernel(self, spec: Any, on: Any) -> runtime.Loaded:
        """A kernel as a program; its address is its number."""
        program = self.folder / f"kernel{len(self.programs)}"
        compiled = program.with_suffix(".o")
        compiled.write_bytes(runtime.compile(calls.source(spec), on))
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


def multiplied(case: Case, arm: Arm) -> Array:
    """The product of a case on the other processor."""
    given = arrays(case)
    axes = 2 + len(case.batch)
    m, n, _ = case.sizes
    stored = (*case.batch, n, m) if "o" in case.turned else (*case.batch, m, n)
    kind: Any = np.uint16 if case.out == "bfloat16" else case.out
    out = np.zeros(stored, kind)
    result = np.swapaxes(out, -1, -2) if "o" in case.turned else out
    product = Product.of(
        {name: operand(name, array, axes) for name, array in given.items()},
        alpha=1.0,
        beta=1.0 if case.c else 0.0,
        transpose_a="a" in case.turned,
        transpose_b="b" in case.turned,
        bias_axis=None,
        activation=case.activation,
        dtype=case.out,
        results=lambda a, b: TYPES,
        biases=lambda kind: TYPES,
    )
    shown = result.view("float16") if case.out == "bfloat16" else result
    lies = operand("out", shown, len(product.batch) + 2)
    prepared = calls.prepare(product, lies, device("neon"))
    arm.arrays += [*given.values(), out, prepared.offsets]
    arm.arrays += prepared.packing.starts if prepared.packing else ()
    where = {**given, "out": out}
    order = ("a", "b", "out", "c", "bias", "gate")
    prepared.run(*[where[name].ctypes.data if name in where else 0 for name in order])
    return result


@pytest.mark.slow
@pytest.mark.feature("M11")
@pytest.mark.skipif(
    bool(MISSING) and os.environ.get("CI") != "true",
    reason=f"{' and '.join(MISSING)} not found; Debian has them in {PACKAGES}",
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.sizes}-{case.a}")
def test_products_on_arm(case: Case, tmp_path: Path) -> None:
    arm = Arm(tmp_path)
    with (
        mock.patch.object(calls, "kernel", arm.kernel),
        mock.patch.object(calls, "_workspace", arm.memory),
        mock.patch.object(calls, "_panels", arm.memory),
        mock.patch.object(calls, "_parts_of", arm.memory),
        mock.patch.object(threads, "run", arm.run),
    ):
        found = multiplied(case, arm)
    if case.out == "bfloat16":
        found = (found.astype(np.uint32) << 16).view(np.float32)
    assert_right(case, arrays(case), found)
