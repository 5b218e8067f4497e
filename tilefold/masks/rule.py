"""The base of all rules, and the rules that are made of others: joins and pieces.

A rule knows no lengths. Bound to two lengths it becomes an expression (see `expression`) that is
folded to exact values, to intervals over tiles, and to kernel source. So every rule, a user's own
included, costs what its expression costs and skips what its intervals allow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from tilefold.common import check
from tilefold.common.computed import computed
from tilefold.masks.evaluate import exact, index_bits
from tilefold.masks.expression import Boolean, Logic, check_size, names
from tilefold.masks.graph import SHALLOW, Node, keep_hash, same, spell
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

    _level: int = 0
    """How many joins of rules lie below each other in it; -1 while nobody has counted."""

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless the rule fits a problem of these sizes."""
        bound: object = self.bind(len_q, len_k)
        if not isinstance(bound, Boolean):
            raise TypeError(
                f"{self!r}: bind must return an expression over q and k, got {check.shown(bound)}"
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
        expression, *planes = sized(self, len_q, len_k, batch, heads)
        b, h, q, k = np.ogrid[: planes[0], : planes[1], :len_q, :len_k]
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
        expression, *planes = sized(self, len_q, len_k, batch, heads)
        visited = runs(
            expression,
            parallel="q",
            batch=planes[0],
            heads=planes[1],
            len_parallel=len_q,
            len_traverse=len_k,
            block_parallel=check.whole("block_q", block_q, 1),
            block_traverse=check.whole("block_k", block_k, 1),
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
        len_q, len_k = (
            check.whole(f"window: len_{x}", n, 0) for x, n in (("q", len_q), ("k", len_k))
        )
        q0, k0 = (check.whole(f"window: {x}0", n, 0) for x, n in (("q", q0), ("k", k0)))
        for name, start, length in (("q", q0, len_q), ("k", k0, len_k)):
            if start > length:
                raise ValueError(f"window: {name}0 must be <= len_{name}={length}, got {start}")
        return Window(self, len_q, len_k, q0, k0)

    def __and__(self, other: Any) -> Rule:
        return _combine(AllOf, self, other)

    def __or__(self, other: Any) -> Rule:
        return _combine(AnyOf, self, other)

    def __rand__(self, other: Any) -> Rule:
        return _combine(AllOf, self, other)

    def __ror__(self, other: Any) -> Rule:
        return _combine(AnyOf, self, other)

    def __invert__(self) -> Rule:
        return Not(self)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"the truth of {self!r} is not one value; combine rules with & | ~ "
            "instead of `and`, `or`, `not`"
        )


class Sized(NamedTuple):
    """A rule's expression that fits a problem, and the sizes of the problem beside the lengths."""

    expression: Boolean
    batch: int
    heads: int


def sized(
    rule: Rule, len_q: int, len_k: int, batch: int | None = None, heads: int | None = None
) -> Sized:
    """The checked expression of a rule, and batch and heads with 1 where they do not matter.

    Raises ValueError if the rule depends on the batch or the head and their number is missing, and
    OverflowError if it computes a number that 64 bits do not hold.
    """
    for name, size in (("len_q", len_q), ("len_k", len_k)):
        check.whole(name, size, 0)
    expression = rule.bind(len_q, len_k)
    read = names(expression)
    for name, letter, given in (("batch", "b", batch), ("heads", "h", heads)):
        if given is not None:
            check.whole(name, given, 0)
        elif letter in read:
            raise ValueError(f"{rule!r} depends on {letter}, so {name} must be given, got None")
    made = Sized(expression, 1 if batch is None else batch, 1 if heads is None else heads)
    rule.check(made.batch, made.heads, len_q, len_k)
    index_bits(*made, len_q, len_k)
    return made


_Lengths = tuple[int, int]


class Composed(Rule, Node):
    """A rule made of others; rules made of rules are walked without recursion: see `graph`."""

    _hash: int | None = None  # kept from its first use on, and so is the level
    _level = -1

    @property
    def inner(self) -> _Lengths | None:
        """The lengths that the parts are bound to, where they are not those of the rule."""
        return None

    def fit(self, len_q: int, len_k: int) -> None:
        """Raises ValueError unless the rule fits these lengths, whatever its parts say."""

    @abstractmethod
    def joined(self, parts: tuple[Boolean, ...]) -> Boolean:
        """The expression of the rule, given those of its parts."""

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """The expressions of the parts, joined; a part that occurs twice is bound once."""
        self.fit(len_q, len_k)
        steps, last = self._steps
        bound: list[Boolean] = []
        for rule, whole, parts in steps:
            lengths = whole or (len_q, len_k)
            if isinstance(rule, Composed):
                rule.fit(*lengths)
                bound.append(rule.joined(tuple([bound[place] for place in parts])))
            else:
                bound.append(rule.bind(*lengths))
        return self.joined(tuple([bound[place] for place in last]))

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless every part fits."""
        self.fit(len_q, len_k)
        for rule, whole, _ in self._steps[0]:
            lengths = whole or (len_q, len_k)
            if isinstance(rule, Composed):
                rule.fit(*lengths)
            else:
                rule.check(batch, heads, *lengths)

    @computed
    def _steps(self) -> tuple[list[_Step], tuple[int, ...]]:
        *inner, last = _steps(self)
        return inner, last.parts  # without the rule itself, which would keep itself

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        if hash(self) != hash(other):
            return False
        if self._level > SHALLOW:
            return same(self, other)
        return bool(self.label == other.label and self.children == other.children)

    def __hash__(self) -> int:
        if self._hash is None:
            keep_hash(self)
        return self._hash  # type: ignore[return-value]  # it is kept now

    def __repr__(self) -> str:
        return spell(self)


class _Step(NamedTuple):
    """A rule within another one: its lengths in a piece of a whole, and the steps of its parts."""

    rule: Rule
    whole: _Lengths | None
    parts: tuple[int, ...]


def _steps(root: Composed) -> list[_Step]:
    """A rule and all that it is made of, each once for each whole that it is bound in."""
    steps: list[_Step] = []
    places: dict[tuple[int, _Lengths | None], int] = {}
    stack: list[tuple[Rule, _Lengths | None, bool]] = [(root, None, False)]
    while stack:
        rule, whole, ready = stack.pop()
        if (id(rule), whole) in places:
            continue
        parts: tuple[int, ...] = ()
        if isinstance(rule, Composed):
            inner = rule.inner or whole
            if not ready:
                stack.append((rule, whole, True))
                stack.extend([(part, inner, False) for part in reversed(rule.children)])
                continue
            parts = tuple([places[id(part), inner] for part in rule.children])
        places[id(rule), whole] = len(steps)
        steps.append(_Step(rule, whole, parts))
    return steps


@dataclass(frozen=True, repr=False, eq=False)
class _Join(Composed):
    """Rules joined by an operator."""

    rules: tuple[Rule, ...]
    operator: ClassVar[str]

    @property
    def children(self) -> tuple[Rule, ...]:
        """The rules."""
        return self.rules

    @classmethod
    def made(cls, label: tuple[Any, ...], children: tuple[Any, ...]) -> Any:
        """These rules, joined."""
        return cls(children)

    def joined(self, parts: tuple[Boolean, ...]) -> Boolean:
        """The expressions, joined by the operator."""
        return Logic(self.operator, parts)

    def spelled(self, below: tuple[str, ...]) -> str:
        """The rules with the operator between them; the other join inside of it in parentheses."""
        pairs = zip(self.rules, below, strict=True)
        return f" {self.operator} ".join(_operand(rule, text, _Join) for rule, text in pairs)


class AllOf(_Join):
    """Rules joined by `&`."""

    operator = "&"


class AnyOf(_Join):
    """Rules joined by `|`."""

    operator = "|"


@dataclass(frozen=True, repr=False, eq=False)
class Not(Composed):
    """A rule negated by `~`."""

    rule: Rule

    @property
    def children(self) -> tuple[Rule, ...]:
        """The rule."""
        return (self.rule,)

    def joined(self, parts: tuple[Boolean, ...]) -> Boolean:
        """The expression of the rule, negated."""
        return ~parts[0]

    def spelled(self, below: tuple[str, ...]) -> str:
        """`~rule`."""
        return f"~{_operand(self.rule, below[0], _Join)}"


@dataclass(frozen=True, repr=False, eq=False)
class Window(Composed):
    """See `Rule.window`."""

    rule: Rule
    len_q: int
    len_k: int
    q0: int
    k0: int

    @property
    def children(self) -> tuple[Rule, ...]:
        """The whole rule."""
        return (self.rule,)

    @property
    def label(self) -> tuple[int, int, int, int]:
        """The lengths of the whole, and where the piece begins."""
        return self.len_q, self.len_k, self.q0, self.k0

    @classmethod
    def made(cls, label: tuple[Any, ...], children: tuple[Any, ...]) -> Any:
        """The piece of this rule."""
        return cls(*children, *label)

    @property
    def inner(self) -> tuple[int, int]:
        """The lengths of the whole."""
        return self.len_q, self.len_k

    def fit(self, len_q: int, len_k: int) -> None:
        """Raises ValueError unless the piece is within the whole."""
        for name, start, length, most in (
            ("q", self.q0, len_q, self.len_q),
            ("k", self.k0, len_k, self.len_k),
        ):
            if start + length > most:
                raise ValueError(
                    f"{self!r}: {name}0={start} and len_{name}={length} leave the whole, "
                    f"which ends at {most}"
                )

    def joined(self, parts: tuple[Boolean, ...]) -> Boolean:
        """The whole rule's expression, with the indices of the piece shifted to the whole's."""
        check_size(self.rule, parts[0])  # a piece is a copy, and its pieces are copies of copies
        return shift(parts[0], self.q0, self.k0)

    def spelled(self, below: tuple[str, ...]) -> str:
        """`rule.window(len_q, len_k, q0=..., k0=...)`."""
        starts = [f"{name}={at}" for name, at in (("q0", self.q0), ("k0", self.k0)) if at]
        given = ", ".join([str(self.len_q), str(self.len_k), *starts])
        return f"{_operand(self.rule, below[0], (_Join, Not))}.window({given})"


def _operand(rule: Rule, text: str, loose: type[Rule] | tuple[type[Rule], ...]) -> str:
    """The text of a part: in parentheses where it is a loose one, unless a name stands for it."""
    return f"({text})" if isinstance(rule, loose) and not text.isidentifier() else text


def _combine(kind: type[AllOf] | type[AnyOf], left: Rule, right: Any) -> Rule:
    if not isinstance(right, Rule):
        hint = "; call it" if callable(right) else ""
        raise TypeError(
            f"{left!r} combines with other rules by & and |, got {check.shown(right)}{hint}"
        )
    parts = [part.rules if isinstance(part, kind) else (part,) for part in (left, right)]
    return kind((*parts[0], *parts[1]))
