"""A modified score of one tile, with what can be made for the whole tile before its rows.

    lines    what is the same along a diagonal (ALiBi, T5): line[i] for each difference of a
             parallel and a traversed index; row r of the tile reads width elements from last - r on
    panels   look-ups [.., q, k]: the tile of the array, turned where the lanes are not contiguous

A tile has traversed + width diagonals and traversed * width pairs: so a line costs next to nothing,
and a row takes a load where it took two gathers. A panel is read in whole cache lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tilefold.backends.cpu.kernels import pack
from tilefold.backends.cpu.kernels.ir import Value, vector
from tilefold.backends.cpu.kernels.mask import Folded, Lanes, Place, ScoreText
from tilefold.backends.cpu.kernels.microkernel import Shape
from tilefold.backends.cpu.kernels.storage import storage_in
from tilefold.backends.cpu.spec import KernelSpec
from tilefold.masks.expression import Expression, RealLookup, Slot, evaluate
from tilefold.masks.pairs import dense_lookups, diagonals
from tilefold.masks.symbols import is_real


def regions(spec: KernelSpec, tile: int) -> dict[str, int]:
    """Scratch of lines and panels, in elements; `tile` is what a tile of scores has."""
    if spec.score is None:
        return {}
    size = (spec.block_traverse + 2 * spec.block_parallel) * _elements(spec)
    lines = range(len(diagonals(spec.score.expression)))
    panels = range(len(dense_lookups(spec.score.expression)))
    return {f"line{i}": size for i in lines} | {f"panel{i}": tile for i in panels}


def _elements(spec: KernelSpec) -> int:
    """Elements of the kernel's type that hold an index."""
    return 2 if spec.index_bits == 64 and spec.dtype != "float64" else 1


@dataclass(frozen=True)
class TileOf:
    """Where a tile is: its rows, its lanes that exist, and the regions of scratch."""

    shape: Shape
    first: Value
    count: Value
    valid: Value
    region: Callable[[str], Value]


class TileScoreText(ScoreText):
    """Writes the modified scores of one tile."""

    def __init__(self, place: Place, rest: Value, tile: TileOf) -> None:
        super().__init__(place, rest)
        self._place, self._tile = place, tile
        body = place.body
        self._last = body.sub(body.add(tile.first, tile.count), 1, "last")
        self._lines = diagonals(self._expression)
        self._panels = dense_lookups(self._expression)
        for number, node in enumerate(self._lines):
            self._fill_line(self._tile.region(f"line{number}"), node)
        for number, lookup in enumerate(self._panels):
            self._fill_panel(self._tile.region(f"panel{number}"), lookup)

    def _row(self, index: Value) -> Folded:
        known = self._known | self._ready(index)
        self._text.indices[self._traverse] = self._text.narrow(index)
        return evaluate(self._expression, self._text, known)

    def _ready(self, index: Value) -> dict[int, Lanes]:
        """What was made ahead, for row `index` of the traversed axis."""
        body, shape = self._place.body, self._tile.shape
        found = {}
        for number, node in enumerate(self._lines):
            element, first = self._element(node), body.sub(self._last, index)
            line = body.offset(self._tile.region(f"line{number}"), element, first)
            found[id(node)] = tuple(
                body.load(body.offset(line, element, j * shape.lanes), vector(shape.lanes, element))
                for j in range(shape.vectors)
            )
        row = body.sub(index, self._tile.first)
        for number, lookup in enumerate(self._panels):
            panel = self._tile.region(f"panel{number}")
            found[id(lookup)] = tuple(
                body.load(shape.at(body, panel, row, j, shape.width), shape.vector)
                for j in range(shape.vectors)
            )
        return found

    def _element(self, node: Expression) -> str:
        return self._tile.shape.scalar if is_real(node) else f"i{self._place.spec.index_bits}"

    def _fill_line(self, line: Value, node: Expression) -> None:
        """The values of all diagonals: of pairs of the last row with lanes that go on and on."""
        body, text, tile = self._place.body, self._text, self._tile
        parallel, shape = self._place.parallel, tile.shape
        before = dict(text.indices)
        farthest = body.sub(body.add(tile.count, tile.valid), 2, "farthest")
        length = body.add(tile.count, shape.width - 1)
        text.indices[self._traverse] = text.narrow(self._last)
        with body.loop("diagonal", 0, length, shape.width) as start:
            first = body.add(self._place.block, start)
            last = body.add(body.add(self._place.block, farthest), 1)
            text.indices[parallel] = text.lanes(first, last)
            values = text.wide(evaluate(node, text))
            for j, value in enumerate(values):
                at = body.add(start, j * shape.lanes)
                body.store(value, body.offset(line, self._element(node), at))
        text.indices = before

    def _fill_panel(self, panel: Value, lookup: RealLookup) -> None:
        """The tile of an array, its lanes parallel."""
        body, tile, arguments = self._place.body, self._tile, self._place.arguments
        assert isinstance(lookup.table, Slot)
        strides = [arguments[name] for name in lookup.table.strides]
        at = {self._place.parallel: self._place.block, self._traverse: tile.first}
        steps, offset = {}, Value("0", "i64")
        for index, stride in zip(lookup.indices, strides, strict=True):
            name = getattr(index, "name", "")
            if name in at:
                steps[name], position = stride, at[name]
            else:
                found = evaluate(index, self._text, self._known)
                position = body.cast("sext", found, "i64", "at")
            offset = body.add(offset, body.mul(position, stride))
        found = storage_in(lookup.table.dtype, tile.shape.scalar)
        start = found.at(body, arguments[lookup.table.name], offset)
        strides = [steps[self._place.parallel], steps[self._traverse]]
        one = body.constant(1.0, tile.shape.scalar)
        function = pack.pack(body.module, tile.shape, found)
        body.invoke(function, [panel, start, *strides, tile.valid, tile.count, one])
