"""Register tiles: sums of a panel of A by a panel of B.

    sums[i, j] = start[i, j] + the sum over c of A[c, i] B[c, j]        i < rows, j < columns

Both panels lie in the order in which they are read, so a step takes `rows` broadcasts and
`vectors` loads for rows x vectors multiply-adds.
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels import microkernel
from tilefold.backends.cpu.kernels.ir import Body, Module, Value
from tilefold.backends.cpu.kernels.microkernel import Shape
from tilefold.backends.cpu.matmul.panels import SCALARS
from tilefold.backends.cpu.matmul.spec import ITEM_BYTES, GemmSpec

AHEAD_BYTES = 8
"""What each step of a tile fetches of the next panel of B, so that 16 tiles fetch all of it."""


def tile(module: Module, spec: GemmSpec, vectors: int) -> str:
    """The name of `(a, b, depth, sums, stride, begin, begin stride, ahead)` of the first `vectors`.

    `depth` counts steps. Strides are those of the rows of `sums` and of `begin`, what they begin
    with, in elements. `ahead` is memory of which the next tiles read.
    """
    name = f"tile_{vectors}"
    if module.defines(name):
        return name
    parameters = [
        *(Value(f"%{name}", "ptr") for name in ("left", "right")),
        *(Value("%depth", "i64"), Value("%sums", "ptr"), Value("%stride", "i64")),
        *(Value("%begin", "ptr"), Value("%begin_stride", "i64"), Value("%ahead", "ptr")),
    ]
    left_panel, right_panel, depth, sums, stride, begin, begin_stride, ahead = parameters
    pairs = spec.unit.name == "dot"
    shape = Shape(spec.rows, vectors, spec.lanes, SCALARS[spec.sums], pairs)
    with module.function(name, parameters, internal=True) as body:
        bytes_ = spec.width * ITEM_BYTES[spec.sums]
        for i in range(spec.rows):
            _prefetch(body, _row(body, shape, begin, i, begin_stride), bytes_, write=True)

        def fetch(c: Value) -> None:
            _prefetch(body, body.offset(ahead, "i8", body.mul(c, AHEAD_BYTES)), 1, write=False)

        left = [body.offset(left_panel, shape.operand, i) for i in range(spec.rows)]
        zeros = microkernel.zeros(body, shape)
        step = spec.rows * spec.unit.depth
        totals = microkernel.multiply(
            body, shape, spec.rows, left, step, right_panel, spec.width, depth, zeros, fetch
        )
        for i, line in enumerate(totals):
            source = _row(body, shape, begin, i, begin_stride)
            target = _row(body, shape, sums, i, stride)
            for j, total in enumerate(line):
                before = body.load(shape.at(body, source, 0, j, 0), shape.vector, "before")
                total = body.binary("fadd", before, total)
                body.store(total, shape.at(body, target, 0, j, 0))
    return name


def _row(body: Body, shape: Shape, base: Value, row: int, stride: Value) -> Value:
    return body.offset(base, shape.scalar, body.mul(stride, row)) if row else base


def _prefetch(body: Body, start: Value, size: int, *, write: bool) -> None:
    """Ask for memory that is used after the loop, or in the next one."""
    near = ("1", "3", "1") if write else ("0", "2", "1")
    name, flags = "llvm.prefetch.p0", [Value(number, "i32") for number in near]
    body.module.declare(name, "void", ["ptr", "i32", "i32", "i32"])
    for before in range(0, size, 64):
        body.invoke(name, [body.offset(start, "i8", before), *flags])
