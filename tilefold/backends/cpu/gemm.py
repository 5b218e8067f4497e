"""The one micro-kernel: a block of registers C, rows x vectors, summed over a contraction.

    for c in range(count):                      rows + vectors loads
        for j in range(vectors): b[j] = B[c, j]           (a vector)
        for i in range(rows):    a    = A[i, c]           (one number, in all lanes)
            for j in range(vectors): C[i, j] += a * b[j]

A is read number by number, so any strides will do and nothing of it is ever packed; B is a row of
vectors in scratch. Every product of attention has this form when the parallel axis lies in the
lanes (BLIS, Van Zee and van de Geijn 2015, calls it the micro-kernel; it is the only code that
knows how many registers there are).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tilefold.backends.cpu.ir import Body, Operand, Value, vector

Accumulators = list[list[Value]]


@dataclass(frozen=True)
class Shape:
    """A register tile: `rows` broadcast rows by `vectors` vectors of `lanes` x `scalar`."""

    rows: int
    vectors: int
    lanes: int
    scalar: str

    @property
    def width(self) -> int:
        """Elements of one row of the tile."""
        return self.vectors * self.lanes

    @property
    def vector(self) -> str:
        """The type of one register."""
        return vector(self.lanes, self.scalar)

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

    A[i][c] is `left[i][c * left_step]`: `left` holds the address of each row's first number. B[c]
    is the row of vectors at `right[c * right_stride]` in scratch. Steps and strides count elements.
    """
    places = [
        [body.variable(shape.vector, start(i, j), "acc") for j in range(shape.vectors)]
        for i in range(rows)
    ]
    with body.loop("c", 0, count) as c:
        vectors = []
        for j in range(shape.vectors):
            address = shape.at(body, right, c, j, right_stride)
            vectors.append(body.load(address, shape.vector, "b"))
        position = body.mul(c, left_step)
        for i in range(rows):
            number = body.load(body.offset(left[i], shape.scalar, position), shape.scalar, "a")
            wide = body.splat(number, shape.lanes, "a")
            for j in range(shape.vectors):
                total = body.read(places[i][j], "acc")
                body.write(places[i][j], body.multiply_add(wide, vectors[j], total, "acc"))
    return [[body.read(place, "acc") for place in line] for line in places]


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
