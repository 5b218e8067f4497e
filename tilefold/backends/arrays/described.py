"""The functions of `protocols.Arrays` for arrays that are described: shape and type, no memory.

Graphs of frameworks are made of such descriptions. The arrays to come are contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from tilefold.problems import attention
from tilefold.problems.attention import Shape, contiguous


class Described(NamedTuple):
    """The shape and the name of the type of an array."""

    shape: Shape
    dtype: str


def layout_key(given: Sequence[Described]) -> tuple[Any, ...]:
    """The descriptions."""
    return tuple(given)


def strides(name: str, array: Described) -> tuple[int, ...]:
    """Those of a contiguous array."""
    return contiguous(array.shape) if array.shape else ()


def dtype_of(array: Described) -> str:
    """The name of an array's type."""
    return array.dtype


def common_dtype(arrays: Mapping[str, Described]) -> str:
    """The one element type of all arrays. Raises TypeError."""
    return attention.common_dtype({name: array.dtype for name, array in arrays.items()})


def check_held(name: str, array: Described) -> None:
    """Nothing is held."""


def native_dtype(like: Described, dtype: str) -> str:
    """The name."""
    return dtype


def _none(*_: Any) -> NoReturn:
    raise AssertionError("a description has no memory")


empty = pointer = packed = is_packed = is_writable = _none
