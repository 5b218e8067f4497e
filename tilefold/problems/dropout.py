"""Which pairs fall out: Philox4x32-10 of the pair's own indices, in plain NumPy, the definition.

    words = philox(counter = (q, k // 4, h, b), key = (seed's low word, seed's high word))
    kept  = words[k % 4] >= round(2^32 p)

A counter-based generator has no state. So a pair is kept or not by its own indices and the seed
alone: the same in the forward and the backward pass, on every backend, whatever blocks, threads or
tiles there are. The words of one evaluation serve four neighbouring keys of a query.

Weights are dropped after the softmax: the sum l, and so lse, is of all weights. A kept weight is
multiplied by 1 / (1 - p), a dropped one by 0.

    O  = (Z P) V        Z = kept / (1 - p)
    dV = (Z P)^T dO     dS = P (Z dP - delta)      delta = rowsum(dO O), as without dropout

Philox is by Salmon, Moraes, Dror and Shaw ("Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilefold.common.check import shown

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
"""The factors of the first and the third word of the counter, in each round."""
WEYL = (0x9E3779B9, 0xBB67AE85)
"""What is added to the two words of the key after each round: the golden ratio, and sqrt(3) - 1."""

_WORD = 0xFFFFFFFF


def philox(counter: Sequence[ArrayLike], key: tuple[int, int]) -> tuple[NDArray[np.uint64], ...]:
    """The four words of 32 bits of each counter; its four words may be arrays that broadcast.

    >>> [hex(word) for word in philox((0, 0, 0, 0), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    word, half = np.uint64(_WORD), np.uint64(32)
    m0, m1 = (np.uint64(factor) for factor in MULTIPLIERS)
    for number in range(ROUNDS):
        k0, k1 = (
            np.uint64((part + number * step) & _WORD) for part, step in zip(key, WEYL, strict=True)
        )
        first, second = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (
            (second >> half) ^ c1 ^ k0,
            second & word,
            (first >> half) ^ c3 ^ k1,
            first & word,
        )
    return c0, c1, c2, c3


def keep(
    seed: int, p: float, b: ArrayLike, h: ArrayLike, q: ArrayLike, k: ArrayLike
) -> NDArray[np.bool_]:
    """True where the pair of query q and key k of query head h is kept; indices broadcast."""
    key_index = np.asarray(k, np.int64)
    counter = np.broadcast_arrays(q, key_index >> 2, h, b)
    words = philox(counter, words_of(seed))
    place = np.broadcast_to(key_index & 3, counter[0].shape)
    found = np.choose(place, words)
    kept: NDArray[np.bool_] = found >= np.uint64(threshold(p))
    return kept


def dropout_mask(
    seed: int,
    p: float,
    *,
    batch: Any,
    heads: Any,
    rows: Any,
    columns: Any,
) -> NDArray[np.bool_]:
    """Which pairs of a region `attention(..., dropout=p, seed=seed)` keeps.

    >>> import tilefold
    >>> kept = tilefold.dropout_mask(7, 0.5, batch=1, heads=1, rows=2, columns=8)
    >>> kept.astype(int).tolist()
    [[[[1, 1, 0, 0, 0, 0, 1, 1], [0, 1, 0, 1, 0, 0, 0, 0]]]]
    >>> part = tilefold.dropout_mask(7, 0.5, batch=1, heads=1, rows=[1], columns=range(3, 7))
    >>> part.astype(int).tolist()
    [[[[1, 0, 0, 0]]]]

    Use it to look at what falls out, or to repeat a result with another library. Every backend
    drops these pairs, forward and backward, whatever its blocks and threads are. Memory is of the
    region.

    Arguments:
        seed: the seed of the call, an integer of 64 bits
        p: the probability with which a pair is dropped, in [0, 1)
        batch, heads, rows, columns: the batch entries, query heads, queries and keys of the region.
            Each is a number n, which means the first n, or a sequence of indices such as
            `range(64, 128)`.

    Returns:
        An array of bool, (batch, heads, rows, columns). True stands for a kept pair. Its weight is
        multiplied by 1 / (1 - p).

    Raises:
        TypeError: seed is not an integer, p is not a number, or an axis is neither
        ValueError: seed has more than 64 bits, p is not in [0, 1), or an index is below 0
    """
    check_probability(p, "p")
    named = {"batch": batch, "heads": heads, "rows": rows, "columns": columns}
    axes = [_indices(name, axis) for name, axis in named.items()]
    return keep(check_seed(seed), p, *np.ix_(*axes))


def factors(
    seed: int, p: float, batch: int, heads: int, len_q: int, len_k: int
) -> NDArray[np.float64]:
    """The factors of all pairs: 0, or 1 / (1 - p); (batch, heads, len_q, len_k)."""
    kept = dropout_mask(seed, p, batch=batch, heads=heads, rows=len_q, columns=len_k)
    return np.where(kept, factor(p), 0.0)


def threshold(p: float) -> int:
    """The least word of a kept pair.

    >>> threshold(0.5) == 2**31, threshold(0.0)
    (True, 0)
    """
    return min(round(p * 2**32), _WORD)


def factor(p: float) -> float:
    """The factor of a kept weight."""
    return 1 / (1 - p)


def words_of(seed: int) -> tuple[int, int]:
    """The low and the high word of a seed; one below 0 stands for its 64 bits."""
    return seed & _WORD, (seed >> 32) & _WORD


def check_probability(p: Any, name: str = "dropout") -> float:
    """The probability as a float. Raises TypeError or ValueError unless it is in [0, 1)."""
    allowed = "a number in [0, 1)"
    try:
        array = hasattr(p, "shape") and not isinstance(p, np.generic)
        if array or isinstance(p, (str, bytes, bool, np.bool_)):
            raise TypeError
        number = float(p)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} must be {allowed}, got {shown(p)}") from None
    if not 0 <= number < 1 or math.isnan(number):
        raise ValueError(f"{name} must be {allowed}, got {number}")
    return number


def check_seed(seed: Any) -> int:
    """The seed as an integer in [-2^63, 2^63). Raises TypeError or ValueError if it is none."""
    allowed = "an integer from -2**63 to 2**64 - 1"
    try:
        if isinstance(seed, (bool, np.bool_)):
            raise TypeError
        number: int = operator.index(seed)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"seed must be {allowed}, got {shown(seed)}") from None
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must be {allowed}, got {number}")
    return number - 2**64 if number >= 2**63 else number


def _indices(name: str, axis: Any) -> NDArray[np.int64]:
    """The indices of one axis of a region."""
    allowed = "a number of indices or a sequence of indices from 0 on"
    try:
        if isinstance(axis, int | np.integer) and not isinstance(axis, bool):
            array = np.arange(axis) if axis >= 0 else np.asarray([axis])
        else:
            array = np.asarray(axis)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise TypeError
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be {allowed}, got {shown(axis)}") from None
    if array.size and not 0 <= array.min() <= array.max() < 2**32:
        raise ValueError(f"{name} must be {allowed}, got {shown(axis)}")
    return array.astype(np.int64)
