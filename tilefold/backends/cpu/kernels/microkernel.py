"""The one micro-kernel: a block of registers C, rows x vectors, summed over a contraction.

    for c in range(count):                      rows + vectors loads
        for j in range(vectors): b[j] = B[c, j]           (a vector)
        for i in range(rows):    a    = A[i, c]           (one element, in all lanes)
            for j in range(vectors): C[i, j] += a * b[j]

A is read element by element, so any strides will do and nothing of it is packed; B is a row of
vectors in scratch. Every product of attention has this form when the parallel axis lies in the
lanes (BLIS, Van Zee and van de Geijn 2015, calls it the micro-kernel; it is the only code that
knows how many registers there are).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tilefold.backends.cpu.kernels.ir import Body, Operand, Value, alignment, vector

Accumulators = list[list[Value]]


@dataclass(frozen=True)
class Shape:
    """A register tile: `rows` broadcast rows by `vectors` vectors of `lanes` x `scalar`.

    `pairs`: A and B hold pairs of bfloat16 elements that follow each other in the contraction, 32
    bits each, and one instruction multiplies and adds both (AVX512-BF16).
    """

    rows: int
    vectors: int
    lanes: int
    scalar: str
    pairs: bool = False

    @property
    def width(self) -> int:
        """Elements of one row of the tile."""
        return self.vectors * self.lanes

    @property
    def vector(self) -> str:
        """The type of one register."""
        return vector(self.lanes, self.scalar)

    @property
    def operand(self) -> str:
        """The type of what is read of A and B at one step of the contraction."""
        return "i32" if self.pairs else self.scalar

    def at(self, body: Body, base: Value, row: Operand, column: int, stride: int) -> Value:
        """The address of vector `column` of row `row` of a scratch matrix."""
        index = body.add(
            body.mul(row, stride) if isinstance(row, Value) else row * stride, column * self.lanes
        )
        return body.offset(base, self.scalar, index)


def multiply(
    body: Body,
    shape: Shape,
    rows: int,
    left: list[Value],
    left_step: Operand,
    right: Value,
    right_stride: int,
    count: Operand,
    start: Callable[[int, int], Value],
) -> Accumulators:
    """C[i][j] = start(i, j) + the sum over c < count of A[i][c] * B[c][j].

    A[i][c] is `left[i][c * left_step]`: `left` holds the address of each row's first element. B[c]
    is the row of vectors at `right[c * right_stride]` in scratch. Steps and strides count elements;
    with pairs, `count` and the strides of B count pairs, and `left_step` counts bfloat16 elements.
    """
    element = "i16" if shape.pairs else shape.scalar
    places = [
        [body.variable(shape.vector, start(i, j), "acc") for j in range(shape.vectors)]
        for i in range(rows)
    ]
    step = body.variable("i64", Value("0", "i64"), "position")
    with body.loop("c", 0, count) as c:
        vectors = []
        for j in range(shape.vectors):
            address = shape.at(body, right, c, j, right_stride)
            vectors.append(body.load(address, vector(shape.lanes, shape.operand), "b"))
        position = body.read(step)
        body.write(step, body.add(position, left_step))
        for i in range(rows):
            address = body.offset(left[i], element, position)
            number = body.load(address, shape.operand, "a", align=alignment(element))
            wide = body.splat(number, shape.lanes, "a")
            for j in range(shape.vectors):
                total = body.read(places[i][j], "acc")
                body.write(places[i][j], add_product(body, shape, wide, vectors[j], total))
    return [[body.read(place, "acc") for place in line] for line in places]


def add_product(body: Body, shape: Shape, left: Value, right: Value, total: Value) -> Value:
    """total + left * right; with pairs, both products of every word."""
    if not shape.pairs:
        return body.multiply_add(left, right, total, "acc")
    halves = vector(2 * shape.lanes, "bfloat")
    pairs = [body.cast("bitcast", value, halves, "pair") for value in (left, right)]
    name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * shape.lanes}"
    return body.call(name, shape.vector, [total, *pairs], "acc")


def zeros(body: Body, shape: Shape) -> Callable[[int, int], Value]:
    """Accumulators that begin at zero."""
    zero = body.constant(0.0, shape.vector)
    return lambda i, j: zero


def row_tiles(
    body: Body, dim: int, rows: int, tile: Callable[[Operand, int], None], hint: str = "row"
) -> None:
    """`tile(first, rows)` over `dim` rows, a constant: full tiles in a loop, then the rest."""
    full = dim - dim % rows
    if full == rows:
        tile(0, rows)
    elif full:
        with body.loop(hint, 0, full, rows) as first:
            tile(first, rows)
    if dim % rows:
        tile(full, dim % rows)
