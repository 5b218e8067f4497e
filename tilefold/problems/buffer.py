"""Where numbers lie: a pointer, a shape and strides, without the framework that owns them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Buffer:
    """A view of someone's memory, its axes in the canonical order (batch, heads, sequence, dim).

    `strides` count elements, may be zero or negative, and belong to `shape`'s axes. `owner` keeps
    the memory alive. The log-sum-exp has the axes (batch, heads, sequence).
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    owner: object
