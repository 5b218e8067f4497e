"""The text fold of a rule to Metal: one function that says whether a query may see a key.

    static inline bool visible(const int b, const int h, const int q, const int k,
                               constant long* sizes, device const int* t0, ...)

The numbers of the rule and the strides of its tables stand in the kernel's list of sizes, so rules
that differ only in these share a kernel. A part of the tree that occurs twice, or would make a line
too long, is a constant of its own. The indices must lie inside the problem, as the tables do: a
kernel asks first whether they do (`k < len_k && visible(...)`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

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

Position = Callable[[str], int]
"""Where a number stands in the kernel's list of sizes, by its name in `arguments.sizes`."""

_WIDEST = 64
"""Characters of one constant; what is longer is made of several."""

_LOGICAL, _EQUAL, _LESS, _ADD, _MULTIPLY, _UNARY, _CALL, _ATOM = range(8)
_RANKS = {
    **dict.fromkeys(("||", "&&"), _LOGICAL),
    **dict.fromkeys(("==", "!="), _EQUAL),
    **dict.fromkeys(("<", "<=", ">", ">="), _LESS),
    **dict.fromkeys("+-", _ADD),
    **dict.fromkeys("*/%", _MULTIPLY),
}
"""How tightly an operator of C binds."""

_LOGIC = {"&": "&&", "|": "||"}

_FLOOR = {
    "//": (
        "floor_divide",
        """\
static inline {integer} floor_divide(const {integer} x, const {integer} y) {{
    return x / y - (x % y < 0 ? 1 : 0);
}}
""",
    ),
    "%": (
        "floor_remainder",
        """\
static inline {integer} floor_remainder(const {integer} x, const {integer} y) {{
    return x % y + (x % y < 0 ? y : 0);
}}
""",
    ),
}
"""Python's `//` and `%` by a positive number, where the left side may be negative: C truncates."""


def tables(skeleton: Skeleton) -> tuple[str, ...]:
    """The parameters through which a function is given the tables of the rule."""
    return tuple(f"device const {_element(slot)}* t{slot.number}" for slot in skeleton.slots)


def call(skeleton: Skeleton, *, b: str, h: str, q: str, k: str) -> str:
    """The call of `visible`, or `true` or `false` where the mask is the same everywhere."""
    if isinstance(skeleton.expression, Truth):
        return "true" if skeleton.expression.value else "false"
    given = [b, h, q, k, "sizes", *(f"t{slot.number}" for slot in skeleton.slots)]
    return f"visible({', '.join(given)})"


def visible(skeleton: Skeleton, index_bits: int, position: Position) -> str:
    """The function `visible` and what it calls; nothing where the mask is the same everywhere."""
    if isinstance(skeleton.expression, Truth):
        return ""
    text = _Text("int" if index_bits == 32 else "long", position)
    numbers = [
        f"const {text.integer} p{slot} = {text.word(f'p{slot}')};"
        for slot in range(skeleton.parameters)
    ]
    truth = text.evaluate(skeleton.expression)
    given = [f"const {text.integer} {name}" for name in "bhqk"]
    given += ["constant long* sizes", *tables(skeleton)]
    head = [
        ", ".join(line)
        for line in [given[:4], *(given[n : n + 3] for n in range(4, len(given), 3))]
    ]
    body = [*numbers, *text.lines, f"return {truth};"]
    opening = "static inline bool visible("
    lines = [
        opening + f",\n{' ' * len(opening)}".join(head) + ") {",
        *(f"    {line}" for line in body),
        "}\n",
    ]
    return "\n".join([*text.helpers.values(), *lines])


def _element(slot: Slot) -> str:
    return "int" if slot.dtype == "int32" else "uchar"


@dataclass(frozen=True)
class _Term:
    """A piece of C: how tightly its outermost operator binds, and whether it is surely >= 0."""

    text: str
    rank: int = _ATOM
    natural: bool = False

    def beside(self, rank: int) -> str:
        """The piece as an operand of something that binds so tightly."""
        return self.text if self.rank >= rank else f"({self.text})"


class _Text:
    """The algebra: each node is a piece of C, and `lines` what must stand before it."""

    def __init__(self, integer: str, position: Position) -> None:
        self.integer = integer
        self.lines: list[str] = []
        self.helpers: dict[str, str] = {}
        self._position = position

    def evaluate(self, expression: Expression) -> str:
        """The text of a tree; nodes with several parents are constants, made before it."""
        known: dict[int, _Term] = {}
        for node in _shared(expression):
            known[id(node)] = self._named(evaluate(node, self, known), isinstance(node, Boolean))
        return evaluate(expression, self, known).text

    def word(self, name: str) -> str:
        """A word of the list of sizes, in the type that the rule is computed in."""
        return self._narrow(f"sizes[{self._position(name)}]")

    def _narrow(self, text: str) -> str:
        return text if self.integer == "long" else f"int({text})"

    def _named(self, term: _Term, truth: bool) -> _Term:
        """A constant that holds the piece; names and numbers need none."""
        if term.rank == _ATOM:
            return term
        kind, name = ("bool", "truth") if truth else (self.integer, "number")
        name = f"{name}{len(self.lines)}"
        self.lines.append(f"const {kind} {name} = {term.text};")
        return _Term(name, natural=term.natural)

    def _joined(self, operator: str, left: _Term, right: _Term, truths: bool = False) -> _Term:
        """Both sides of an operator that associates to the left; the longer is named if need be."""
        if len(left.text) + len(right.text) > _WIDEST:
            longest = len(left.text) >= len(right.text)
            left = self._named(left, truths) if longest else left
            right = right if longest else self._named(right, truths)
        rank = _RANKS[operator]
        text = f"{left.beside(rank)} {operator} {right.beside(rank + 1)}"
        return _Term(text, rank, left.natural and right.natural and operator in "+*/%")

    def index(self, name: str) -> _Term:
        return _Term(name, natural=True)

    def constant(self, value: int) -> _Term:
        assert value >= 0, "only a divisor is a constant in a skeleton"
        return _Term(str(value), natural=True)

    def parameter(self, slot: int) -> _Term:
        return _Term(f"p{slot}")

    def truth(self, value: bool) -> _Term:
        return _Term("true" if value else "false")

    def lookup(self, table: Table | Slot, indices: tuple[_Term, ...]) -> _Term:
        assert isinstance(table, Slot)
        steps = [
            f"{index.beside(_MULTIPLY)} * sizes[{self._position(f't{table.number}_{axis}')}]"
            for axis, index in enumerate(indices)
        ]
        read = _Term(f"t{table.number}[{' + '.join(steps) or '0'}]", _CALL)
        if table.dtype == "int32":
            return self._named(read, truth=False)
        return _Term(f"{read.text} != 0", _EQUAL)

    def unary(self, operator: str, operand: _Term) -> _Term:
        if operator == "-":
            return _Term(f"-{operand.beside(_ATOM)}", _UNARY)
        return _Term(f"abs({operand.text})", _CALL, natural=True)

    def binary(self, operator: str, left: _Term, right: _Term) -> _Term:
        if operator not in _FLOOR or left.natural:
            return self._joined(operator[0], left, right)
        name, helper = _FLOOR[operator]
        self.helpers[name] = helper.format(integer=self.integer)
        return _Term(f"{name}({left.text}, {right.text})", _CALL, natural=operator == "%")

    def compare(self, operator: str, left: _Term, right: _Term) -> _Term:
        return self._joined(operator, left, right)

    def logic(self, operator: str, operands: tuple[_Term, ...]) -> _Term:
        if operator == "~":
            return _Term(f"!{operands[0].beside(_UNARY)}", _UNARY)
        # Compilers warn of `a && b || c`, so a join inside of another one stands in parentheses.
        apart = [_Term(x.beside(_EQUAL), max(x.rank, _EQUAL)) for x in operands]
        total = apart[0]
        for operand in apart[1:]:
            total = self._joined(_LOGIC[operator], total, operand, truths=True)
        return total


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
