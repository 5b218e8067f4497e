"""Tables that masks look up: with their data, with bounds of data to come, and without any.

A rule that carries data holds a `Table`. Data that are known at launch only, such as the lengths of
sequences that grow with every decoding step, are `Declared`: a plan sees their shape, type and
bounds, so it outlives the data. A kernel knows neither: its source has a `Slot` for each table.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.common.computed import computed
from tilefold.common.foreign_arrays import dtype_name, is_traced

DTYPES = ("int32", "bool")
"""The types of tables whose entries are kept with a rule."""


class _Memory(bytearray):
    """Memory that belongs to tables alone."""


@dataclass(frozen=True)
class Table:
    """Mask data: an int32 or bool array, one axis per index that reads it; equal by content.

    The entries never change: they are copied, and `array` can never be written to. An array that
    lies in the memory of a table already is kept as it is.
    """

    array: NDArray[Any]
    memory: NDArray[Any] = field(init=False, repr=False, compare=False)
    """The entries as an array that a compiler takes for an input of its graph: PyTorch's takes none
    that can never be written to. Nobody writes to it."""

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype
        array = self.array
        owner: Any = array
        while isinstance(owner, np.ndarray):
            owner = owner.base
        if not (isinstance(owner, memoryview) and isinstance(owner.obj, _Memory)):
            owner = memoryview(_Memory(max(array.nbytes, 1))).toreadonly()
            np.ndarray(array.shape, array.dtype, owner.obj)[...] = array
            entries = np.frombuffer(owner, np.uint8, array.nbytes)
            array = entries.view(array.dtype).reshape(array.shape)
            object.__setattr__(self, "array", array)
        start = array.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
        memory = np.ndarray(array.shape, array.dtype, owner.obj, start, array.strides)
        object.__setattr__(self, "memory", memory)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made as the first one was: an array that is copied could be written to."""
        return Table, (self.array,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Table:
        """The table itself, which never changes."""
        return self

    @property
    def dtype(self) -> str:
        """The type of the entries: "int32" or "bool"."""
        return str(self.array.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of entries along each axis."""
        return self.array.shape

    @computed
    def digest(self) -> str:
        """A hash of shape, type and content."""
        head = f"{self.dtype}{self.shape}".encode()
        return hashlib.sha256(head + np.ascontiguousarray(self.array).tobytes()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return f"{_form(self)}#{self.digest[:6]}"


@dataclass(frozen=True)
class Declared:
    """A table whose entries are known at launch only; equal by shape, type and bounds.

    Every entry is at least `low` and at most `high`. So a plan knows of each tile what holds for
    all such tables, and stays right when the entries change.

    >>> lengths = Declared((2,), "int32", low=100, high=200)
    >>> print(lengths)
    int32[2]{100..200}
    >>> lengths.fill(np.array([120, 200], np.int32)).array
    array([120, 200], dtype=int32)
    >>> lengths.array
    Traceback (most recent call last):
    ValueError: the entries of int32[2]{100..200} are known at launch only: \
fill the declared table with an array first
    """

    shape: tuple[int, ...]
    dtype: str
    low: int
    high: int

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype
        least, most = (0, 1) if self.dtype == "bool" else (-(2**31), 2**31 - 1)
        assert least <= self.low <= self.high <= most, (self.low, self.high)

    @property
    def array(self) -> NDArray[Any]:
        """Raises ValueError: there are no entries yet."""
        raise ValueError(
            f"the entries of {self} are known at launch only: "
            "fill the declared table with an array first"
        )

    def fill(self, array: NDArray[Any]) -> Table:
        """The table with its entries.

        Raises ValueError for an array of another shape or type, or with an entry out of bounds.
        """
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"{self} was declared, got an array {array.dtype}{[*array.shape]}")
        if array.size and not self.low <= array.min() <= array.max() <= self.high:
            raise ValueError(
                f"{self} was declared, got entries from {array.min()} to {array.max()}"
            )
        return Table(array)

    def __str__(self) -> str:
        return f"{_form(self)}{{{self.low}..{self.high}}}"


@dataclass(frozen=True, eq=False)
class Given(Declared):
    """A table whose entries come with each call, as an operand.

    `held` is the caller's array in a rule of the caller's, which a compiler of its framework
    traces. It is None in the rule of a request, which knows no data. Such tables are equal by
    number, shape, type and bounds, and by the very array that they hold.
    """

    number: int = 0
    held: Any = field(default=None, repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and self._key == other._key and self.held is other.held

    def __hash__(self) -> int:
        if self.held is not None:
            raise TypeError(
                f"the mask holds an array that is traced ({_form(self)}), so q, k and v must be"
                " arrays of the same framework"
            )
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return (self.number, self.shape, self.dtype, self.low, self.high)

    def numbered(self, number: int) -> Given:
        """The same table without its array, as the operand of a number."""
        return Given(self.shape, self.dtype, self.low, self.high, number)

    @property
    def name(self) -> str:
        """The name of the operand."""
        return f"data{self.number}"

    @property
    def array(self) -> NDArray[Any]:
        """Raises ValueError: nobody knows the entries before a call."""
        if self.held is not None:
            raise ValueError(
                f"the mask holds an array that is traced ({_form(self)}), so its entries are not"
                " known here: make the rule of an array with values"
            )
        raise ValueError(f"the entries of {self} come with each call")

    def __str__(self) -> str:
        return f"{self.name}:{_form(self)}"


def given_table(name: str, array: Any, *allowed: str) -> Given:
    """A table that holds a traced array. Raises TypeError unless its type is of those allowed.

    Where none is named, those of `DTYPES` are.

    `array` has `shape` and `dtype`; a size that is not known is None.
    """
    dtype, wanted = dtype_name(array), allowed or DTYPES
    if dtype not in wanted:
        raise TypeError(
            f"{name} is traced, so it must be of {' or '.join(wanted)}, got {dtype}; convert it"
        )
    low, high = (0, 1) if dtype == "bool" else (-(2**31), 2**31 - 1)
    return Given(tuple(array.shape), dtype, low, high, held=array)


@dataclass(frozen=True, eq=False)
class Input:
    """A float array that a score reads and that comes with each call.

    `held` is the caller's array in a score of the caller's, and None in the score of a request,
    which knows no data. Inputs are equal by number, type, shape, and content where they hold one.
    """

    number: int
    dtype: str
    shape: tuple[int, ...]
    held: Any = field(default=None, repr=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Input):
            return NotImplemented
        mine, its = (self.number, self.dtype, self.shape), (other.number, other.dtype, other.shape)
        if mine != its or (self.held is None) != (other.held is None):
            return False
        if self.held is other.held:
            return True
        if is_traced(self.held) or is_traced(other.held):
            return False
        return np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return hash((self.number, self.dtype, self.shape))

    @property
    def name(self) -> str:
        """The name of the operand."""
        return f"input{self.number}"

    @property
    def array(self) -> NDArray[Any]:
        """The caller's array, as NumPy sees it. Raises ValueError where no array is held."""
        if self.held is None:
            raise ValueError(f"the entries of {self} come with each call")
        held = self.held
        if not hasattr(held, "detach"):
            return np.asarray(held)
        held = held.detach().cpu()  # of torch; NumPy has no bfloat16
        return np.asarray(held.float() if self.dtype == "bfloat16" else held)

    def __str__(self) -> str:
        if self.held is not None:
            return f"array[{'x'.join(map(str, self.shape))}]"
        return f"{self.name}:{_form(self)}"


@dataclass(frozen=True)
class Slot:
    """A place for a table in a kernel: its number, element type and rank, without the data."""

    number: int
    dtype: str
    rank: int

    @property
    def name(self) -> str:
        """The name of the kernel's argument that holds the table."""
        return f"t{self.number}"

    @property
    def strides(self) -> tuple[str, ...]:
        """The names of the kernel's arguments that hold the strides, in elements."""
        return tuple(f"t{self.number}_{axis}" for axis in range(self.rank))

    def __str__(self) -> str:
        return f"{self.name}:{self.dtype}"


AnyTable = Table | Declared | Input | Slot


def _form(table: Table | Declared | Input) -> str:
    return f"{table.dtype}[{'x'.join(map(str, table.shape))}]"
