"""Every environment variable that tilefold reads, declared once, with its type.

No variable is read at import, so a program may set them before its first call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

ISAS = ("amx", "avx512", "avx2", "sse2", "neon")
"""The instruction-set levels that the CPU kernels are written for, widest first."""

METAL_FAMILIES = ("apple7", "apple8", "apple9", "apple10")
"""The families of Apple GPUs that the Metal kernels are written for, oldest first."""

SCOPES = ("anywhere", "machine")
"""How far results are the same bits: see `reproducible.set_reproducible`."""

MAX_THREADS = 1024
"""The largest number of threads that can be set: OpenMP runtimes end the process when the system
cannot start another thread, so larger numbers are refused.
"""


@dataclass(frozen=True)
class Setting(Generic[T]):
    """One environment variable: its name, the function that reads its text, and its meaning."""

    name: str
    read: Callable[[str], T]
    allowed: str
    default: T
    meaning: str

    def get(self) -> T:
        """Return the variable's value, or the default where it is unset or empty.

        Raises ValueError, which names the variable, its text and the allowed values.
        """
        text = os.environ.get(self.name, "").strip()
        if not text:
            return self.default
        try:
            return self.read(text)
        except ValueError:
            raise ValueError(f"{self.name} must be {self.allowed}, not {text!r}") from None


def _threads(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MAX_THREADS:
        raise ValueError(text)
    return value


def _openmp(text: str) -> int | None:
    """The first number of a list such as "4,2"; None for what OpenMP runtimes ignore, too."""
    first = text.split(",")[0].strip()
    return min(int(first), MAX_THREADS) or None if first.isdecimal() else None


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def _isa(text: str) -> str:
    if text.lower() not in ISAS:
        raise ValueError(text)
    return text.lower()


def _metal_family(text: str) -> str:
    if text.lower() not in METAL_FAMILIES:
        raise ValueError(text)
    return text.lower()


def _scope(text: str) -> str:
    if text.lower() not in SCOPES:
        raise ValueError(text)
    return text.lower()


def _switch(text: str) -> int:
    if text not in ("0", "1"):
        raise ValueError(text)
    return int(text)


def _directory(text: str) -> Path:
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # "~name", where there is no user of this name
        raise ValueError(text) from None
    if not path.is_absolute():
        raise ValueError(text)
    return path


NUM_THREADS: Setting[int | None] = Setting(
    "TILEFOLD_NUM_THREADS",
    _threads,
    f"an integer from 1 to {MAX_THREADS}",
    None,
    "threads per call; without it, see `tilefold.get_num_threads`",
)
OMP_NUM_THREADS: Setting[int | None] = Setting(
    "OMP_NUM_THREADS",
    _openmp,
    "a positive integer, or a list of them",
    None,
    "threads per call where neither tilefold nor torch was told a number; the first of a list",
)
OMP_THREAD_LIMIT: Setting[int | None] = Setting(
    "OMP_THREAD_LIMIT",
    _openmp,
    "a positive integer",
    None,
    "the most threads per call where tilefold was not told a number",
)
CPU_ISA: Setting[str | None] = Setting(
    "TILEFOLD_CPU_ISA",
    _isa,
    "one of " + ", ".join(ISAS),
    None,
    "the widest instruction set that CPU kernels may use; without it, the widest there is",
)
METAL_FAMILY: Setting[str | None] = Setting(
    "TILEFOLD_METAL_FAMILY",
    _metal_family,
    "one of " + ", ".join(METAL_FAMILIES),
    None,
    "the family of the Apple GPU, whose blocks and limits kernels follow; without it, by its name",
)
HOPPER: Setting[int] = Setting(
    "TILEFOLD_HOPPER",
    _switch,
    "0 or 1",
    1,
    "whether H100 and H200 take the forward kernel that is written for them in Gluon",
)
REPRODUCIBLE: Setting[str] = Setting(
    "TILEFOLD_REPRODUCIBLE",
    _scope,
    "one of " + ", ".join(SCOPES),
    "anywhere",
    "how far results are the same bits: with any cores and neighbours, or on one machine",
)
CACHE_DIR: Setting[Path | None] = Setting(
    "TILEFOLD_CACHE_DIR",
    _directory,
    "an absolute path",
    None,
    "where compiled kernels are kept; without it, the user's cache directory",
)
CACHE_MIB: Setting[int] = Setting(
    "TILEFOLD_CACHE_MIB",
    _count,
    "an integer (MiB), 0 to keep nothing",
    256,
    "how large the kernel cache may grow before the least recently used kernels go",
)

ALL: tuple[
    Setting[int | None] | Setting[str | None] | Setting[Path | None] | Setting[int] | Setting[str],
    ...,
] = (
    NUM_THREADS,
    OMP_NUM_THREADS,
    OMP_THREAD_LIMIT,
    CPU_ISA,
    METAL_FAMILY,
    HOPPER,
    REPRODUCIBLE,
    CACHE_DIR,
    CACHE_MIB,
)
"""All settings, for `tilefold doctor` and the documentation."""
