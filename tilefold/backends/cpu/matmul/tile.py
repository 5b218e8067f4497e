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
from tilefold.backends.cpu.matmul.spec import GemmSpec


def tile(module: Module, spec: GemmSpec, vectors: int) -> str:
    """The name of `(a, b, depth, sums, stride, start, start stride)` of the first `vectors`.

    `depth` counts steps. Strides are those of the rows of `sums` and `start`, in elements.
    """
    name = f"tile_{vectors}"
    if module.defines(name):
        return name
    parameters = [
        *(Value(f"%{name}", "ptr") for name in ("left", "right")),
        *(Value("%depth", "i64"), Value("%sums", "ptr"), Value("%stride", "i64")),
        *(Value("%begin", "ptr"), Value("%begin_stride", "i64")),
    ]
    a, b, depth, sums, stride, start, start_stride = parameters
    pairs = spec.unit.name == "dot"
    shape = Shape(spec.rows, vectors, spec.lanes, SCALARS[spec.sums], pairs)
    with module.function(name, parameters, internal=True) as body:

        def first(i: int, j: int) -> Value:
            return body.load(shape.at(body, _row(body, shape, start, i, start_stride), 0, j, 0),
                             shape.vector, "start")

        left = [body.offset(a, shape.operand, i) for i in range(spec.rows)]
        totals = microkernel.multiply(
            body, shape, spec.rows, left, spec.rows * spec.unit.depth, b, spec.width, depth, first
        )
        for i, line in enumerate(totals):
            target = _row(body, shape, sums, i, stride)
            for j, total in enumerate(line):
                body.store(total, shape.at(body, target, 0, j, 0))
    return name


def _row(body: Body, shape: Shape, base: Value, row: int, stride: Value) -> Value:
    return body.offset(base, shape.scalar, body.mul(stride, row)) if row else base
