"""What every plan is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scratch:
    """An array that the kernels of a plan hand to each other: contiguous, not set beforehand."""

    shape: tuple[int, ...]
    dtype: str


OPERATIONS = ("forward", "backward")
