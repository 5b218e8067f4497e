"""Triton's interpreter as a machine: the same kernel sources on the CPU, for small cases."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.launching import check_held
from tilefold.backends.triton import module
from tilefold.backends.triton.machine import Machine, MachineCache

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Interpreted(Machine):
    """Triton's interpreter as a machine: NumPy does every operation of a kernel.

    It is for tests and small cases, since it takes seconds where a GPU takes microseconds.
    Raises NotImplementedError unless TRITON_INTERPRET=1 was set before Triton was imported.
    """

    architecture: str = "sm_90"
    kept: MachineCache = field(default_factory=MachineCache)
    name: str = "Triton's interpreter"
    multiprocessors: int = 4
    gluon: bool = False

    def __post_init__(self) -> None:
        if reason := missing():
            raise NotImplementedError(reason)
        _teach_bfloat16()
        _teach_fma()

    def active(self) -> AbstractContextManager[Any]:
        """A context that does nothing: there is only one device."""
        return nullcontext()

    def function(self, text: str, entry: str) -> Any:
        """The kernel of a source, as a function that is interpreted."""
        return module.load(text, entry)

    def upload(self, array: NDArray[Any]) -> Tensor:
        """A tensor with the elements of an array."""
        import torch

        return torch.tensor(np.ascontiguousarray(array))

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A tensor whose elements are not set."""
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype))

    def check(self, **tensors: Tensor) -> None:
        """Raises TypeError unless all arguments are tensors on the CPU."""
        for name, tensor in tensors.items():
            if not getattr(tensor, "is_cpu", False):
                where = getattr(tensor, "device", f"a {type(tensor).__name__}")
                raise TypeError(f"{name} must be a tensor on the CPU, got {where}")
            check_held(name, tensor)

    def launched(self, tensors: Sequence[Tensor]) -> None:
        """Do nothing: an interpreted launch has finished when it returns."""


def missing() -> str | None:
    """The reason why Triton's interpreter cannot run kernels in this process; None if it can."""
    if reason := module.missing():
        return reason
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "set TRITON_INTERPRET=1 before Triton is imported to run kernels on the CPU"
    return None


@functools.cache
def _teach_bfloat16() -> None:
    """Correct the interpreter's bfloat16.

    Without this it multiplies the integers that hold bfloat16 elements, and truncates where GPUs
    round.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    multiply, convert = builder.create_dot, interpreter._convert_float

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        return multiply(self, widened(left), widened(right), *rest)

    def convert_float(numbers: Any, kind: Any, into: Any, rounding: Any) -> Any:
        if (kind, into) != (tl.float32, tl.bfloat16):
            return convert(numbers, kind, into, rounding)
        bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
        even = bits + 0x7FFF + (bits >> 16 & 1)
        return np.where(np.isnan(numbers), 0x7FC0, even >> 16).astype(np.uint16)

    builder.create_dot = create_dot
    interpreter._convert_float = convert_float


@functools.cache
def _teach_fma() -> None:
    """Correct the interpreter's fused multiply-add of float32, which it rounds twice."""
    from triton.runtime import interpreter

    usual = interpreter.InterpreterBuilder.create_fma

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype != np.float32:
            return usual(self, x, y, z)
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma
