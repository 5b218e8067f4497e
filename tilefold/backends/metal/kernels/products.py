"""The two products of attention on 8x8 fragments, and what stays in registers between them.

"Outer product": rows of a parallel operand times rows of a traversed one, both long in the head
dimension, give a tile of scores. "Accumulate": such a tile times a traversed operand is added to a
sum that is as wide as the head dimension. Every product of attention, forward and backward, is one
of the two (Turner, Metal FlashAttention, 2024, whose three blocks these are).

Both walk the head dimension in blocks. An operand of the parallel axis is held in registers, or
read again for each tile; a sum that registers do not hold is spilled, as float32 in device
memory, which are read and written once for each tile: a long `traverse` block pays for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from tilefold.backends.metal.kernels.fragment import at, multiply_accumulate
from tilefold.backends.metal.kernels.msl import Text
from tilefold.backends.metal.kernels.storage import storage
from tilefold.backends.metal.kernels.tile import (
    HeadBlock,
    Reader,
    Tiles,
    column_of,
    fragment,
    set_pair,
    vector_of,
)
from tilefold.backends.metal.spec import SIDE, MetalSpec, whole


class Products:
    """The products of one kernel.

    The source has a `row` pointer for each operand of the parallel axis.
    """

    def __init__(self, text: Text, spec: MetalSpec) -> None:
        self._text, self._spec = text, spec
        self._storage = storage(spec.dtype, spec.bfloat)
        self.tiles = Tiles(text, spec)
        self.weight_type = self._storage.compute
        """The type in which P is multiplied."""
        self.ds_type = self._storage.ds
        """The type in which dS is multiplied."""

    def hold(self, *names: str) -> None:
        """Read operands of the parallel axis into registers, if the spec keeps them there."""
        for name in names:
            if name in self._spec.cached:
                width = self._spec.width(name)
                tile = fragment(self.weight_type)
                self._text(tile.declare(f"{name}_held", whole(width) // SIDE))
                with self._text.loop("d", whole(width), SIDE):
                    self._read_row(f"{name}_held[d / {SIDE}]", name, "d", width % SIDE == 0)

    def begin(self, *names: str) -> None:
        """Set sums to zero, those that are spilled when the first tile comes."""
        for name in names:
            if name in self._spec.cached:
                count = whole(self._spec.width(name)) // SIDE
                self.zeros(f"{name}_sum", count)
        if self._spilled(names):
            self._text("bool fresh = true;")

    def zeros(self, name: str, count: int) -> None:
        """An array of fragments of float32 zeros."""
        tile = fragment("float")
        self._text(tile.declare(name, count))
        with self._text.loop("i", count):
            self._text(tile.fill(f"{name}[i]"))

    def outer(self, result: str, parallel: str, traversed: str) -> None:
        """A tile of `result`: rows of `parallel` times rows of `traversed`, float32."""
        text, spec = self._text, self._spec
        text.note(f"{result} = {parallel} {traversed}^T")
        self.zeros(result, spec.blocks.traverse // SIDE)
        for block in self._head_blocks(spec.width(traversed)):
            with self._at_block(block, unroll=parallel in spec.cached):
                place = "fragment_column", "fragment_row"
                for read in self.tiles.read(traversed, block, place, self.weight_type):
                    self._outer(result, parallel, read, block)

    def _outer(self, result: str, parallel: str, read: Reader, block: HeadBlock) -> None:
        text = self._text
        tile = fragment(self.weight_type)
        with text.loop("d", block.width, SIDE):
            left = f"{parallel}_held[(d0 + d) / {SIDE}]"
            if parallel not in self._spec.cached:
                left = "a"
                text(tile.declare(left))
                self._read_row(left, parallel, "d0 + d", block.exact)
            with text.loop("j", self._spec.blocks.traverse, SIDE):
                text(tile.declare("x"))
                text(f"{at('x', 0)} = {read.number('j', 'd')};")
                text(f"{at('x', 1)} = {read.number('j + 1', 'd')};")
                text(multiply_accumulate(f"{result}[j / {SIDE}]", left, "x"))

    def accumulate(
        self, name: str, weights: str, traversed: str, kind: str, *, correction: str = ""
    ) -> None:
        """Add a tile of weights times `traversed` to the sum `name`, scaled by `correction` first.

        The weights are fragments of type `kind`.
        """
        text, spec = self._text, self._spec
        before = f"{name} {correction}".rstrip()
        text.note(f"{name} = {before} + {weights} {traversed}")
        cached = name in spec.cached
        if cached and correction:
            with text.loop("i", whole(spec.width(name)) // SIDE), text.loop("e", 2):
                text(f"{at(f'{name}_sum[i]', 'e')} *= {correction};")
        for block in self._head_blocks(spec.width(name)):
            with self._at_block(block, unroll=cached):
                if not cached:
                    self._turn_spill(name, block, correction)
                total = f"{name}_sum[(d0 + d) / {SIDE}]" if cached else f"spill[d / {SIDE}]"
                place = "fragment_row", "fragment_column"
                for read in self.tiles.read(traversed, block, place, kind, (total, weights)):
                    with (
                        text.loop("j", spec.blocks.traverse, SIDE),
                        text.loop("d", block.width, SIDE),
                    ):
                        text(fragment(kind).declare("x"))
                        text(*read.pair("j", "d"))
                        text(multiply_accumulate(total, f"{weights}[j / {SIDE}]", "x"))
                if not cached:
                    self._keep_spill(name, block)

    def finish(self, name: str, factor: str) -> None:
        """Write a sum, scaled, to its row where that is inside."""
        text, spec = self._text, self._spec
        width, cached = spec.width(name), name in spec.cached
        with (
            text.block("if (inside)"),
            text.loop("d", whole(width), SIDE, unroll=cached),
            text.loop("e", 2, unroll=cached) if spec.vector == 1 else nullcontext(),
        ):
            e = " + e" if spec.vector == 1 else ""
            text(f"const ushort column = d + fragment_column{e};")
            # A spilled row has no columns past the row, so the guard stands before the read too.
            with text.block(f"if (column < {width})") if width % SIDE else nullcontext():
                if spec.vector == 1:
                    value = self._finished(name, "e", "column", factor)
                    text(f"{name}_row[{column_of(self._spec, name, 'column')}] = {value};")
                else:
                    kind = f"{self._storage.memory}2"
                    first = self._finished(name, "0", "column", factor)
                    second = self._finished(name, "1", "column + 1", factor)
                    text(f"*(device {kind}*)({name}_row + column) = {kind}({first}, {second});")

    def _finished(self, name: str, e: str, column: str, factor: str) -> str:
        """The expression of an element of a sum as it is written."""
        value = at(f"{name}_sum[d / {SIDE}]", e)
        if name not in self._spec.cached:
            value = f"(fresh ? 0.0f : {name}_spill_row[{column}])"
        return self._storage.write(f"{value} * {factor}")

    def spills(self, names: Sequence[str], row: str) -> None:
        """Where the spilled rows of this lane's row begin; `row` counts spilled rows before it."""
        for name in names:
            if name not in self._spec.cached:
                offset = f"({row}) * {self._spec.width(name)}"
                self._text(f"device float* {name}_spill_row = {name}_spill + {offset};")

    def end_tile(self, *names: str) -> None:
        """The end of a tile: these sums are in memory now."""
        if self._spilled(names):
            self._text("fresh = false;")

    def _spilled(self, names: Sequence[str]) -> bool:
        return any(name not in self._spec.cached for name in names)

    def _turn_spill(self, name: str, block: HeadBlock, correction: str) -> None:
        """A block of a spilled sum; zeros at the first tile and past its row."""
        text = self._text
        text(fragment("float").declare("spill", block.width // SIDE))
        with text.loop("d", block.width, SIDE), text.loop("e", 2):
            text("const ushort column = d0 + d + fragment_column + e;")
            there = f"!fresh && {self._on_spill(name, block)}"
            scale = f"{correction} * " if correction else ""
            value = f"{there} ? {scale}{name}_spill_row[column] : 0.0f"
            text(f"{at(f'spill[d / {SIDE}]', 'e')} = {value};")

    def _keep_spill(self, name: str, block: HeadBlock) -> None:
        text = self._text
        with text.loop("d", block.width, SIDE), text.loop("e", 2):
            text("const ushort column = d0 + d + fragment_column + e;")
            with text.block(f"if ({self._on_spill(name, block)})"):
                text(f"{name}_spill_row[column] = {at(f'spill[d / {SIDE}]', 'e')};")

    def _on_spill(self, name: str, block: HeadBlock) -> str:
        return "inside" if block.exact else f"inside && column < {self._spec.width(name)}"

    def _read_row(self, target: str, name: str, d: str, exact: bool) -> None:
        """Two elements of this lane's row, from column `d` of the head dimension; zeros past it."""
        text, kind = self._text, self.weight_type
        column, width = f"{d} + fragment_column", self._spec.width(name)
        if self._spec.vector == 1:
            for e, place in enumerate((column, f"{column} + 1")):
                value = self._storage.read(
                    f"{name}_row[{column_of(self._spec, name, place)}]", kind
                )
                if not exact:
                    value = f"{place} < {width} ? {value} : {kind}(0)"
                text(f"{at(target, e)} = {value};")
            return
        pair = f"{self._storage.memory}2"
        value = vector_of(self._storage, f"{name}_row + {column}", 2)
        if not exact:
            value = f"{column} < {width} ? {value} : {pair}({self._storage.memory}(0))"
        numbers = (self._storage.read(f"{name}_pair[{e}]", kind) for e in range(2))
        text(f"const {pair} {name}_pair = {value};", *set_pair(target, *numbers))

    def _head_blocks(self, dim: int) -> list[HeadBlock]:
        width = min(self._spec.blocks.head, whole(dim))
        full = dim // width * width
        blocks = [HeadBlock(0, full, width, True)] if full else []
        if full < dim:
            rest = dim - full
            blocks.append(HeadBlock(full, dim, whole(rest), rest % SIDE == 0))
        return blocks

    @contextmanager
    def _at_block(self, block: HeadBlock, *, unroll: bool) -> Iterator[None]:
        """A loop over blocks of one width, or a single one: `d0` is where each begins."""
        text = self._text
        if block.stop - block.first > block.width:
            with text.loop("d0", block.stop, block.width, unroll=unroll):
                yield
        else:
            with text.block(""):
                text(f"const ushort d0 = {block.first};")
                yield
