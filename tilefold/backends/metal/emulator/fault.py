"""The fault that the emulator found in a kernel or in its launch."""

from __future__ import annotations


class Fault(RuntimeError):
    """A kernel contains or did something that Metal forbids. `kind` is one of `KINDS`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


KINDS = {
    "out-of-bounds read": "a read of memory outside of all arguments and threadgroup arrays",
    "out-of-bounds write": "a write to memory outside of all arguments and threadgroup arrays",
    "unwritten memory": "a branch, an address or a result depends on memory that was not written",
    "race": "two threads use one address, one of them writes, and no barrier stands between",
    "divergence": "an operation of a simdgroup is reached by a part of its lanes",
    "barrier": "a threadgroup barrier is reached by a part of its threads",
    "address space": "a pointer into one kind of memory is used as a pointer into another kind",
    "refused": "Metal would not compile or launch this",
    "argument": "an argument does not fit the parameter that the kernel declares",
    "crash": "the processor stopped the kernel: a division by zero, a stack overflow",
    "time": "the launch did not end in time",
}
"""All kinds of faults with their meanings."""
