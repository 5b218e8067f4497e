"""The types that all plans share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tilefold.common.computed import computed
from tilefold.masks.expression import Declared, Table
from tilefold.masks.skeleton import Parts, Skeleton
from tilefold.masks.tables import Given, Input
from tilefold.problems.attention import Problem

OPERATIONS = ("forward", "backward")
"""The operations that a user asks for; one or more kernels serve each."""


@dataclass(frozen=True)
class Scratch:
    """An array that the kernels of a plan hand to each other: contiguous, not set beforehand."""

    shape: tuple[int, ...]
    dtype: str

    @computed
    def bytes(self) -> int:
        """Its size: found once, since a call that makes it may take microseconds."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Launched(Protocol):
    """One kernel of a plan with its work."""

    @property
    def arrays(self) -> tuple[NDArray[np.integer], ...]:
        """The arrays that say where its workers work."""


L = TypeVar("L", bound=Launched)


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan(Generic[L]):
    """The kernels of one operation in the order in which they run, and the data of the mask.

    `buffers` are operands that no caller gives, by their names in the kernels. `scores` has the
    numbers and tables of what kernels compute of a modified score.
    """

    problem: Problem
    operation: str
    launches: tuple[L, ...]
    parameters: tuple[int, ...]
    tables: tuple[Table | Declared, ...]
    buffers: Mapping[str, Scratch]
    scores: Mapping[Skeleton, Parts] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Bytes of the mask's tables and of the runs."""
        tables = [*self.tables, *(t for parts in self.scores.values() for t in parts.tables)]
        arrays = [table.array for table in tables if not isinstance(table, Input | Given)]
        for launch in self.launches:
            arrays += launch.arrays
        return sum(array.nbytes for array in arrays)

    def explain_score(self) -> list[str]:
        """What becomes of the scores, as lines of text: none where they are as products give them.

        The skeleton beside a modification has its numbers and arrays as names.
        """
        problem, lines = self.problem, []
        if problem.score is not None:
            lines.append(f"score {problem.score}")
            lines += [f"  computed: {skeleton.shown}" for skeleton in self.scores]
        if problem.sinks:
            lines.append(f"sinks: {problem.sinks} for each head")
        if problem.dropout:
            lines.append(f"dropout {problem.dropout:g}")
        return lines

    def explain_scratch(self) -> list[str]:
        """The buffers, as lines of text."""
        return [
            f"scratch {name}: {' x '.join(map(str, scratch.shape))} {scratch.dtype}"
            for name, scratch in self.buffers.items()
        ]


def split_scratch(problem: Problem, splits: int, dtype: str) -> dict[str, Scratch]:
    """The arrays that decoding leaves for a merge, of each query and each split of the keys."""
    shape = (problem.batch, problem.heads_q, splits, problem.len_q)
    return {
        "part_o": Scratch((*shape, problem.dim_v), dtype),
        "part_m": Scratch(shape, dtype),
        "part_l": Scratch(shape, dtype),
    }
