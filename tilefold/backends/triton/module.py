"""From a text to a function of Triton's: the module is written into the cache, and run.

What is run is the text that was just emitted and never what lies on the disk, so nobody else's
file can become code. The file is there for people, profilers and Triton itself, which asks Python
for the source of a function.
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
    """The function of a text by its name, as Triton's decorator made it."""
    return getattr(_module(text), entry)


def missing() -> str | None:
    """Why there is no Triton; None where there is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (it comes with PyTorch for CUDA)"
    return None


def launch_options(kind: str, dtype: str, warps: int, stages: int) -> dict[str, int]:
    """How Triton is to compile a kernel: for a kind of GPU ("cuda", "hip"), beside its arguments.

    Triton up to 3.7 gives products of float64 to the matrix unit of an MI300, and then has no code
    for it. Asked for a unit of 32 x 32, which there is none of for float64, it takes multiply-adds.
    """
    found = {"num_warps": warps, "num_stages": stages}
    if kind == "hip" and dtype == "float64" and version() < (3, 9):
        found["matrix_instr_nonkdim"] = 32
    return found


@functools.cache
def version() -> tuple[int, int]:
    """The version of Triton that is installed, its first two numbers.

    Its package has other names where AMD builds it, so the module says it.
    """
    import triton

    major, minor, *_ = triton.__version__.split(".")
    return int(major), int(minor)


@functools.cache
def has_gluon() -> bool:
    """Whether this Triton has Gluon, its language of explicit layouts."""
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
    # Without a time of change the entry stays, whether there is such a file or not.
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    module = ModuleType(f"tilefold_triton_{name[:16]}")
    module.__file__ = file
    exec(compile(text, file, "exec"), module.__dict__)
    return module
