"""Functions of real numbers for a score of one's own: see `tilefold.score`.

They take symbols and numbers. NumPy's functions of the same names take numbers alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tilefold.common.check import shown
from tilefold.common.foreign_arrays import dtype_name, is_of_framework, is_traced, unwrapped
from tilefold.masks.arrays import INT32, as_array, as_table
from tilefold.masks.expression import (
    Integer,
    Lookup,
    Real,
    RealLookup,
    TruthLookup,
    Where,
    as_boolean,
    as_integer,
    as_real,
)
from tilefold.masks.symbols import Number, binary, is_real, unary
from tilefold.masks.tables import Input, Table

__all__ = ["exp", "log", "maximum", "minimum", "sigmoid", "sqrt", "table", "tanh", "where"]


def exp(x: Any) -> Real:
    """The exponential e**x of a number in a score.

    >>> from tilefold import score
    >>> score(lambda s: exp(s - 1))
    score(lambda s: exp((s - 1)))

    Raises TypeError unless x is a number.
    """
    return as_real(unary("exp", x))


def log(x: Any) -> Real:
    """The natural logarithm of a number in a score.

    >>> from tilefold import score
    >>> score(lambda s, k: s + log(k + 1))
    score(lambda s, k: s + log((k + 1)))

    It is -inf of 0 and NaN of negative numbers.

    Raises TypeError unless x is a number.
    """
    return as_real(unary("log", x))


def tanh(x: Any) -> Real:
    """The hyperbolic tangent of a number in a score.

    >>> from tilefold import score
    >>> score(lambda s: 10 * tanh(s / 10))
    score(lambda s: 10 * tanh((s / 10)))

    Raises TypeError unless x is a number.
    """
    return as_real(unary("tanh", x))


def sigmoid(x: Any) -> Real:
    """The logistic function 1 / (1 + e**-x) of a number in a score.

    >>> from tilefold import score
    >>> score(lambda s: s * sigmoid(s))
    score(lambda s: s * sigmoid(s))

    Raises TypeError unless x is a number.
    """
    return as_real(unary("sigmoid", x))


def sqrt(x: Any) -> Real:
    """The square root of a number in a score.

    >>> from tilefold import score
    >>> score(lambda s, k: s / sqrt(k + 1))
    score(lambda s, k: s / sqrt((k + 1)))

    It is NaN of negative numbers.

    Raises TypeError unless x is a number.
    """
    return as_real(unary("sqrt", x))


def minimum(x: Any, y: Any) -> Number:
    """The smaller one of two numbers: an integer if both are, as an index of a table must be.

    >>> from tilefold import score
    >>> score(lambda s: minimum(s, 30))
    score(lambda s: minimum(s, 30))

    Raises TypeError unless x and y are numbers.
    """
    return binary("minimum", x, y)


def maximum(x: Any, y: Any) -> Number:
    """The larger one of two numbers: an integer if both are, as an index of a table must be.

    >>> from tilefold import score
    >>> score(lambda s: maximum(s, -30))
    score(lambda s: maximum(s, -30))

    Raises TypeError unless x and y are numbers.
    """
    return binary("maximum", x, y)


def where(truth: Any, x: Any, y: Any) -> Real:
    """x where the truth holds, else y.

    >>> from tilefold import score
    >>> score(lambda s, q, k: where(q >= k, s, s - 1))
    score(lambda s, q, k: where((q >= k), s, (s - 1)))

    Arguments:
        truth: a comparison, or comparisons joined by & | ~
        x, y: numbers. The derivative of the one that is not chosen does not matter, even where it
            is infinite.

    Raises TypeError for other values.
    """
    if isinstance(truth, Number) or is_real(truth):
        raise TypeError(f"where: the first argument must be a truth, got the number `{truth}`")
    return Where(as_boolean(truth), as_real(x), as_real(y))


class Entries:
    """An array whose entries a score reads: `tilefold.table(array)[i, j]`."""

    def __init__(self, table: Table | Input) -> None:
        self._table = table

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self._table.shape

    def __repr__(self) -> str:
        return f"table of shape {self.shape}"

    def __getitem__(self, indices: Any) -> Lookup | RealLookup | TruthLookup:
        """The entry at an integer for each axis. Raises TypeError for other indices."""
        given = indices if isinstance(indices, tuple) else (indices,)
        if len(given) != len(self.shape):
            raise TypeError(
                f"table of shape {self.shape} takes {len(self.shape)} indices, got {len(given)}"
            )
        for index in given:
            if is_real(index):
                raise TypeError(f"an index of a table must be an integer, got `{index}`")
        nodes: tuple[Integer, ...] = tuple([as_integer(index) for index in given])
        kind: Any = {"int32": Lookup, "bool": TruthLookup}.get(self._table.dtype, RealLookup)
        entry: Lookup | RealLookup | TruthLookup = kind(self._table, nodes)
        return entry


def table(array: Any) -> Entries:
    """An array whose entries a score of one's own may read, by indices that are traced.

    >>> import numpy as np
    >>> from tilefold import score
    >>> slopes = table(np.array([0.5, 0.25]))
    >>> score(lambda s, q, k, h: s - slopes[h] * abs(q - k))
    score(lambda s, q, k, h: s - (array[2][h] * abs((q - k))))

    Arguments:
        array: floats of NumPy or torch are read where they lie, in every call, and get a gradient;
            integers and bools are copied. An index counts from 0; none may lie outside of the
            array, wherever the score is asked: use `minimum` and `maximum`.

    Raises TypeError for what is no array of numbers, and ValueError for integers of more than 32
    bits.
    """
    given = as_input("table", array)
    if isinstance(given, Input):
        return Entries(given)
    if given.dtype.kind in "iu":
        if given.size and not (INT32.min <= given.min() and given.max() <= INT32.max):
            raise ValueError(
                "table: integers must fit 32 bits, got numbers from"
                f" {given.min()} to {given.max()}; pass floats"
            )
        return Entries(as_table(given, np.int32))
    if given.dtype == np.bool_:
        return Entries(as_table(given, np.bool_))
    raise TypeError(f"table: array must be of floats, integers or bool, got {given.dtype}")


FLOATS = ("float32", "float64", "float16", "bfloat16")


def as_input(name: str, value: Any) -> Any:
    """An `Input` that holds an array of floats, as it is; a NumPy array for other values.

    Numbers and nested lists of floats become a new array of float64.
    """
    value = unwrapped(value)
    torch = type(value).__module__ == "torch" or hasattr(value, "requires_grad")
    if torch or is_of_framework(value):
        dtype = dtype_name(value)
        if dtype in FLOATS:
            return Input(0, dtype, tuple(value.shape), value)
        if is_traced(value):
            raise TypeError(f"{name} is traced, so it must be of floats, got {dtype}; convert it")
    array = as_array(name, value)
    if array.dtype.name in FLOATS:
        return Input(0, array.dtype.name, array.shape, array)
    return array


def floats(name: str, value: Any) -> Input:
    """An `Input` of floats; integers are converted. Raises TypeError for other values."""
    given = as_input(name, value)
    if isinstance(given, Input):
        return given
    if given.dtype.kind in "iu":
        converted = given.astype(np.float64)
        return Input(0, "float64", converted.shape, converted)
    raise TypeError(f"{name} must be an array of floats, got {given.dtype} {shown(value)}")
