"""Tensors of products and of softmax as the kernels see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilefold.backends.matmul import MOST_AXES
from tilefold.backends.triton.machine import ALIGNED
from tilefold.backends.triton.matmul.gemm import DTYPES
from tilefold.problems.attention import LIMIT
from tilefold.problems.matmul import Accepted, Axes, Operand

if TYPE_CHECKING:
    from torch import Tensor

ACCEPTED = Accepted(DTYPES, empty=True, longest=LIMIT, most=MOST_AXES)
"""The tensors that products take."""

ROWS = Accepted(DTYPES, empty=True, longest=LIMIT)
"""The tensors that the kernel of a softmax takes."""

_NEAR = {"row": 3, "column": 2}


def operand(name: str, tensor: Tensor, least: int, accepted: Accepted = ACCEPTED) -> Operand:
    """A tensor of a call. Raises TypeError or ValueError for one that no kernel takes."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return accepted.operand(name, dtype, tensor.shape, tensor.stride(), least)


def movable(axes: Axes, item: int) -> str | None:
    """The axis whose elements are neighbours, "row" or "column", if a unit can move whole tiles.

    `item`: bytes of an element.
    """
    *_, down, across = axes.strides
    near = {1: "row"}.get(across) or {1: "column"}.get(down)
    if near is None or 0 in axes.lengths:
        return None
    steps = zip(axes.lengths, axes.strides, strict=True)
    others = [step for n, (length, step) in enumerate(steps) if length > 1 and n != _NEAR[near]]
    return near if all(step and step * item % ALIGNED == 0 for step in others) else None


def wide(axes: Axes, rows: int, columns: int) -> bool:
    """True if offsets inside a block of rows and columns may pass 31 bits."""
    return rows * axes.strides[2] + columns * axes.strides[3] >= 2**31
