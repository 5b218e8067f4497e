"""Rules: which query may see which key.

A rule knows no lengths. Bound to two lengths it becomes an expression (see `expression`) that is
folded exactly, over tiles, and to kernel text; so every rule here, a user's own `rule(...)`
included, costs what its expression costs and skips what its intervals allow.

Rules are values: they compare by structure, hash, print as the call that makes them, and combine
with `&`, `|` and `~`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tilefold import blocks
from tilefold.check import shown, whole
from tilefold.coordinates import Coordinates, coordinates
from tilefold.expression import (
    INDEX_NAMES,
    Boolean,
    Index,
    Integer,
    Logic,
    Lookup,
    Table,
    Truth,
    TruthLookup,
    as_boolean,
    names,
)
from tilefold.fold import exact, index_bits

INT32 = np.iinfo(np.int32)

__all__ = [
    "Rule",
    "causal",
    "chunked",
    "dense",
    "documents",
    "full",
    "lengths",
    "local",
    "prefix",
    "rule",
]


class Rule(ABC):
    """Which query may see which key, whatever the lengths.

    >>> print((causal() & local(2)) | prefix(1))
    (causal() & local(2)) | prefix(1)
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

    @abstractmethod
    def __eq__(self, other: object) -> bool: ...

    @abstractmethod
    def __hash__(self) -> int: ...

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless the rule fits a problem of these sizes."""
        self.bind(len_q, len_k)

    def to_dense(
        self, len_q: int, len_k: int, batch: int | None = None, heads: int | None = None
    ) -> NDArray[np.bool_]:
        """The rule as an array (len_q, len_k), or (batch, heads, len_q, len_k) if either is given.

        Raises ValueError if the rule depends on the batch or the head and their number is missing.

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
    ) -> blocks.Counts:
        """How many tiles of block_q x block_k are skipped, full and partial.

        A rule that depends on the batch or the head needs their number; its counts are the sums.

        >>> causal().blocks(64, 64, 16, 16)
        Counts(skip=6, full=6, partial=4)
        """
        expression, sizes = self._sized(len_q, len_k, batch, heads)
        runs = blocks.runs(
            expression,
            parallel="q",
            batch=sizes[0],
            heads=sizes[1],
            len_parallel=len_q,
            len_traverse=len_k,
            block_parallel=whole("block_q", block_q, 1),
            block_traverse=whole("block_k", block_k, 1),
        )
        return blocks.count(runs, len_k, block_k)

    def _sized(
        self, len_q: int, len_k: int, batch: int | None, heads: int | None
    ) -> tuple[Boolean, tuple[int, int]]:
        """The checked expression, and batch and heads with 1 where they do not matter."""
        for name, size in (("len_q", len_q), ("len_k", len_k)):
            whole(name, size, 0)
        read = names(self.bind(len_q, len_k))
        for name, letter, given in (("batch", "b", batch), ("heads", "h", heads)):
            if given is not None:
                whole(name, given, 0)
            elif letter in read:
                raise ValueError(f"{self!r} depends on {letter}, so {name} must be given, got None")
        sizes = (1 if batch is None else batch, 1 if heads is None else heads)
        self.check(*sizes, len_q, len_k)
        expression = self.bind(len_q, len_k)
        index_bits(expression, *sizes, len_q, len_k)
        return expression, sizes

    def __and__(self, other: Any) -> Rule:
        return _combine(All, self, other)

    def __or__(self, other: Any) -> Rule:
        return _combine(Any_, self, other)

    def __invert__(self) -> Rule:
        return Not(self)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"the truth of {self!r} is not one value; combine rules with & | ~ "
            "instead of `and`, `or`, `not`"
        )


@dataclass(frozen=True, repr=False)
class Full(Rule):
    """See `full`."""

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """Always true."""
        return Truth(True)

    def __repr__(self) -> str:
        return "full()"


def full() -> Rule:
    """Every query sees every key.

    >>> print(full().to_dense(2, 3).astype(int))
    [[1 1 1]
     [1 1 1]]
    """
    return Full()


@dataclass(frozen=True, repr=False)
class Causal(Rule):
    """See `causal`."""

    coordinates: Coordinates

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """The order of the coordinates."""
        self.coordinates.check(repr(self), len_q, len_k)
        order_q, order_k = self.coordinates.order(len_q, len_k)
        return order_q >= order_k

    def __repr__(self) -> str:
        return f"causal({_arguments(self.coordinates)})"


def causal(
    align: str = "end",
    sync: str | None = None,
    grid_q: tuple[int, int] | None = None,
    grid_k: tuple[int, int] | None = None,
) -> Rule:
    """A query sees the keys at its own position and before.

    >>> print(causal().to_dense(4, 4).astype(int))
    [[1 0 0 0]
     [1 1 0 0]
     [1 1 1 0]
     [1 1 1 1]]

    Arguments:
        align: "end": the last query meets the last key; "start": query i meets key i.
        sync: spreads the shorter sequence over the longer one; replaces align. "none_front" is
            align="start"; "scale_front" and "scale_end" put a short position at the first or the
            last of the long positions that it stands for.
        grid_q: (height, width) of a 2-D sequence of queries, flattened row by row; then earlier
            rows are seen whole, and in the same row the columns up to the query's own.
        grid_k: the same for keys; grid_q where absent.

    Raises TypeError or ValueError for other values, and ValueError once the rule meets lengths
    that the grids do not multiply to.
    """
    return Causal(coordinates("causal", align, sync, grid_q, grid_k))


@dataclass(frozen=True, repr=False)
class Local(Rule):
    """See `local`."""

    window: int
    stride: int
    causal: bool
    coordinates: Coordinates

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """The distance per dimension is below the window and a multiple of the stride."""
        self.coordinates.check(repr(self), len_q, len_k)
        tests: list[Boolean] = []
        for axis in self.coordinates.axes(len_q, len_k):
            distance = abs(axis.q - axis.k)
            # No distance reaches `longest`, so larger numbers mean the same and may not overflow.
            longest = max(axis.size_q, axis.size_k, 1)
            tests.append(distance < min(self.window * self.stride, longest))
            if self.stride > 1:
                tests.append(distance % min(self.stride, longest) == 0)
        if self.causal:
            order_q, order_k = self.coordinates.order(len_q, len_k)
            tests.append(order_q >= order_k)
        return tests[0] if len(tests) == 1 else Logic("&", tuple(tests))

    def __repr__(self) -> str:
        stride = "" if self.stride == 1 else f"stride={self.stride}"
        flag = "causal=True" if self.causal else ""
        return f"local({_join(str(self.window), stride, _arguments(self.coordinates), flag)})"


def local(
    window: int,
    stride: int = 1,
    align: str = "end",
    causal: bool = False,
    sync: str | None = None,
    grid_q: tuple[int, int] | None = None,
    grid_k: tuple[int, int] | None = None,
) -> Rule:
    """A query sees the keys closer than `window` on either side, itself included.

    >>> print(local(2).to_dense(4, 4).astype(int))
    [[1 1 0 0]
     [1 1 1 0]
     [0 1 1 1]
     [0 0 1 1]]

    Arguments:
        window: keys per side and dimension, the query's own counted: 2 * window - 1 in all.
        stride: sees only every stride-th position, counted from the query.
        causal: hides later keys as `causal` does with the same coordinates.
        align, sync, grid_q, grid_k: the coordinates, as for `causal`; in 2-D a window is square.

    Raises TypeError or ValueError for other values, and ValueError once the rule meets lengths
    that the grids do not multiply to.
    """
    if not isinstance(causal, (bool, np.bool_)):
        raise TypeError(f"local: causal must be True or False, got {shown(causal)}")
    return Local(
        whole("local: window", window, 1),
        whole("local: stride", stride, 1),
        bool(causal),
        coordinates("local", align, sync, grid_q, grid_k),
    )


@dataclass(frozen=True, repr=False)
class Prefix(Rule):
    """See `prefix`."""

    length: int
    causal: bool

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """Early keys, or earlier keys."""
        early = Index("k") < min(self.length, len_k)
        return early | Causal(Coordinates()).bind(len_q, len_k) if self.causal else early

    def __repr__(self) -> str:
        return f"prefix({_join(str(self.length), '' if self.causal else 'causal=False')})"


def prefix(n: int, causal: bool = True) -> Rule:
    """Every query sees the first n keys, and beyond them what `causal()` lets it see.

    >>> print(prefix(2).to_dense(4, 4).astype(int))
    [[1 1 0 0]
     [1 1 0 0]
     [1 1 1 0]
     [1 1 1 1]]

    With causal=False, the first n keys alone.

    Raises TypeError or ValueError unless n is a whole number >= 0 and causal a bool.
    """
    if not isinstance(causal, (bool, np.bool_)):
        raise TypeError(f"prefix: causal must be True or False, got {shown(causal)}")
    return Prefix(whole("prefix: n", n, 0), bool(causal))


@dataclass(frozen=True, repr=False)
class Chunked(Rule):
    """See `chunked`."""

    size: int

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """The same chunk of raw indices."""
        size = min(self.size, max(len_q, len_k, 1))
        return Index("q") // size == Index("k") // size

    def __repr__(self) -> str:
        return f"chunked({self.size})"


def chunked(size: int) -> Rule:
    """A query sees the keys of its own chunk: index q // size == k // size.

    >>> print(chunked(2).to_dense(4, 4).astype(int))
    [[1 1 0 0]
     [1 1 0 0]
     [0 0 1 1]
     [0 0 1 1]]

    Raises TypeError or ValueError unless size is a whole number >= 1.
    """
    return Chunked(whole("chunked: size", size, 1))


@dataclass(frozen=True, repr=False)
class Documents(Rule):
    """See `documents`."""

    ids_q: Table
    ids_k: Table

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """Equal ids."""
        sides: list[Integer] = []
        for name, table, length in (("q", self.ids_q, len_q), ("k", self.ids_k, len_k)):
            if table.array.shape[-1] != length:
                raise ValueError(
                    f"{self!r}: ids_{name} has {table.array.shape[-1]} entries, "
                    f"but len_{name} is {length}; give one id per position"
                )
            point = (Index("b"),) if table.array.ndim == 2 else ()
            sides.append(Lookup(table, (*point, Index(name))))
        return sides[0] == sides[1]

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless there is one id per position and row of the batch."""
        self.bind(len_q, len_k)
        for name, table in (("q", self.ids_q), ("k", self.ids_k)):
            _check_batch(f"{self!r}: ids_{name}", table, batch, rows=table.array.ndim == 2)

    def __repr__(self) -> str:
        if self.ids_q == self.ids_k:
            return f"documents(ids{_shape(self.ids_q)})"
        return f"documents(ids_q{_shape(self.ids_q)}, ids_k{_shape(self.ids_k)})"


def documents(ids_q: Any, ids_k: Any = None) -> Rule:
    """A query sees the keys of its own document.

    >>> print(documents([0, 0, 0, 7]).to_dense(4, 4).astype(int))
    [[1 1 1 0]
     [1 1 1 0]
     [1 1 1 0]
     [0 0 0 1]]

    Arguments:
        ids_q: whole numbers of any integer type, (len_q,) or (batch, len_q); copied.
        ids_k: the same for keys, (len_k,) or (batch, len_k); ids_q where absent.

    Raises TypeError or ValueError for other arrays, and ValueError once the rule meets lengths or
    a batch that they do not have.
    """
    array_q = _integers("documents: ids_q", ids_q, (1, 2))
    array_k = array_q if ids_k is None else _integers("documents: ids_k", ids_k, (1, 2))
    if not (_narrow(array_q) and _narrow(array_k)):
        both = np.concatenate((array_q.ravel(), array_k.ravel()))
        ranks = np.unique(both, return_inverse=True)[1].reshape(-1)
        array_q, array_k = (
            ranks[: array_q.size].reshape(array_q.shape),
            ranks[array_q.size :].reshape(array_k.shape),
        )
    return Documents(_table(array_q, np.int32), _table(array_k, np.int32))


@dataclass(frozen=True, repr=False)
class Lengths(Rule):
    """See `lengths`."""

    n_k: int | Table

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """Keys below the length."""
        if isinstance(self.n_k, Table):
            return Index("k") < Lookup(self.n_k, (Index("b"),))
        return Index("k") < min(self.n_k, len_k)

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless there is one length per row of the batch."""
        if isinstance(self.n_k, Table):
            _check_batch(f"{self!r}: n_k", self.n_k, batch, rows=True)

    def __repr__(self) -> str:
        given = f"n_k{_shape(self.n_k)}" if isinstance(self.n_k, Table) else self.n_k
        return f"lengths({given})"


def lengths(n_k: Any) -> Rule:
    """Every query sees the first n_k keys; the rest is padding.

    >>> print(lengths(3).to_dense(4, 4).astype(int))
    [[1 1 1 0]
     [1 1 1 0]
     [1 1 1 0]
     [1 1 1 0]]

    Arguments:
        n_k: a whole number >= 0, or (batch,) of them; copied. One past len_k hides nothing.

    Raises TypeError or ValueError for other values, and ValueError once an array meets a batch of
    another size.
    """
    if np.ndim(n_k) == 0 and not hasattr(n_k, "__dlpack__"):
        return Lengths(whole("lengths: n_k", n_k, 0))
    array = _integers("lengths: n_k", n_k, (0, 1))
    if array.ndim == 0:
        return Lengths(whole("lengths: n_k", int(array), 0))
    if array.size and array.min() < 0:
        raise ValueError(f"lengths: n_k must be whole numbers >= 0, got {array.min()} among them")
    return Lengths(_table(np.minimum(array, INT32.max), np.int32))


@dataclass(frozen=True, repr=False)
class Dense(Rule):
    """See `dense`."""

    array: Table

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """A lookup by the axes that are longer than one."""
        self._fit({"q": len_q, "k": len_k}, f"(batch, heads, {len_q}, {len_k})")
        array = self.array.array
        axes = [axis for axis in range(-array.ndim, 0) if array.shape[axis] != 1]
        if not axes:
            return Truth(bool(array.reshape(())))
        if len(axes) == array.ndim:
            table = self.array
        else:
            table = Table(_frozen(array.reshape([array.shape[axis] for axis in axes])))
        return TruthLookup(table, tuple(Index(INDEX_NAMES[axis]) for axis in axes))

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless the array broadcasts to the sizes."""
        sizes = (batch, heads, len_q, len_k)
        self._fit(dict(zip(INDEX_NAMES, sizes, strict=True)), str(sizes))

    def _fit(self, sizes: dict[str, int], shape: str) -> None:
        given = self.array.array.shape
        for name, have in zip(reversed(INDEX_NAMES), reversed(given), strict=False):
            if name in sizes and have not in (1, sizes[name]):
                raise ValueError(f"{self!r} of shape {given} does not broadcast to {shape}")

    def __repr__(self) -> str:
        return f"dense(array{_shape(self.array)})"


def dense(array: Any) -> Rule:
    """The visible pairs as an array of bool.

    >>> print(dense([[True, False], [True, True]]).to_dense(2, 2).astype(int))
    [[1 0]
     [1 1]]

    Arguments:
        array: bool, broadcastable to (batch, heads, len_q, len_k); copied.

    Raises TypeError or ValueError for other arrays, and ValueError once it meets sizes that it
    does not broadcast to.
    """
    given = _array("dense: array", array)
    if given.dtype != np.bool_:
        raise TypeError(f"dense: array must be of bool, got {given.dtype}; use array != 0")
    if given.ndim > 4:
        raise ValueError(
            "dense: array must broadcast to (batch, heads, len_q, len_k), "
            f"got {given.ndim} axes {given.shape}"
        )
    return Dense(_table(given, np.bool_))


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
    return Traced(as_boolean(function(**taken)), tuple(taken))


@dataclass(frozen=True, repr=False)
class All(Rule):
    """Rules joined by `&`."""

    rules: tuple[Rule, ...]

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """All of them."""
        return Logic("&", tuple(rule.bind(len_q, len_k) for rule in self.rules))

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless every one fits."""
        for rule in self.rules:
            rule.check(batch, heads, len_q, len_k)

    def __repr__(self) -> str:
        return " & ".join(
            f"({rule!r})" if isinstance(rule, Any_) else repr(rule) for rule in self.rules
        )


@dataclass(frozen=True, repr=False)
class Any_(Rule):
    """Rules joined by `|`."""

    rules: tuple[Rule, ...]

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """Any of them."""
        return Logic("|", tuple(rule.bind(len_q, len_k) for rule in self.rules))

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless every one fits."""
        for rule in self.rules:
            rule.check(batch, heads, len_q, len_k)

    def __repr__(self) -> str:
        return " | ".join(
            f"({rule!r})" if isinstance(rule, All) else repr(rule) for rule in self.rules
        )


@dataclass(frozen=True, repr=False)
class Not(Rule):
    """A rule negated by `~`."""

    rule: Rule

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """What it hides."""
        return ~self.rule.bind(len_q, len_k)

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless the rule fits."""
        self.rule.check(batch, heads, len_q, len_k)

    def __repr__(self) -> str:
        joined = isinstance(self.rule, (All, Any_))
        return f"~({self.rule!r})" if joined else f"~{self.rule!r}"


def _combine(kind: type[All] | type[Any_], left: Rule, right: Any) -> Rule:
    if not isinstance(right, Rule):
        raise TypeError(f"{left!r} combines with other rules by & and |, got {shown(right)}")
    parts = [part.rules if isinstance(part, kind) else (part,) for part in (left, right)]
    return kind((*parts[0], *parts[1]))


def _join(*arguments: str) -> str:
    return ", ".join(argument for argument in arguments if argument)


def _arguments(coordinates: Coordinates) -> str:
    given = []
    for field in fields(coordinates):
        value = getattr(coordinates, field.name)
        same = field.name == "grid_k" and value == coordinates.grid_q
        if value != field.default and not same:
            given.append(f"{field.name}={value!r}".replace("'", '"'))
    return ", ".join(given)


def _shape(table: Table) -> str:
    return f"[{'x'.join(map(str, table.array.shape))}]"


def _array(name: str, value: Any) -> NDArray[Any]:
    """A NumPy array for anything that is one, lies on the CPU, or nests lists."""
    try:
        if not hasattr(value, "__array__") and hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
        return np.asarray(value)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TypeError(
            f"{name} must be an array on the CPU, got {shown(value)}: {reason}"
        ) from None


def _integers(name: str, value: Any, ranks: tuple[int, ...]) -> NDArray[Any]:
    array = _array(name, value)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must be whole numbers, got {array.dtype} {shown(value)}")
    if array.ndim not in ranks:
        axes = " or ".join(map(str, ranks))
        raise ValueError(f"{name} must have {axes} axes, got {array.ndim} in shape {array.shape}")
    return array if array.dtype.kind in "iu" else array.astype(np.int32)


def _narrow(array: NDArray[Any]) -> bool:
    return not array.size or bool(array.min() >= INT32.min and array.max() <= INT32.max)


def _table(array: NDArray[Any], kind: type[np.generic]) -> Table:
    """A table of a copy that nobody can write to: a rule never changes after it was made."""
    return Table(_frozen(np.array(array, kind, order="C")))


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.setflags(write=False)
    return array


def _check_batch(name: str, table: Table, batch: int, rows: bool) -> None:
    if rows and table.array.shape[0] != batch:
        raise ValueError(f"{name} is for a batch of {table.array.shape[0]}, but batch is {batch}")
