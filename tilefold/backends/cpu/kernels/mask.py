"""The mask and the modified score of a CPU kernel: expressions over the pairs of a tile.

The mask says which pairs of a partial tile may meet. The score is made of each product. Indices
along the parallel axis are vectors, the index along the traversed axis is a scalar. What does not
depend on the traversed index is computed once per tile, the rest once per row of the tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tilefold.backends.cpu.kernels import elementary
from tilefold.backends.cpu.kernels.arguments import Arguments
from tilefold.backends.cpu.kernels.ir import Body, Value, overload, vector
from tilefold.backends.cpu.kernels.storage import SCALARS, storage
from tilefold.backends.cpu.spec import KernelSpec
from tilefold.masks.expression import (
    AnyTable,
    Expression,
    Index,
    Interpretation,
    Parameter,
    ScoreValue,
    Several,
    Slot,
    evaluate,
)
from tilefold.masks.graph import ordered

Lanes = tuple[Value, ...]
"""A value for each element of the parallel block: a vector for each vector of the tile."""

Folded = Any
"""A value, lanes, or a list of either for several expressions."""

_OPCODES = {"+": "add", "-": "sub", "*": "mul"}
_CONDITIONS = {"<": "slt", "<=": "sle", ">": "sgt", ">=": "sge", "==": "eq", "!=": "ne"}
_REAL_CONDITIONS = {"<": "olt", "<=": "ole", ">": "ogt", ">=": "oge", "==": "oeq", "!=": "une"}
_LOGIC = {"&": "and", "|": "or"}
_FUNCTIONS = {
    "abs": elementary.absolute,
    "exp": elementary.exp,
    "log": elementary.log,
    "tanh": elementary.tanh,
    "sigmoid": elementary.sigmoid,
}
_ELEMENTS = {
    "int32": "i32",
    "bool": "i8",
    "float32": "float",
    "float64": "double",
    "float16": "i16",
    "bfloat16": "i16",
}
"""The types of LLVM as which entries of tables are read."""
_ALIGNMENTS = {"i32": 4, "i8": 1, "float": 4, "double": 8, "i16": 2}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the pairs of a tile are: the block and the length of the parallel axis, b and h."""

    body: Body = field(kw_only=False)
    spec: KernelSpec = field(kw_only=False)
    arguments: Arguments = field(kw_only=False)
    parallel: str
    block: Value
    length: Value
    b: Value
    h: Value


class _Rows:
    """Writes an expression of one tile, row by row of the traversed axis."""

    def __init__(self, place: Place, expression: Expression) -> None:
        self._expression = expression
        self._traverse = "k" if place.parallel == "q" else "q"
        self._text = _Text(place.body, place.spec, place.arguments)
        self._text.indices = {
            place.parallel: self._text.lanes(place.block, place.length),
            "b": self._text.narrow(place.b),
            "h": self._text.narrow(place.h),
        }
        self._known: dict[int, Folded] = {}
        self._fold_before_rows()

    def _row(self, index: Value) -> Folded:
        """The value of the expression for row `index` and the parallel block."""
        self._text.indices[self._traverse] = self._text.narrow(index)
        return evaluate(self._expression, self._text, self._known)

    def _fold_before_rows(self) -> None:
        moving: set[int] = set()
        for node, children in ordered(self._expression):
            index = isinstance(node, Index) and node.name == self._traverse
            own = index or isinstance(node, ScoreValue | Several)
            if own or any(id(child) in moving for child in children):
                moving.add(id(node))
            else:
                self._known[id(node)] = evaluate(node, self._text, self._known)


class MaskText(_Rows):
    """Writes the mask of one tile: `row(index)` gives a truth for each parallel lane."""

    def __init__(self, place: Place) -> None:
        super().__init__(place, place.spec.mask.expression)

    def row(self, index: Value) -> Lanes:
        """The truths of the pairs of row `index` of the traversed axis with the parallel block."""
        return self._text.wide(self._row(index))


class ScoreText(_Rows):
    """Writes the modified scores of one tile, from its products and their factor `rest`."""

    def __init__(self, place: Place, rest: Value) -> None:
        assert place.spec.score is not None
        super().__init__(place, place.spec.score.expression)
        self._body = place.body
        self._rest = place.body.splat(rest, place.spec.lanes, "rest")

    def row(self, index: Value, products: Sequence[Value]) -> tuple[Lanes, ...]:
        """What is computed of the score (see `Scored`), for the products of row `index`.

        Integers among them, the indices of entries, may be one number for all lanes.
        """
        natural = [self._body.binary("fmul", product, self._rest, "s") for product in products]
        self._text.scores = tuple(natural)
        values = self._row(index)
        assert isinstance(values, list)
        return tuple([self._text.wide(value) for value in values])


class IndexText(_Rows):
    """Writes the indices of entries that a score reads, for one tile.

    `row(index)` gives each as one number, or as lanes where it depends on the parallel index.
    """

    def __init__(self, place: Place, indices: Sequence[Expression]) -> None:
        super().__init__(place, Several(tuple(indices)))

    def row(self, index: Value) -> list[Value | Lanes]:
        """The indices for row `index` of the traversed axis."""
        found = self._row(index)
        assert isinstance(found, list)
        return found


class _Text(Interpretation[Folded]):
    """The interpretation: a node is a scalar, or lanes if it depends on the parallel index."""

    def __init__(self, body: Body, spec: KernelSpec, arguments: Arguments) -> None:
        self._body, self._spec, self._arguments = body, spec, arguments
        self._integer = f"i{spec.index_bits}"
        self._scalar = SCALARS[spec.dtype]
        self.indices: dict[str, Folded] = {}
        self.scores: Lanes = ()

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
        word = self._arguments[Parameter(slot, dtype).name]
        if dtype == "int":
            return self.narrow(word)
        return self._narrowed(self._body.cast("bitcast", word, "double", "real"))

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
        position = position or Value("0", "i64")  # an array without axes has one entry
        element = _ELEMENTS[table.dtype]
        address = body.offset(self._arguments[table.name], element, position, "at")
        found = self._gather(address, element)
        if table.dtype == "int32":
            return body.cast("sext", found, vector(found.lanes, self._integer))
        if table.dtype == "bool":
            return body.compare("ne", found, body.constant(0, found.type))
        return self._narrowed(self._widened(found, table.dtype))

    def _widened(self, found: Value, dtype: str) -> Value:
        """Entries of a type of floats as numbers of LLVM."""
        return storage(dtype, False).widen(self._body, found, "element")

    def _narrowed(self, number: Value) -> Value:
        """Numbers in the type that the kernel computes in."""
        wanted = vector(number.lanes, self._scalar)
        if number.type == wanted:
            return number
        narrows = self._scalar == "float"
        return self._body.cast("fptrunc" if narrows else "fpext", number, wanted, "real")

    def _gather(self, address: Value, element: str) -> Value:
        body = self._body
        if address.lanes == 1:
            return body.load(address, element, "found")
        type_ = vector(address.lanes, element)
        everywhere = Value("splat (i1 true)", vector(address.lanes, "i1"))
        nothing = Value("poison", type_)
        name = f"llvm.masked.gather.{overload(type_)}.{overload(address.type)}"
        align = Value(str(_ALIGNMENTS[element]), "i32")
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
        if operator in ("minimum", "maximum"):
            name = {"minimum": "llvm.smin", "maximum": "llvm.smax"}[operator]
            return self._each(
                lambda x, y: body.call(f"{name}.{overload(x.type)}", x.type, [x, y]), left, right
            )
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
        real = _is_real(left) or _is_real(right)
        condition = (_REAL_CONDITIONS if real else _CONDITIONS)[operator]
        return self._each(lambda x, y: self._body.compare(condition, x, y), left, right)

    def score(self) -> Folded:
        return self.scores

    def real(self, value: float) -> Folded:
        return self._body.constant(value, self._scalar)

    def from_integer(self, operand: Folded) -> Folded:
        return self._each(
            lambda x: self._body.cast("sitofp", x, vector(x.lanes, self._scalar), "real"), operand
        )

    def real_unary(self, operator: str, operand: Folded) -> Folded:
        body = self._body
        if operator == "-":
            return self._each(
                lambda x: body.binary("fsub", body.constant(-0.0, x.type), x, "minus"), operand
            )
        if operator == "sqrt":
            return self._each(
                lambda x: body.call(f"llvm.sqrt.{overload(x.type)}", x.type, [x], "sqrt"), operand
            )
        function = _FUNCTIONS[operator]
        return self._each(lambda x: function(body, x), operand)

    def real_binary(self, operator: str, left: Folded, right: Folded) -> Folded:
        body = self._body
        if operator in ("minimum", "maximum"):
            return self._each(
                lambda x, y: body.call(f"llvm.{operator}.{overload(x.type)}", x.type, [x, y]),
                left,
                right,
            )
        opcode = {"+": "fadd", "-": "fsub", "*": "fmul", "/": "fdiv"}[operator]
        return self._each(lambda x, y: body.binary(opcode, x, y, "real"), left, right)

    def where(self, truth: Folded, then: Folded, otherwise: Folded) -> Folded:
        return self._each(self._body.select, truth, then, otherwise)

    def several(self, parts: tuple[Folded, ...]) -> Folded:
        return list(parts)

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


def _is_real(value: Folded) -> bool:
    first = value[0] if isinstance(value, tuple) else value
    return bool(first.element in ("float", "double"))
