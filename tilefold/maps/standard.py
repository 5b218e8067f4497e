"""Attention maps of arrays that follow the array API standard, by NumPy's, of their own kind."""

from __future__ import annotations

from typing import Any

from tilefold.frontends.standard import given_back
from tilefold.maps import numpy
from tilefold.maps.region import Asked


def key_mass(q: Any, k: Any, lse: Any, asked: Asked) -> Any:
    """See `tilefold.key_mass`."""
    return given_back((numpy.key_mass(q, k, lse, asked),), q=q, k=k, lse=lse)[0]


def weights(q: Any, k: Any, lse: Any, rows: Any, columns: Any, asked: Asked) -> Any:
    """See `tilefold.weights`."""
    return given_back((numpy.weights(q, k, lse, rows, columns, asked),), q=q, k=k, lse=lse)[0]
