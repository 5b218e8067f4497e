"""The place of an array in memory: a pointer, a shape and strides, without its framework."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Buffer:
    """A view of an array, its axes in the canonical order (batch, heads, sequence, dim).

    `strides` count elements and may be zero or negative. `owner` keeps the memory alive. The
    log-sum-exp has the axes (batch, heads, sequence).
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    owner: object
