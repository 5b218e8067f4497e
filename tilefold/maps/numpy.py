"""Attention maps of NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends import calls
from tilefold.backends.arrays import numpy as arrays
from tilefold.backends.protocols import KEY_MASS
from tilefold.backends.registry import machine
from tilefold.frontends.numpy import as_array
from tilefold.frontends.numpy import attention as attend
from tilefold.maps.region import Asked, Region
from tilefold.problems.attention import STATISTICS, check_lse, check_shape, describe, shape_lse
from tilefold.problems.request import LAYOUTS

Array = NDArray[Any]


def key_mass(q: Any, k: Any, lse: Any, asked: Asked) -> Array:
    """See `tilefold.key_mass`."""
    q, k = as_array("q", q), as_array("k", k)
    lse = _lse(q, k, lse, asked)
    inputs = tuple([as_array(*named) for named in asked.extra.inputs])
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
    dtype = arrays.common_dtype({"q": q, "k": k})
    problem = describe(q.shape, k.shape, k.shape, dtype, asked.plain)
    region = Region.of(problem, rows, columns)
    lse = _lse(q, k, lse, asked)
    check_lse(lse.dtype.name, dtype)
    check_shape("lse", lse.shape, shape_lse(problem))
    kind, axes = STATISTICS[dtype], LAYOUTS[asked.plain.layout]
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
            inputs = {i: as_array(*named) for i, named in enumerate(asked.extra.inputs)}
            s = region.scores(s, inputs)
            visible = visible & (s != -np.inf)
        p = np.exp(s - lse[:, :, region.rows, None])
    return np.where(visible, p, 0).astype(kind, copy=False)


def _lse(q: Array, k: Array, lse: Any, asked: Asked) -> Array:
    """The given lse, or that of the forward pass, with one element of each key as its value."""
    if lse is not None:
        return as_array("lse", lse)
    one = [slice(None)] * k.ndim
    one[LAYOUTS[asked.plain.layout].index(3) if k.ndim == 4 else -1] = slice(1)
    return attend(q, k, k[tuple(one)], asked.request, asked.extra)[1]
