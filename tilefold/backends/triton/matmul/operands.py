"""What kernels that stand alone are given: tensors of up to four axes, checked, in any strides."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tilefold.backends.triton.machine import ALIGNED, Machine
from tilefold.backends.triton.matmul.gemm import DTYPES
from tilefold.problems.attention import LIMIT

if TYPE_CHECKING:
    from torch import Tensor

_NEAR = {"row": 3, "column": 2}


class Axes(NamedTuple):
    """Lengths and strides of a tensor of four axes; a stride is 0 where its length is 1."""

    lengths: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def batch(self) -> tuple[int, ...]:
        """Lengths of the two axes of the batch."""
        return self.lengths[:2]

    @property
    def sizes(self) -> list[int]:
        """Strides in the order of a kernel's list: rows and columns, then the batch from inside."""
        b, h, row, column = self.strides
        return [row, column, h, b]

    def moved(self, item: int) -> str | None:
        """Which axis lies side by side, "row" or "column", where a unit can move whole tiles."""
        *_, down, across = self.strides
        near = {1: "row"}.get(across) or {1: "column"}.get(down)
        if near is None or 0 in self.lengths:
            return None
        steps = zip(self.lengths, self.strides, strict=True)
        others = [step for n, (length, step) in enumerate(steps) if length > 1 and n != _NEAR[near]]
        return near if all(step and step * item % ALIGNED == 0 for step in others) else None

    def turned(self) -> Axes:
        """The transposed matrices."""
        return Axes(*((b, h, n, m) for b, h, m, n in self))

    def wide(self, rows: int, columns: int) -> bool:
        """Whether offsets inside so many rows and columns may pass 31 bits."""
        return rows * self.strides[2] + columns * self.strides[3] >= 2**31


def dtype_of(name: str, tensor: Tensor) -> str:
    """The name of a tensor's type. Raises TypeError for one that kernels do not take."""
    found = str(tensor.dtype).removeprefix("torch.")
    if found not in DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(DTYPES)}, got {found}")
    return found


def axes_of(name: str, tensor: Tensor, least: int) -> Axes:
    """A tensor with axes of length 1 put before its own, four in all."""
    lengths = tuple(tensor.shape)
    if not least <= len(lengths) <= 4 or max(lengths) > LIMIT:
        raise ValueError(
            f"{name} must have {least} to 4 axes, none longer than {LIMIT}, got {lengths}"
        )
    steps = (
        0 if length == 1 else step for length, step in zip(lengths, tensor.stride(), strict=True)
    )
    front = 4 - len(lengths)
    return Axes((1,) * front + lengths, (0,) * front + tuple(steps))


def common(name: str, batch: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """The batch of two tensors, where an axis of length 1 serves any length."""
    for one, two in zip(batch, other, strict=True):
        if one != two and 1 not in (one, two):
            raise ValueError(f"the batch of {name} must be {batch} or 1 along an axis, got {other}")
    return tuple(two if one == 1 else one for one, two in zip(batch, other, strict=True))


def bias_steps(bias: Tensor, dtype: str, result: str, shape: tuple[int, ...]) -> list[int]:
    """Strides of a bias: from number to number, then those of the batch from inside."""
    if dtype != result:
        raise TypeError(f"bias must be {result} as the result is, got {dtype}")
    (first, b, h, length), (_, step_b, step_h, step) = axes_of("bias", bias, 1)
    if length != shape[2] or first != 1:
        raise ValueError(f"bias must be (..., {shape[2]}), got {tuple(bias.shape)}")
    if common("bias", shape[:2], (b, h)) != shape[:2]:
        raise ValueError(f"the batch of bias must be {shape[:2]}, got {(b, h)}")
    return [step, step_h, step_b]


def written(
    name: str, given: Tensor | None, shape: tuple[int, ...], dtype: str, machine: Machine
) -> Tensor:
    """The tensor that a kernel writes: the given one, checked, or a new one."""
    if given is None:
        return machine.empty(shape, dtype)
    if tuple(given.shape) != shape or dtype_of(name, given) != dtype:
        raise ValueError(
            f"{name} must be {dtype} of shape {shape}, got {dtype_of(name, given)} of shape "
            f"{tuple(given.shape)}"
        )
    steps = zip(*axes_of(name, given, 1), strict=True)
    if given.numel() and any(step == 0 < length - 1 for length, step in steps):
        raise ValueError(f"{name} is written, so no axis of it may be broadcast")
    return given
