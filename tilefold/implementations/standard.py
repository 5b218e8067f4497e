"""The implementations of NumPy on arrays of libraries that follow the array API standard.

They view the arrays, and give results of their kind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from tilefold.frontends.standard import given_back
from tilefold.implementations import Implementation, numpy


def _of_their_kind(run: Implementation) -> Callable[..., tuple[Any, ...]]:
    @wraps(run)
    def implementation(q: Any, k: Any, v: Any, *options: Any) -> tuple[Any, ...]:
        return given_back(run(q, k, v, *options), q=q, k=k, v=v)

    return implementation


composed = _of_their_kind(numpy.composed)
native = _of_their_kind(numpy.native)
tensorops = numpy.tensorops
