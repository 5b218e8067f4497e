"""What the emulator found wrong with a kernel or with a launch of it."""

from __future__ import annotations


class Fault(RuntimeError):
    """A kernel did, or says, what Metal forbids. `kind` is one of `KINDS`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


KINDS = {
    "out-of-bounds read": "memory outside of every argument, or of the threadgroup's arrays, read",
    "out-of-bounds write": "the same, written",
    "unwritten memory": "a branch, an address or a result depends on memory that nobody wrote",
    "race": "two threads use one address, one of them writes, and no barrier stands between",
    "divergence": "an operation of a simdgroup is reached by a part of its lanes",
    "barrier": "a threadgroup barrier is reached by a part of its threads",
    "address space": "a pointer into one kind of memory is used as one into another",
    "refused": "Metal would not compile or launch this",
    "argument": "what was passed is not what the kernel declares",
    "crash": "the processor stopped the kernel: a division by zero, a stack without end",
    "time": "the launch did not end in time",
}
"""Every kind of fault, and what it means."""
