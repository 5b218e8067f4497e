"""Records from Python: prepared steps that share one memory, on addresses of operands."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tilefold.backends.cpu import native, threads
from tilefold.backends.cpu.dispatch import _Memory
from tilefold.backends.cpu.native import NativeCall, Step


@dataclass(frozen=True, eq=False)
class Recorded:
    """Steps as a record, and as Python runs them where a team of threads needs it.

    `fixed`, `each` and `most` are those of `native.recorded`.
    """

    steps: tuple[Step, ...]
    fixed: int
    each: int
    most: int
    call: NativeCall

    @classmethod
    def of(cls, steps: Sequence[Step], fixed: int, each: int, *, alone: bool) -> Recorded:
        """The record of steps; `alone`: for the calling thread."""
        most = 1 if alone else max(step.items for step in steps)
        return cls((*steps,), fixed, each, most, native.recorded(steps, fixed, each, most))

    @property
    def alone(self) -> bool:
        """True if the calling thread does all the work."""
        return self.most == 1

    @property
    def is_native(self) -> bool:
        """True if the record runs with as many threads as a call may use now."""
        return self.most == 1 or threads.follow()

    def run(self, *addresses: int) -> None:
        """Run the steps on operands at addresses. The caller keeps these alive meanwhile."""
        if not self.is_native:
            self._by_python(addresses)
            return
        given = struct.pack(f"{len(addresses)}q", *addresses)
        if _KIND(native.runner())(self.call.address, given) == native.NO_MEMORY:
            raise MemoryError(MESSAGE)

    def _by_python(self, addresses: Sequence[int]) -> None:
        """What `native` does, step by step; threads of Python run the kernels."""
        workers = min(self.most, threads.number())
        memory = _taken(self.fixed + workers * self.each)
        for step in self.steps:
            ctypes.memmove(memory.pointer, step.template.ctypes.data, step.template.nbytes)
            block = (ctypes.c_int64 * len(step.template)).from_address(memory.pointer)
            for word, operand, offset in step.places.tolist():
                block[word] = addresses[operand] if operand >= 0 else memory.pointer + offset
            threads.run(step.kernel.address, memory.pointer, min(workers, step.items))


_KIND = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_char_p)

MESSAGE = "there is no memory for the scratch of a call"


def _taken(size: int) -> _Memory:
    """Memory of a call; tests look for it by this name."""
    return _Memory(size)
