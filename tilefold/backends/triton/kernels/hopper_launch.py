"""Hopper's kernel as plans and launches see it: which specs it serves, its tiles, its arguments.

What a launch gives, in this order: what `arguments.names` lists; `places`, the number of row blocks
of all heads; `near`, the number of heads that come together; and the tensor descriptors that
`descriptors` lists. The grid is (programs,), at most one for each multiprocessor. `num_warps` is 4:
Gluon adds the warps of the second warpgroup and of the loader. As in `forward`, runs without a mask
are of whole tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tilefold.backends.triton.kernels import arguments
from tilefold.backends.triton.spec import Blocks, TritonSpec, power_of_two

WARPGROUPS, ROWS = 2, 64
"""Warpgroups, and queries of each: an instruction of Hopper multiplies 64 rows, by four warps."""

SHARED_BYTES = 232448
"""Shared memory of a program on sm_90."""

SPARE_BYTES = 2048
"""Of these, for barriers, arguments of the parts and reductions."""

ACCUMULATED = 320
"""The most columns of scores and sums together: a thread holds half as many registers of them."""

ROW_BLOCKS = ("places", "near")
"""Integers that this kernel alone takes: see above."""


class Operand(NamedTuple):
    """A tensor descriptor: of which operand, and the rows and columns of its tiles."""

    name: str
    operand: str
    rows: int
    columns: int

    @property
    def block(self) -> list[int]:
        """The block of a descriptor over (batch, heads, sequence, dimension)."""
        return [1, 1, self.rows, self.columns]

    def layout(self, build: Callable[..., Any]) -> Any:
        """Its tiles in shared memory, given Gluon's `NVMMASharedLayout`."""
        return build(swizzle_byte_width=128, element_bitwidth=16, rank=4)


def descriptors(spec: TritonSpec) -> tuple[Operand, ...]:
    """The tensor descriptors in the order of the arguments.

    Each is a `TensorDescriptor` of `triton.experimental.gluon.nvidia.hopper` over an operand of
    shape (batch, heads, sequence, dimension): its address and all strides but the last are
    multiples of 16 bytes, the last is 1, no side is 0, and what lies outside is read as 0.
    """
    keys = spec.blocks.traverse
    return (
        Operand("q_tiles", "q", ROWS, padded(spec.dim)),
        Operand("k_tiles", "k", keys, padded(spec.dim)),
        Operand("v_tiles", "v", keys, padded(spec.dim_v)),
    )


def parameters(spec: TritonSpec) -> tuple[str, ...]:
    """All arguments in their order."""
    return (*arguments.names(spec), *ROW_BLOCKS, *(given.name for given in descriptors(spec)))


def padded(dim: int) -> int:
    """The columns of a tile: a power of two, at least the 128 bytes within which it is swizzled.

    >>> padded(40), padded(80)
    (64, 128)
    """
    return max(64, power_of_two(dim))


def blocks(dim: int, dim_v: int) -> Blocks:
    """Tiles of 128 keys, or of 64 where heads are wide, in as many slots as shared memory has.

    FlashAttention-3 has 128 x 128 to 176 for dim 128 and 128 x 80 for dim 256; powers of two alone
    are possible here. Not timed.
    """
    wide = max(padded(dim), padded(dim_v))
    return Blocks(128, 64 if wide > 128 else 128, 4, {64: 4, 128: 3}.get(wide, 2))


def shared_bytes(spec: TritonSpec) -> int:
    """Shared memory of the tiles."""
    columns, columns_v = padded(spec.dim), padded(spec.dim_v)
    ring = spec.blocks.stages * spec.blocks.traverse * (columns + columns_v)
    return 2 * (WARPGROUPS * ROWS * columns + ring)


def fits(spec: TritonSpec) -> str | None:
    """Why there is no such kernel, or None."""
    blocks, columns_v, most = spec.blocks, padded(spec.dim_v), SHARED_BYTES - SPARE_BYTES
    if spec.kernel != "forward":
        return f"it is written for forward, not for {spec.kernel}"
    if spec.dtype not in ("float16", "bfloat16"):
        return f"it multiplies float16 and bfloat16, not {spec.dtype}"
    if max(spec.dim, spec.dim_v) > 256:
        return f"heads have at most 256 dimensions, not {max(spec.dim, spec.dim_v)}"
    if blocks.parallel != WARPGROUPS * ROWS:
        return f"a block has {WARPGROUPS * ROWS} queries, not {blocks.parallel}"
    if blocks.traverse < 64 or blocks.traverse + columns_v > ACCUMULATED:
        return f"tiles have 64 to {ACCUMULATED - columns_v} keys, not {blocks.traverse}"
    if blocks.warps != 4:
        return f"a warpgroup has 4 warps, not {blocks.warps}"
    if shared_bytes(spec) > most:
        return f"its tiles take {shared_bytes(spec)} bytes of shared memory, of which are {most}"
    return None
