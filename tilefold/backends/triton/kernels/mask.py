"""The text fold of a rule to Triton: one function that says which queries may see which keys.

    @triton.jit
    def visible(b, h, q, k, p0, ..., t0, t0_0, ...):

`q` and `k` are columns and rows of indices, `b` and `h` numbers; so whatever depends on one index
alone is computed for one row or one column. The numbers of the rule and the strides of its tables
are arguments, so rules that differ only in these share a kernel. A part of the tree that occurs
twice, or would make a line too long, has a name. The indices must lie inside the problem, as the
tables do.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tilefold.backends.triton.kernels.text import Text
from tilefold.masks.expression import (
    Boolean,
    Expression,
    Skeleton,
    Slot,
    Table,
    Truth,
    children,
    evaluate,
)

_WIDEST = 64
"""Characters of one expression; what is longer gets a name."""

_LOGICAL, _COMPARE, _ADD, _MULTIPLY, _UNARY, _ATOM = range(6)
_RANKS = {
    **dict.fromkeys(("==", "!=", "<", "<=", ">", ">="), _COMPARE),
    **dict.fromkeys("+-", _ADD),
    **dict.fromkeys(("*", "//", "%"), _MULTIPLY),
}
"""How tightly an operator of numbers binds; `&` and `|` get parentheses around all they join."""

_FLOOR = {"//": "floor_divide", "%": "floor_remainder"}

_HELPERS = {
    "floor_divide": """\
def floor_divide(x, y):
    return x // y - tl.where(x % y < 0, 1, 0)
""",
    "floor_remainder": """\
def floor_remainder(x, y):
    return x % y + tl.where(x % y < 0, y, 0)
""",
    "absolute": """\
def absolute(x):
    return tl.where(x < 0, -x, x)
""",
}
"""Python's `//` and `%` by a positive number: Triton truncates where the left side is negative."""


def masks(skeleton: Skeleton) -> bool:
    """Whether the rule says more than that all pairs, or none, may meet."""
    return not isinstance(skeleton.expression, Truth)


def arguments(skeleton: Skeleton) -> tuple[str, ...]:
    """What `visible` takes beside the indices, and a kernel with it: numbers, tables, strides."""
    found = [f"p{number}" for number in range(skeleton.parameters)]
    for slot in skeleton.slots:
        found += [f"t{slot.number}", *strides(slot)]
    return tuple(found)


def strides(slot: Slot) -> tuple[str, ...]:
    """The strides of a table, in elements."""
    return tuple(f"t{slot.number}_{axis}" for axis in range(slot.rank))


def call(skeleton: Skeleton, *, b: str, h: str, q: str, k: str) -> str:
    """The call of `visible`."""
    return f"visible({', '.join([b, h, q, k, *arguments(skeleton)])})"


def visible(skeleton: Skeleton, index_bits: int, jit: str = "triton.jit") -> str:
    """The function `visible` and what it calls; nothing where the mask is the same everywhere.

    `jit` is the decorator of its language; Gluon's functions may only call functions of Gluon.
    """
    if not masks(skeleton):
        return ""
    fold_ = _Fold(index_bits)
    truth = fold_.text(skeleton.expression)
    text = Text()
    text(*(f"@{jit}\n{_HELPERS[name]}\n" for name in sorted(fold_.helpers)))
    text(f"@{jit}")
    text.listed("def visible(", ["b", "h", "q", "k", *arguments(skeleton)], "):")
    body = [f"{name} = {name}.to(tl.int64)" for name in "bhqk"] if index_bits == 64 else []
    text(*(f"    {line}" for line in [*body, *fold_.lines, f"return {truth}"]))
    return str(text)


@dataclass(frozen=True)
class _Term:
    """A piece of text: how tightly its operator binds, and whether it is surely >= 0."""

    text: str
    rank: int = _ATOM
    natural: bool = False

    def beside(self, rank: int) -> str:
        """The piece as an operand of something that binds so tightly."""
        return self.text if self.rank >= rank else f"({self.text})"


class _Fold:
    """The algebra: each node is a piece of text, and `lines` what must stand before it."""

    def __init__(self, index_bits: int) -> None:
        self.lines: list[str] = []
        self.helpers: set[str] = set()
        self._wide = index_bits == 64

    def text(self, expression: Expression) -> str:
        """The text of a tree; nodes with several parents get names."""
        known: dict[int, _Term] = {}
        for node in _shared(expression):
            known[id(node)] = self._named(evaluate(node, self, known), isinstance(node, Boolean))
        return evaluate(expression, self, known).text

    def _named(self, term: _Term, truth: bool) -> _Term:
        if term.rank == _ATOM and term.text.isidentifier():
            return term
        name = f"{'truth' if truth else 'number'}{len(self.lines)}"
        self.lines.append(f"{name} = {term.text}")
        return _Term(name, natural=term.natural)

    def _joined(self, operator: str, left: _Term, right: _Term) -> _Term:
        """Both sides of an operator; the longer one gets a name if need be."""
        if len(left.text) + len(right.text) > _WIDEST:
            longest = len(left.text) >= len(right.text)
            left = self._named(left, False) if longest else left
            right = right if longest else self._named(right, False)
        rank = _RANKS[operator]
        natural = left.natural and right.natural and operator in ("+", "*", "//", "%")
        first = left.beside(_ADD if rank == _COMPARE else rank)
        return _Term(f"{first} {operator} {right.beside(rank + 1)}", rank, natural)

    def index(self, name: str) -> _Term:
        return _Term(name, natural=True)

    def constant(self, value: int) -> _Term:
        assert value >= 0, "only a divisor is a constant in a skeleton"
        return _Term(str(value), natural=True)

    def parameter(self, slot: int) -> _Term:
        return _Term(f"p{slot}")

    def truth(self, value: bool) -> _Term:
        return _Term("(q >= 0) & (k >= 0)" if value else "(q < 0) & (k < 0)", _LOGICAL)

    def lookup(self, table: Table | Slot, indices: tuple[_Term, ...]) -> _Term:
        assert isinstance(table, Slot)
        # A dense mask of 65536 x 65536 has more entries than 31 bits count.
        cast = ".to(tl.int64)" if table.rank > 1 and not self._wide else ""
        steps = [
            f"{index.beside(_ATOM if cast else _MULTIPLY)}{cast} * {stride}"
            for index, stride in zip(indices, strides(table), strict=True)
        ]
        at = " + ".join([f"t{table.number}", *steps])
        if table.dtype != "int32":
            return _Term(f"tl.load({at}) != 0", _COMPARE)
        read = f"tl.load({at})"
        return self._named(_Term(f"{read}.to(tl.int64)" if self._wide else read), truth=False)

    def unary(self, operator: str, operand: _Term) -> _Term:
        if operator == "-":
            return _Term(f"-{operand.beside(_ATOM)}", _UNARY)
        self.helpers.add("absolute")
        return _Term(f"absolute({operand.text})", natural=True)

    def binary(self, operator: str, left: _Term, right: _Term) -> _Term:
        if operator not in _FLOOR or left.natural:
            return self._joined(operator, left, right)
        name = _FLOOR[operator]
        self.helpers.add(name)
        return _Term(f"{name}({left.text}, {right.text})", natural=operator == "%")

    def compare(self, operator: str, left: _Term, right: _Term) -> _Term:
        return self._joined(operator, left, right)

    def logic(self, operator: str, operands: tuple[_Term, ...]) -> _Term:
        if operator == "~":
            return _Term(f"({operands[0].text}) == 0", _COMPARE)
        total = operands[0].beside(_ADD)
        for operand in operands[1:]:
            if len(total) + len(operand.text) > _WIDEST:
                total = self._named(_Term(total, _LOGICAL), True).text
            total = f"{total} {operator} {operand.beside(_ADD)}"
        return _Term(total, _LOGICAL)


def _shared(expression: Expression) -> list[Expression]:
    """Nodes with several parents, each after the nodes that it is made of."""
    parents: Counter[int] = Counter()
    order: list[Expression] = []

    def visit(node: Expression) -> None:
        parents[id(node)] += 1
        if parents[id(node)] == 1:
            for child in children(node):
                visit(child)
            order.append(node)

    visit(expression)
    return [node for node in order if parents[id(node)] > 1]
