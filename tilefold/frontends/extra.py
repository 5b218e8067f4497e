"""The arrays of a call beside q, k and v: what a score reads, sinks, and the seed of dropout."""

from __future__ import annotations

from typing import Any, NamedTuple

from tilefold.problems.request import Request
from tilefold.scores.score import as_score


class Extra(NamedTuple):
    """Extra arrays by their names, in the order in which passes take them."""

    names: tuple[str, ...]
    arrays: tuple[Any, ...]

    @property
    def gradients(self) -> tuple[str, ...]:
        """The names of the gradients, of all arrays that have one."""
        return tuple([f"d{name}" for name in self.names if name != "seed"])


NOTHING = Extra((), ())


def taken_apart(request: Request, score: Any) -> tuple[Request, Extra]:
    """The request with a score's form, and the score's arrays.

    Raises TypeError for a score that is none.
    """
    modified = as_score(score)
    if modified is None:
        return request, NOTHING
    form, arrays = modified.form
    names = tuple([f"input{number}" for number in range(len(arrays))])
    options = request.mask, request.scale, request.layout, request.precision
    return Request(*options, form, request.sinks, request.dropout), Extra(names, arrays)
