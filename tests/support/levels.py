"""The levels of instructions, as machines that need not be here: kernels are written for them."""

from __future__ import annotations

from tilefold.backends.cpu.device import Device, host

AVX512 = "+avx2,+fma,+avx512f,+avx512bw,+avx512dq,+avx512vl"
X86 = {
    "amx": f"{AVX512},+avx512bf16,+amx-tile,+amx-bf16",
    "avx512": AVX512,
    "avx2": "+avx2,+fma",
    "sse2": "+sse2",
}
NEON = {"neon": "+neon,+fp-armv8"}


def device(isa: str) -> Device:
    """A machine of the level and no more."""
    if isa in NEON:
        return Device("cpu", "described", isa, "aarch64-linux-gnu", NEON[isa], cores=4)
    return Device("cpu", "described", isa, "x86_64-unknown-linux-gnu", X86[isa], cores=4)


def here() -> list[Device]:
    """This machine, and the same at every level below its own."""
    found = [host()]
    for isa in X86:
        if isa != host().isa:
            try:
                found.append(host().lowered(isa))
            except ValueError:
                continue
    return found
