"""Rules over positions: full, causal, local, prefix, chunked.

This file is also the public home of `Rule` and `rule`; `data_rules` has the rules that carry
arrays. All rules are values: they compare by structure, hash, and print as the call that makes
them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from tilefold.common.check import flag, whole
from tilefold.masks.arrays import shape_of
from tilefold.masks.coordinates import Coordinates, coordinates
from tilefold.masks.expression import Boolean, Index, Logic, Table, Truth
from tilefold.masks.rule import Rule
from tilefold.masks.traced import rule

__all__ = ["Rule", "causal", "chunked", "full", "local", "prefix", "rule"]


@dataclass(frozen=True, repr=False)
class Full(Rule):
    """See `full`."""

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """The truth True."""
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


class _Placed(Rule):
    """A rule that compares coordinates."""

    coordinates: Coordinates

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless the coordinates fit the sizes."""
        if self.coordinates.lengths is not None:
            self.coordinates.check_batch(repr(self), batch)
        super().check(batch, heads, len_q, len_k)


_END = Coordinates()
"""One dimension, in which the last query meets the last key."""


@dataclass(frozen=True, repr=False)
class Causal(_Placed):
    """See `causal`."""

    coordinates: Coordinates

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """True if the key's coordinate is no later than the query's."""
        if len_q == 1 and self.coordinates == _END:
            return Truth(True)  # the last query sees all, so decoding needs no mask in its kernel
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
    lengths: Any = None,
) -> Rule:
    """A query sees the keys at its own position and before.

    >>> print(causal().to_dense(4, 4).astype(int))
    [[1 0 0 0]
     [1 1 0 0]
     [1 1 1 0]
     [1 1 1 1]]

    New tokens after caches of different lengths: entry b has `lengths[b]` keys, the new ones
    included, and its last query meets the last of them.

    >>> print(causal(lengths=[3, 5]).to_dense(2, 5, batch=2)[:, 0].astype(int))
    [[[1 1 0 0 0]
      [1 1 1 0 0]]
    <BLANKLINE>
     [[1 1 1 1 0]
      [1 1 1 1 1]]]

    Arguments:
        align: "end": the last query meets the last key; "start": query i meets key i.
        sync: spreads the shorter sequence over the longer one; replaces align. "none_front" is
            align="start"; "scale_front" and "scale_end" put a short position at the first or the
            last of the long positions that it stands for.
        grid_q: (height, width) of a 2-D sequence of queries, flattened row by row; then earlier
            rows are seen whole, and in the same row the columns up to the query's own.
        grid_k: the same for keys; grid_q where absent.
        lengths: an integer >= 0, or an array (batch,) of them; copied. The last query meets key
            lengths[b] - 1, so keys past it are hidden. Replaces align, for 1-D sequences.

    Raises TypeError or ValueError for other values, and ValueError once the rule meets lengths
    that the grids do not multiply to, fewer keys than `lengths` says, or another batch.
    """
    return Causal(coordinates("causal", align, sync, grid_q, grid_k, lengths))


@dataclass(frozen=True, repr=False)
class Local(_Placed):
    """See `local`."""

    reach: int
    stride: int
    causal: bool
    coordinates: Coordinates

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """True if the distance per dimension is below the reach and a multiple of the stride."""
        self.coordinates.check(repr(self), len_q, len_k)
        tests: list[Boolean] = []
        for axis in self.coordinates.axes(len_q, len_k):
            distance = abs(axis.q - axis.k)
            # No distance reaches `longest`, so larger numbers mean the same and may not overflow.
            longest = max(axis.longest, 1)
            tests.append(distance < min(self.reach * self.stride, longest))
            if self.stride > 1:
                tests.append(distance % min(self.stride, longest) == 0)
        if self.causal:
            order_q, order_k = self.coordinates.order(len_q, len_k)
            tests.append(order_q >= order_k)
        return tests[0] if len(tests) == 1 else Logic("&", tuple(tests))

    def __repr__(self) -> str:
        stride = "" if self.stride == 1 else f"stride={self.stride}"
        flag = "causal=True" if self.causal else ""
        return f"local({_join(str(self.reach), stride, _arguments(self.coordinates), flag)})"


def local(
    window: int,
    stride: int = 1,
    align: str = "end",
    causal: bool = False,
    sync: str | None = None,
    grid_q: tuple[int, int] | None = None,
    grid_k: tuple[int, int] | None = None,
    lengths: Any = None,
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
        align, sync, grid_q, grid_k, lengths: the coordinates, as for `causal`; in 2-D a window is
            square. With lengths it hides keys past them only if causal.

    Raises TypeError or ValueError for other values, and ValueError once the rule meets lengths
    that the grids do not multiply to, fewer keys than `lengths` says, or another batch.
    """
    hides_later = flag("local: causal", causal)
    return Local(
        whole("local: window", window, 1),
        whole("local: stride", stride, 1),
        hides_later,
        coordinates("local", align, sync, grid_q, grid_k, lengths),
    )


@dataclass(frozen=True, repr=False)
class Prefix(Rule):
    """See `prefix`."""

    length: int

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """True if the key is among the first."""
        return Index("k") < min(self.length, len_k)

    def __repr__(self) -> str:
        return f"prefix({self.length})"


def prefix(n: int, **gone: Any) -> Rule:
    """Every query sees the first n keys, and no other.

    >>> print(prefix(2).to_dense(3, 4).astype(int))
    [[1 1 0 0]
     [1 1 0 0]
     [1 1 0 0]]

    It is a part to join with others. A prompt read in both directions before text read in one is
    `causal() | prefix(n)`:

    >>> print((causal() | prefix(2)).to_dense(4, 4).astype(int))
    [[1 1 0 0]
     [1 1 0 0]
     [1 1 1 0]
     [1 1 1 1]]

    A window that keeps the first keys in sight is `causal() & (local(window) | prefix(n))`.

    Arguments:
        n: an integer >= 0. One past len_k hides nothing.
        gone: no other argument. causal= of earlier versions raises, and says what to write.

    Raises TypeError or ValueError for another n, and TypeError for any other argument.
    """
    if "causal" in gone:
        raise TypeError(
            "prefix: there is no causal= any more, prefix(n) is the first n keys alone; "
            "write causal() | prefix(n) for them and all that causal() shows"
        )
    if gone:
        raise TypeError(f"prefix() got an unexpected keyword argument {next(iter(gone))!r}")
    return Prefix(whole("prefix: n", n, 0))


@dataclass(frozen=True, repr=False)
class Chunked(Rule):
    """See `chunked`."""

    size: int

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """True if both raw indices are in the same chunk."""
        size = min(self.size, max(len_q, len_k, 1))
        same: Boolean = Index("q") // size == Index("k") // size
        return same

    def __repr__(self) -> str:
        return f"chunked({self.size})"


def chunked(size: int) -> Rule:
    """A query sees the keys of its own chunk: index q // size == k // size.

    >>> print(chunked(2).to_dense(4, 4).astype(int))
    [[1 1 0 0]
     [1 1 0 0]
     [0 0 1 1]
     [0 0 1 1]]

    Raises TypeError or ValueError unless size is an integer >= 1.
    """
    return Chunked(whole("chunked: size", size, 1))


def _join(*arguments: str) -> str:
    return ", ".join(argument for argument in arguments if argument)


def _arguments(coordinates: Coordinates) -> str:
    given = []
    for field in fields(coordinates):
        value = getattr(coordinates, field.name)
        same = field.name == "grid_k" and value == coordinates.grid_q
        if isinstance(value, Table):
            given.append(f"{field.name}=n{shape_of(value)}")
        elif value != field.default and not same:
            given.append(f"{field.name}={value!r}".replace("'", '"'))
    return ", ".join(given)
