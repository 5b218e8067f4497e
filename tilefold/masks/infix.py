"""The printer of a mask's kernel source for languages with infix operators: Metal and Triton.

A language is a `Dialect`: a table of its operators, a table of its other forms, and how it writes a
constant and reads a table. The printer walks the expression once. It knows of each piece of source
how tightly its outermost operator binds, so it writes no parentheses that a reader could spare, and
whether the piece is surely >= 0: Python floors `//` and `%`, these languages truncate, and the two
differ on negative left sides only.

A part of the expression that occurs twice, or would make a line too long, becomes a constant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tilefold.masks.expression import (
    AnyTable,
    Boolean,
    Expression,
    Interpretation,
    Parameter,
    Slot,
    evaluate,
)
from tilefold.masks.graph import ordered

WIDEST = 64
"""The longest constant, in characters; a longer one is made of several."""

LONGEST = 4 * WIDEST
"""The longest operand of `-`, `abs`, `~` or a helper. Compilers read 256 levels of parentheses."""

LOOSEST, LOGICAL, EQUAL, LESS, ADD, MULTIPLY, UNARY, CALL, ATOM = range(9)
"""Ranks, from the loosest binding to names and literals, which need no parentheses anywhere."""

_NATURAL = {"+", "*", "//", "%"}
"""Operators whose result is >= 0 where both sides are."""


@dataclass(frozen=True)
class Infix:
    """An operator between two operands; it associates to the left.

    `floor` names the helper that is called instead where the left side may be negative.
    `names_left` tells what becomes a constant when an expression grows too long: all that stands
    left of the operator, or (False) the longer side.
    """

    spelling: str
    rank: int
    floor: str = ""
    names_left: bool = False


@dataclass(frozen=True)
class Form:
    """A template around one operand, the rank that the operand needs, and the rank of the whole."""

    template: str
    operand: int
    rank: int
    natural: bool = False
    helper: str = ""


@dataclass(frozen=True)
class Term:
    """A piece of source: its rank, and whether its value is surely >= 0."""

    source: str
    rank: int = ATOM
    natural: bool = False

    def beside(self, rank: int) -> str:
        """The piece as an operand that needs this rank: in parentheses if its own is lower."""
        return self.source if self.rank >= rank else f"({self.source})"


@dataclass(frozen=True)
class Dialect:
    """How one language writes masks.

    infix       rows of the operators of integers, comparisons, `&` and `|`
    forms       rows of `-`, `abs` and `~`
    false, true the two truths
    number      template of a constant integer: its name and its value
    truth       template of a constant truth: its name and its value
    joined      the rank that an operand of `&` or `|` needs
    helpers     the source of the functions that the rows name
    read        the entry of a table at some indices, as the language's own number
    """

    infix: Mapping[str, Infix]
    forms: Mapping[str, Form]
    false: Term
    true: Term
    number: str
    truth: str
    joined: int
    helpers: Mapping[str, str]
    read: Callable[[Slot, tuple[Term, ...]], str]


class Source(NamedTuple):
    """A mask in kernel source: the lines that come first, the truth, and the helpers by name."""

    lines: list[str]
    truth: str
    helpers: dict[str, str]


def infix(expression: Boolean, dialect: Dialect) -> Source:
    """The source of a skeleton's expression in a dialect.

    Nodes with several parents become constants, made before the rest.
    """
    printer = _Printer(dialect)
    known: dict[int, Term] = {}
    for node in _shared(expression):
        term = evaluate(node, printer, known)
        known[id(node)] = printer.named(term, truth=isinstance(node, Boolean))
    truth = evaluate(expression, printer, known)
    return Source(printer.lines, truth.source, printer.helpers)


class _Printer(Interpretation[Term]):
    """The interpretation: each node is a piece of source, and `lines` what must stand before it."""

    def __init__(self, dialect: Dialect) -> None:
        self.lines: list[str] = []
        self.helpers: dict[str, str] = {}
        self._dialect = dialect

    def index(self, name: str) -> Term:
        return Term(name, natural=True)

    def constant(self, value: int) -> Term:
        assert value >= 0, "only a divisor is a constant in a skeleton"
        return Term(str(value), natural=True)

    def parameter(self, slot: int, dtype: str) -> Term:
        return Term(Parameter(slot, dtype).name)

    def truth(self, value: bool) -> Term:
        return self._dialect.true if value else self._dialect.false

    def lookup(self, table: AnyTable, indices: tuple[Term, ...]) -> Term:
        assert isinstance(table, Slot)
        entry = self._dialect.read(table, indices)
        if table.dtype == "bool":
            return Term(f"{entry} != 0", EQUAL)
        return self.named(Term(entry, CALL), truth=False)

    def unary(self, operator: str, operand: Term) -> Term:
        form = self._dialect.forms[operator]
        if form.helper:
            self._help(form.helper)
        operand = self._short(operand, truth=operator == "~")
        return Term(form.template.format(operand.beside(form.operand)), form.rank, form.natural)

    def binary(self, operator: str, left: Term, right: Term) -> Term:
        row = self._dialect.infix[operator]
        if row.floor and not left.natural:
            self._help(row.floor)
            left = self._short(left, truth=False)
            call = f"{row.floor}({left.source}, {right.source})"
            return Term(call, CALL, natural=operator == "%")
        natural = left.natural and right.natural and operator in _NATURAL
        return self._joined(row, left, right, natural=natural)

    def compare(self, operator: str, left: Term, right: Term) -> Term:
        return self._joined(self._dialect.infix[operator], left, right)

    def logic(self, operator: str, operands: tuple[Term, ...]) -> Term:
        if operator == "~":
            return self.unary(operator, operands[0])
        row, rank = self._dialect.infix[operator], self._dialect.joined
        if row.names_left:
            total, *rest = operands
            total = Term(total.beside(rank), row.rank)
        else:
            total, *rest = (Term(x.beside(rank), max(x.rank, rank)) for x in operands)
        for operand in rest:
            total = self._joined(row, total, operand, truths=True)
        return total

    def _joined(
        self, row: Infix, left: Term, right: Term, *, truths: bool = False, natural: bool = False
    ) -> Term:
        """Both sides of an operator; one of them becomes a constant if they are long together."""
        if len(left.source) + len(right.source) > WIDEST:
            if row.names_left or len(left.source) >= len(right.source):
                left = self.named(left, truths)
            else:
                right = self.named(right, truths)
        beyond = self._dialect.joined if truths else row.rank + 1
        source = f"{left.beside(row.rank)} {row.spelling} {right.beside(beyond)}"
        return Term(source, row.rank, natural)

    def _short(self, term: Term, truth: bool) -> Term:
        return self.named(term, truth) if len(term.source) > LONGEST else term

    def named(self, term: Term, truth: bool) -> Term:
        """A constant that holds the piece; names and literals need none."""
        if term.rank == ATOM:
            return term
        template = self._dialect.truth if truth else self._dialect.number
        name = f"{'truth' if truth else 'number'}{len(self.lines)}"
        self.lines.append(template.format(name, term.source))
        return Term(name, natural=term.natural)

    def _help(self, name: str) -> None:
        self.helpers[name] = self._dialect.helpers[name]


def _shared(expression: Expression) -> list[Expression]:
    """Nodes with several parents, each after the nodes that it is made of."""
    order = ordered(expression)
    parents = Counter(id(child) for _, children in order for child in children)
    return [node for node, _ in order if parents[id(node)] > 1]
