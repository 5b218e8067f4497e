"""The GPU of this Mac, through PyTorch: `torch.mps.compile_shader` compiles kernel sources.

Launches go to PyTorch's own stream, so they run in order with all other work of torch on the GPU,
and nothing waits for them until a result is read. On other machines `gpu` raises
NotImplementedError with the reason.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.launching import check_held
from tilefold.backends.metal import emulate
from tilefold.backends.metal.dispatch import Machine, MachineCache
from tilefold.backends.metal.families import FAMILIES
from tilefold.backends.protocols import Array
from tilefold.common import settings
from tilefold.common.imports import why_not


@dataclass(frozen=True, eq=False)
class Mps(Machine):
    """A torch device as a machine; `compiler` has the interface of `torch.mps.compile_shader`."""

    device: Any
    compiler: Callable[[str], Any]
    family: str
    kept: MachineCache = field(default_factory=MachineCache)

    def compile(self, text: str) -> Any:
        """The kernels of a source. Raises SyntaxError with Metal's log."""
        assert text.isascii(), "torch passes sources to Metal as ASCII"
        return self.compiler(text)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A tensor whose elements are not set."""
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)

    def upload(self, array: NDArray[Any]) -> Array:
        """A tensor with the elements of an array."""
        import torch

        return torch.tensor(np.ascontiguousarray(array), device=self.device)

    def check(self, **arrays: Array) -> None:
        """Raises TypeError or ValueError unless all arrays are tensors on the device."""
        for name, array in arrays.items():
            place = getattr(array, "device", None)  # of NumPy's arrays it is a string
            if getattr(place, "type", None) != self.device.type:
                where = place if hasattr(place, "type") else f"a {type(array).__name__}"
                raise TypeError(f"{name} must be a tensor on {self.device}, got {where}")
            check_held(name, array)


@functools.lru_cache(maxsize=1)
def gpu() -> Mps:
    """The GPU behind torch's device "mps". Raises NotImplementedError if there is none."""
    if reason := missing():
        raise NotImplementedError(reason)
    import torch

    return Mps(torch.device("mps"), torch.mps.compile_shader, family())


def missing(
    advice: str = "tilefold.metal.emulated() runs the same kernels on the CPU",
) -> str | None:
    """The reason why Metal kernels cannot run on this machine; None if they can.

    The reason ends with `advice` if the emulator can run here.
    """
    reason = _missing()
    return reason if reason is None or emulate.available() else f"{reason}; {advice}"


def _missing() -> str | None:
    if sys.platform != "darwin":
        return f"Metal is there on macOS alone, and this is {sys.platform}"
    if reason := why_not("torch"):
        return f"Metal kernels are compiled through PyTorch, which {reason}"
    import torch

    if torch.__version__ < "2.12":  # a TorchVersion, which compares releases
        return f"Metal kernels need PyTorch 2.12 or newer, found {torch.__version__}"
    if not torch.backends.mps.is_built():
        return f"this PyTorch ({torch.__version__}) was built without MPS"
    if not torch.backends.mps.is_available():
        return "PyTorch finds no Apple GPU, or macOS is too old for it"
    return None


@functools.lru_cache(maxsize=1)
def macos() -> str | None:
    """The version of macOS, such as "26.2"; None on other systems.

    macOS 26 reports version 16 to a Python that was built for an older system
    (python/cpython#135675), unless an environment variable asks for the true version at its start.
    """
    version = platform.mac_ver()[0]
    if not version.startswith("16."):
        return version or None
    command = [sys.executable, "-sSc", "import platform; print(platform.mac_ver()[0])"]
    truthful = {**os.environ, "SYSTEM_VERSION_COMPAT": "0"}
    try:
        done = subprocess.run(command, env=truthful, capture_output=True, text=True)
        version = done.stdout.strip() or version
    except OSError:
        pass
    return re.sub(r"^16\.", "26.", version)


def family() -> str:
    """The family of this Mac's GPU: TILEFOLD_METAL_FAMILY, else the family of its Metal name."""
    import torch

    chosen = settings.METAL_FAMILY.get()
    return family_of(torch.backends.mps.get_name()) if chosen is None else chosen


def family_of(name: str) -> str:
    """The family of a GPU by its name; a chip newer than all known ones counts as the newest.

    >>> family_of("Apple M1 Max"), family_of("Apple A17 Pro"), family_of("Apple M7")
    ('apple7', 'apple9', 'apple10')
    """
    found = re.fullmatch(r"Apple ([AM])(\d+)\b.*", name)
    newest = {"A": 0, "M": 0}
    for known, family in FAMILIES.items():
        for chip in family.chips.split(", "):
            if found and chip == found[1] + found[2]:
                return known
            newest[chip[0]] = max(newest[chip[0]], int(chip[1:]))
    if found and int(found[2]) > newest[found[1]]:
        return [*FAMILIES][-1]
    raise NotImplementedError(
        f"the GPU is called {name!r}, which names no chip of a known family: Metal kernels need"
        f" A14, M1 or newer; if it is one, set {settings.METAL_FAMILY.name} to one of"
        f" {', '.join(FAMILIES)}"
    )
