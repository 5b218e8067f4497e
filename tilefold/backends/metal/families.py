"""GPU families of Apple, and what a kernel of each may take.

Limits are taken from Apple's Metal Feature Set Tables. `register_bytes` is no limit of Apple's: it
is how many bytes of tiles a thread plans to keep alive, and is read off the tables of `tables`.
These were tuned on an M1 and an M4, with which Apple8 and Apple10 are taken together: for them
nobody measured anything. What else was measured is from the same author's spreadsheet (2024).
"""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.common.check import choice


@dataclass(frozen=True)
class MetalFamily:
    """One family. `table` is the family whose tuned blocks it uses, `source` what its values are.

    `staged`: traversed operands pass through threadgroup memory, since each simdgroup reading them
    from device memory by itself is slower there. `bfloat`: the GPU multiplies bfloat16 itself.
    """

    name: str
    chips: str
    table: str
    register_bytes: int
    staged: bool
    bfloat: bool
    source: str
    threadgroup_bytes: int = 32768
    threads: int = 1024


_M1 = (
    "216 bytes: the most that a row of the table plans (dK/dV, float32, dim 56); the register file "
    "of an M1 has 208 for each of 1024 threads, and what spills beyond was accepted there. Staged: "
    "an M1 Max did 3801 billion instructions a second with K and V staged and 2025 with nothing "
    "staged (forward, float32, dim 64). bfloat is emulated before Apple9"
)
_M3 = (
    "512 bytes: the most that a row of the table plans (dQ, float32, dim 192; dK/dV, float32, dim "
    "128); registers are given out as they are needed there. Not staged: an M4 did 1226 billion "
    "instructions a second with K and V read from device memory and all else staged, 755 with K "
    "and V staged as well (forward, float32, dim 64)"
)

FAMILIES = {
    family.name: family
    for family in (
        MetalFamily("apple7", "A14, M1", "apple7", 216, True, False, _M1),
        MetalFamily("apple8", "A15, A16, M2", "apple7", 216, True, False, "as Apple7"),
        MetalFamily("apple9", "A17, A18, M3, M4", "apple9", 512, False, True, _M3),
        MetalFamily("apple10", "A19, M5", "apple9", 512, False, True, "as Apple9"),
    )
}
"""By name, oldest first."""


def family(name: str) -> MetalFamily:
    """The family of a name; raises ValueError for others.

    >>> family("apple8").chips
    'A15, A16, M2'
    """
    choice("family", name, tuple(FAMILIES))
    return FAMILIES[name]
