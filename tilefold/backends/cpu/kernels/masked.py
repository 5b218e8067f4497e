"""Vectors of which some lanes exist: others are neither read nor written."""

from __future__ import annotations

from tilefold.backends.cpu.kernels.ir import Body, Value, alignment, overload, vector


def first(body: Body, count: Value, lanes: int) -> Value:
    """Which of so many lanes are among the first `count`."""
    numbers = ", ".join(f"i64 {lane}" for lane in range(lanes))
    each = Value(f"<{numbers}>", vector(lanes, "i64"))
    return body.compare("slt", each, body.splat(count, lanes), "exists")


def load(body: Body, address: Value, type_: str, exists: Value, hint: str = "t") -> Value:
    """The lanes that exist, and 0 in the place of others."""
    align = Value(str(alignment(type_)), "i32")
    arguments = [address, align, exists, body.constant(0, type_)]
    return body.call(f"llvm.masked.load.{overload(type_)}.p0", type_, arguments, hint)


def store(body: Body, value: Value, address: Value, exists: Value) -> None:
    """Store the lanes that exist."""
    arguments = [value, address, Value(str(alignment(value.type)), "i32"), exists]
    name = f"llvm.masked.store.{overload(value.type)}.p0"
    body.module.declare(name, "void", [each.type for each in arguments])
    body.invoke(name, arguments)
