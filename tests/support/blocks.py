"""Argument blocks, as kernels are given them."""

from __future__ import annotations

import ctypes

from tilefold.backends.cpu.kernels.arguments import names
from tilefold.backends.cpu.spec import KernelSpec


def block_at(spec: KernelSpec, address: int) -> ctypes.Array[ctypes.c_int64]:
    """All words of a block: the named ones, and where keys are split the counters of the heads."""
    named = names(spec)
    words = (ctypes.c_int64 * len(named)).from_address(address)
    if spec.kernel != "decode_part":
        return words
    heads = words[named.index("items")] // words[named.index("item_rows")]
    return (ctypes.c_int64 * (len(named) + heads)).from_address(address)
