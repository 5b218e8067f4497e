"""Rules that carry data: documents, lengths, dense.

The data become tables: a kernel reads them, and the planner bounds them. Data are copied and cannot
be written to, so a rule never changes after it was made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.common.check import choice, flag
from tilefold.common.computed import computed
from tilefold.common.foreign_arrays import is_of_torch, is_traced
from tilefold.masks.arrays import (
    INT32,
    as_array,
    as_integers,
    as_table,
    as_traced,
    check_batch,
    key_count,
    key_counts,
    shape_of,
)
from tilefold.masks.expression import INDEX_NAMES, Boolean, Index, Lookup, Table, Truth, TruthLookup
from tilefold.masks.nodes import Constant
from tilefold.masks.rule import Rule
from tilefold.masks.tables import Given

SIDES = ("right", "left")


@dataclass(frozen=True, repr=False)
class Documents(Rule):
    """See `documents`."""

    ids_q: Table | Given
    ids_k: Table | Given
    causal: bool = False

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """True if the ids are equal, and (if causal) the key is not past the query's last one."""
        for name, table, length in (("q", self.ids_q, len_q), ("k", self.ids_k, len_k)):
            if table.shape[-1] != length:
                raise ValueError(
                    f"{self!r}: ids_{name} has {table.shape[-1]} entries, "
                    f"but len_{name} is {length}; give one id per position"
                )
        same = _entry(self.ids_q, "q") == _entry(self.ids_k, "k")
        if not self.causal:
            return same
        if self.ids_q == self.ids_k:
            return same & (Index("q") >= Index("k"))
        return same & (_entry(self._last_keys, "q") >= Index("k"))

    @computed
    def _last_keys(self) -> Table:
        """The last key that each query may see: the query's own, counted from the document's end.

        It grows with the query where documents lie in the same order on both sides, so bounds of
        tiles stay exact from document to document.
        """
        sides = [np.atleast_2d(table.array) for table in (self.ids_q, self.ids_k)]
        rows = max(len(side) for side in sides)
        pairs = zip(*(np.broadcast_to(side, (rows, side.shape[1])) for side in sides), strict=True)
        found = np.array([_last_keys(*pair) for pair in pairs], np.int32)
        batched = self.ids_q.array.ndim == 2 or self.ids_k.array.ndim == 2
        return as_table(found if batched else found[0], np.int32)

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless there is one id per position and row of the batch."""
        for name, table in (("q", self.ids_q), ("k", self.ids_k)):
            if len(table.shape) == 2:
                check_batch(f"{self!r}: ids_{name}", table, batch)
        self.bind(len_q, len_k)

    def __repr__(self) -> str:
        flag = ", causal=True" if self.causal else ""
        if self.ids_q == self.ids_k:
            return f"documents(ids{shape_of(self.ids_q)}{flag})"
        return f"documents(ids_q{shape_of(self.ids_q)}, ids_k{shape_of(self.ids_k)}{flag})"


def documents(ids_q: Any, ids_k: Any = None, causal: bool = False) -> Rule:
    """A query sees the keys of its own document.

    >>> print(documents([0, 0, 0, 7]).to_dense(4, 4).astype(int))
    [[1 1 1 0]
     [1 1 1 0]
     [1 1 1 0]
     [0 0 0 1]]

    With causal=True it sees them up to its own: the last query of a document meets the last key
    of that document. Here two new queries meet three keys, and one new query meets two:

    >>> print(documents([0, 0, 1], [0, 0, 0, 1, 1], causal=True).to_dense(3, 5).astype(int))
    [[1 1 0 0 0]
     [1 1 1 0 0]
     [0 0 0 1 1]]

    `documents(ids) & causal()` is the same only where ids_q and ids_k are.

    Arguments:
        ids_q: integers of any integer type, (len_q,) or (batch, len_q); copied.
        ids_k: the same for keys, (len_k,) or (batch, len_k); ids_q where absent.
        causal: hides the later keys of a document, counted from its last query and its last key.

    Raises TypeError or ValueError for other values, and ValueError once the rule meets lengths or
    a batch that they do not have.
    """
    hides_later = flag("documents: causal", causal)
    given = {"ids_q": ids_q} if ids_k is None else {"ids_q": ids_q, "ids_k": ids_k}
    if any(map(is_traced, given.values())):
        return _traced_documents(given, hides_later)
    arrays = [as_integers(f"documents: {name}", ids, (1, 2)) for name, ids in given.items()]
    rows = [array.shape[0] for array in arrays if array.ndim == 2]
    if len(set(rows)) > 1:
        raise ValueError(
            f"documents: ids_q is for a batch of {rows[0]}, ids_k for one of {rows[1]}"
        )
    if not all(_fits_int32(array) for array in arrays):
        arrays = _ranks(arrays)
    tables = [as_table(array, np.int32) for array in arrays]
    return Documents(tables[0], tables[-1], hides_later)


def _traced_documents(given: dict[str, Any], causal: bool) -> Rule:
    """Documents whose ids are traced, at least those of one side."""
    if causal and len(given) > 1 and not any(map(is_of_torch, given.values())):
        raise NotImplementedError(
            "documents: causal=True with ids_q and ids_k needs their values, and they are traced;"
            " pass one ids for both, or make the rule outside of the traced function"
        )
    tables = [_beside_traced(f"documents: {name}", ids) for name, ids in given.items()]
    return Documents(tables[0], tables[-1], causal)


def _beside_traced(name: str, ids: Any) -> Table | Given:
    """Ids of one side. Raises ValueError for known ones that no traced int32 can equal."""
    if is_traced(ids):
        return as_traced(name, ids, (1, 2), "int32")
    known = as_integers(name, ids, (1, 2))
    if not _fits_int32(known):
        raise ValueError(
            f"{name} must fit 32 bits, since the other ids are traced and of int32; got numbers"
            f" from {known.min()} to {known.max()}"
        )
    return as_table(known, np.int32)


def _entry(table: Table | Given, name: str) -> Lookup:
    """The entry of a table (length,) or (batch, length) at an index."""
    return Lookup(table, (*((Index("b"),) if len(table.shape) == 2 else ()), Index(name)))


def _last_keys(ids_q: NDArray[Any], ids_k: NDArray[Any]) -> NDArray[Any]:
    """The last key that each query may see, or -1: as many of its document follow both.

    >>> _last_keys(np.array([4, 4, 7, 9, 9]), np.array([4, 4, 4, 9])).tolist()
    [1, 2, -1, -1, 3]
    """
    order_q, order_k = (np.argsort(ids, kind="stable") for ids in (ids_q, ids_k))
    place = np.empty(len(ids_q), np.int64)
    place[order_q] = np.arange(len(ids_q))
    later = np.searchsorted(ids_q[order_q], ids_q, "right") - 1 - place
    keys = ids_k[order_k]
    first, end = (np.searchsorted(keys, ids_q, side) for side in ("left", "right"))
    last = end - 1 - later
    return np.append(order_k, -1)[np.where(last >= first, last, -1)]


def _fits_int32(array: NDArray[Any]) -> bool:
    return not array.size or bool(array.min() >= INT32.min and array.max() <= INT32.max)


def _ranks(arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """Arrays with the same order and equalities whose small integers fit int32 tables."""
    flat = [array.reshape(-1) for array in arrays]
    if len({array.dtype.kind for array in arrays}) > 1:  # int64 and uint64 would meet in float64
        flat = [array.astype(object) for array in flat]
    ranks = np.unique(np.concatenate(flat), return_inverse=True)[1].reshape(-1)
    parts = np.split(ranks, np.cumsum([array.size for array in arrays])[:-1])
    return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]


@dataclass(frozen=True, repr=False)
class Lengths(Rule):
    """See `lengths`."""

    n_k: int | Table | Given
    side: str = "right"

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """True if the key is among the first n_k, or the last."""
        count = key_count(f"{self!r}: n_k", self.n_k, len_k)
        return Index("k") < count if self.side == "right" else Index("k") >= len_k - count

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless there is one length per row of the batch, at most len_k."""
        if not isinstance(self.n_k, int) and self.n_k.shape:
            check_batch(f"{self!r}: n_k", self.n_k, batch)
        self.bind(len_q, len_k)

    def __repr__(self) -> str:
        given = self.n_k if isinstance(self.n_k, int) else f"n_k{shape_of(self.n_k)}"
        side = "" if self.side == "right" else ', side="left"'
        return f"lengths({given}{side})"


def lengths(n_k: Any, side: str = "right") -> Rule:
    """Every query sees n_k of the keys; the rest is padding.

    >>> print(lengths(3).to_dense(2, 4).astype(int))
    [[1 1 1 0]
     [1 1 1 0]]
    >>> print(lengths(3, side="left").to_dense(2, 4).astype(int))
    [[0 1 1 1]
     [0 1 1 1]]

    Arguments:
        n_k: an integer >= 0, or an array (batch,) of them; copied.
        side: the side of the padding. "right": the first n_k keys are visible; "left": the last.

    Raises TypeError or ValueError for other values, and ValueError once the rule meets fewer keys
    than n_k, or an array meets a batch of another size.
    """
    choice("lengths: side", side, SIDES)
    return Lengths(key_counts("lengths: n_k", n_k), side)


@dataclass(frozen=True, repr=False)
class Dense(Rule):
    """See `dense`."""

    array: Table | Given

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """A lookup by the axes that are longer than one."""
        self._fit({"q": len_q, "k": len_k}, f"(batch, heads, {len_q}, {len_k})")
        if isinstance(self.array, Given):
            shape = self.array.shape
            named = zip(shape, INDEX_NAMES[4 - len(shape) :], strict=True)
            at = [Constant(0) if size == 1 else Index(name) for size, name in named]
            return TruthLookup(self.array, tuple(at))
        array = self.array.array
        axes = [axis for axis in range(-array.ndim, 0) if array.shape[axis] != 1]
        if not axes:
            return Truth(bool(array.reshape(())))
        if len(axes) == array.ndim:
            table = self.array
        else:
            table = Table(array.reshape([array.shape[axis] for axis in axes]))
        return TruthLookup(table, tuple(Index(INDEX_NAMES[axis]) for axis in axes))

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless the array broadcasts to the sizes."""
        sizes = (batch, heads, len_q, len_k)
        self._fit(dict(zip(INDEX_NAMES, sizes, strict=True)), str(sizes))

    def _fit(self, sizes: dict[str, int], shape: str) -> None:
        given = self.array.shape
        for name, have in zip(reversed(INDEX_NAMES), reversed(given), strict=False):
            if name in sizes and have not in (1, sizes[name]):
                raise ValueError(f"{self!r} of shape {given} does not broadcast to {shape}")

    def __repr__(self) -> str:
        return f"dense(array{shape_of(self.array)})"


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
    if is_traced(array):
        return Dense(as_traced("dense: array", array, (0, 1, 2, 3, 4), "bool"))
    given = as_array("dense: array", array)
    if given.dtype != np.bool_:
        hint = (
            "; use array == 0 if 0 is seen and -inf is hidden (an additive mask), and array != 0 if"
            " 1 is seen and 0 is hidden"
        )
        numbers = given.dtype.kind in "iufc" or given.dtype.name == "bfloat16"
        raise TypeError(f"dense: array must be of bool, got {given.dtype}{hint if numbers else ''}")
    if given.ndim > 4:
        raise ValueError(
            "dense: array must broadcast to (batch, heads, len_q, len_k), "
            f"got {given.ndim} axes {given.shape}"
        )
    return Dense(as_table(given, np.bool_))
