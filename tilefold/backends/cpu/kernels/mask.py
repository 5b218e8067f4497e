"""The mask of a CPU kernel: the instructions that say which pairs of a partial tile may meet.

Indices along the parallel axis are vectors, the index along the traversed axis is a scalar. What
does not depend on the traversed index is computed once per tile, the rest once per row of the tile.
"""

from __future__ import annotations

from collections.abc import Callable

from tilefold.backends.cpu.kernels.arguments import Arguments
from tilefold.backends.cpu.kernels.ir import Body, Value, overload, vector
from tilefold.backends.cpu.spec import KernelSpec
from tilefold.masks.expression import (
    AnyTable,
    Index,
    Interpretation,
    Parameter,
    Slot,
    evaluate,
)
from tilefold.masks.graph import ordered

Lanes = tuple[Value, ...]
"""A value for each element of the parallel block: a vector for each vector of the tile."""

Folded = Value | Lanes

_OPCODES = {"+": "add", "-": "sub", "*": "mul"}
_CONDITIONS = {"<": "slt", "<=": "sle", ">": "sgt", ">=": "sge", "==": "eq", "!=": "ne"}
_LOGIC = {"&": "and", "|": "or"}


class MaskText:
    """Writes the mask of one tile: `row(index)` gives a truth for each parallel lane."""

    def __init__(
        self,
        body: Body,
        spec: KernelSpec,
        arguments: Arguments,
        *,
        parallel: str,
        block: Value,
        length: Value,
        b: Value,
        h: Value,
    ) -> None:
        self._expression = spec.mask.expression
        self._traverse = "k" if parallel == "q" else "q"
        self._text = _Text(body, spec, arguments)
        self._text.indices = {
            parallel: self._text.lanes(block, length),
            "b": self._text.narrow(b),
            "h": self._text.narrow(h),
        }
        self._known: dict[int, Folded] = {}
        self._fold_before_rows()

    def row(self, index: Value) -> Lanes:
        """The truths of the pairs of row `index` of the traversed axis with the parallel block."""
        self._text.indices[self._traverse] = self._text.narrow(index)
        return self._text.wide(evaluate(self._expression, self._text, self._known))

    def _fold_before_rows(self) -> None:
        moving: set[int] = set()
        for node, children in ordered(self._expression):
            index = isinstance(node, Index) and node.name == self._traverse
            if index or any(id(child) in moving for child in children):
                moving.add(id(node))
            else:
                self._known[id(node)] = evaluate(node, self._text, self._known)


class _Text(Interpretation[Folded]):
    """The interpretation: a node is a scalar, or lanes if it depends on the parallel index."""

    def __init__(self, body: Body, spec: KernelSpec, arguments: Arguments) -> None:
        self._body, self._spec, self._arguments = body, spec, arguments
        self._integer = f"i{spec.index_bits}"
        self.indices: dict[str, Folded] = {}

    def narrow(self, value: Value) -> Value:
        return self._body.cast("trunc", value, self._integer, "i")

    def lanes(self, block: Value, length: Value) -> Lanes:
        """The parallel indices; lanes past the end repeat the last, to stay inside the tables."""
        body, count = self._body, self._spec.lanes
        first = body.splat(self.narrow(block), count, "i")
        last = body.splat(body.sub(self.narrow(length), 1), count, "last")
        steps = ", ".join(f"{self._integer} {lane}" for lane in range(count))
        iota = Value(f"<{steps}>" if count > 1 else "0", first.type)
        indices = []
        for j in range(self._spec.vectors):
            offset = body.add(body.add(first, iota), j * count) if j else body.add(first, iota)
            indices.append(body.minimum(offset, last, "i"))
        return tuple(indices)

    def wide(self, value: Folded) -> Lanes:
        if isinstance(value, tuple):
            return value
        return (self._body.splat(value, self._spec.lanes),) * self._spec.vectors

    def _each(self, operation: Callable[..., Value], *operands: Folded) -> Folded:
        """One operation on scalars, or on each vector as soon as one operand has lanes."""
        if all(isinstance(operand, Value) for operand in operands):
            return operation(*operands)
        return tuple(operation(*column) for column in zip(*map(self.wide, operands), strict=True))

    def index(self, name: str) -> Folded:
        return self.indices[name]

    def constant(self, value: int) -> Folded:
        return Value(str(value), self._integer)

    def parameter(self, slot: int, dtype: str) -> Folded:
        assert dtype == "int", dtype
        return self.narrow(self._arguments[Parameter(slot, dtype).name])

    def truth(self, value: bool) -> Folded:
        return Value("true" if value else "false", "i1")

    def lookup(self, table: AnyTable, indices: tuple[Folded, ...]) -> Folded:
        assert isinstance(table, Slot)
        strides = [self._arguments[name] for name in table.strides]
        return self._each(lambda *at: self._read(table, strides, at), *indices)

    def _read(self, table: Slot, strides: list[Value], indices: tuple[Value, ...]) -> Value:
        body = self._body
        position: Value | None = None
        for index, stride in zip(indices, strides, strict=True):
            wide = body.cast("sext", index, vector(index.lanes, "i64"))
            term = body.mul(wide, body.splat(stride, index.lanes))
            position = term if position is None else body.add(position, term)
        assert position is not None
        element = "i32" if table.dtype == "int32" else "i8"
        address = body.offset(self._arguments[table.name], element, position, "at")
        found = self._gather(address, element)
        if table.dtype == "int32":
            return body.cast("sext", found, vector(found.lanes, self._integer))
        return body.compare("ne", found, body.constant(0, found.type))

    def _gather(self, address: Value, element: str) -> Value:
        body = self._body
        if address.lanes == 1:
            return body.load(address, element, "found")
        type_ = vector(address.lanes, element)
        everywhere = Value("splat (i1 true)", vector(address.lanes, "i1"))
        nothing = Value("poison", type_)
        name = f"llvm.masked.gather.{overload(type_)}.{overload(address.type)}"
        align = Value(str(4 if element == "i32" else 1), "i32")
        return body.call(name, type_, [address, align, everywhere, nothing], "found")

    def unary(self, operator: str, operand: Folded) -> Folded:
        body = self._body
        if operator == "-":
            return self._each(lambda x: body.sub(body.constant(0, x.type), x), operand)
        no = Value("false", "i1")
        return self._each(
            lambda x: body.call(f"llvm.abs.{overload(x.type)}", x.type, [x, no]), operand
        )

    def binary(self, operator: str, left: Folded, right: Folded) -> Folded:
        body = self._body
        if operator in ("//", "%"):
            return self._each(lambda x, y: self._floor(operator, x, y), left, right)
        return self._each(lambda x, y: body.binary(_OPCODES[operator], x, y), left, right)

    def _floor(self, operator: str, x: Value, y: Value) -> Value:
        """Python's `//` and `%` by a positive divisor: LLVM's truncate, so step back below zero."""
        body = self._body
        rest = body.binary("srem", x, y)
        below = body.compare("slt", rest, body.constant(0, rest.type))
        if operator == "%":
            return body.select(below, body.add(rest, y), rest)
        return body.add(body.binary("sdiv", x, y), body.cast("sext", below, rest.type))

    def compare(self, operator: str, left: Folded, right: Folded) -> Folded:
        condition = _CONDITIONS[operator]
        return self._each(lambda x, y: self._body.compare(condition, x, y), left, right)

    def logic(self, operator: str, operands: tuple[Folded, ...]) -> Folded:
        body = self._body
        if operator == "~":
            return self._each(
                lambda x: body.binary("xor", x, body.constant(-1, x.type)), operands[0]
            )
        total = operands[0]
        for operand in operands[1:]:
            total = self._each(lambda x, y: body.binary(_LOGIC[operator], x, y), total, operand)
        return total
