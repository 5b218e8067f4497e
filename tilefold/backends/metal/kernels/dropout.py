"""Dropout in Metal: one bit for each element of a tile that a lane holds, set where the pair stays.

    words = philox(q, k / 4, h, b; seed);  kept: words[k % 4] >= keep_from

`tilefold.problems.dropout` defines it. A lane holds two neighbours of a row of each fragment: where
they are keys, one evaluation serves both, unless a group of four keys ends between them. A dropped
weight is 0 in the products. What is kept is multiplied by 1 / (1 - p) in dP and in the finished
sums of O and dV: so no weight of float16 exceeds its type.
"""

from __future__ import annotations

from tilefold.backends.metal.kernels.msl import UNROLL, Text
from tilefold.backends.metal.spec import SIDE, MetalSpec
from tilefold.problems.dropout import MULTIPLIERS, ROUNDS, WEYL

FACTOR = "as_type<float>(uint(keep_bits))"
"""1 / (1 - p): its bits are one of the kernel's sizes."""

PHILOX = f"""\
// Four random words of 32 bits: Philox4x32-{ROUNDS} (Salmon et al., 2011).
static inline uint4 philox(uint c0, uint c1, uint c2, uint c3, const ulong seed) {{
    uint k0 = uint(seed), k1 = uint(seed >> 32);
    {UNROLL}
    for (ushort i = 0; i < {ROUNDS}; ++i) {{
        const uint high0 = mulhi({MULTIPLIERS[0]:#X}u, c0), low0 = {MULTIPLIERS[0]:#X}u * c0;
        const uint high1 = mulhi({MULTIPLIERS[1]:#X}u, c2), low1 = {MULTIPLIERS[1]:#X}u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += {WEYL[0]:#X}u;
        k1 += {WEYL[1]:#X}u;
    }}
    return uint4(c0, c1, c2, c3);
}}
""".replace("0X", "0x")
"""The function that kernels with dropout call."""


def bits(text: Text, spec: MetalSpec, row: str, element: str) -> None:
    """`kept`, the bits of this lane's elements of the tile; nothing without dropout.

    `row` is the lane's row inside the parallel operand, `element` the index of its first element in
    the traversed one, as long as `e` is 0.
    """
    if not spec.dropout:
        return
    count = spec.blocks.traverse // SIDE * 2
    assert count <= 32, spec
    text.note("Which pairs stay, a bit for each.")
    text("uint kept = 0;")
    with text.loop("j", spec.blocks.traverse, SIDE):
        if spec.row.parallel == "q":
            text(f"const uint key = uint({element.replace(' + e', '')});")
            text(f"uint4 words = philox({row}, key / 4, h, b, ulong(seed[0]));")
            text("uint word = words[key % 4];", _keep("0"))
            with text.block("if (key % 4 == 3)"):
                text(f"words = philox({row}, key / 4 + 1, h, b, ulong(seed[0]));")
            text("word = words[(key + 1) % 4];", _keep("1"))
        else:
            with text.loop("e", 2):
                text(f"const uint query = uint({element});")
                text(f"const uint4 words = philox(query, {row} / 4, h, b, ulong(seed[0]));")
                text(f"const uint word = words[{row} % 4];", _keep("e"))


def _keep(e: str) -> str:
    return f"kept |= uint(word >= uint(keep_from)) << (j / {SIDE // 2} + {e});"


def stays(value: str, otherwise: str = "0.0f") -> str:
    """A value where the element `e` of fragment `j` stays."""
    return f"(kept >> (j / {SIDE // 2} + e)) & 1 ? {value} : {otherwise}"


def scaled(spec: MetalSpec, factor: str) -> str:
    """The factor of a finished sum of kept weights: `factor` times 1 / (1 - p)."""
    if not spec.dropout:
        return factor
    return FACTOR if factor == "1.0f" else f"{factor} * {FACTOR}"
