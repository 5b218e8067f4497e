"""The protocols of a call: the functions of arrays, and of the machine that runs its kernels.

A backend is a folder whose `calls` module has the functions of `Backend`; a framework is a module
with the functions of `Arrays`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

from tilefold.problems.attention import Problem, Shape

Array = Any
"""An array of any framework."""

Strides = tuple[int, ...]
"""The strides of an array in elements."""

Axes = tuple[int, int, int, int]
"""The positions of the canonical axes in an array of the caller's layout."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass of attention: its operation, and the arrays that it is given and that it writes.

    The names stand in the order in which a prepared call takes the arrays. Passes are made by
    `plus`, once for each set of names, so they are compared by identity.

    >>> FORWARD.plus(results=("lse_low",)).results
    ('o', 'lse', 'lse_low')
    """

    operation: str
    given: tuple[str, ...]
    results: tuple[str, ...]

    @property
    def operands(self) -> tuple[str, ...]:
        """All arrays, in order."""
        return self.given + self.results

    @lru_cache(maxsize=256)  # noqa: B019  # passes are few and live as long as the program
    def plus(self, given: tuple[str, ...] = (), results: tuple[str, ...] = ()) -> Pass:
        """The same pass with more arrays."""
        if not (given or results):
            return self
        return Pass(self.operation, self.given + given, self.results + results)


FORWARD = Pass("forward", ("q", "k", "v"), ("o", "lse"))
FORWARD_LOW = FORWARD.plus(results=("lse_low",))
"""The pass also writes `lse_low`, which is what rounding took from lse: gradients are then exact
for large scores too. Only machines that `keeps_low` have this pass."""
BACKWARD = Pass("backward", ("do", "q", "k", "v", "o", "lse"), ("dq", "dk", "dv"))
BACKWARD_LOW = BACKWARD.plus(("lse_low",))
"""The pass also reads `lse_low`."""

KEY_MASS = Pass("key_mass", ("q", "k", "lse"), ("mass",))
"""The sums of the columns of P. Only processors have this pass."""


def is_extra(name: str) -> bool:
    """True for an array of a mask ("data0") or a score ("input0"), for sinks and dropout's seed.

    They follow the usual arrays of a pass, in any shape. Layouts do not matter to them.
    """
    return name.startswith(("data", "input", "sinks", "seed"))


def spoken(name: str) -> str:
    """An operand as messages call it.

    >>> spoken("input0"), spoken("sinks")
    ('the array 0 of score', 'sinks')
    """
    for start, option in (("input", "score"), ("data", "mask")):
        if name.startswith(start):
            return f"the array {name.removeprefix(start)} of {option}"
    return name


PASSES = {each.operation: each for each in (FORWARD, BACKWARD)}
"""The passes of an operation without further arrays."""


class Arrays(Protocol):
    """The functions of a framework's module."""

    def layout_key(self, given: Sequence[Array]) -> tuple[Any, ...]:
        """The properties of arrays without data and addresses: shapes, strides and types."""

    def strides(self, name: str, array: Array) -> Strides:
        """The strides of an argument, in elements.

        Raises ValueError if a stride is no multiple of the item size.
        """

    def dtype_of(self, array: Array) -> str:
        """The name of an array's type."""

    def common_dtype(self, arrays: Mapping[str, Array]) -> str:
        """The common type of arguments. Raises if they cannot be read together."""

    def check_held(self, name: str, array: Array) -> None:
        """Raises ValueError for an array whose memory was freed, where the framework knows it."""

    def native_dtype(self, like: Array, dtype: str) -> Any:
        """The framework's type with this name; `like` is an array that may have this type."""

    def empty(self, like: Array, wanted: Sequence[tuple[Shape, Any]]) -> tuple[Array, ...]:
        """New contiguous arrays on the device of another array; their elements are not set."""

    def pointer(self, array: Array) -> int:
        """The address of the first element."""

    def packed(self, array: Array) -> Array:
        """The array if it is contiguous, else a contiguous copy."""

    def is_packed(self, array: Array) -> bool:
        """True for a contiguous array."""

    def is_writable(self, array: Array) -> bool:
        """False for an array that is read-only."""


@dataclass(frozen=True, eq=False)
class Placement:
    """The placement of a call's operands in memory.

    `strides` have canonical axes. `alignment` is a machine's measure of the operands' addresses.
    `axes` are the positions of the canonical axes in an array of the caller's layout.
    """

    strides: Mapping[str, Strides]
    alignment: int
    axes: Axes


class Prepared(Protocol):
    """A plan prepared for one placement of operands; only the operands are missing."""

    @property
    def data_bytes(self) -> int:
        """The size of the mask's tables and of the runs, in bytes."""

    def launch(self, arrays: Arrays, operands: Sequence[Array]) -> None:
        """Run the kernels in order on arrays in the caller's layout.

        `operands` are in the order of `Pass.operands`.
        """

    def compile(self) -> None:
        """Compile the kernels that are not compiled yet."""

    def with_keys(self, problem: Problem, strides: Mapping[str, Strides]) -> Prepared | None:
        """The same for another number of keys; None where it must be planned from the beginning.

        `problem` differs in `len_k` alone. `strides` are those of k and v, in canonical axes.
        """


class Machine(ABC):
    """A machine that runs kernels: a processor, a GPU, or a stand-in. It equals only itself."""

    backend: ClassVar[str]
    """The name of the backend whose kernels the machine runs: see `registry.BACKENDS`."""

    keeps_low: ClassVar[bool] = False
    """Whether kernels write and read what rounding took from lse: see `FORWARD_LOW`."""

    reads_dlse: ClassVar[bool] = False
    """Whether kernels of the backward pass read a gradient of lse."""

    aligned: ClassVar[int] = 0
    """The alignment of operands that begin at the start of an allocation."""

    @abstractmethod
    def check(self, **arrays: Array) -> None:
        """Raises TypeError, ValueError or NotImplementedError for arrays of another machine."""

    def alignment(self, arrays: Mapping[str, Array]) -> int:
        """The machine's measure of the arrays' addresses: see `Placement.alignment`."""
        return 0

    def accept(
        self, arrays: Arrays, wanted: Pass, given: tuple[Array, ...]
    ) -> tuple[tuple[Array, ...], int]:
        """The arrays as kernels read them, and their alignment. Every call asks for them.

        Kernels read lse, and its gradient, without strides. Raises unless kernels can read the
        arrays.
        """
        named = dict(zip(wanted.given, given, strict=True))
        self.check(**named)
        for name in ("lse", "dlse"):
            if name in named:
                named[name] = arrays.packed(named[name])
                given = tuple(named.values())
        return given, self.alignment(named)


class Backend(Protocol):
    """The functions of a backend's `calls` module."""

    def machine(self, index: int = 0) -> Machine:
        """The machine of this computer with a number. Raises NotImplementedError without one."""

    def missing(self) -> str | None:
        """The reason why this backend's kernels cannot run here; None if they can."""

    def admit(self, problem: Problem) -> Problem:
        """The problem as this backend computes it. Raises NotImplementedError if it cannot."""

    def prepare(
        self, machine: Any, problem: Problem, wanted: Pass, placement: Placement
    ) -> Prepared:
        """Plan a problem that is not empty, and emit or compile its kernels."""
