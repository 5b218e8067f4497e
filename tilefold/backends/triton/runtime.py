"""GPUs of NVIDIA and AMD through PyTorch: Triton compiles a kernel source at its first launch.

Launches go to PyTorch's current stream of the tensors' device, and nothing waits for them until a
result is read. The first call of a plan copies the plan's data to the device and waits for the
copy. So a call can be recorded into a CUDA graph if it was made once before.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.launching import check_held
from tilefold.backends.triton import module
from tilefold.backends.triton.architectures import ARCHITECTURES
from tilefold.backends.triton.machine import Machine, MachineCache
from tilefold.common.imports import why_not

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Gpu(Machine):
    """One GPU as a machine. `pinned` keeps the tensors that CUDA graphs read, while it lives."""

    device: Any
    architecture: str
    multiprocessors: int = 1
    kept: MachineCache = field(default_factory=MachineCache)
    pinned: list[Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the GPU in the driver."""
        import torch

        return str(torch.cuda.get_device_name(self.device))

    @property
    def gluon(self) -> bool:
        """True if this Triton has Gluon, and kernels in Gluon are written for this GPU."""
        return self.architecture == "sm_90" and module.has_gluon()

    def active(self) -> AbstractContextManager[Any]:
        """A context in which Triton launches on this device."""
        import torch

        held: AbstractContextManager[Any] = torch.cuda.device(self.device)
        return held

    def function(self, text: str, entry: str) -> Any:
        """The kernel of a source; Triton compiles it at its first launch."""
        return module.load(text, entry)

    def upload(self, array: NDArray[Any]) -> Tensor:
        """A copy of an array on the device; the call waits for it, so any stream may read it."""
        import torch

        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph cannot record the first call of attention with these shapes: make"
                " the same call once before the graph is captured"
            )
        with torch.cuda.stream(torch.cuda.default_stream(self.device)):
            return torch.tensor(np.ascontiguousarray(array), device=self.device)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A tensor whose elements are not set, for the current stream."""
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)

    def check(self, **tensors: Tensor) -> None:
        """Raises TypeError or ValueError unless all arguments are tensors on the device."""
        for name, tensor in tensors.items():
            place = getattr(tensor, "device", None)
            if not hasattr(place, "type"):
                raise TypeError(f"{name} must be a tensor, got a {type(tensor).__name__}")
            if place != self.device:
                raise ValueError(f"{name} must be on {self.device}, got {place}")
            check_held(name, tensor)

    def launched(self, tensors: Sequence[Tensor]) -> None:
        """Keep the memory of tensors until other streams, or graphs, have read them."""
        import torch

        stream = torch.cuda.current_stream(self.device)
        if stream == torch.cuda.default_stream(self.device):
            return
        if torch.cuda.is_current_stream_capturing():
            self.pinned.extend(tensors)
            return
        for tensor in tensors:
            tensor.record_stream(stream)


@functools.lru_cache(maxsize=64)
def gpu(index: int = 0) -> Gpu:
    """The GPU with torch's name "cuda:<index>". Raises NotImplementedError if it cannot be used."""
    if reason := missing():
        raise NotImplementedError(reason)
    import torch

    device = torch.device("cuda", index)
    count = torch.cuda.get_device_properties(index).multi_processor_count
    return Gpu(device, architecture_of(index), count)


def missing() -> str | None:
    """The reason why Triton kernels cannot run on this machine; None if they can."""
    if reason := why_not("torch"):
        return f"kernels on GPUs of NVIDIA and AMD need PyTorch, which {reason}"
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return (
            f"this PyTorch ({torch.__version__}) finds no GPU of NVIDIA or AMD"
            f"{'' if built else ', and was built without support for any'}"
        )
    if reason := module.missing():
        return reason
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 makes Triton interpret kernels on the CPU: unset it"
    return None


def architecture_of(index: int) -> str:
    """The architecture of a GPU. Raises NotImplementedError if it has no tables."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return known(properties.gcnArchName.partition(":")[0], properties.name)
    return known(f"sm_{properties.major}{properties.minor}", properties.name)


def known(name: str, chip: str = "") -> str:
    """The architecture whose tables and limits serve the architecture that the driver names.

    >>> known("sm_90"), known("sm_103"), known("sm_121")
    ('sm_90', 'sm_100', 'sm_120')

    Raises NotImplementedError for architectures that are too old or have no tables.
    """
    found = {"sm_87": "sm_86", "sm_103": "sm_100", "sm_121": "sm_120"}.get(name, name)
    if found not in ARCHITECTURES:
        raise NotImplementedError(
            f"the GPU {chip or name} is of architecture {name}, and kernels are written for"
            f" {', '.join(ARCHITECTURES)}: use impl='native' or 'composed' there, or the CPU"
        )
    return found
