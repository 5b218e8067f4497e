"""Memory that is asked for before it is needed."""

from __future__ import annotations

from tilefold.backends.cpu.kernels.ir import Body, Value


def prefetch(body: Body, address: Value, *, near: int = 3, write: bool = False) -> None:
    """Ask for a line: `near` 3 into the first cache, 2 into the second. No address is an error."""
    flags = [Value(str(number), "i32") for number in (int(write), near, 1)]
    body.module.declare("llvm.prefetch.p0", "void", ["ptr", "i32", "i32", "i32"])
    body.invoke("llvm.prefetch.p0", [address, *flags])
