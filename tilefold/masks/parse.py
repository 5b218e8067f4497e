"""Mask strings such as `causal() & (local(256) | prefix(4))`, as rules print themselves.

Python's own grammar gives a syntax tree. The walk over it knows rules, integers, strings, tuples
and nothing else: nothing is evaluated, and no name leads out of the tables below.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any, ClassVar

from tilefold.common.check import shorten, shown
from tilefold.masks.data_rules import dense, documents, lengths
from tilefold.masks.expression import INDEX_NAMES, as_boolean
from tilefold.masks.position_rules import causal, chunked, full, local, prefix
from tilefold.masks.rule import Rule
from tilefold.masks.traced import rule

RULES: Mapping[str, Callable[..., Rule]] = {
    made.__name__: made
    for made in (full, causal, local, prefix, chunked, documents, lengths, dense, rule)
}
DEEPEST = 150  # levels of operators and calls; deeper trees meet the limit of Python's own stack

_AN_ARRAY = "stands for an array, which a string cannot hold; write a tuple of numbers"

ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def parse(text: str) -> Rule:
    """The rule that a string spells: calls of rules and their pieces, joined by `&`, `|`, `~`.

    >>> parse("causal() & (local(256) | prefix(4))")
    causal() & (local(256) | prefix(4))
    >>> parse("rule(lambda q, k: (q - k) % 3 == 0)")
    rule(lambda q, k: ((q - k) % 3) == 0)
    >>> parse("causal().window(4096, 4096, q0=1024) & local(256)")
    causal().window(4096, 4096, q0=1024) & local(256)
    >>> parse("causal() & foo")
    Traceback (most recent call last):
    ValueError: mask string, column 12: expected a rule, got `foo`

    Arguments may be integers, strings, True, False, None, and tuples or lists of them.

    Raises TypeError for anything but a string, and ValueError, naming the column, for a string
    that is not a rule.
    """
    if not isinstance(text, str):
        raise TypeError(f"a mask string must be a string, got {shown(text)}")
    if not text.strip():
        raise ValueError('a mask string is empty; write a rule, for example "causal()"')
    made: Rule = Walk(text).whole()
    return made


class Refusal(ValueError):
    """An error that already names the column."""


class Walk:
    """One string on its way to a rule; a subclass reads another language of the same grammar.

    A subclass says what a whole string is (`made`), and what its literals, numbers and lambdas may
    have beside those of a mask.
    """

    language: ClassVar[str] = "mask"
    own: ClassVar[str] = "rule"
    """The name that takes a lambda."""
    letters: ClassVar[tuple[str, ...]] = INDEX_NAMES
    numerals: ClassVar[tuple[type, ...]] = (int,)
    arithmetic: ClassVar[Mapping[type[ast.operator], Callable[[Any, Any], Any]]] = ARITHMETIC
    functions: ClassVar[Mapping[str, Callable[..., Any]]] = {"abs": abs}
    words: ClassVar[str] = "integers, + - * // % abs()"
    """What a lambda may use beside its parameters, as an error says it."""

    def __init__(self, text: str) -> None:
        line = "".join(" " if letter.isspace() else letter for letter in text)
        self.text = line.lstrip()
        self.start = len(line) - len(self.text)

    def whole(self) -> Any:
        """The value of the whole string. Raises ValueError, which names the column."""
        try:
            return self.made(self._tree(), {})
        except Refusal as error:
            raise ValueError(str(error)) from None

    def _tree(self) -> ast.expr:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's advice on code that will not be run
                tree = ast.parse(self.text, mode="eval")
        except (SyntaxError, ValueError) as error:
            offset = error.offset if isinstance(error, SyntaxError) else None
            reason = error.msg if isinstance(error, SyntaxError) else error
            if printed := re.search(r"\w+\[\d+(x\d+)+\]", self.text):
                offset, reason = printed.start() + 1, f"`{printed[0]}` {_AN_ARRAY}"
            raise self._at(offset or 1, reason) from None
        except (RecursionError, MemoryError):
            raise self._at(1, f"nested more than {DEEPEST} deep") from None
        if _depth(tree) > DEEPEST:
            raise self._at(1, f"nested more than {DEEPEST} deep")
        return tree.body

    def _at(self, column: int, reason: object) -> Refusal:
        where = f"{self.language} string, column {column + self.start}"
        return Refusal(f"{where}: {shorten(str(reason), 400)}")

    def wrong(self, node: ast.AST, reason: object) -> Refusal:
        """The error that says what is wrong with a node, and where it stands."""
        before = self.text.encode()[: getattr(node, "col_offset", 0)]
        return self._at(len(before.decode(errors="replace")) + 1, reason)

    def source(self, node: ast.expr) -> str:
        """The text of a node."""
        return shorten(ast.get_source_segment(self.text, node) or "", 60)

    def made(self, node: ast.expr, known: Mapping[str, Any]) -> Any:
        """The rule that a node spells; `known` are parts with names."""
        match node:
            case ast.BinOp(_, ast.BitAnd() | ast.BitOr() as operation, _):
                terms = [self.made(term, known) for term in _terms(node)]
                joined: Rule = reduce(ARITHMETIC[type(operation)], terms)
                return joined
            case ast.UnaryOp(ast.Invert(), operand):
                return ~self.made(operand, known)
            case ast.Name(name) if name in known:
                return known[name]
            case ast.Subscript(ast.Tuple(parts), ast.UnaryOp(ast.USub(), ast.Constant(1))):
                last: Rule = self._last(parts, self.made, known)
                return last
            case ast.Call(ast.Name(name)) if name in RULES:
                return self.call(node, name, RULES[name])
            case ast.Call(ast.Attribute(whole, "window")):
                return self.call(node, "window", self.made(whole, known).window)
            case ast.Call(ast.Name(name)):
                raise self.wrong(node, f"unknown rule {name}; use {', '.join(RULES)}")
            case ast.Name(name) if name in RULES:
                raise self.wrong(node, f"a rule is called: write {name}(...)")
            case ast.BoolOp() | ast.UnaryOp(ast.Not()):
                raise self.wrong(node, "write & | ~ instead of `and`, `or`, `not`")
        raise self.wrong(node, f"expected a rule, got `{self.source(node)}`")

    def _last(
        self, parts: list[ast.expr], read: Callable[..., Any], known: Mapping[str, Any]
    ) -> Any:
        """The last of `(x0 := ..., x1 := ..., x0 & x1)[-1]`: so rules print that share parts."""
        for part in parts[:-1]:
            if not isinstance(part, ast.NamedExpr):
                raise self.wrong(part, f"expected a name and :=, got `{self.source(part)}`")
            known = {**known, part.target.id: read(part.value, known)}
        return read(parts[-1], known)

    def call(self, node: ast.Call, name: str, maker: Callable[..., Any]) -> Any:
        """The value of a call of a function that takes literals, or a lambda."""
        value = self._function if name == self.own else self.value
        arguments = [value(argument) for argument in node.args]
        named = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self.wrong(keyword, "** is not known here")
            if keyword.arg in named:
                raise self.wrong(keyword, f"{keyword.arg} is given twice")
            named[keyword.arg] = value(keyword.value)
        signature = inspect.signature(maker)
        taken = [
            each.name for each in signature.parameters.values() if each.kind != each.VAR_KEYWORD
        ]
        try:
            signature.bind(*arguments, **named)
        except TypeError as error:
            known = ", ".join(taken) or "no argument"
            raise self.wrong(node, f"{name} takes {known}: {error}") from None
        try:
            return maker(*arguments, **named)
        except Refusal:
            raise
        except (TypeError, ValueError) as error:
            raise self.wrong(node, error) from None

    def value(self, node: ast.expr) -> Any:
        """The value of a literal."""
        match node:
            case ast.Constant(value) if value is None or isinstance(value, (str, *self.numerals)):
                return value
            case ast.UnaryOp(ast.USub(), ast.Constant(value)) if type(value) in self.numerals:
                number: Any = value
                return -number
            case ast.Tuple(elements):
                return tuple(self.value(element) for element in elements)
            case ast.List(elements):
                return [self.value(element) for element in elements]
            case ast.Subscript():
                raise self.wrong(node, f"`{self.source(node)}` {_AN_ARRAY}")
        reason = "expected a number, a string or a tuple of them"
        raise self.wrong(node, f"{reason}, got `{self.source(node)}`")

    def _function(self, node: ast.expr) -> Callable[..., Any]:
        """A lambda over indices, as a function that builds the expression of its body."""
        letters = ", ".join(self.letters)
        if not isinstance(node, ast.Lambda):
            reason = f"{self.own} takes a lambda over {letters}, got `{self.source(node)}`"
            raise self.wrong(node, reason)
        names = [argument.arg for argument in node.args.args]
        plain = ast.arguments([], node.args.args, None, [], [], None, [])
        if ast.dump(plain) != ast.dump(node.args) or not set(names) <= set(self.letters):
            raise self.wrong(node, f"the parameters of a lambda must be any of {letters}")
        if len(set(names)) < len(names):
            raise self.wrong(node, "a parameter of the lambda stands twice")

        def build(**symbols: Any) -> Any:
            return self._number(node.body, symbols)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        vars(build)["__signature__"] = signature
        return build

    def _number(self, node: ast.expr, known: Mapping[str, Any]) -> Any:
        """A number or a truth over the symbols that are known."""
        try:
            return self.number(node, known)
        except Refusal:
            raise
        except (TypeError, ValueError, ArithmeticError) as error:
            raise self.wrong(node, error) from None

    def number(self, node: ast.expr, known: Mapping[str, Any]) -> Any:
        """The same, before errors name the column."""
        match node:
            case ast.Name(name) if name in known:
                return known[name]
            case ast.Constant(value) if isinstance(value, self.numerals):
                return value
            case ast.UnaryOp(ast.USub(), operand):
                return -self._number(operand, known)
            case ast.UnaryOp(ast.Invert(), operand):
                return ~as_boolean(self._number(operand, known))
            case ast.Call(ast.Name(name), arguments, []) if name in self.functions:
                return self.functions[name](*[self._number(each, known) for each in arguments])
            case ast.BinOp(_, operation, _) if type(operation) in self.arithmetic:
                terms = [self._number(term, known) for term in _terms(node)]
                return reduce(self.arithmetic[type(operation)], terms)
            case ast.Subscript(ast.Tuple(parts), ast.UnaryOp(ast.USub(), ast.Constant(1))):
                return self._last(parts, self._number, known)
            case ast.Compare(left, [comparison], [right]) if type(comparison) in _COMPARISONS:
                apply = _COMPARISONS[type(comparison)]
                return apply(self._number(left, known), self._number(right, known))
        usable = f"{', '.join(known) or 'numbers'}, {self.words}"
        reason = f"use {usable}, one comparison at a time, and & | ~"
        raise self.wrong(node, f"`{self.source(node)}` is not known here; {reason}")


def _terms(node: ast.BinOp) -> list[ast.expr]:
    """The terms of a chain such as `a | b | c`, which Python nests to the left."""
    left: ast.expr = node
    right = []
    while isinstance(left, ast.BinOp) and type(left.op) is type(node.op):
        right.append(left.right)
        left = left.left
    return [left, *reversed(right)]


def _depth(tree: ast.AST) -> int:
    """The number of levels of a tree, counted without recursion; a chain is one level."""
    depth, level = 0, [tree]
    while level:
        depth, level = depth + 1, [low for node in level for low in _below(node)]
    return depth


def _below(node: ast.AST) -> Iterable[ast.AST]:
    return _terms(node) if isinstance(node, ast.BinOp) else ast.iter_child_nodes(node)
