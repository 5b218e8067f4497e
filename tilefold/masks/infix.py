"""The printer of kernel source for languages with infix operators: of masks and scores in Metal and
Triton.

A language is a `Dialect`: a table of its operators, a table of its other forms, and how it writes a
constant and reads a table. What it has for real numbers are its `Reals`. The printer walks the
expression once. It knows of each piece of source how tightly its outermost operator binds, so it
writes no parentheses that a reader could spare, and whether the piece is surely >= 0: Python floors
`//` and `%`, these languages truncate, and the two differ on negative left sides only.

A part of the expression that occurs twice, or would make a line too long, becomes a constant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from tilefold.masks.expression import (
    AnyTable,
    Expression,
    Interpretation,
    Parameter,
    Several,
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
    """A template around operands, the rank that each needs, and the rank of the whole."""

    template: str
    operand: int
    rank: int
    natural: bool = False
    helper: str = ""


@dataclass(frozen=True)
class Term:
    """A piece of source: its rank, whether its value is surely >= 0, and what it is.

    Its `kind` is "number" for an integer, "truth", or "real".
    """

    source: str
    rank: int = ATOM
    natural: bool = False
    kind: str = "number"

    def beside(self, rank: int) -> str:
        """The piece as an operand that needs this rank: in parentheses if its own is lower."""
        return self.source if self.rank >= rank else f"({self.source})"


@dataclass(frozen=True)
class Reals:
    """How one language writes real numbers.

    infix       rows of `+`, `-`, `*` and `/`
    forms       rows of `-` and of the functions; of "where", and of "from_integer"
    literal     a number that stays in the source: 0, 1, -1 or an infinity
    number      template of a constant: its name and its value
    """

    infix: Mapping[str, Infix]
    forms: Mapping[str, Form]
    literal: Callable[[float], str]
    number: str


@dataclass(frozen=True)
class Dialect:
    """How one language writes masks.

    infix       rows of the operators of integers, comparisons, `&` and `|`
    forms       rows of `-`, `abs`, `~`, `minimum` and `maximum`
    false, true the two truths
    number      template of a constant integer: its name and its value
    truth       template of a constant truth: its name and its value
    joined      the rank that an operand of `&` or `|` needs
    helpers     the source of the functions that the rows name
    read        the entry of a table at some indices, as the language's own number
    reals       how it writes scores
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
    reals: Reals | None = None


class Source(NamedTuple):
    """An expression in kernel source.

    First come the lines, then the values of its parts: one truth of a mask. The helpers stand by
    name.
    """

    lines: list[str]
    values: tuple[str, ...]
    helpers: dict[str, str]

    @property
    def truth(self) -> str:
        """The only value, of a mask."""
        (value,) = self.values
        return value


def infix(expression: Expression, dialect: Dialect) -> Source:
    """The source of a skeleton's expression in a dialect: of a mask, or of `Several` parts.

    Nodes with several parents become constants, made before the rest.
    """
    printer = _Printer(dialect)
    parts = expression.parts if isinstance(expression, Several) else (expression,)
    known: dict[int, Term] = {}
    for node in _shared(expression):
        known[id(node)] = printer.named(evaluate(node, printer, known))
    values = tuple([evaluate(part, printer, known).source for part in parts])
    return Source(printer.lines, values, printer.helpers)


class _Printer(Interpretation[Term]):
    """The interpretation: each node is a piece of source, and `lines` what must stand before it."""

    def __init__(self, dialect: Dialect) -> None:
        self.lines: list[str] = []
        self.helpers: dict[str, str] = {}
        self._dialect = dialect

    @property
    def _reals(self) -> Reals:
        if self._dialect.reals is None:
            raise NotImplementedError(
                "this language has no real numbers yet: compute it on the CPU"
            )
        return self._dialect.reals

    def index(self, name: str) -> Term:
        return Term(name, natural=True)

    def constant(self, value: int) -> Term:
        assert value >= 0, "only a divisor is a constant in a skeleton"
        return Term(str(value), natural=True)

    def parameter(self, slot: int, dtype: str) -> Term:
        kind = "real" if dtype == "real" else "number"
        return Term(Parameter(slot, dtype).name, kind=kind)

    def truth(self, value: bool) -> Term:
        return replace(self._dialect.true if value else self._dialect.false, kind="truth")

    def lookup(self, table: AnyTable, indices: tuple[Term, ...]) -> Term:
        assert isinstance(table, Slot)
        entry = self._dialect.read(table, indices)
        if table.dtype == "bool":
            return Term(f"{entry} != 0", EQUAL, kind="truth")
        kind = "number" if table.dtype == "int32" else "real"
        return self.named(Term(entry, CALL, kind=kind))

    def unary(self, operator: str, operand: Term) -> Term:
        kind = "truth" if operator == "~" else "number"
        return self._formed(self._dialect.forms[operator], kind, operand)

    def score(self) -> Term:
        return Term("s", kind="real")

    def real(self, value: float) -> Term:
        source = self._reals.literal(value)
        return Term(source, UNARY if source.startswith("-") else ATOM, kind="real")

    def from_integer(self, operand: Term) -> Term:
        return self._formed(self._reals.forms["from_integer"], "real", operand)

    def real_unary(self, operator: str, operand: Term) -> Term:
        return self._formed(self._reals.forms[operator], "real", operand)

    def real_binary(self, operator: str, left: Term, right: Term) -> Term:
        if operator in ("minimum", "maximum"):
            return self._formed(self._reals.forms[operator], "real", left, right)
        return self._joined(self._reals.infix[operator], left, right, "real")

    def where(self, truth: Term, then: Term, otherwise: Term) -> Term:
        return self._formed(self._reals.forms["where"], "real", truth, then, otherwise)

    def _formed(self, form: Form, kind: str, *operands: Term) -> Term:
        if form.helper:
            self._help(form.helper)
        given = [self._short(operand).beside(form.operand) for operand in operands]
        return Term(form.template.format(*given), form.rank, form.natural, kind)

    def binary(self, operator: str, left: Term, right: Term) -> Term:
        if operator in ("minimum", "maximum"):
            return self._formed(self._dialect.forms[operator], "number", left, right)
        row = self._dialect.infix[operator]
        if row.floor and not left.natural:
            self._help(row.floor)
            left = self._short(left)
            call = f"{row.floor}({left.source}, {right.source})"
            return Term(call, CALL, natural=operator == "%")
        natural = left.natural and right.natural and operator in _NATURAL
        return self._joined(row, left, right, natural=natural)

    def compare(self, operator: str, left: Term, right: Term) -> Term:
        return self._joined(self._dialect.infix[operator], left, right, "truth")

    def logic(self, operator: str, operands: tuple[Term, ...]) -> Term:
        if operator == "~":
            return self.unary(operator, operands[0])
        row, rank = self._dialect.infix[operator], self._dialect.joined
        if row.names_left:
            total, *rest = operands
            total = Term(total.beside(rank), row.rank, kind="truth")
        else:
            total, *rest = (Term(x.beside(rank), max(x.rank, rank), kind="truth") for x in operands)
        for operand in rest:
            total = self._joined(row, total, operand, "truth", beyond=rank)
        return total

    def _joined(
        self,
        row: Infix,
        left: Term,
        right: Term,
        kind: str = "number",
        *,
        natural: bool = False,
        beyond: int = 0,
    ) -> Term:
        """Both sides of an operator; one of them becomes a constant if they are long together.

        `beyond` is the rank that the right side needs, where it is not the next one.
        """
        if len(left.source) + len(right.source) > WIDEST:
            if row.names_left or len(left.source) >= len(right.source):
                left = self.named(left)
            else:
                right = self.named(right)
        beyond = beyond or row.rank + 1
        source = f"{left.beside(row.rank)} {row.spelling} {right.beside(beyond)}"
        return Term(source, row.rank, natural, kind)

    def _short(self, term: Term) -> Term:
        return self.named(term) if len(term.source) > LONGEST else term

    def named(self, term: Term) -> Term:
        """A constant that holds the piece; names and literals need none."""
        if term.rank == ATOM:
            return term
        templates = {"truth": self._dialect.truth, "number": self._dialect.number}
        template = templates.get(term.kind) or self._reals.number
        name = f"{term.kind}{len(self.lines)}"
        self.lines.append(template.format(name, term.source))
        return Term(name, natural=term.natural, kind=term.kind)

    def _help(self, name: str) -> None:
        self.helpers[name] = self._dialect.helpers[name]


def _shared(expression: Expression) -> list[Expression]:
    """Nodes with several parents, each after the nodes that it is made of."""
    order = ordered(expression)
    parents = Counter(id(child) for _, children in order for child in children)
    return [node for node, _ in order if parents[id(node)] > 1]
