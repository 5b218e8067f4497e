"""Dropout in Triton: `kept`, a truth for each pair of a tile.

    words = philox(q, k / 4, h, b; seed);  kept: words[k % 4] >= keep_from

`tilefold.problems.dropout` defines it. Tiles begin at multiples of 4 along both axes, so one
evaluation serves four keys of a tile, side by side. A dropped weight is 0 in the products. What is
kept is multiplied by 1 / (1 - p) in dP and in the finished sums of O and dV: so no weight of
float16 exceeds its type.
"""

from __future__ import annotations

from tilefold.backends.triton.kernels.storage import storage
from tilefold.backends.triton.kernels.text import Text
from tilefold.backends.triton.spec import TritonSpec

ARGUMENTS = ("keep_from", "keep_factor")
"""The last arguments where pairs fall out: the least word of a kept pair, an unsigned number of 32
bits, and the factor of a kept weight, which is given as the scale is."""

STAYS = '''\
@triton.jit
def stays(seed, keep_from, b, h, q, group):
    """Which pairs stay: those of queries q and the four keys of each group, along the last axis."""
    w0, w1, w2, w3 = tl.philox(seed, q, group, h, b, 10)  # Salmon et al., 2011
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words >= keep_from
'''
"""The function that kernels with dropout call."""


def opening(spec: TritonSpec, used: set[str]) -> list[str]:
    """The lines at the start of a kernel that make its arguments what the body uses."""
    lines = []
    if "keep_from" in used:
        lines.append("keep_from = tl.cast(keep_from, tl.int32).to(tl.uint32, bitcast=True)")
        lines.append("seed_bits = tl.load(seed)")
    if "keep_factor" in used and storage(spec.dtype).by_bits:
        bits = "tl.cast(keep_factor, tl.int64)"
        lines.append(f"keep_factor = {bits}.to(tl.float64, bitcast=True)")
    return lines


def kept(text: Text, spec: TritonSpec, head: str) -> None:
    """`kept` of a tile; nothing without dropout. `head` is the head of its queries."""
    if not spec.dropout:
        return
    if spec.parallel == "q":
        groups = "start // 4 + tl.arange(0, TRAVERSE // 4)"
        pairs = f"q_at[:, None], ({groups})[None, :]"
        text(f"kept = stays(seed_bits, keep_from, b, {head}, {pairs})")
    else:
        groups = "first_k // 4 + tl.arange(0, PARALLEL // 4)"
        pairs = f"(start + row_traverse)[:, None], ({groups})[None, :]"
        text(f"kept = tl.trans(stays(seed_bits, keep_from, b, {head}, {pairs}))")


def weights(spec: TritonSpec) -> str:
    """The weights of a tile as its products take them, before they are rounded."""
    return "tl.where(kept, p, 0.0)" if spec.dropout else "p"


def scale_dp(text: Text, spec: TritonSpec) -> None:
    """dP of a tile, which the factor of dropout multiplies."""
    if spec.dropout:
        text("dp = tl.where(kept, dp * keep_factor, 0.0)")


def scaled(spec: TritonSpec, total: str) -> str:
    """A finished sum of kept weights."""
    return f"({total} * keep_factor)" if spec.dropout else total
