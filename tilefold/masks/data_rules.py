"""Rules that carry data: documents, lengths, dense.

The data become tables: a kernel reads them, and the planner bounds them. Data are copied and cannot
be written to, so a rule never changes after it was made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.common.check import shown, whole
from tilefold.masks.expression import (
    INDEX_NAMES,
    Boolean,
    Index,
    Integer,
    Lookup,
    Table,
    Truth,
    TruthLookup,
)
from tilefold.masks.rule import Rule

INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, repr=False)
class Documents(Rule):
    """See `documents`."""

    ids_q: Table
    ids_k: Table

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """True if the ids are equal."""
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
        ids_q: integers of any integer type, (len_q,) or (batch, len_q); copied.
        ids_k: the same for keys, (len_k,) or (batch, len_k); ids_q where absent.

    Raises TypeError or ValueError for other arrays, and ValueError once the rule meets lengths or
    a batch that they do not have.
    """
    given = {"ids_q": ids_q} if ids_k is None else {"ids_q": ids_q, "ids_k": ids_k}
    arrays = [_integers(f"documents: {name}", ids, (1, 2)) for name, ids in given.items()]
    if not all(_fits_int32(array) for array in arrays):
        arrays = _ranks(arrays)
    tables = [_table(array, np.int32) for array in arrays]
    return Documents(tables[0], tables[-1])


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

    n_k: int | Table

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """True if the key is below the length."""
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
        n_k: an integer >= 0, or an array (batch,) of them; copied. One past len_k hides nothing.

    Raises TypeError or ValueError for other values, and ValueError once an array meets a batch of
    another size.
    """
    if isinstance(n_k, int):
        return Lengths(whole("lengths: n_k", n_k, 0))
    array = _integers("lengths: n_k", n_k, (0, 1))
    if array.ndim == 0:
        return Lengths(whole("lengths: n_k", int(array), 0))
    if array.size and array.min() < 0:
        raise ValueError(f"lengths: n_k must be integers >= 0, got {array.min()} among them")
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
        raise TypeError(f"{name} must be integers, got {array.dtype} {shown(value)}")
    if array.ndim not in ranks:
        axes = " or ".join(map(str, ranks))
        raise ValueError(f"{name} must have {axes} axes, got {array.ndim} in shape {array.shape}")
    return array if array.dtype.kind in "iu" else array.astype(np.int32)


def _table(array: NDArray[Any], kind: type[np.generic]) -> Table:
    """A table of a copy that nobody can write to: a rule never changes after it was made."""
    return Table(_frozen(np.array(array, kind, order="C")))


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.setflags(write=False)
    return array


def _check_batch(name: str, table: Table, batch: int, rows: bool) -> None:
    if rows and table.array.shape[0] != batch:
        raise ValueError(f"{name} is for a batch of {table.array.shape[0]}, but batch is {batch}")
