"""Where the gradients of a score's arrays are added: places in an owner's parts, and slots.

A slot is a sum in double for each lane, for an entry of a small array. So lanes that meet the same
entry do not collide; when an owner is done with a head, the lanes are summed into the entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tilefold.backends.cpu.kernels.block import Block
from tilefold.backends.cpu.kernels.entries import Read, reads
from tilefold.backends.cpu.kernels.ir import Value, overload, vector
from tilefold.backends.cpu.kernels.mask import IndexText
from tilefold.backends.cpu.kernels.products import products
from tilefold.backends.cpu.kernels.reduce import summed
from tilefold.backends.cpu.kernels.storage import storage_in
from tilefold.backends.cpu.kernels.tile import Tile

FIRST_B, LAST_B, FIRST_H, LAST_H, FIRST_ROW, LAST_ROW, FIRST_PART = range(7)
"""The columns of the table of owners; from the last on there is a part for each target."""


class Targets:
    """The targets of one owner."""

    indices: IndexText
    exists: list[Value]

    def __init__(self, block: Block) -> None:
        self.block, self.body = block, block.body
        self.shape, self.spec = block.shape, block.spec
        self.products = products(block)
        self.reads = reads(self.spec)
        self.owner = block.row
        self.double = vector(self.shape.lanes, "double")

    def _column(self, column: int) -> Value:
        """A column of the owner's row in the table."""
        body = self.body
        place = body.mul(self.owner, FIRST_PART + len(self.spec.targets))
        at = body.offset(self.block.arguments["owners"], "i64", body.add(place, column))
        return body.load(at, "i64", "owned")

    def _place_type(self, read: Read) -> str:
        """Slots are few; offsets in an array need all bits."""
        return vector(self.shape.lanes, "i32" if read.way == "slots" else "i64")

    def _place_at(self, read: Read, tile: Tile, row: Value, j: int) -> Value:
        """Where the places of a vector are kept."""
        body, shape = self.body, self.shape
        index = body.add(body.mul(row, shape.width), j * shape.lanes)
        element = Value("", self._place_type(read)).element
        return body.offset(self.block.region(read.places), element, index, "places")

    def _place_of(self, read: Read, indices: Sequence[Value]) -> Value:
        """The sum of indices times strides over the varying axes: of slots, or of the target."""
        body, lanes, kind = self.body, self.shape.lanes, self._place_type(read)
        element = Value("", kind).element
        strides = self._slot_strides(read) if read.way == "slots" else self._strides(read)
        total: Value | None = None
        for axis in read.varying:
            index, stride = indices[axis], strides[axis]
            wider = int(index.element[1:]) < int(element[1:])
            term = body.cast("sext" if wider else "trunc", index, kind, "at")
            if stride.text != "1":
                step = body.cast("trunc", stride, element) if element == "i32" else stride
                term = body.mul(term, body.splat(step, lanes))
            total = term if total is None else body.add(total, term)
        assert total is not None
        return total

    def _strides(self, read: Read) -> list[Value]:
        """The strides of the target along the axes of the array."""
        arguments = self.block.arguments
        return [arguments[f"target{read.target}_{axis + 1}"] for axis in range(len(read.indices))]

    def _sizes(self, read: Read) -> list[Value]:
        arguments, axes = self.block.arguments, range(len(read.indices))
        return [arguments[f"target{read.target}_size{axis + 1}"] for axis in axes]

    def _base(self, read: Read, fixed: Sequence[tuple[int, Value]]) -> Value:
        """The address in the owner's part at these indices, 0 along the other axes."""
        body, arguments = self.body, self.block.arguments
        part = self._column(FIRST_PART + read.target)
        offset = body.mul(part, arguments[f"target{read.target}_0"])
        strides = self._strides(read)
        for axis, index in fixed:
            wide = body.cast("sext", index, "i64", "at")
            offset = body.add(offset, body.mul(wide, strides[axis]))
        stored = self._storage(read).stored
        return body.offset(arguments[f"target{read.target}"], stored, offset, "target")

    def _storage(self, read: Read) -> Any:
        return storage_in(self.spec.targets[read.target].dtype, self.shape.scalar)

    def _indices_of(self, read: Read, text: IndexText, row: Value) -> list[Any]:
        """The indices of a look-up: each one number, or lanes."""
        first = sum(len(before.indices) for before in self.reads[: read.number])
        return text.row(row)[first : first + len(read.indices)]

    def _same(self, read: Read, text: IndexText) -> list[tuple[int, Value]]:
        """The axes whose index is the same for all pairs of a head, and these indices."""
        indices = self._indices_of(read, text, Value("0", "i64"))
        return [(axis, i) for axis, i in enumerate(indices) if axis not in read.varying]

    def _text_of_head(self) -> IndexText:
        block = self.block
        return IndexText(
            block.place(block.h), [index for read in self.reads for index in read.indices]
        )

    def _add_number(self, number: Value, place: Value) -> None:
        """Add one double in memory."""
        body = self.body
        body.store(body.binary("fadd", body.load(place, "double"), number), place)

    def _slot_strides(self, read: Read) -> dict[int, Value]:
        """The strides of the varying axes among slots, which lie one after the other."""
        body, sizes = self.body, self._sizes(read)
        stride, found = Value("1", "i64"), {}
        for axis in reversed(read.varying):
            found[axis] = stride
            stride = body.mul(stride, sizes[axis])
        return found

    def _slot_count(self, read: Read) -> Value:
        sizes, count = self._sizes(read), Value("1", "i64")
        for axis in read.varying:
            count = self.body.mul(count, sizes[axis])
        return count

    def _slot(self, read: Read, slot: Value) -> Value:
        """The address of a slot: a double for each lane."""
        body, first = self.body, Value("0", "i64")
        for before in self.reads[: read.number]:
            if before.way == "slots":
                first = body.add(first, self._slot_count(before))
        index = body.mul(body.add(first, slot), self.shape.lanes)
        return body.offset(self.block.beyond, "double", index, "slot")

    def _zero_slots(self, read: Read) -> None:
        body = self.body
        with body.loop("slot", 0, self._slot_count(read)) as slot:
            body.store(body.constant(0.0, self.double), self._slot(read, slot))

    def _add_to_slots(self, read: Read, tile: Tile, row: Value) -> None:
        """One row of the tile, each vector at once."""
        body, shape = self.body, self.shape
        region, zero = self.block.region(read.changes), body.constant(0.0, shape.vector)
        for j in range(shape.vectors):
            change = body.load(tile.at(region, row, j), shape.vector, "change")
            change = body.select(self.exists[j], change, zero)
            wide = body.cast("fpext", change, self.double, "wide")
            at = self._place_at(read, tile, row, j)
            places = body.load(at, self._place_type(read), "places")
            first = body.lane(places, 0)
            alike = body.compare("eq", places, body.splat(first, shape.lanes), "alike")
            name = f"llvm.vector.reduce.and.{overload(alike.type)}"
            with body.choose(body.call(name, "i1", [alike], "one"), "one") as branch:
                slot = self._slot(read, body.cast("sext", first, "i64"))
                old = body.load(slot, self.double, "old")
                body.store(body.binary("fadd", old, wide), slot)
                branch.otherwise()
                self._add_apart(read, places, wide)

    def _add_apart(self, read: Read, places: Value, wide: Value) -> None:
        """Add each lane to its own copy of its entry."""
        body, lanes = self.body, self.shape.lanes
        steps = ", ".join(f"i32 {lane}" for lane in range(lanes))
        iota = Value(f"<{steps}>", places.type)
        elements = body.add(body.mul(places, lanes), iota)
        at = body.offset(self._slot(read, Value("0", "i64")), "double", elements, "at")
        everywhere, align = Value("splat (i1 true)", vector(lanes, "i1")), Value("8", "i32")
        kinds = f"{overload(self.double)}.{overload(at.type)}"
        nothing = Value("poison", self.double)
        arguments = [at, align, everywhere, nothing]
        old = body.call(f"llvm.masked.gather.{kinds}", self.double, arguments, "old")
        new = body.binary("fadd", old, wide)
        scatter = f"llvm.masked.scatter.{kinds}"
        body.module.declare(scatter, "void", [new.type, at.type, "i32", everywhere.type])
        body.invoke(scatter, [new, at, align, everywhere])

    def _flush_slots(self, read: Read) -> None:
        """Add the lanes of each slot up, and to its entry; the slot is 0 then."""
        body = self.body
        self.block.at_row(Value("0", "i64"))  # the indices that are asked for depend on none
        base = self._base(read, self._same(read, self._text_of_head()))
        sizes, strides = self._sizes(read), self._strides(read)
        with body.loop("slot", 0, self._slot_count(read)) as slot:
            rest, offset = slot, Value("0", "i64")
            for axis in reversed(read.varying):
                at = body.binary("urem", rest, sizes[axis])
                rest = body.binary("udiv", rest, sizes[axis])
                offset = body.add(offset, body.mul(at, strides[axis]))
            place = self._slot(read, slot)
            total = summed(body, body.load(place, self.double, "slot"))
            self._add_number(total, body.offset(base, "double", offset))
            body.store(body.constant(0.0, self.double), place)
