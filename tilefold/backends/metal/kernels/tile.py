"""How tiles of a traversed operand reach the fragments: from where they lie, or staged.

Tiles are read where they lie, and pass through threadgroup memory at an edge, where zeros fill what
is not there; or always, on GPUs whose cores do not cache what several simdgroups read.

A weight of 0 does not keep NaN and infinities out of a product. A tile at an edge that holds any is
"wild", and is added pair by pair, without the pairs that may not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from tilefold.backends.metal.kernels.fragment import Fragment, at
from tilefold.backends.metal.kernels.frame import hidden, seen, stage_stride
from tilefold.backends.metal.kernels.msl import Text
from tilefold.backends.metal.kernels.storage import Storage, storage
from tilefold.backends.metal.spec import SIDE, MetalSpec


class Reader(NamedTuple):
    """How a tile is read, given a row and a column beside the lane's place.

    `number` gives the expression of an element; `pair` gives the statements that set `x` to two
    neighbours.
    """

    number: Callable[[str, str], str]
    pair: Callable[[str, str], Sequence[str]]


class HeadBlock(NamedTuple):
    """Some blocks of the head dimension: `first` to `stop`, fragments over `width` at a time.

    `exact`: they end inside the dimension; else the last fragment is filled up with zeros.
    """

    first: int
    stop: int
    width: int
    exact: bool


class Tiles:
    """The tiles of one kernel's traversed operands.

    The source has a `head` pointer for each, and the tile's `start`, `last` and `edge` (see
    `frame.tiles`).
    """

    def __init__(self, text: Text, spec: MetalSpec) -> None:
        self._text, self._spec = text, spec
        self._storage = storage(spec.dtype, spec.bfloat)

    def begin(self, *names: str) -> None:
        """Where the present tile of each traversed operand begins."""
        for name in names:
            self._text(
                f"device const {self._storage.memory}* {name}_tile"
                f" = {name}_head + long(start) * {name}_n;"
            )

    def read(
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
                argument = f"device const {self._storage.memory}*"
                lane = f"{row} * {name}_n + {column_of(self._spec, name, column)}"
                text(f"{argument} lane_of_{name} = {name}_tile + {lane};")
                yield Reader(
                    partial(self._number_of, name, kind), partial(self._pair_of, name, kind)
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
        number = partial(self._staged_number, lane, kind)
        read = Reader(number, partial(self._staged_pair, number))
        if added is None:
            yield read
            return
        with self._text.either("wild") as otherwise:
            self._add_wild(*added, block)
            otherwise()
            yield read

    def _number_of(self, name: str, kind: str, r: str, d: str) -> str:
        """The expression of an element of a tile that is read where it lies."""
        place = f"{_by(r, f'{name}_n')} + {column_of(self._spec, name, f'd0 + {d}')}"
        return self._storage.read(f"lane_of_{name}[{place}]", kind)

    def _pair_of(self, name: str, kind: str, r: str, d: str) -> Sequence[str]:
        if self._spec.vector == 1:
            numbers = (self._number_of(name, kind, r, column) for column in (d, f"{d} + 1"))
            return set_pair("x", *numbers)
        pair = vector_of(self._storage, f"lane_of_{name} + {_by(r, f'{name}_n')} + d0 + {d}", 2)
        numbers = (self._storage.read(f"pair[{e}]", kind) for e in range(2))
        return [f"const {self._storage.memory}2 pair = {pair};", *set_pair("x", *numbers)]

    def _staged_number(self, lane: str, kind: str, r: str, d: str) -> str:
        value = f"stage[{lane} + {_by(r, stage_stride(self._spec))} + {d}]"
        return value if kind == self._storage.compute else f"{kind}({value})"

    def _staged_pair(self, number: Callable[[str, str], str], r: str, d: str) -> Sequence[str]:
        return set_pair("x", number(r, d), number(r, f"{d} + 1"))

    def _stage(self, name: str, block: HeadBlock, *, watch: bool) -> None:
        """Copy a block of the tile to threadgroup memory, zeros where there is nothing.

        With `watch`, `wild` tells whether a tile at an edge holds NaN or infinities.
        """
        text, spec = self._text, self._spec
        compute = self._storage.compute
        across = block.width // spec.vector
        count = spec.blocks.traverse * across
        text("threadgroup_barrier(mem_flags::mem_threadgroup);")
        if watch:
            text("bool odd = false;")
        head = f"for (ushort i = thread_index; i < {count}; i += {spec.threads})"
        with text.block(head):
            column = f"i % {across}" if spec.vector == 1 else f"{spec.vector} * (i % {across})"
            text(f"const ushort r = i / {across};", f"const ushort d = {column};")
            there = "start + r < last"
            if not block.exact:
                there += f" && d0 + d < {spec.width(name)}"
            if spec.vector == 1:
                place = f"{name}_tile[r * {name}_n + {column_of(self._spec, name, 'd0 + d')}]"
                value = self._storage.read(place, compute)
                text(f"const {compute} x = {there} ? {value} : {compute}(0);")
                self._put("d", watch)
            else:
                kind = f"{self._storage.memory}{spec.vector}"
                value = vector_of(
                    self._storage, f"{name}_tile + r * {name}_n + d0 + d", spec.vector
                )
                text(
                    f"const {kind} several = {there} ? {value} : {kind}({self._storage.memory}(0));"
                )
                with text.loop("e", spec.vector):
                    text(f"const {compute} x = {self._storage.read('several[e]', compute)};")
                    self._put("d + e", watch)
        if watch:
            text("odd = simd_any(odd);")
            with text.block("if (lane == 0)"):
                text("oddities[simdgroup] = odd;")
        text("threadgroup_barrier(mem_flags::mem_threadgroup);")
        if watch:
            text("bool wild = false;")
            with text.loop("i", spec.simdgroups):
                text("wild |= oddities[i] && edge;")

    def _put(self, column: str, watch: bool) -> None:
        """Store the element `x` in the stage, and look whether it is finite."""
        self._text(f"stage[r * {stage_stride(self._spec)} + {column}] = x;")
        if watch:
            # By its bits: fast mathematics take isfinite for true.
            value = "x" if self._storage.compute == "float" else "float(x)"
            self._text(f"odd |= (as_type<uint>({value}) & 0x7f800000u) == 0x7f800000u;")

    def _add_wild(self, total: str, weights: str, block: HeadBlock) -> None:
        """Add the pairs of a wild tile that may meet, one by one; weights come from their lanes."""
        text, spec = self._text, self._spec
        other, mine = ("key", "query") if spec.row.parallel == "q" else ("query", "key")
        with text.loop("j", spec.blocks.traverse, SIDE), text.loop("c", SIDE, unroll=False):
            text("const ushort holder = (lane & 22) | ((c / 2) & 1) | ((c / 4) << 3);")
            self._of_holder("weight", "held", weights)
            if spec.hides:
                self._of_holder("score", "scored", "s")
                meets = f"!({hidden(spec, 'score')})"
            else:
                text(f"const int {other} = start + j + c;")
                meets = seen(spec, f"{mine}_inside", other)
            with (
                text.block(f"if ({meets})"),
                text.loop("d", block.width, SIDE),
                text.loop("e", 2),
            ):
                value = f"stage[(j + c) * {stage_stride(spec)} + d + fragment_column + e]"
                text(f"{at(total, 'e')} += weight * float({value});")

    def _of_holder(self, name: str, held: str, tile: str) -> None:
        """Column `c` of a tile in the lane's row, from the lane that holds it."""
        # Two constant indices: the elements are registers, which have no run-time index.
        first, second = (f"float({at(f'{tile}[j / {SIDE}]', e)})" for e in range(2))
        self._text(f"const float {held} = c % 2 ? {second} : {first};")
        self._text(f"const float {name} = simd_shuffle({held}, holder);")


def vector_of(storage: Storage, place: str, count: int) -> str:
    """The expression of `count` neighbours in device memory, read at once."""
    return f"*(device const {storage.memory}{count}*)({place})"


def column_of(spec: MetalSpec, name: str, column: str) -> str:
    """The offset of an element in a row of an operand."""
    return column if spec.unit else _by(column, f"{name}_d")


def set_pair(name: str, first: str, second: str) -> list[str]:
    """The two elements of a fragment that this lane holds."""
    return [f"{at(name, 0)} = {first};", f"{at(name, 1)} = {second};"]


def _by(factor: str, other: str | int) -> str:
    """A product, in parentheses where it needs them."""
    return f"{factor} * {other}" if factor.isidentifier() else f"({factor}) * {other}"


def fragment(kind: str) -> Fragment:
    """The fragment of a type of Metal's."""
    return Fragment({"float": "float32", "half": "float16", "bfloat": "bfloat16"}[kind])
