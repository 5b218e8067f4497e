"""Score strings such as `[softcap(50), alibi()]`, as modifications of scores print themselves.

The walk is that of mask strings. Numbers may be real ones, and a lambda may use the functions of
`tilefold.scores.functions`. An array is written as a tuple of numbers, or as nested tuples.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from tilefold.common.check import shown
from tilefold.masks.parse import ARITHMETIC, Walk
from tilefold.scores import functions
from tilefold.scores.modifications import alibi, bias, softcap, temperature
from tilefold.scores.relative import distance_bias, relative_bias, window_bias
from tilefold.scores.score import Score, as_score
from tilefold.scores.traced import score

SCORES: Mapping[str, Callable[..., Score]] = {
    made.__name__: made
    for made in (
        softcap,
        alibi,
        bias,
        temperature,
        relative_bias,
        distance_bias,
        window_bias,
        score,
    )
}
_FUNCTIONS = ("exp", "log", "tanh", "sigmoid", "sqrt", "minimum", "maximum", "where")
_NAMED = ("inf", "nan")


def parse_score(text: str) -> Score:
    """The modification of scores that a string spells: one, or several in order in brackets.

    >>> parse_score("softcap(30)")
    softcap(30)
    >>> parse_score("[softcap(50), alibi()]")
    [softcap(50), alibi()]
    >>> parse_score("score(lambda s, q, k: s - 0.1 * abs(q - k))")
    score(lambda s, q, k: s - (0.1 * abs((q - k))))
    >>> parse_score("alibi((0.5, 0.25))")
    alibi(array[2])
    >>> parse_score("softcap(30) + alibi()")
    Traceback (most recent call last):
    ValueError: score string, column 1: expected a score, got `softcap(30) + alibi()`

    Arguments are numbers, True, False, None, and tuples or lists of them. A score that carries no
    array prints as a string that is read as an equal score.

    Raises TypeError for anything but a string, and ValueError, naming the column, for a string
    that is not a score.
    """
    if not isinstance(text, str):
        raise TypeError(f"a score string must be a string, got {shown(text)}")
    if not text.strip():
        raise ValueError('a score string is empty; write a score, for example "softcap(30)"')
    made: Score = _ScoreWalk(text).whole()
    return made


class _ScoreWalk(Walk):
    """One string on its way to a score."""

    language: ClassVar[str] = "score"
    own: ClassVar[str] = "score"
    letters: ClassVar[tuple[str, ...]] = ("s", *Walk.letters)
    numerals: ClassVar[tuple[type, ...]] = (int, float)
    arithmetic: ClassVar[Mapping[type[ast.operator], Callable[[Any, Any], Any]]] = {
        **ARITHMETIC,
        ast.Div: operator.truediv,
    }
    functions: ClassVar[Mapping[str, Callable[..., Any]]] = {
        "abs": abs,
        **{name: getattr(functions, name) for name in _FUNCTIONS},
    }
    words: ClassVar[str] = f"numbers, + - * / // %, abs, {', '.join(_FUNCTIONS)}, table"

    def made(self, node: ast.expr, known: Mapping[str, Any]) -> Any:
        match node:
            case ast.List(parts) | ast.Tuple(parts) if parts:
                return as_score([self.made(part, known) for part in parts])
            case ast.Call(ast.Name(name)) if name in SCORES:
                return self.call(node, name, SCORES[name])
            case ast.Call(ast.Name(name)):
                raise self.wrong(node, f"unknown score {name}; use {', '.join(SCORES)}")
            case ast.Name(name) if name in SCORES:
                raise self.wrong(node, f"a score is called: write {name}(...)")
        raise self.wrong(node, f"expected a score, got `{self.source(node)}`")

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(name) if name in _NAMED:
                return float(name)
            case ast.UnaryOp(ast.USub(), ast.Name(name)) if name in _NAMED:
                return -float(name)
        return super().value(node)

    def number(self, node: ast.expr, known: Mapping[str, Any]) -> Any:
        match node:
            case ast.Name(name) if name in _NAMED:
                return float(name)
            case ast.Subscript(ast.Call(ast.Name("table"), [array], []), at):
                indices = at.elts if isinstance(at, ast.Tuple) else [at]
                entries = functions.table(self.value(array))
                return entries[tuple([self._number(index, known) for index in indices])]
        return super().number(node, known)
