"""AMX for tests: the processor's own tiles, or `amx.c` in their place if it has none.

The machine code is the same in both cases. On a processor without AMX its tile instructions raise
a signal, and the handler of `amx.c` executes them: counted, checked, with the arithmetic that the
manual states. Kernels may rely on what was observed of LLVM 22's tile intrinsics:

- An intrinsic with constant tile numbers is one instruction on these tiles. LLVM allocates no
  tiles, spills none, copies none, and neither configures nor releases any by itself.
- Without the feature `amx-tile` LLVM does not raise: it ends the process ("Cannot select").
- They may read and write any memory, so no load or store is moved across one, neither in the source
  nor in the machine code. Therefore invariant loads stay in a loop that contains an intrinsic.
  Arithmetic in registers moves freely.

`test_amx.py` holds all but the second.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from tilefold.backends.cpu import device
from tilefold.backends.cpu.device import Device

SOURCE = Path(__file__).with_name("amx.c")
OPTIONS = ("-std=c11", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")

KINDS = (
    "ldtilecfg",
    "sttilecfg",
    "tilerelease",
    "tilezero",
    "tileloadd",
    "tileloaddt1",
    "tilestored",
    "tdpbf16ps",
    "tdpfp16ps",
)
"""The instructions that are executed in software, in the order of `amx.c`."""


@dataclass(frozen=True)
class Amx:
    """A machine with AMX: the `device` to emit and compile for, and the record of its tiles.

    Counts and faults exist only where tiles are `emulated`; a processor ends the process instead.
    """

    device: Device
    emulated: bool
    library: ctypes.CDLL

    def counts(self) -> dict[str, int]:
        """The number of executions of each instruction."""
        counts = {kind: self.library.amx_count(number) for number, kind in enumerate(KINDS)}
        return {kind: count for kind, count in counts.items() if count}

    def faults(self) -> list[str]:
        """The first faults that a processor would refuse, and the number of further ones."""
        count, kept = self.library.amx_faults(), 64
        found = []
        for place in range(min(count, kept)):
            kind = KINDS[self.library.amx_fault_kind(place)]
            found.append(f"{kind}: {self.library.amx_fault_reason(place).decode()}")
        return found + [f"and {count - kept} more"] * (count > kept)

    def configured(self) -> int:
        """The number of threads with configured tiles; 0 if every kernel has released its tiles."""
        return int(self.library.amx_configured())

    def reset(self) -> None:
        """Forget counts, faults, and the tiles of every thread."""
        self.library.amx_reset()

    def check(self) -> None:
        """Raises AssertionError for a fault, or for tiles that were not released."""
        assert not self.faults(), self.faults()
        assert not self.configured(), f"{self.configured()} threads did not release their tiles"


def missing() -> str | None:
    """The reason why AMX is not available here, not even in software; None if it is."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "AMX and its signal handler are for Linux on x86-64"
    if not device.host().has("avx512bf16"):
        return "kernels for AMX also use AVX-512 and its bfloat16, and this processor has none"
    if _compiler() is None:
        return "no C compiler found to build the software tiles"
    return None


@contextmanager
def amx() -> Iterator[Amx]:
    """A machine with AMX; the end of the block checks the use of its tiles."""
    made = _machine()
    if made.emulated:
        made.library.amx_install()
    made.reset()
    try:
        yield made
        made.check()
    finally:
        made.reset()
        if made.emulated:
            made.library.amx_remove()


@contextmanager
def everywhere() -> Iterator[Amx]:
    """A machine with AMX that is also `host()` meanwhile, so that all calls run on tiles."""

    def host(isa: str | None) -> Device:
        return made.device if isa is None else made.device.lowered(isa)

    with amx() as made, mock.patch.object(device, "_host", host):
        yield made


def tile_instructions(listing: str) -> list[str]:
    """The tile instructions of an assembly, in its order, with their operands."""
    return re.findall(rf"^\s+((?:{'|'.join(KINDS)})\b.*?)\s*(?:#.*)?$", listing, re.MULTILINE)


@functools.cache
def _machine() -> Amx:
    host = device.host()
    if host.isa == "amx":
        return Amx(host, False, _library())
    features = f"{host.lowered('avx512').features},+amx-tile,+amx-bf16"
    return Amx(replace(host, isa="amx", features=features), True, _library())


def _compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "amx.so"
        command = [str(_compiler()), *OPTIONS, "-Wall", "-Wextra", str(SOURCE), "-o", str(built)]
        subprocess.run(command, check=True, timeout=60)
        library = ctypes.CDLL(str(built))
    library.amx_count.restype = library.amx_faults.restype = ctypes.c_long
    library.amx_fault_reason.restype = ctypes.c_char_p
    library.amx_product.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    return library
