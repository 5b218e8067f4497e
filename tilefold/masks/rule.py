"""The base of all rules, joins and pieces of rules, and rules traced from a user's own function.

A rule knows no lengths. Bound to two lengths it becomes an expression (see `expression`) that is
folded to exact values, to intervals over tiles, and to kernel source. So every rule, a user's own
included, costs what its expression costs and skips what its intervals allow.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tilefold.common.check import shorten, shown, whole
from tilefold.masks.evaluate import exact, index_bits
from tilefold.masks.expression import INDEX_NAMES, Boolean, Index, Logic, as_boolean, names
from tilefold.masks.rewrite import shift
from tilefold.masks.runs import Counts, count, runs


class Rule(ABC):
    """Which query may see which key, whatever the lengths.

    >>> from tilefold import causal, local, prefix
    >>> causal() & (local(2) | prefix(1))
    causal() & (local(2) | prefix(1))
    >>> (causal() & local(2)).to_dense(3, 3).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]])
    """

    @abstractmethod
    def bind(self, len_q: int, len_k: int) -> Boolean:
        """The expression at these lengths; raises ValueError if they do not fit the rule."""

    @abstractmethod
    def __repr__(self) -> str: ...

    def __eq__(self, other: object) -> bool:
        """True for the same structure and data: rules are frozen dataclasses and compare fields."""
        return NotImplemented

    def __hash__(self) -> int:
        return hash(repr(self))

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless the rule fits a problem of these sizes."""
        bound: object = self.bind(len_q, len_k)
        if not isinstance(bound, Boolean):
            raise TypeError(
                f"{self!r}: bind must return an expression over q and k, got {shown(bound)}"
            )

    def to_dense(
        self, len_q: int, len_k: int, batch: int | None = None, heads: int | None = None
    ) -> NDArray[np.bool_]:
        """The rule as an array (len_q, len_k), or (batch, heads, len_q, len_k) if either is given.

        Raises ValueError if the rule depends on the batch or the head and their number is missing.

        >>> from tilefold import causal
        >>> causal().to_dense(2, 3).astype(int)
        array([[1, 1, 0],
               [1, 1, 1]])
        """
        expression, sizes = self._sized(len_q, len_k, batch, heads)
        b, h, q, k = np.ogrid[: sizes[0], : sizes[1], :len_q, :len_k]
        dense = exact(expression, b=b, h=h, q=q, k=k)
        return dense[0, 0] if batch is None and heads is None else dense

    def blocks(
        self,
        len_q: int,
        len_k: int,
        block_q: int,
        block_k: int,
        batch: int | None = None,
        heads: int | None = None,
    ) -> Counts:
        """The numbers of skipped, full and partial tiles of block_q x block_k.

        A rule that depends on the batch or the head needs their number; its counts are the sums.

        >>> from tilefold import causal
        >>> causal().blocks(64, 64, 16, 16)
        Counts(skip=6, full=6, partial=4)
        """
        expression, sizes = self._sized(len_q, len_k, batch, heads)
        visited = runs(
            expression,
            parallel="q",
            batch=sizes[0],
            heads=sizes[1],
            len_parallel=len_q,
            len_traverse=len_k,
            block_parallel=whole("block_q", block_q, 1),
            block_traverse=whole("block_k", block_k, 1),
        )
        return count(visited, len_k, block_k)

    def window(self, len_q: int, len_k: int, *, q0: int = 0, k0: int = 0) -> Rule:
        """A piece of this rule: what it says between len_q queries and len_k keys, from q0, k0 on.

        Query 0 of the piece is query q0 of the whole, key 0 is key k0. The piece ends where the
        call that it masks ends. So a shard of a long sequence, a chunk of a prompt or a page of
        keys is masked as it is within the whole:

        >>> from tilefold import causal, local
        >>> piece = (causal() & local(3)).window(8, 8, q0=4, k0=3)
        >>> print(piece.to_dense(4, 4).astype(int))
        [[1 1 0 0]
         [1 1 1 0]
         [0 1 1 1]
         [0 0 1 1]]

        These are rows 4 to 7 and columns 3 to 6 of `(causal() & local(3)).to_dense(8, 8)`. Arrays
        that the rule carries belong to the whole.

        Arguments:
            len_q, len_k: the lengths of the whole.
            q0, k0: the first query and the first key of the piece.

        Raises TypeError or ValueError unless they are integers with 0 <= q0 <= len_q and
        0 <= k0 <= len_k, and ValueError once a call leaves the whole.
        """
        len_q, len_k = (whole(f"window: len_{x}", n, 0) for x, n in (("q", len_q), ("k", len_k)))
        q0, k0 = (whole(f"window: {x}0", n, 0) for x, n in (("q", q0), ("k", k0)))
        for name, start, length in (("q", q0, len_q), ("k", k0, len_k)):
            if start > length:
                raise ValueError(f"window: {name}0 must be <= len_{name}={length}, got {start}")
        return Window(self, len_q, len_k, q0, k0)

    def _sized(
        self, len_q: int, len_k: int, batch: int | None, heads: int | None
    ) -> tuple[Boolean, tuple[int, int]]:
        """The checked expression, and batch and heads with 1 where they do not matter."""
        for name, size in (("len_q", len_q), ("len_k", len_k)):
            whole(name, size, 0)
        expression = self.bind(len_q, len_k)
        read = names(expression)
        for name, letter, given in (("batch", "b", batch), ("heads", "h", heads)):
            if given is not None:
                whole(name, given, 0)
            elif letter in read:
                raise ValueError(f"{self!r} depends on {letter}, so {name} must be given, got None")
        sizes = (1 if batch is None else batch, 1 if heads is None else heads)
        self.check(*sizes, len_q, len_k)
        index_bits(expression, *sizes, len_q, len_k)
        return expression, sizes

    def __and__(self, other: Any) -> Rule:
        return _combine(AllOf, self, other)

    def __or__(self, other: Any) -> Rule:
        return _combine(AnyOf, self, other)

    def __invert__(self) -> Rule:
        return Not(self)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"the truth of {self!r} is not one value; combine rules with & | ~ "
            "instead of `and`, `or`, `not`"
        )


@dataclass(frozen=True, repr=False)
class AllOf(Rule):
    """Rules joined by `&`."""

    rules: tuple[Rule, ...]

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """The expressions of all rules, joined by `&`."""
        return Logic("&", tuple(rule.bind(len_q, len_k) for rule in self.rules))

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless every rule fits."""
        for rule in self.rules:
            rule.check(batch, heads, len_q, len_k)

    def __repr__(self) -> str:
        return " & ".join(
            f"({rule!r})" if isinstance(rule, AnyOf) else repr(rule) for rule in self.rules
        )


@dataclass(frozen=True, repr=False)
class AnyOf(Rule):
    """Rules joined by `|`."""

    rules: tuple[Rule, ...]

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """The expressions of all rules, joined by `|`."""
        return Logic("|", tuple(rule.bind(len_q, len_k) for rule in self.rules))

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless every rule fits."""
        for rule in self.rules:
            rule.check(batch, heads, len_q, len_k)

    def __repr__(self) -> str:
        return " | ".join(
            f"({rule!r})" if isinstance(rule, AllOf) else repr(rule) for rule in self.rules
        )


@dataclass(frozen=True, repr=False)
class Not(Rule):
    """A rule negated by `~`."""

    rule: Rule

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """The expression of the rule, negated."""
        return ~self.rule.bind(len_q, len_k)

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless the rule fits."""
        self.rule.check(batch, heads, len_q, len_k)

    def __repr__(self) -> str:
        joined = isinstance(self.rule, (AllOf, AnyOf))
        return f"~({self.rule!r})" if joined else f"~{self.rule!r}"


@dataclass(frozen=True, repr=False)
class Window(Rule):
    """See `Rule.window`."""

    rule: Rule
    len_q: int
    len_k: int
    q0: int
    k0: int

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """The whole rule's expression, with the indices of the piece shifted to the whole's."""
        for name, start, length, most in (
            ("q", self.q0, len_q, self.len_q),
            ("k", self.k0, len_k, self.len_k),
        ):
            if start + length > most:
                raise ValueError(
                    f"{self!r}: {name}0={start} and len_{name}={length} leave the whole, "
                    f"which ends at {most}"
                )
        return shift(self.rule.bind(self.len_q, self.len_k), self.q0, self.k0)

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless the piece is within the whole and the rule fits the whole."""
        self.bind(len_q, len_k)
        self.rule.check(batch, heads, self.len_q, self.len_k)

    def __repr__(self) -> str:
        joined = isinstance(self.rule, (AllOf, AnyOf, Not))
        starts = [f"{name}={at}" for name, at in (("q0", self.q0), ("k0", self.k0)) if at]
        given = ", ".join([str(self.len_q), str(self.len_k), *starts])
        return f"({self.rule!r}).window({given})" if joined else f"{self.rule!r}.window({given})"


def _combine(kind: type[AllOf] | type[AnyOf], left: Rule, right: Any) -> Rule:
    if not isinstance(right, Rule):
        raise TypeError(f"{left!r} combines with other rules by & and |, got {shown(right)}")
    parts = [part.rules if isinstance(part, kind) else (part,) for part in (left, right)]
    return kind((*parts[0], *parts[1]))


@dataclass(frozen=True, repr=False, eq=False)
class Traced(Rule):
    """See `rule`."""

    expression: Boolean
    parameters: tuple[str, ...]

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """The traced expression: raw indices need no lengths."""
        return self.expression

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Traced) and str(self.expression) == str(other.expression)

    def __hash__(self) -> int:
        return hash(str(self.expression))

    def __repr__(self) -> str:
        text = str(self.expression)
        whole_text = text[1:-1] if text.startswith("(") else text
        return f"rule(lambda {', '.join(self.parameters)}: {whole_text})"


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
    allowed = "rule: the parameters of a function must be any of b, h, q, k"
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise TypeError(f"{allowed}; got {shown(function)}") from None
    taken = {}
    for parameter in parameters:
        if parameter.name in INDEX_NAMES and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        ):
            taken[parameter.name] = Index(parameter.name)
        elif parameter.default is parameter.empty:
            raise TypeError(f"{allowed}; got {str(parameter)!r}")
    traced = Traced(as_boolean(_called(function, taken)), tuple(taken))
    try:
        hash(traced)
    except RecursionError:
        raise ValueError("rule: the function builds an expression nested too deeply") from None
    return traced


def _called(function: Callable[..., Any], indices: dict[str, Index]) -> Any:
    """The function's value for symbols. Raises TypeError where it does what symbols cannot."""
    try:
        made = function(**indices)
    except (TypeError, AttributeError, LookupError) as error:
        last = error.__traceback__
        while last and last.tb_next:
            last = last.tb_next
        if last and last.tb_frame.f_globals.get("__name__", "").startswith("tilefold."):
            raise  # an operator of the symbols has said what is wrong
        raise TypeError(
            "rule: the function cannot be called with symbols:"
            f" {type(error).__name__}: {shorten(str(error), 120)}; it may use integers, + - *, //"
            " and % by a constant, abs, comparisons, and & | ~ between comparisons; the data of"
            " arrays go into documents(), lengths() or dense()"
        ) from error
    if made is None:
        raise TypeError("rule: the function returned None, no comparison; is `return` missing?")
    if isinstance(made, Rule):
        raise TypeError(
            f"rule: the function returned the rule {shown(made)}, no comparison; join rules with"
            " & | ~ outside of rule()"
        )
    return made
