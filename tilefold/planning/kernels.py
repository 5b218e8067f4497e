"""The reads, writes and products of kernels: the rows of a backend's table `KERNELS`.

All that follows from a kernel's name stands in its row, and nowhere else (as all of a processor
stands in one context of BLIS). The row lists operands in the order of the kernel's arguments: first
what it reads, then what it writes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from tilefold.common.first_use import imported
from tilefold.problems.attention import Problem


class Operand(NamedTuple):
    """An array of the kernels.

    It has a row for each position of `axis` ("q" or "k"), and `width` names the field of a problem
    that counts the elements of a row; None stands for one element. A `given` array comes from the
    caller: it has the caller's type and any strides. Others are contiguous and have the type of the
    sums.
    """

    axis: str
    width: str | None
    given: bool = True


OPERANDS = {
    "q": Operand("q", "dim"),
    "k": Operand("k", "dim"),
    "v": Operand("k", "dim_v"),
    "o": Operand("q", "dim_v"),
    "do": Operand("q", "dim_v"),
    "dq": Operand("q", "dim"),
    "dk": Operand("k", "dim"),
    "dv": Operand("k", "dim_v"),
    "lse": Operand("q", None, given=False),
    "lse_low": Operand("q", None, given=False),
    "dlse": Operand("q", None, given=False),
    "max": Operand("q", None, given=False),
    "mass": Operand("k", None, given=False),
    "delta": Operand("q", None, given=False),
    "statistics": Operand("q", None, given=False),
    "part": Operand("q", "dim_v", given=False),
    "part_o": Operand("q", "dim_v", given=False),
    "part_m": Operand("q", None, given=False),
    "part_l": Operand("q", None, given=False),
    "dq_parts": Operand("q", "dim", given=False),
}
"""The arrays of all kernels by name: adding one begins here."""

STRIDED = tuple(name for name, operand in OPERANDS.items() if operand.given)
"""Operands of four axes that may lie in memory in any way."""


class Contractions(NamedTuple):
    """Products of a kernel by the length of their sum or row: `dim` or `dim_v`."""

    dim: int
    dim_v: int


ATTEND = Contractions(1, 1)
"""Products of the forward pass: S = Q K^T; O = P V."""
DIFFERENCES = Contractions(1, 1)
"""Products of the gradients of a score's arrays: S; dP = dO V^T."""
SCORES = Contractions(1, 0)
"""The product of the mass of keys: S."""
QUERY_GRADIENT = Contractions(2, 1)
"""Products of dQ: S; dP = dO V^T; dQ = dS K."""
KEY_GRADIENTS = Contractions(2, 2)
"""Products of dK and dV: S^T; dP^T; dV = P^T dO; dK = dS^T Q."""
ALL_GRADIENTS = Contractions(3, 2)
"""Products of the whole backward pass at once: S; dP; dQ; dK; dV."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Work:
    """Arrays that are read and written once, and products that are made for each pair."""

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    contractions: Contractions | None = None

    @property
    def operands(self) -> tuple[str, ...]:
        """All arrays, in the order of the arguments."""
        return (*self.reads, *self.writes)


WORK = {
    "forward": Work(
        name="forward",
        reads=("q", "k", "v"),
        writes=("o", "lse"),
        contractions=ATTEND,
    ),
    "backward": Work(
        name="backward",
        reads=("q", "k", "v", "o", "do", "lse"),
        writes=("dq", "dk", "dv"),
        contractions=ALL_GRADIENTS,
    ),
}
"""Work that no form of an operation can do without."""


@dataclass(frozen=True, eq=False, kw_only=True)
class KernelRow(Work):
    """One kernel of a backend.

    `parallel` is the axis that workers share, "q" or "k". `score_tiles` counts the tiles of scores
    that live at once (S, or S and dP); 0 stands for a kernel that visits no pairs. `emitter` names
    the function that writes the kernel's source, as "module.function" below the backend's `kernels`
    folder: it is imported where source is wanted, which a first call seldom does.
    """

    parallel: str
    emitter: str
    score_tiles: int = 0

    @property
    def visits(self) -> bool:
        """True where the kernel visits pairs of queries and keys."""
        return self.score_tiles > 0

    def length(self, problem: Problem) -> int:
        """Length of the parallel axis."""
        return problem.len_q if self.parallel == "q" else problem.len_k

    def heads(self, problem: Problem) -> int:
        """Heads on the side of the parallel axis."""
        return problem.heads_q if self.parallel == "q" else problem.heads_kv


Row = TypeVar("Row", bound=KernelRow)


def table(rows: Iterable[Row]) -> dict[str, Row]:
    """The rows of a backend by their kernels' names."""
    return {row.name: row for row in rows}


@imported
def emitter(row: KernelRow, package: str) -> Callable[[Any], str]:
    """The function that writes a kernel's source, in the package of a backend's generators."""
    module, function = row.emitter.split(".")
    found: Callable[[Any], str] = getattr(importlib.import_module(f"{package}.{module}"), function)
    return found
