"""Attention maps of NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends import calls
from tilefold.backends.arrays import numpy as arrays
from tilefold.backends.protocols import KEY_MASS, spoken
from tilefold.backends.registry import machine
from tilefold.frontends.numpy import as_array
from tilefold.frontends.numpy import attention as attend
from tilefold.maps.region import Asked, Region
from tilefold.problems.attention import (
    STATISTICS,
    Problem,
    check_lse,
    check_shape,
    describe,
    shape_lse,
)
from tilefold.problems.request import LAYOUTS, Request

Array = NDArray[Any]


def key_mass(q: Any, k: Any, lse: Any, asked: Asked) -> Array:
    """See `tilefold.key_mass`."""
    q, k = as_array("q", q), as_array("k", k)
    lse = _lse(q, k, lse, asked, _problem(q, k, asked.plain))
    inputs = _inputs(asked)
    wanted = KEY_MASS.plus(tuple([name for name, _ in asked.extra.inputs]))
    mass: Array
    (mass,) = calls.run(machine("cpu"), arrays, wanted, (q, k, lse, *inputs), asked.plain)
    return mass


def weights(
    q: Any,
    k: Any,
    lse: Any,
    rows: Any,
    columns: Any,
    asked: Asked,
) -> Array:
    """See `tilefold.weights`."""
    q, k = as_array("q", q), as_array("k", k)
    problem = _problem(q, k, asked.plain)
    region = Region.of(problem, rows, columns)
    lse = _lse(q, k, lse, asked, problem)
    kind, axes = STATISTICS[problem.dtype], LAYOUTS[asked.plain.layout]
    queries = q.transpose(axes)[:, :, region.rows].astype(kind)
    keys = k.transpose(axes)[:, :, region.columns].astype(kind)
    shape = (*queries.shape[:3], keys.shape[2])
    if 0 in shape:
        return np.zeros(shape, kind)
    grouped = queries.reshape(*keys.shape[:2], -1, problem.dim)
    with np.errstate(all="ignore"):
        s = (grouped @ keys.swapaxes(2, 3)).reshape(shape) * np.dtype(kind).type(problem.scale)
        visible = region.visible()
        if problem.score is not None:
            s = region.scores(s, dict(enumerate(_inputs(asked))))
            visible = visible & (s != -np.inf)
        p = np.exp(s - lse[:, :, region.rows, None])
    return np.where(visible, p, 0).astype(kind, copy=False)


def _problem(q: Array, k: Array, request: Request) -> Problem:
    dtype = arrays.common_dtype({"q": q, "k": k})
    return describe(q.shape, k.shape, k.shape, dtype, request)


def _inputs(asked: Asked) -> tuple[Array, ...]:
    return tuple([as_array(spoken(name), array) for name, array in asked.extra.inputs])


def _lse(q: Array, k: Array, lse: Any, asked: Asked, problem: Problem) -> Array:
    """The given lse, or that of the forward pass, with one element of each key as its value."""
    if lse is None:
        one = [slice(None)] * 4
        one[LAYOUTS[asked.plain.layout].index(3)] = slice(1)
        return attend(q, k, k[tuple(one)], asked.request, asked.extra)[1]
    given = as_array("lse", lse)
    check_lse(given.dtype.name, problem.dtype)
    check_shape("lse", given.shape, shape_lse(problem))
    asked.check_sinks(problem.heads_q)
    return given
