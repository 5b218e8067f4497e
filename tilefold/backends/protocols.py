"""What a call asks of arrays, and of the machine that runs its kernels.

A backend is a folder whose `calls` module has the functions of `Backend`; a framework is a module
with the functions of `Arrays`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from tilefold.problems.attention import Problem, Shape

Array = Any
"""An array of any framework."""

Strides = tuple[int, ...]
"""The strides of an array in elements."""

Axes = tuple[int, int, int, int]
"""Which axis of an array in the caller's layout each canonical axis is."""

GIVEN = {"forward": ("q", "k", "v"), "backward": ("do", "q", "k", "v", "o", "lse")}
"""The arrays that a caller gives to each pass, in order."""

RESULTS = {"forward": ("o", "lse"), "backward": ("dq", "dk", "dv")}
"""The arrays that each pass writes, in order."""

OPERANDS = {name: GIVEN[name] + RESULTS[name] for name in GIVEN}
"""All arrays of each pass: the order in which they are handed to a prepared call."""


class Arrays(Protocol):
    """The functions of a framework's module."""

    def layout_key(self, given: Sequence[Array]) -> tuple[Any, ...]:
        """All of arrays but their data and place: shapes, strides and types."""

    def strides(self, name: str, array: Array) -> Strides:
        """The strides of an argument. Raises ValueError for fractions of an element."""

    def dtype_of(self, array: Array) -> str:
        """The name of an array's type."""

    def common_dtype(self, arrays: Mapping[str, Array]) -> str:
        """The one type of arguments that can be read together. Raises."""

    def native_dtype(self, like: Array, dtype: str) -> Any:
        """A type of the framework by its name, which may be the type of the array `like`."""

    def empty(self, like: Array, wanted: Sequence[tuple[Shape, Any]]) -> tuple[Array, ...]:
        """Contiguous arrays of shapes and native types beside another; elements are not set."""

    def pointer(self, array: Array) -> int:
        """The address of the first element."""

    def packed(self, array: Array) -> Array:
        """The array where it is contiguous, else a contiguous copy."""

    def is_packed(self, array: Array) -> bool:
        """True for a contiguous array."""

    def is_writable(self, array: Array) -> bool:
        """False for an array that is read-only."""


@dataclass(frozen=True, eq=False)
class Placement:
    """How the operands of a call lie in memory, whatever they hold.

    `strides` have canonical axes. `alignment` is a machine's measure of where operands begin, and
    `axes` says which axis of an array in the caller's layout each canonical axis is.
    """

    strides: Mapping[str, Strides]
    alignment: int
    axes: Axes


class Prepared(Protocol):
    """A plan made ready for operands that lie in one way: all but the operands themselves."""

    @property
    def data_bytes(self) -> int:
        """Bytes of the mask's tables and of the runs."""

    def launch(self, arrays: Arrays, operands: Sequence[Array]) -> None:
        """Run the kernels in order on arrays in the caller's layout, in the order of `OPERANDS`."""

    def compile(self) -> None:
        """Have the kernels compiled that were not compiled yet."""


class Machine(ABC):
    """What runs kernels: a processor, a GPU, or a stand-in for one. Equal to itself alone."""

    backend: ClassVar[str]
    """The name of the backend whose kernels it runs: see `registry.BACKENDS`."""

    aligned: ClassVar[int] = 0
    """The alignment of operands that begin where an allocation does."""

    @abstractmethod
    def check(self, **arrays: Array) -> None:
        """Raises TypeError, ValueError or NotImplementedError for arrays that are elsewhere."""

    def alignment(self, arrays: Mapping[str, Array]) -> int:
        """How far the places where arrays begin let kernels move several elements at once."""
        return 0

    def accept(
        self, arrays: Arrays, operation: str, given: tuple[Array, ...]
    ) -> tuple[tuple[Array, ...], int]:
        """The arrays as kernels read them, and their alignment: asked in every call.

        Kernels read lse without strides. Raises for arrays that are elsewhere.
        """
        named = dict(zip(GIVEN[operation], given, strict=True))
        self.check(**named)
        if "lse" in named:
            named["lse"] = arrays.packed(named["lse"])
            given = tuple(named.values())
        return given, self.alignment(named)


class Backend(Protocol):
    """The functions of a backend's `calls` module."""

    def machine(self, index: int = 0) -> Machine:
        """The machine that is here, by its number among several. Raises NotImplementedError."""

    def missing(self) -> str | None:
        """Why this backend's kernels cannot run here; None where they can."""

    def admit(self, problem: Problem) -> Problem:
        """The problem as it is computed here. Raises NotImplementedError for what cannot be."""

    def prepare(
        self, machine: Any, problem: Problem, operation: str, placement: Placement
    ) -> Prepared:
        """Plan a problem that is not empty, and compile its kernels or have them written."""
