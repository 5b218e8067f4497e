"""From a spec to a function in memory: emit, find in the cache or compile, load."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

from tilefold.backends.cpu import backward, block, decode, forward, fused, merge, runtime, state
from tilefold.backends.cpu.arguments import names
from tilefold.device import Device
from tilefold.plan import DECODE, KernelSpec
from tilefold.problem import ITEM_BYTES, STATISTICS

_GENERATORS = {
    "forward": forward.forward,
    "decode": decode.decode,
    "decode_part": decode.decode,
    "merge": merge.merge,
    "delta": backward.delta,
    "backward_dq": backward.dq,
    "backward_dkv": backward.dkv,
    "backward": fused.fused,
    "reduce_dq": fused.reduce_dq,
}


@dataclass(frozen=True)
class CpuKernel:
    """A loaded kernel: its address, the words of its argument block, the scratch of one worker."""

    loaded: runtime.Loaded
    names: tuple[str, ...]
    workspace_bytes: int


def emit(spec: KernelSpec) -> str:
    """The LLVM text of a kernel; works on every machine."""
    return _GENERATORS[spec.operation](spec)


@lru_cache(maxsize=512)
def kernel(spec: KernelSpec, device: Device) -> CpuKernel:
    """The kernel of a spec, compiled for the device unless the disk cache has it."""
    loaded = runtime.kernel(emit(spec), spec.operation, device)
    return CpuKernel(loaded, names(spec), workspace_bytes(spec))


def workspace_bytes(spec: KernelSpec) -> int:
    """Scratch of one worker, a whole number of 64-byte lines and one page apart from the next."""
    item_bytes = ITEM_BYTES[STATISTICS[spec.dtype]]
    regions = state.regions if spec.operation in DECODE else block.regions
    return -(-sum(regions(spec).values()) * item_bytes // 64) * 64


def double_bits(number: float) -> int:
    """A double as the 64-bit integer with the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
