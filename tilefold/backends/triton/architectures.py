"""GPU architectures, and what a kernel of each may take.

Limits are taken from NVIDIA's CUDA programming guide (table of technical specifications by compute
capability) and AMD's CDNA 3 ISA guide.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.common.check import choice


@dataclass(frozen=True)
class Architecture:
    """One kind of GPU. `table` is the architecture whose blocks it uses.

    `shared_bytes` is what one program may take of shared memory, `registers` 32-bit ones of all of
    its threads, of which one thread has `thread_registers` at most. `descriptors`: there is a unit
    that moves whole tiles. `asynchronous`: products of half types and of TF32 read operands from
    shared memory (wgmma, tcgen05); `tensor_memory`: and leave their sums in a memory of their own.
    `float64_rows`: products of float64 have no more rows, where that is set; for a B200 Triton 3.6
    and 3.7 give longer ones to its newest matrix unit, which has no float64, and stop (3.9 takes an
    older one).
    """

    name: str
    kind: str
    chips: str
    table: str
    shared_bytes: int
    warp: int = 32
    registers: int = 65536
    thread_registers: int = 255
    descriptors: bool = False
    asynchronous: bool = False
    tensor_memory: bool = False
    float64_rows: int | None = None


_KIB = 1024

ARCHITECTURES = {
    found.name: found
    for found in (
        Architecture("sm_80", "cuda", "A100", "sm_80", 163 * _KIB),
        Architecture("sm_86", "cuda", "A10, RTX 30", "sm_120", 99 * _KIB),
        Architecture("sm_89", "cuda", "L4, L40, RTX 40", "sm_120", 99 * _KIB),
        Architecture(
            "sm_90", "cuda", "H100, H200", "sm_90", 227 * _KIB, descriptors=True, asynchronous=True,
        ),
        Architecture(
            "sm_100", "cuda", "B200", "sm_100", 227 * _KIB, descriptors=True, asynchronous=True,
            tensor_memory=True, float64_rows=32,
        ),
        Architecture("sm_120", "cuda", "RTX 50", "sm_120", 99 * _KIB, descriptors=True),
        *(
            Architecture(
                name, "hip", chips, "gfx942", 64 * _KIB, warp=64, registers=131072,
                thread_registers=512,
            )
            for name, chips in (("gfx90a", "MI200"), ("gfx942", "MI300"), ("gfx950", "MI350"))
        ),
    )
}  # fmt: skip
"""By name, NVIDIA's oldest first, then AMD's. An MI350 has 160 KiB, of which no table makes use."""


def architecture(name: str) -> Architecture:
    """The architecture of a name; raises ValueError for others.

    >>> architecture("sm_90").shared_bytes
    232448
    """
    choice("architecture", name, tuple(ARCHITECTURES))
    return ARCHITECTURES[name]
