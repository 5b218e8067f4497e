"""Tuned blocks of products on this machine: `tilefold tune --operation gemm` keeps them in a file.

They serve products of the sizes, types and order in memory that they were measured for, of any
batch, bias and activation. A matrix that is packed before its products keeps the usual blocks: it
serves products of all sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.matmul.blocks import TUNED, GemmBlocks, divided, split, up
from tilefold.backends.cpu.matmul.spec import VNNI, Unit, lanes_of
from tilefold.backends.cpu.tuned import (
    Processor,
    TunedBlocks,
    check,
    check_sizes,
    entry_of,
    parsed,
)
from tilefold.common.tuned_store import TunedStore
from tilefold.problems.matmul import Product

ITEMS_PER_CORE = 2
"""Items that each core gets: tuned blocks are divided where a machine has more cores."""

_LARGEST = 32, 8
"""Rows and vectors at most that are accepted from a file."""


@dataclass(frozen=True)
class Key:
    """What the best blocks of a product depend on, beside the processor.

    `unit` is what multiplies. `transpose_a`: terms of A are no neighbours. `transpose_b`: those of
    B are.
    """

    a: str
    b: str
    unit: str
    m: int
    n: int
    k: int
    transpose_a: bool
    transpose_b: bool
    gate: bool

    @classmethod
    def of(cls, product: Product, unit: Unit) -> Key:
        """The key of a product, as its kernel sees it."""
        a, b = product.a, product.b
        turned = a.axes.transposed, b.axes.transposed
        sizes = product.m, product.n, product.k
        return cls(a.dtype, b.dtype, unit.name, *sizes, *turned, product.gate is not None)


def find(product: Product, unit: Unit, device: Device) -> TunedBlocks[GemmBlocks] | None:
    """The record of a product, or None."""
    kept = STORE.load().entries
    return kept.get((Processor.of(device), Key.of(product, unit))) if kept else None


def blocks(product: Product, unit: Unit, device: Device) -> GemmBlocks | None:
    """The tuned blocks of a product, divided for all cores of a device; or None."""
    found = find(product, unit, device)
    return shared(found.best.blocks, product, unit, device) if found else None


def shared(blocks: GemmBlocks, product: Product, unit: Unit, device: Device) -> GemmBlocks:
    """Blocks in whole register tiles, divided for all cores. Terms follow from `blocks` alone.

    So the bits of results do not depend on cores.
    """
    rows, width = blocks.rows, blocks.vectors * lanes_of(device, product.sums)
    block_k = up(blocks.block_k, max(16, unit.depth))
    if unit == VNNI or block_k >= product.k:
        block_k = product.k
    wanted = ITEMS_PER_CORE * device.cores // split(product, unit)[0]
    block_m = up(min(blocks.block_m, product.m), rows)
    block_n = up(min(blocks.block_n, product.n), width)
    block_m, block_n = divided(product, rows, width, block_m, block_n, wanted)
    return replace(blocks, block_m=block_m, block_n=block_n, block_k=max(1, block_k))


def _parse(value: Any, machine: Processor, key: Key) -> GemmBlocks:
    """Blocks of a file. Raises one of `tuned_store.UNUSABLE` for what kernels cannot have."""
    found = GemmBlocks(**value)
    rows, vectors, *sizes = vars(found).values()
    check_sizes((rows,), most=_LARGEST[0])
    check_sizes((vectors,), most=_LARGEST[1])
    check_sizes(sizes, most=2**31)
    check(not key.unit.startswith("amx") or (rows in (16, 32) and vectors == 2), value)
    return found


STORE: TunedStore[tuple[Processor, Key], TunedBlocks[GemmBlocks]] = TunedStore(
    file=TUNED,
    form="tilefold product winners 1",
    noun="winners",
    parse=lambda entry: parsed(entry, Key, _parse),
    entry=entry_of,
)
"""The file of this machine's processors."""
