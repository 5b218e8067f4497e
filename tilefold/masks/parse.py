"""Mask strings such as `causal() & (local(256) | prefix(4))`, as rules print themselves.

Python's own grammar gives a syntax tree. The walk over it knows rules, integers, strings, tuples
and nothing else: nothing is evaluated, and no name leads out of the tables below.
"""

from __future__ import annotations

import ast
import inspect
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

from tilefold.common.check import shorten, shown
from tilefold.masks.data_rules import dense, documents, lengths
from tilefold.masks.expression import INDEX_NAMES, Index, as_boolean
from tilefold.masks.position_rules import causal, chunked, full, local, prefix
from tilefold.masks.rule import Rule
from tilefold.masks.traced import rule

RULES: Mapping[str, Callable[..., Rule]] = {
    made.__name__: made
    for made in (full, causal, local, prefix, chunked, documents, lengths, dense, rule)
}
DEEPEST = 150  # levels of operators and calls; deeper trees meet the limit of Python's own stack

_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
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
    line = "".join(" " if letter.isspace() else letter for letter in text)
    try:
        return _Walk(line).rule()
    except _Refusal as error:
        raise ValueError(str(error)) from None


class _Refusal(ValueError):
    """An error that already names the column."""


class _Walk:
    """One string on its way to a rule."""

    def __init__(self, text: str) -> None:
        self.text = text.lstrip()
        self.start = len(text) - len(self.text)

    def rule(self) -> Rule:
        """The rule of the whole string."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's advice on code that will not be run
                tree = ast.parse(self.text, mode="eval")
        except (SyntaxError, ValueError) as error:
            offset = error.offset if isinstance(error, SyntaxError) else None
            reason = error.msg if isinstance(error, SyntaxError) else error
            raise self._at(offset or 1, reason) from None
        except (RecursionError, MemoryError):
            raise self._at(1, f"nested more than {DEEPEST} deep") from None
        if _depth(tree) > DEEPEST:
            raise self._at(1, f"nested more than {DEEPEST} deep")
        return self._rule(tree.body, {})

    def _at(self, column: int, reason: object) -> _Refusal:
        where = f"mask string, column {column + self.start}"
        return _Refusal(f"{where}: {shorten(str(reason), 400)}")

    def _wrong(self, node: ast.AST, reason: object) -> _Refusal:
        before = self.text.encode()[: getattr(node, "col_offset", 0)]
        return self._at(len(before.decode(errors="replace")) + 1, reason)

    def _source(self, node: ast.expr) -> str:
        return shorten(ast.get_source_segment(self.text, node) or "", 60)

    def _rule(self, node: ast.expr, known: Mapping[str, Rule]) -> Rule:
        match node:
            case ast.BinOp(_, ast.BitAnd() | ast.BitOr() as operation, _):
                terms = [self._rule(term, known) for term in _terms(node)]
                joined: Rule = reduce(_ARITHMETIC[type(operation)], terms)
                return joined
            case ast.UnaryOp(ast.Invert(), operand):
                return ~self._rule(operand, known)
            case ast.Name(name) if name in known:
                return known[name]
            case ast.Subscript(ast.Tuple(parts), ast.UnaryOp(ast.USub(), ast.Constant(1))):
                last: Rule = self._last(parts, self._rule, known)
                return last
            case ast.Call(ast.Name(name)) if name in RULES:
                return self._call(node, name, RULES[name])
            case ast.Call(ast.Attribute(whole, "window")):
                return self._call(node, "window", self._rule(whole, known).window)
            case ast.Call(ast.Name(name)):
                raise self._wrong(node, f"unknown rule {name}; use {', '.join(RULES)}")
            case ast.Name(name) if name in RULES:
                raise self._wrong(node, f"a rule is called: write {name}(...)")
            case ast.BoolOp() | ast.UnaryOp(ast.Not()):
                raise self._wrong(node, "write & | ~ instead of `and`, `or`, `not`")
        raise self._wrong(node, f"expected a rule, got `{self._source(node)}`")

    def _last(
        self, parts: list[ast.expr], read: Callable[..., Any], known: Mapping[str, Any]
    ) -> Any:
        """The last of `(x0 := ..., x1 := ..., x0 & x1)[-1]`: so rules print that share parts."""
        for part in parts[:-1]:
            if not isinstance(part, ast.NamedExpr):
                raise self._wrong(part, f"expected a name and :=, got `{self._source(part)}`")
            known = {**known, part.target.id: read(part.value, known)}
        return read(parts[-1], known)

    def _call(self, node: ast.Call, name: str, maker: Callable[..., Rule]) -> Rule:
        value = self._function if name == "rule" else self._value
        arguments = [value(argument) for argument in node.args]
        named = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self._wrong(keyword, "** is not known here")
            if keyword.arg in named:
                raise self._wrong(keyword, f"{keyword.arg} is given twice")
            named[keyword.arg] = value(keyword.value)
        signature = inspect.signature(maker)
        taken = [
            each.name for each in signature.parameters.values() if each.kind != each.VAR_KEYWORD
        ]
        try:
            signature.bind(*arguments, **named)
        except TypeError as error:
            known = ", ".join(taken) or "no argument"
            raise self._wrong(node, f"{name} takes {known}: {error}") from None
        try:
            return maker(*arguments, **named)
        except _Refusal:
            raise
        except (TypeError, ValueError) as error:
            raise self._wrong(node, error) from None

    def _value(self, node: ast.expr) -> Any:
        """The value of a literal."""
        match node:
            case ast.Constant(value) if value is None or isinstance(value, (bool, int, str)):
                return value
            case ast.UnaryOp(ast.USub(), ast.Constant(value)) if type(value) is int:
                return -value
            case ast.Tuple(elements):
                return tuple(self._value(element) for element in elements)
            case ast.List(elements):
                return [self._value(element) for element in elements]
            case ast.Subscript():
                reason = "stands for an array, which a string cannot hold; write a tuple of numbers"
                raise self._wrong(node, f"`{self._source(node)}` {reason}")
        reason = "expected a number, a string or a tuple of them"
        raise self._wrong(node, f"{reason}, got `{self._source(node)}`")

    def _function(self, node: ast.expr) -> Callable[..., Any]:
        """A lambda over indices, as a function that builds the expression of its body."""
        if not isinstance(node, ast.Lambda):
            reason = f"rule takes a lambda over b, h, q, k, got `{self._source(node)}`"
            raise self._wrong(node, reason)
        names = [argument.arg for argument in node.args.args]
        plain = ast.arguments([], node.args.args, None, [], [], None, [])
        if ast.dump(plain) != ast.dump(node.args) or not set(names) <= set(INDEX_NAMES):
            raise self._wrong(node, "the parameters of a lambda must be any of b, h, q, k")

        if len(set(names)) < len(names):
            raise self._wrong(node, "a parameter of the lambda stands twice")

        def build(**indices: Index) -> Any:
            return self._number(node.body, indices)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        vars(build)["__signature__"] = signature
        return build

    def _number(self, node: ast.expr, indices: Mapping[str, Any]) -> Any:
        """An integer or a truth over the indices."""
        try:
            match node:
                case ast.Name(name) if name in indices:
                    return indices[name]
                case ast.Constant(value) if isinstance(value, int):
                    return value
                case ast.UnaryOp(ast.USub(), operand):
                    return -self._number(operand, indices)
                case ast.UnaryOp(ast.Invert(), operand):
                    return ~as_boolean(self._number(operand, indices))
                case ast.Call(ast.Name("abs"), [operand], []):
                    return abs(self._number(operand, indices))
                case ast.BinOp(_, operation, _) if type(operation) in _ARITHMETIC:
                    terms = [self._number(term, indices) for term in _terms(node)]
                    return reduce(_ARITHMETIC[type(operation)], terms)
                case ast.Subscript(ast.Tuple(parts), ast.UnaryOp(ast.USub(), ast.Constant(1))):
                    return self._last(parts, self._number, indices)
                case ast.Compare(left, [comparison], [right]) if type(comparison) in _COMPARISONS:
                    apply = _COMPARISONS[type(comparison)]
                    return apply(self._number(left, indices), self._number(right, indices))
        except _Refusal:
            raise
        except (TypeError, ValueError, ArithmeticError) as error:
            raise self._wrong(node, error) from None
        known = f"{', '.join(indices) or 'numbers'}, integers, + - * // % abs()"
        reason = f"use {known}, one comparison at a time, and & | ~"
        raise self._wrong(node, f"`{self._source(node)}` is not known here; {reason}")


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
