"""From a kernel source to a Triton function: the module is written into the cache, and executed.

The emitted source is executed, and never the file on disk, so a foreign file cannot become code.
The file serves people, profilers, and Triton itself, which asks Python for the source of a
function.
"""

from __future__ import annotations

import functools
import importlib.util
import linecache
from types import ModuleType
from typing import Any

from tilefold.common import disk_cache
from tilefold.common.single_flight import once

_TOOLCHAIN = "a module of Triton kernels"


@once(most=512)
def load(text: str, entry: str) -> Any:
    """The function named `entry` in a source, as Triton's decorator made it."""
    return getattr(_module(text), entry)


def missing() -> str | None:
    """The reason why there is no Triton; None if it is installed."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (it comes with PyTorch for CUDA)"
    return None


def launch_options(kind: str, dtype: str, warps: int, stages: int) -> dict[str, int]:
    """The options of a launch, beside the kernel's arguments, by kind of GPU ("cuda" or "hip").

    Triton up to 3.7 assigns products of float64 to the matrix unit of an MI300 but cannot generate
    code for them. A request for 32 x 32 units, which do not exist for float64, makes it use
    multiply-adds.
    """
    found = {"num_warps": warps, "num_stages": stages}
    if kind == "hip" and dtype == "float64" and version() < (3, 9):
        found["matrix_instr_nonkdim"] = 32
    return found


@functools.cache
def version() -> tuple[int, int]:
    """The first two numbers of the installed version of Triton.

    AMD's builds have other package names, so the version is read from the module.
    """
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


@functools.cache
def has_gluon() -> bool:
    """True if this Triton has Gluon, its language with explicit layouts."""
    if missing():
        return False
    try:
        return (
            importlib.util.find_spec("triton.experimental.gluon.language.nvidia.hopper") is not None
        )
    except ModuleNotFoundError:
        return False


@once(most=512)
def _module(text: str) -> ModuleType:
    kept = disk_cache.default()
    name = disk_cache.key(text, _TOOLCHAIN)
    kept.put(text, _TOOLCHAIN, b"", suffix=".py")
    file = str(kept.directory / f"{name}.py")
    # Without a modification time the entry stays, whether the file exists or not.
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    module = ModuleType(f"tilefold_triton_{name[:16]}")
    module.__file__ = file
    exec(compile(text, file, "exec"), module.__dict__)
    return module
