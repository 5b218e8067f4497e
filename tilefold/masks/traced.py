"""Rules of a user's own: a function of symbols, traced to an expression."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tilefold.common.check import shorten, shown
from tilefold.common.computed import computed
from tilefold.common.foreign_arrays import compiled_by_torch
from tilefold.masks.evaluate import index_bits
from tilefold.masks.expression import (
    INDEX_NAMES,
    Boolean,
    Expression,
    Index,
    Lookup,
    Real,
    RealBinary,
    RealConstant,
    TruthLookup,
    as_boolean,
)
from tilefold.masks.graph import WRITTEN_OUT, hashed, ordered, same
from tilefold.masks.rule import Rule


@dataclass(frozen=True, repr=False, eq=False)
class _Traced(Rule):
    expression: Boolean
    parameters: tuple[str, ...]

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """The traced expression: raw indices need no lengths."""
        return self.expression

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises IndexError where the expression reads beyond a table."""
        super().check(batch, heads, len_q, len_k)
        if self._reads:
            index_bits(self.expression, batch, heads, len_q, len_k)

    @computed
    def _reads(self) -> bool:
        return any(isinstance(node, Lookup | TruthLookup) for node, _ in ordered(self.expression))

    @computed
    def _key(self) -> str | int:
        """The text, where all graphs of the same tree have it; of large ones a hash."""
        text = str(self.expression)
        written_out = len(text) <= WRITTEN_OUT and ":=" not in text
        return text if written_out else hashed(self.expression)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Traced) or self._key != other._key:
            return False
        return isinstance(self._key, str) or same(self.expression, other.expression)

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[Any, ...]:
        """A hash belongs to its process."""
        return type(self), (self.expression, self.parameters)

    def __repr__(self) -> str:
        return spelled("rule", self.parameters, self.expression)


class Traced(_Traced):
    """See `rule`."""


class Inlined(_Traced):
    """The same of a function that PyTorch's compiler traces with its symbols, as a part of a graph.

    The compiler takes a `Traced` for a constant, and cannot make one.
    """


def rule(function: Callable[..., Any]) -> Rule:
    """A rule of your own, written over raw indices: b (batch), h (head), q (query), k (key).

    >>> print(rule(lambda q, k: (q - k) % 3 == 0).to_dense(4, 4).astype(int))
    [[1 0 0 1]
     [0 1 0 0]
     [0 0 1 0]
     [1 0 0 1]]

    The function is called once, with symbols, and must return their comparison. It may use + - *,
    // and % by a positive constant, abs, comparisons, and & | ~ between comparisons.

    Arguments:
        function: its parameters are any of b, h, q, k, by name.

    Raises TypeError or ValueError for anything that cannot be traced.
    """
    symbols = {name: Index(name) for name in INDEX_NAMES}
    if compiled_by_torch():
        inlined = symbols_in_graph(function, symbols)
        return Inlined(function(**inlined), tuple(inlined))
    taken = symbols_of(function, "rule", symbols)
    expression = as_boolean(_called(function, taken))
    check_integers(expression)
    return Traced(expression, tuple(taken))


def symbols_in_graph(
    function: Callable[..., Any], symbols: Mapping[str, Expression]
) -> dict[str, Any]:
    """`symbols_of` where PyTorch's compiler traces it. Other parameters have defaults."""
    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return {name: symbols[name] for name in names if name in symbols}


def symbols_of(
    function: Callable[..., Any], maker: str, symbols: Mapping[str, Expression]
) -> dict[str, Any]:
    """The symbols that a function takes, by its parameters. Raises TypeError for other parameters.

    `maker` is the function that was called with it, as messages name it.
    """
    allowed = f"{maker}: the parameters of a function must be any of {', '.join(symbols)}"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise TypeError(f"{allowed}; got {shown(function)}") from None
    taken = {}
    for parameter in parameters:
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.name in symbols:
            taken[parameter.name] = symbols[parameter.name]
        elif parameter.default is parameter.empty:
            raise TypeError(f"{allowed}; got {str(parameter)!r}")
    return taken


def called(
    function: Callable[..., Any], maker: str, symbols: Mapping[str, Any], wanted: str, may: str
) -> Any:
    """The function's value for symbols. Raises TypeError where it does what symbols cannot.

    `wanted` is what it must return, and `may` what it may use, as messages name them.
    """
    try:
        made = function(**symbols)
    except (TypeError, AttributeError, LookupError) as error:
        last = error.__traceback__
        while last and last.tb_next:
            last = last.tb_next
        if last and last.tb_frame.f_globals.get("__name__", "").startswith("tilefold."):
            raise  # an operator of the symbols has said what is wrong
        raise TypeError(
            f"{maker}: the function cannot be called with symbols:"
            f" {type(error).__name__}: {shorten(str(error), 120)}; it may use {may}"
        ) from error
    if made is None:
        raise TypeError(f"{maker}: the function returned None, no {wanted}; is `return` missing?")
    return made


def spelled(maker: str, parameters: Iterable[str], expression: Expression) -> str:
    """The call of `maker` that makes an expression, with a lambda."""
    text = str(expression)
    whole_text = text[1:-1] if text.startswith("(") and text.endswith(")") else text
    return f"{maker}(lambda {', '.join(parameters)}: {whole_text})"


def check_integers(expression: Boolean) -> None:
    """Raises TypeError for an expression that computes with real numbers."""
    reals = [node for node, _ in ordered(expression) if isinstance(node, Real)]
    for node in reals:
        if isinstance(node, RealBinary) and node.operator == "/":
            raise TypeError(
                f"`{str(node)[1:-1]}`: a rule computes with integers; write //, which rounds down"
            )
    for node in sorted(reals, key=lambda node: not isinstance(node, RealConstant)):
        found = f"float {node}" if isinstance(node, RealConstant) else f"`{node}`"
        raise TypeError(f"a rule computes with integers and indices, not with {found}")


def _called(function: Callable[..., Any], indices: dict[str, Any]) -> Any:
    """The comparison that a function makes of indices."""
    may = (
        "integers, + - *, // and % by a constant, abs, comparisons, and & | ~ between comparisons;"
        " the data of arrays go into documents(), lengths() or dense()"
    )
    made = called(function, "rule", indices, "comparison", may)
    if isinstance(made, Rule):
        raise TypeError(
            f"rule: the function returned the rule {shown(made)}, no comparison; join rules with"
            " & | ~ outside of rule()"
        )
    return made
