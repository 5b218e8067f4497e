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
from tilefold.masks.derivative import derivatives
from tilefold.masks.evaluate import exact, exact_real
from tilefold.masks.expression import Expression, FromInteger, names
from tilefold.masks.tables import Input
from tilefold.problems.attention import Problem
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
        return self._value(self._score(), s, inputs)

    def slopes(self, s: Array, inputs: Inputs) -> Array:
        """Their derivatives with respect to the scaled products."""
        return self._value(derivatives(self._score()).score, s, inputs)

    def gradients(self, s: Array, ds: Array, inputs: Inputs) -> dict[int, Array]:
        """The gradients of the arrays, from `ds`, the gradient of the modified scores."""
        found = {number: np.zeros(array.shape) for number, array in inputs.items()}
        for entry, slope in derivatives(self._score()).entries:
            if isinstance(entry.table, Input):
                change = np.where(ds == 0, 0, ds * self._value(slope, s, inputs))
                places = [self._value(FromInteger(index), s, inputs) for index in entry.indices]
                at = tuple([place.astype(np.int64) for place in places])
                total = found[entry.table.number]
                if at:
                    np.add.at(total, at, change)
                else:
                    total += change.sum()
        return found

    def _score(self) -> Any:
        problem = self.problem
        assert problem.score is not None
        return problem.score.expression(problem.score_sizes)

    def _value(self, expression: Expression, s: Array, inputs: Inputs) -> Array:
        return exact_real(expression, s, **self._indices(expression), inputs=inputs)

    def _indices(self, expression: Expression) -> dict[str, Any]:
        """The indices of all pairs; 0 for those that an expression does not name."""
        named, problem = names(expression), self.problem
        b = np.arange(problem.batch if "b" in named else 1)[:, None, None, None]
        h = np.arange(problem.heads_q if "h" in named else 1)[:, None, None]
        return {"b": b, "h": h, "q": self.rows[:, None], "k": self.columns}


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
