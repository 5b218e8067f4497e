"""A call without its pointers: shapes, types, scale and mask."""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.mask import Rule


@dataclass(frozen=True)
class Problem:
    """What attention is asked to compute. Lengths count tokens, dims count elements."""

    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    len_k: int
    dim: int
    dim_v: int
    dtype: str
    scale: float
    mask: Rule
