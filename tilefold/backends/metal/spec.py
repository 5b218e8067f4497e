"""What a Metal kernel is: its name, its types, its three block sizes and what stays in registers.

As on the CPU a spec is all that decides the text of a kernel, and forgets the lengths. The letters
are those of Metal FlashAttention (Turner 2024): the `parallel` axis is split over threadgroups and
its simdgroups, 8 rows each; the `traverse` axis is walked inside a threadgroup; `head` is the head
dimension, which is walked too where it is larger than its block.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.masks.expression import Skeleton

SIMD = 32
"""Threads of a simdgroup, on every Apple GPU."""

SIDE = 8
"""Rows and columns of a fragment, the only matrix that simdgroups multiply."""

PARALLEL = {
    "forward": "q",
    "decode": "q",
    "merge": "q",
    "backward_dq": "q",
    "backward_dkv": "k",
}
"""The axis that is split over threadgroups, by operation."""

TENSOR_ROWS = 16
"""Rows of the parallel axis that a simdgroup multiplies with tensor operations."""

RESIDENT = {
    "forward": ("q", "o"),
    "decode": ("q", "o"),
    "merge": (),
    "backward_dq": ("q", "do", "dq"),
    "backward_dkv": ("k", "v", "dv", "dk"),
}
"""Operands along the parallel axis: each is kept in registers, or read and written per tile."""

SUMS = ("o", "dq", "dk", "dv")
"""Operands that are sums over the traversed axis: float32 wherever they are kept."""


@dataclass(frozen=True)
class Blocks:
    """Elements of a block along each axis; 8 rows of `parallel` for each simdgroup.

    >>> print(Blocks(32, 64, 16))
    32 x 64 x 16
    """

    parallel: int
    traverse: int
    head: int

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if value < SIDE or value % SIDE:
                raise ValueError(f"{name} must be a multiple of {SIDE} from {SIDE}, got {value}")

    def __str__(self) -> str:
        return f"{self.parallel} x {self.traverse} x {self.head}"


@dataclass(frozen=True)
class MetalSpec:
    """What changes the text of a kernel, and nothing else: no lengths, batch, heads or mask data.

    `cached` names the operands of `HELD` that stay in registers. With `staged` the traversed
    operands always pass through threadgroup memory, else only tiles at an edge do. `bfloat`: the
    GPU multiplies bfloat16 itself, else such numbers are widened by their bits. `unit`: the
    elements of a row lie side by side in every operand. `wide`: offsets inside a tile may pass 31
    bits. `vector`, 1, 2 or 4: so many neighbours of a row may be moved at once, and rows are whole
    in them. These three follow from where the arrays lie, which a plan does not know.
    `tensor_ops`: multiplies by Metal 4's tensor operations, not by fragments.
    """

    kernel: str
    dtype: str
    dim: int
    dim_v: int
    blocks: Blocks
    cached: tuple[str, ...]
    staged: bool
    bfloat: bool
    mask: Skeleton
    index_bits: int
    unit: bool = True
    wide: bool = False
    vector: int = 1
    tensor_ops: bool = False

    def __post_init__(self) -> None:
        assert self.kernel in RESIDENT, self.kernel
        assert set(self.cached) <= set(RESIDENT[self.kernel]), self.cached

    @property
    def simdgroups(self) -> int:
        """Simdgroups of a threadgroup."""
        return self.blocks.parallel // (TENSOR_ROWS if self.tensor_ops else SIDE)

    @property
    def threads(self) -> int:
        """Threads of a threadgroup."""
        return SIMD * self.simdgroups

    @property
    def entry(self) -> str:
        """The kernel's name in the text: stable, so that an app can take the text."""
        return f"tilefold_{self.kernel}"

    def width(self, operand: str) -> int:
        """Elements in a row of an operand."""
        return self.dim_v if operand in ("v", "o", "do", "dv") else self.dim


def whole(dim: int) -> int:
    """A dimension rounded up to whole fragments."""
    return -(-dim // SIDE) * SIDE
