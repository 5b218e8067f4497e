"""A region of the pairs of a problem: some queries and some keys, of all batch entries and heads.

Mask and score are folded exactly for the pairs of the region, so memory grows with the region and
not with the lengths. Truths and scores have the axes (batch, heads, rows, columns), where an axis
on which nothing depends may have the length 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.extra import Extra, taken_apart
from tilefold.common.check import shown
from tilefold.masks.evaluate import exact, exact_real
from tilefold.masks.expression import Expression, names
from tilefold.problems.attention import Problem, check_rows_of_sinks
from tilefold.problems.request import Request

Array = NDArray[Any]
Inputs = Mapping[int, Array]
"""The arrays of a score by their numbers."""


class Asked(NamedTuple):
    """The options of a map: the request of attention with its extra arrays, and without sinks.

    Sinks are a part of lse, so only attention takes them.
    """

    request: Request
    extra: Extra
    plain: Request

    @staticmethod
    def of(request: Request, score: Any, sinks: Any) -> Asked:
        """The options, from the request without score and sinks."""
        plain, _ = taken_apart(request, score)
        return Asked(*taken_apart(request, score, sinks), plain)

    def check_sinks(self, heads: int) -> None:
        """Raises ValueError unless there is a row of sinks for each head; lse has them already."""
        if self.request.sinks:
            check_rows_of_sinks(len(self.extra.arrays[-1]), heads)


@dataclass(frozen=True, eq=False)
class Region:
    """The pairs of `rows`, numbers of queries, with `columns`, numbers of keys."""

    problem: Problem
    rows: Array
    columns: Array

    @staticmethod
    def of(problem: Problem, rows: Any, columns: Any) -> Region:
        """The region of two indices, each a slice or whole numbers.

        Raises TypeError, or IndexError for a number that is no query or key.
        """
        numbers = _numbers("rows", rows, problem.len_q), _numbers("columns", columns, problem.len_k)
        return Region(problem, *numbers)

    def visible(self) -> Array:
        """Which pairs the mask shows."""
        problem = self.problem
        rule = problem.mask.bind(problem.len_q, problem.len_k)
        return exact(rule, **self._indices(rule))

    def scores(self, s: Array, inputs: Inputs) -> Array:
        """The modified scores of scaled products."""
        problem = self.problem
        assert problem.score is not None
        score = problem.score.expression(problem.score_sizes)
        return exact_real(score, s, **self._indices(score), inputs=inputs)

    @property
    def indices(self) -> dict[str, Array]:
        """The indices of all pairs, which broadcast to them."""
        problem = self.problem
        axes = np.arange(problem.batch), np.arange(problem.heads_q), self.rows, self.columns
        return dict(zip("bhqk", np.ix_(*axes), strict=True))

    def _indices(self, expression: Expression) -> dict[str, Any]:
        """The indices of all pairs; 0 for those that an expression does not name."""
        named = names(expression)
        return {name: x if name in named or name in "qk" else 0 for name, x in self.indices.items()}


def _numbers(name: str, index: Any, length: int) -> Array:
    """The numbers that an index picks of a length."""
    allowed = f"a slice or an array of whole numbers from {-length} to {length - 1}"
    picked = index if isinstance(index, slice) else np.asarray(index)
    if not isinstance(picked, slice) and (picked.ndim != 1 or picked.dtype.kind not in "iu"):
        if picked.size or picked.ndim != 1:
            raise TypeError(f"{name} must be {allowed}, got {shown(index)}")
        picked = picked.astype(np.int64)  # an empty list
    try:
        return np.arange(length)[picked]
    except IndexError:
        raise IndexError(f"{name} must be {allowed}, got {shown(index)}") from None
