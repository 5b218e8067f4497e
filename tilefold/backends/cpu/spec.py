"""What a kernel is: its name, which axis lies in its lanes, what multiplies, and its sizes.

A spec is all that decides the text of a kernel, and forgets the lengths: one kernel serves many
problems.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tilefold.masks.expression import Skeleton

DECODE = ("decode", "decode_part", "merge")
"""Kernels whose rows hold one query each, the head dimension in the lanes."""

PARALLEL = {
    "forward": "q",
    **dict.fromkeys(DECODE, "q"),
    "delta": "q",
    "backward_dq": "q",
    "backward_dkv": "k",
    "backward": "k",
    "reduce_dq": "q",
}
"""The axis that lies in the lanes, by kernel."""


class Multiplier(NamedTuple):
    """What multiplies: "fma" numbers, "dot" pairs of bfloat16, "amx" tiles of such pairs.

    With pairs every operand is a sum of `parts` bfloat16 numbers.
    """

    unit: str
    parts: int = 1

    @property
    def step(self) -> int:
        """Numbers of a sum in one product: operands are padded to a multiple."""
        return {"fma": 1, "dot": 2, "amx": 32}[self.unit]

    @property
    def terms(self) -> int:
        """Products that make one: all of two parts but that of the low ones."""
        return self.parts * (self.parts + 1) // 2


FMA = Multiplier("fma")


@dataclass(frozen=True)
class KernelSpec:
    """What changes the text of a kernel, and nothing else: no lengths, batch, heads or mask data.

    The register tile is `rows` broadcast rows by `vectors` vectors of `lanes` elements. The
    parallel axis lies in the lanes, `block_parallel` at a time; the traversed axis is walked
    `block_traverse` rows at a time. In the kernels of `DECODE`, `rows` is how many queries a worker
    holds at most. `native_half`: the machine converts float16 itself.
    """

    kernel: str
    dtype: str
    dim: int
    dim_v: int
    lanes: int
    vectors: int
    rows: int
    block_traverse: int
    mask: Skeleton
    index_bits: int
    native_half: bool = False
    multiplier: Multiplier = FMA

    @property
    def block_parallel(self) -> int:
        """Rows of the parallel axis in one block."""
        return self.lanes * self.vectors

    @property
    def state_width(self) -> int:
        """Elements that "decode_part" leaves of one query: O in whole vectors, m and l."""
        return self.whole(self.dim_v) + 2 * self.lanes

    def whole(self, dim: int) -> int:
        """A dimension rounded up to whole vectors."""
        return -(-dim // self.lanes) * self.lanes
