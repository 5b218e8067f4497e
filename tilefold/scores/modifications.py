"""The ready-made modifications of scores: softcap, alibi, temperature, bias."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilefold.common.check import shown
from tilefold.common.foreign_arrays import constant_of
from tilefold.masks.expression import (
    INDEX_NAMES,
    Constant,
    Index,
    Integer,
    Real,
    RealLookup,
    as_real,
)
from tilefold.masks.tables import Input
from tilefold.scores.functions import exp, floats, tanh, where
from tilefold.scores.score import Score, Sizes, shape_text


@dataclass(frozen=True, repr=False)
class Softcap(Score):
    """See `softcap`."""

    cap: float

    def bind(self, s: Real, sizes: Sizes) -> Real:
        """cap tanh(s / cap)."""
        return as_real(tanh(s * (1 / self.cap)) * self.cap)

    def __repr__(self) -> str:
        return (
            f"softcap({self.cap:g})"
            if self.cap == float(f"{self.cap:g}")
            else (f"softcap({self.cap!r})")
        )

    __hash__ = Score.__hash__


def softcap(cap: float) -> Score:
    """Scores stay within (-cap, cap): s becomes cap * tanh(s / cap), as in Gemma 2.

    >>> softcap(30.0)
    softcap(30)

    Arguments:
        cap: a finite number > 0, whose inverse is finite.

    Raises TypeError or ValueError for other values, and ValueError once a number that float32 does
    not hold meets arrays of float32 or of a half type.
    """
    number = _number("softcap: cap", cap)
    if not (0 < number < math.inf and math.isfinite(1 / number)):
        raise ValueError(
            f"softcap: cap must be a finite number > 0 with a finite inverse, got {shown(cap)}"
        )
    return Softcap(number)


@dataclass(frozen=True, repr=False)
class Alibi(Score):
    """See `alibi`."""

    slopes: Input | None = None

    def bind(self, s: Real, sizes: Sizes) -> Real:
        """S - slope |distance|."""
        distance = abs(Index("k") - Index("q") - (sizes.len_k - sizes.len_q))
        return as_real(s - self._slope(sizes) * distance)

    def _slope(self, sizes: Sizes) -> Real:
        if self.slopes is None:
            return _default_slope(sizes.heads)
        return _entry("alibi: slopes", self.slopes, (sizes.batch, sizes.heads), "bh")

    def __repr__(self) -> str:
        return "alibi()" if self.slopes is None else f"alibi({shape_text(self.slopes)})"

    __hash__ = Score.__hash__


def alibi(slopes: Any = None) -> Score:
    """Attention with linear biases: s becomes s - slope * distance (Press et al., 2022).

    >>> alibi()
    alibi()

    The distance of a query and a key counts from the end of both, as in `causal()`: the last query
    stands beside the last key. It counts to both sides.

    Arguments:
        slopes: floats, (heads,) or (batch, heads); they get a gradient. None means the slopes of
            the paper: 2**-(8 / n), 2**-(16 / n), ... for n heads that are a power of two; for
            other n those of the next lower power, then every second one of the next higher.

    Raises TypeError or ValueError for other values, and ValueError once the slopes meet another
    number of heads. The paper is arXiv:2108.12409.
    """
    if slopes is None:
        return Alibi()
    given = floats("alibi: slopes", slopes)
    if len(given.shape) not in (1, 2):
        raise ValueError(
            f"alibi: slopes must be (heads,) or (batch, heads), got shape {given.shape}"
        )
    return Alibi(given)


def _default_slope(heads: int) -> Real:
    """The slope of a head, as an expression of it."""
    whole = 1 << (max(1, heads).bit_length() - 1)
    h, step = Index("h"), 8 * math.log(2) / whole
    first = exp((h + 1) * -step)
    if whole == heads:
        return first
    return where(h < whole, first, exp((2 * (h - whole) + 1) * (-step / 2)))


@dataclass(frozen=True, repr=False)
class Bias(Score):
    """See `bias`."""

    array: Input

    def bind(self, s: Real, sizes: Sizes) -> Real:
        """S + array[b, h, q, k]."""
        return as_real(s + _entry("bias: array", self.array, sizes, INDEX_NAMES))

    def __repr__(self) -> str:
        return f"bias({shape_text(self.array)})"

    __hash__ = Score.__hash__


def bias(array: Any) -> Score:
    """Adds an array to the scores: s becomes s + array[b, h, q, k].

    >>> import numpy as np
    >>> bias(np.zeros((8, 1, 64)))
    bias(array[8x1x64])

    Arguments:
        array: floats of NumPy or torch that broadcast to (batch, heads, len_q, len_k). They are
            read where they lie, in any strides, and get a gradient of their own shape. -inf hides
            a pair.

    Raises TypeError or ValueError for other values, and ValueError once the array meets sizes that
    it does not broadcast to.
    """
    return Bias(_of_pairs("bias: array", array))


@dataclass(frozen=True, repr=False)
class Temperature(Score):
    """See `temperature`."""

    array: Input | float

    def bind(self, s: Real, sizes: Sizes) -> Real:
        """S / array[b, h, q, k]."""
        if isinstance(self.array, float):
            return as_real(s * (1 / self.array))
        return as_real(s / _entry("temperature: array", self.array, sizes, INDEX_NAMES))

    def __repr__(self) -> str:
        given = self.array
        return (
            f"temperature({given!r})"
            if isinstance(given, float)
            else (f"temperature({shape_text(given)})")
        )

    __hash__ = Score.__hash__


def temperature(array: Any) -> Score:
    """Divides the scores: s becomes s / array[b, h, q, k].

    >>> temperature(0.5)
    temperature(0.5)

    Arguments:
        array: a number other than 0 whose inverse is finite, or floats of NumPy or torch that
            broadcast to (batch, heads, len_q, len_k). An array is read where it lies, in any
            strides, and gets a gradient of its own shape.

    Raises TypeError or ValueError for other values, and ValueError once the array meets sizes that
    it does not broadcast to.
    """
    if isinstance(array, (int, float, np.number)) and not isinstance(array, bool):
        number = _number("temperature: array", array)
        if number == 0 or not (math.isfinite(number) and math.isfinite(1 / number)):
            raise ValueError(
                "temperature: a number must be finite and not 0, with a finite inverse, got"
                f" {shown(array)}"
            )
        return Temperature(number)
    return Temperature(_of_pairs("temperature: array", array))


def _of_pairs(name: str, array: Any) -> Input:
    """An array of floats that may broadcast to all pairs. Raises ValueError for too many axes."""
    given = floats(name, array)
    if len(given.shape) > 4:
        raise ValueError(
            f"{name} must broadcast to (batch, heads, len_q, len_k), got shape {given.shape} of"
            f" {len(given.shape)} axes"
        )
    return given


def _entry(name: str, given: Input, sizes: tuple[int, ...], letters: Any) -> RealLookup:
    """The entry of an array that broadcasts to sizes, by the indices of these letters."""
    shape = given.shape
    if len(shape) > len(sizes) or any(
        have not in (1, size) for have, size in zip(reversed(shape), reversed(sizes), strict=False)
    ):
        wanted = {4: "(batch, heads, len_q, len_k)", 2: "(batch, heads)"}[len(sizes)]
        raise ValueError(f"{name} of shape {shape} does not broadcast to {wanted} = {tuple(sizes)}")
    names = [*letters][len(letters) - len(shape) :]
    at: list[Integer] = [
        Constant(0) if have == 1 else Index(name) for have, name in zip(shape, names, strict=True)
    ]
    return RealLookup(given, tuple(at))


def _number(name: str, value: Any) -> float:
    """The value as a float. Raises TypeError unless it is a number."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        return float(constant_of(value))
    except (OverflowError, TypeError):
        raise ValueError(
            f"{name} must be a number that a float holds, got {shown(value)}"
        ) from None
