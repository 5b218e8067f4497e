"""The arrays of a call beside q, k and v: what a score reads, sinks, and the seed of dropout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from tilefold.backends.protocols import Pass
from tilefold.common.foreign_arrays import dtype_name, unwrapped
from tilefold.masks.given import operands_of
from tilefold.problems.dropout import check_probability, check_seed
from tilefold.problems.request import Request
from tilefold.scores.functions import FLOATS, floats
from tilefold.scores.score import Score, as_score


class Extra(NamedTuple):
    """Extra arrays by their names, in the order in which passes take them."""

    names: tuple[str, ...]
    arrays: tuple[Any, ...]

    @property
    def gradients(self) -> tuple[str, ...]:
        """The names of the gradients, of all arrays that have one."""
        return tuple([f"d{name}" for name in self.names if name.startswith(("input", "sinks"))])

    @property
    def inputs(self) -> list[tuple[str, Any]]:
        """The arrays of a score, with their names."""
        named = zip(self.names, self.arrays, strict=True)
        return [(name, array) for name, array in named if name.startswith("input")]

    def fitted(
        self, wanted: Pass, results: Sequence[Any], fit: Callable[[Any, Any], Any]
    ) -> tuple[Any, ...]:
        """The results of a pass; `fit` gives the gradient of sinks their shape and type.

        It takes the gradient and the caller's sinks.
        """
        if "sinks" not in self.names:
            return tuple(results)
        sinks = self.arrays[self.names.index("sinks")]
        pairs = zip(wanted.results, results, strict=True)
        return tuple([fit(x, sinks) if name == "dsinks" else x for name, x in pairs])


NOTHING = Extra((), ())


@lru_cache(maxsize=64)
def names_of(request: Request, count: int) -> tuple[str, ...]:
    """The names of the `count` extra arrays of a request.

    >>> names_of(Request(dropout=0.1), 3)
    ('input0', 'input1', 'seed')
    """
    first = tuple([f"data{number}" for number in sorted(operands_of(request.mask))])
    last = ("sinks",) * bool(request.sinks) + ("seed",) * bool(request.dropout)
    least = len(first) + len(last)
    if count < least:
        raise ValueError(f"the request reads {least} extra arrays or more, got {count}")
    inputs = range(count - least)
    return (*first, *[f"input{number}" for number in inputs], *last)


def extended_request(
    request: Request, score: Score | None, sinks: int, dropout: float
) -> tuple[Request, tuple[Any, ...]]:
    """The request with a modified score, a number of sinks, and dropout; the score's arrays."""
    form, arrays = (None, ()) if score is None else score.form
    options = request.mask, request.scale, request.layout, request.precision
    return Request(*options, form, sinks, dropout), arrays


def taken_apart(
    request: Request,
    score: Any,
    sinks: Any = None,
    dropout: float = 0.0,
    seed: Any = None,
    extend: Callable[
        [Request, Score | None, int, float], tuple[Request, tuple[Any, ...]]
    ] = extended_request,
) -> tuple[Request, Extra]:
    """The request with a score's form, the number of sinks, and dropout.

    And the extra arrays: the score's, sinks, and the seed as kernels read it. `extend` is the
    frontend's `extended_request`.

    Raises TypeError or ValueError for a score or sinks that are none.
    """
    modified = as_score(score)
    if modified is None and sinks is None and not dropout:
        return request, NOTHING
    sinks = None if sinks is None else _floats(sinks)
    number = 0 if sinks is None else _sinks_of_head(sinks)
    request, arrays = extend(request, modified, number, dropout)
    names = [f"input{i}" for i in range(len(arrays))]
    for name, array in (("sinks", sinks), ("seed", seed if dropout else None)):
        if array is not None:
            names, arrays = [*names, name], (*arrays, array)
    return request, Extra(tuple(names), arrays)


def beside(
    q: Any, request: Request, score: Any, sinks: Any, dropout: Any, seed: Any
) -> tuple[Request, Extra]:
    """`taken_apart` for kernels that a caller runs directly: sinks are rows, and a seed is given.

    The seed is an array of the kind of `q`, in its place.

    Raises what `taken_apart` raises, and TypeError or ValueError for a probability or a seed that
    is none.
    """
    chance, drawn = check_probability(dropout), None
    if chance:
        drawn = np.array([check_seed(seed)])
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(q, torch.Tensor):
            drawn = torch.from_numpy(drawn).to(q.device)
    request, extra = taken_apart(request, score, sinks, chance, drawn)
    rows = [
        rows_of(array) if name == "sinks" else array
        for name, array in zip(extra.names, extra.arrays, strict=True)
    ]
    return request, Extra(extra.names, tuple(rows))


def rows_of(sinks: Any) -> Any:
    """Sinks as kernels read them: a row for each head."""
    return sinks[:, None] if len(sinks.shape) == 1 else sinks


def sinks_as_given(sinks: Any, wanted: Pass, results: Sequence[Any]) -> tuple[Any, ...]:
    """The results of a pass; the gradient of sinks has their shape."""
    one = sinks is not None and np.ndim(sinks) == 1
    pairs = zip(wanted.results, results, strict=True)
    return tuple(
        [
            array[:, 0] if name == "dsinks" and one and array is not None else array
            for name, array in pairs
        ]
    )


def _floats(sinks: Any) -> Any:
    """Sinks as an array of floats: numbers, nested lists and integers are converted.

    Raises TypeError for what is no array of numbers.
    """
    sinks = unwrapped(sinks)
    given = hasattr(sinks, "dtype") and dtype_name(sinks) in FLOATS
    return sinks if given else floats("sinks", sinks).held


def _sinks_of_head(sinks: Any) -> int:
    """The number of sinks of each head. Raises ValueError for another shape."""
    shape = tuple(sinks.shape)
    if not 1 <= len(shape) <= 2 or 0 in shape[1:]:
        raise ValueError(f"sinks must have shape (heads,) or (heads, number), got {shape}")
    if None in shape[1:]:
        raise NotImplementedError(
            "sinks must have a number of them for each head that is known while the function is"
            f" traced, got shape {shape}"
        )
    return int(shape[1]) if len(shape) == 2 else 1
