"""The two products of attention on 8x8 fragments, and what stays in registers between them.

"Outer product": rows of a parallel operand times rows of a traversed one, both long in the head
dimension, give a tile of scores. "Accumulate": such a tile times a traversed operand is added to a
sum that is as wide as the head dimension. Every product of attention, forward and backward, is one
of the two (Turner, Metal FlashAttention, 2024, whose three blocks these are).

Both walk the head dimension in blocks. An operand of the parallel axis is held in registers, or
read again for each tile; a sum that registers do not hold is kept in pages, float32 in device
memory, which are read and written once for each tile: a long `traverse` block pays for that.

Tiles of a traversed operand are read where they lie, and pass through threadgroup memory at an
edge, where zeros fill what is not there; or always, on GPUs whose cores do not cache what several
simdgroups read.

A weight of 0 does not keep NaN and infinities out of a product. A tile at an edge that holds any is
"wild", and is added pair by pair, without the pairs that may not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

from tilefold.backends.metal.fragment import Fragment, at, multiply_accumulate
from tilefold.backends.metal.frame import seen, stage_stride
from tilefold.backends.metal.msl import Text, element
from tilefold.backends.metal.spec import PARALLEL, SIDE, MetalSpec, whole

Reader = Callable[[str, str], str]
"""The text of a number of the present tile, given its row and column beside the lane's place."""


class HeadBlock(NamedTuple):
    """Some blocks of the head dimension: `first` to `stop`, fragments over `width` at a time.

    `exact`: they end inside the dimension; else the last fragment is filled up with zeros.
    """

    first: int
    stop: int
    width: int
    exact: bool


class Products:
    """The products of one kernel.

    The text has `row` pointers for operands of the parallel axis, `head` pointers for traversed
    ones, and the tile's `start`, `last` and `edge` (see `frame.tiles`).
    """

    def __init__(self, text: Text, spec: MetalSpec) -> None:
        self._text, self._spec = text, spec
        self._number = element(spec.dtype, spec.bfloat)
        self.weight_type = self._number.compute
        """In which P is multiplied."""
        # dS may pass what float16 holds; bfloat16 has float32's range.
        self.slope_type = "float" if self.weight_type == "half" else self.weight_type
        """In which dS is multiplied."""

    def hold(self, *names: str) -> None:
        """Read operands of the parallel axis into registers, those that the spec keeps there."""
        for name in names:
            if name in self._spec.cached:
                width = self._spec.width(name)
                tile = fragment(self.weight_type)
                self._text(tile.declare(f"{name}_held", whole(width) // SIDE))
                with self._text.loop("d", whole(width), SIDE):
                    self._read_row(f"{name}_held[d / {SIDE}]", name, "d", width % SIDE == 0)

    def begin(self, *names: str) -> None:
        """Set sums to zero, those in pages when the first tile comes."""
        for name in names:
            if name in self._spec.cached:
                count = whole(self._spec.width(name)) // SIDE
                self.zeros(f"{name}_sum", count)
        if self._paged(names):
            self._text("bool fresh = true;")

    def zeros(self, name: str, count: int) -> None:
        """An array of fragments of float32 zeros."""
        tile = fragment("float")
        self._text(tile.declare(name, count))
        with self._text.loop("i", count):
            self._text(tile.fill(f"{name}[i]"))

    def tiles(self, *names: str) -> None:
        """Where the present tile of each traversed operand begins."""
        for name in names:
            self._text(
                f"device const {self._number.memory}* {name}_tile"
                f" = {name}_head + long(start) * {name}_n;"
            )

    def outer(self, result: str, parallel: str, traversed: str) -> None:
        """A tile of `result`: rows of `parallel` times rows of `traversed`, float32."""
        text, spec = self._text, self._spec
        text.note(f"{result} = {parallel} {traversed}^T")
        self.zeros(result, spec.blocks.traverse // SIDE)
        for block in self._head_blocks(spec.width(traversed)):
            with self._at_block(block, unroll=parallel in spec.cached):
                place = "fragment_column", "fragment_row"
                for read in self._tile(traversed, block, place, self.weight_type):
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
                text(f"{at('x', 0)} = {read('j', 'd')};")
                text(f"{at('x', 1)} = {read('j + 1', 'd')};")
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
                    self._turn_page(name, block, correction)
                total = f"{name}_sum[(d0 + d) / {SIDE}]" if cached else f"page[d / {SIDE}]"
                place = "fragment_row", "fragment_column"
                for read in self._tile(traversed, block, place, kind, (total, weights)):
                    with (
                        text.loop("j", spec.blocks.traverse, SIDE),
                        text.loop("d", block.width, SIDE),
                    ):
                        text(fragment(kind).declare("x"))
                        text(f"{at('x', 0)} = {read('j', 'd')};")
                        text(f"{at('x', 1)} = {read('j', 'd + 1')};")
                        text(multiply_accumulate(total, f"{weights}[j / {SIDE}]", "x"))
                if not cached:
                    self._keep_page(name, block)

    def finish(self, name: str, factor: str) -> None:
        """Write a sum, scaled, to its row where that is inside."""
        text, spec = self._text, self._spec
        width, cached = spec.width(name), name in spec.cached
        with (
            text.block("if (inside)"),
            text.loop("d", whole(width), SIDE, unroll=cached),
            text.loop("e", 2, unroll=cached),
        ):
            text("const ushort column = d + fragment_column + e;")
            value = at(f"{name}_sum[d / {SIDE}]", "e")
            if not cached:
                value = f"(fresh ? 0.0f : {name}_page_row[column])"
            target = f"{name}_row[{self.column(name, 'column')}]"
            line = f"{target} = {self._number.write(f'{value} * {factor}')};"
            with text.block(f"if (column < {width})") if width % SIDE else nullcontext():
                # A page has no columns past the row, so the guard stands before the read too.
                text(line)

    def pages(self, names: Sequence[str], row: str) -> None:
        """Where the pages of this lane's row begin; `row` counts rows of the page before it."""
        for name in names:
            if name not in self._spec.cached:
                offset = f"({row}) * {self._spec.width(name)}"
                self._text(f"device float* {name}_page_row = {name}_page + {offset};")

    def end_tile(self, *names: str) -> None:
        """What follows a tile: the pages of these sums hold numbers now."""
        if self._paged(names):
            self._text("fresh = false;")

    def _paged(self, names: Sequence[str]) -> bool:
        return any(name not in self._spec.cached for name in names)

    def _turn_page(self, name: str, block: HeadBlock, correction: str) -> None:
        """A block of a sum from its page; zeros at the first tile and where no page is."""
        text = self._text
        text(fragment("float").declare("page", block.width // SIDE))
        with text.loop("d", block.width, SIDE), text.loop("e", 2):
            text("const ushort column = d0 + d + fragment_column + e;")
            there = f"!fresh && {self._on_page(name, block)}"
            scale = f"{correction} * " if correction else ""
            value = f"{there} ? {scale}{name}_page_row[column] : 0.0f"
            text(f"{at(f'page[d / {SIDE}]', 'e')} = {value};")

    def _keep_page(self, name: str, block: HeadBlock) -> None:
        text = self._text
        with text.loop("d", block.width, SIDE), text.loop("e", 2):
            text("const ushort column = d0 + d + fragment_column + e;")
            with text.block(f"if ({self._on_page(name, block)})"):
                text(f"{name}_page_row[column] = {at(f'page[d / {SIDE}]', 'e')};")

    def _on_page(self, name: str, block: HeadBlock) -> str:
        return "inside" if block.exact else f"inside && column < {self._spec.width(name)}"

    def _tile(
        self,
        name: str,
        block: HeadBlock,
        place: tuple[str, str],
        kind: str,
        added: tuple[str, str] | None = None,
    ) -> Iterator[Reader]:
        """How to read a block of the tile: once for each way that it may lie; write the product.

        `place` is the lane's row and column in a fragment of it. `added`: the sum and the weights
        of a product that must keep out what is wild.
        """
        text = self._text
        row, column = place
        if not self._spec.staged and block.exact:
            with text.either("!edge") as otherwise:
                argument = f"device const {self._number.memory}*"
                lane = f"{row} * {name}_n + {self.column(name, column)}"
                text(f"{argument} lane_of_{name} = {name}_tile + {lane};")
                yield lambda r, d: self._number.read(
                    f"lane_of_{name}[{_by(r, f'{name}_n')} + {self.column(name, f'd0 + {d}')}]",
                    kind,
                )
                otherwise()
                yield from self._staged(name, block, place, kind, added)
        else:
            yield from self._staged(name, block, place, kind, added)

    def _staged(
        self,
        name: str,
        block: HeadBlock,
        place: tuple[str, str],
        kind: str,
        added: tuple[str, str] | None,
    ) -> Iterator[Reader]:
        self._stage(name, block, watch=added is not None)
        lane = f"{place[0]} * {stage_stride(self._spec)} + {place[1]}"
        read = partial(self._read_staged, lane, kind)
        if added is None:
            yield read
            return
        with self._text.either("wild") as otherwise:
            self._add_wild(*added, block)
            otherwise()
            yield read

    def _read_staged(self, lane: str, kind: str, r: str, d: str) -> str:
        value = f"stage[{lane} + {_by(r, stage_stride(self._spec))} + {d}]"
        return value if kind == self._number.compute else f"{kind}({value})"

    def _stage(self, name: str, block: HeadBlock, *, watch: bool) -> None:
        """Copy a block of the tile to threadgroup memory, zeros where there is nothing.

        With `watch`, `wild` tells whether a tile at an edge holds NaN or infinities.
        """
        text, spec = self._text, self._spec
        compute = self._number.compute
        count = spec.blocks.traverse * block.width
        text("threadgroup_barrier(mem_flags::mem_threadgroup);")
        if watch:
            text("bool odd = false;")
        head = f"for (ushort i = thread_index; i < {count}; i += {spec.threads})"
        with text.block(head):
            text(f"const ushort r = i / {block.width};", f"const ushort d = i % {block.width};")
            there = "start + r < last"
            if not block.exact:
                there += f" && d0 + d < {spec.width(name)}"
            at_ = f"{name}_tile[r * {name}_n + {self.column(name, 'd0 + d')}]"
            text(f"const {compute} x = {there} ? {self._number.read(at_, compute)} : {compute}(0);")
            text(f"stage[r * {stage_stride(spec)} + d] = x;")
            if watch:
                # By its bits: fast mathematics take isfinite for true.
                value = "x" if compute == "float" else "float(x)"
                text(f"odd |= (as_type<uint>({value}) & 0x7f800000u) == 0x7f800000u;")
        if watch:
            text("odd = simd_any(odd);")
            with text.block("if (lane == 0)"):
                text("oddities[simdgroup] = odd;")
        text("threadgroup_barrier(mem_flags::mem_threadgroup);")
        if watch:
            text("bool wild = false;")
            with text.loop("i", spec.simdgroups):
                text("wild |= oddities[i] && edge;")

    def _add_wild(self, total: str, weights: str, block: HeadBlock) -> None:
        """Add the pairs of a wild tile that may meet, one by one; weights come from their lanes."""
        text, spec = self._text, self._spec
        other, mine = ("key", "query") if PARALLEL[spec.operation] == "q" else ("query", "key")
        with text.loop("j", spec.blocks.traverse, SIDE), text.loop("c", SIDE, unroll=False):
            text("const ushort holder = (lane & 22) | ((c / 2) & 1) | ((c / 4) << 3);")
            element_ = f"float({at(f'{weights}[j / {SIDE}]', 'c % 2')})"
            text(f"const float weight = simd_shuffle({element_}, holder);")
            text(f"const int {other} = start + j + c;")
            with (
                text.block(f"if ({seen(spec, f'{mine}_inside', other)})"),
                text.loop("d", block.width, SIDE),
                text.loop("e", 2),
            ):
                value = f"stage[(j + c) * {stage_stride(spec)} + d + fragment_column + e]"
                text(f"{at(total, 'e')} += weight * float({value});")

    def _read_row(self, target: str, name: str, d: str, exact: bool) -> None:
        """Two elements of this lane's row, from column `d` of the head dimension; zeros past it."""
        for e in range(2):
            column = f"{d} + fragment_column + {e}" if e else f"{d} + fragment_column"
            value = self._number.read(f"{name}_row[{self.column(name, column)}]", self.weight_type)
            if not exact:
                value = f"{column} < {self._spec.width(name)} ? {value} : {self.weight_type}(0)"
            self._text(f"{at(target, e)} = {value};")

    def column(self, name: str, column: str) -> str:
        """The offset of an element in a row of an operand."""
        return column if self._spec.unit else _by(column, f"{name}_d")

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


def _by(factor: str, other: str | int) -> str:
    """A product, in parentheses where it needs them."""
    return f"{factor} * {other}" if factor.isidentifier() else f"({factor}) * {other}"


def fragment(kind: str) -> Fragment:
    """The fragment of a type of Metal's."""
    return Fragment({"float": "float32", "half": "float16", "bfloat": "bfloat16"}[kind])
