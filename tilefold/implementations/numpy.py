"""The other implementations on NumPy arrays: attention composed of NumPy's own operations.

NumPy has no fused attention, so "native" is PyTorch's attention on the same memory, if PyTorch is
installed. Neither computes gradients, since NumPy arrays carry none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.arrays import numpy as arrays
from tilefold.backends.calls import check_extra
from tilefold.backends.extra import NOTHING, Extra
from tilefold.common.imports import why_not
from tilefold.frontends.numpy import arrays_of, as_array
from tilefold.implementations import refuse_extra
from tilefold.masks.evaluate import exact_real
from tilefold.masks.expression import as_real
from tilefold.masks.hiding import may_hide
from tilefold.planning.masked import MaskedProblem
from tilefold.problems import dropout
from tilefold.problems.attention import STATISTICS, Problem, describe
from tilefold.problems.request import LAYOUTS, Request

Array = NDArray[Any]


def composed(
    q: Any,
    k: Any,
    v: Any,
    request: Request,
    wants_lse: bool,
    extra: Extra = NOTHING,
    further: tuple[str, ...] = (),
) -> tuple[Array, ...]:
    """o and lse by two matrix products and a softmax, in the type of lse, for all pairs at once.

    With "max" as a `further` result also the largest scores. A score is folded in float64.
    """
    q, k, v = as_array("q", q), as_array("k", k), as_array("v", v)
    dtype = arrays.common_dtype({"q": q, "k": k, "v": v})
    problem = describe(q.shape, k.shape, v.shape, dtype, request)
    axes, kind = LAYOUTS[request.layout], STATISTICS[dtype]
    visible = request.mask.to_dense(problem.len_q, problem.len_k, problem.batch, problem.heads_q)
    queries, keys, values = (x.transpose(axes).astype(kind, copy=False) for x in (q, k, v))
    every = (problem.batch, problem.heads_q, problem.len_q)
    rows = (problem.batch, problem.heads_kv, -1)  # all queries that share a key head: one matrix
    named = dict(zip(extra.names, arrays_of(extra, q), strict=True))
    check_extra(arrays, named, problem)
    sinks = named["sinks"] if problem.sinks else np.zeros((problem.heads_q, 0), kind)
    if problem.empty:
        o = np.zeros((*every, problem.dim_v), q.dtype)
        lse = np.full(every, -np.inf, kind)
        largest = [lse.copy() for _ in further]
        lse[...] = np.logaddexp.reduce(sinks, axis=1, initial=-np.inf)[:, None]
        return np.ascontiguousarray(o.transpose(axes)), lse, *largest
    with np.errstate(all="ignore"):
        grouped = queries.reshape(*rows, problem.dim)
        s = (grouped @ keys.swapaxes(2, 3)).reshape(*every, problem.len_k)
        s, visible = _modified(problem, s * s.dtype.type(problem.scale), visible, named)
        s = np.where(visible, s, -np.inf)
        largest = [s.max(axis=3) for _ in further]
        m = np.maximum(s.max(axis=3), sinks.max(axis=1, initial=-np.inf)[:, None])[..., None]
        shift = np.where(m == -np.inf, s.dtype.type(0), m)
        p = np.exp(s - shift)
        total = p.sum(axis=3, keepdims=True)
        total += np.exp(sinks[:, None] - shift).sum(axis=3, keepdims=True)
        lse = (m + np.log(total))[..., 0]
        p = p / total
        if problem.dropout:
            seed = int(named["seed"][0])
            p *= dropout.factors(seed, problem.dropout, *every, problem.len_k).astype(kind)
        o = p.reshape(*rows, problem.len_k) @ values
        seen = np.broadcast_to(visible.any(axis=3, keepdims=True), (*every, 1))
        o = np.where(seen, o.reshape(*every, problem.dim_v), 0)
    o = np.ascontiguousarray(o.transpose(axes)).astype(q.dtype, copy=False)
    return o, lse, *largest


def _modified(
    problem: Problem, s: Array, visible: Array, named: Mapping[str, Array]
) -> tuple[Array, Array]:
    """The scores of all pairs and which are visible, from scaled products: -inf hides a pair."""
    if problem.score is None:
        return s, visible
    score = as_real(MaskedProblem.of(problem).score)
    indices = dict(zip("bhqk", np.ogrid[tuple(map(slice, s.shape))], strict=True))
    inputs = {given.number: named[given.name] for given in problem.score.inputs}
    s = exact_real(score, s, **indices, inputs=inputs).astype(s.dtype)
    return s, visible & (s != -np.inf) if may_hide(score) else visible


def native(
    q: Any,
    k: Any,
    v: Any,
    request: Request,
    wants_lse: bool,
    extra: Extra = NOTHING,
    further: tuple[str, ...] = (),
) -> tuple[Array, Array | None]:
    """o and lse by PyTorch's fused attention, on tensors that share memory with the arrays."""
    refuse_extra("native", request, further)
    if reason := why_not("torch"):
        raise ImportError(
            f"impl='native' is PyTorch's fused attention, since NumPy has none, and torch {reason}:"
            " pip install torch, or choose impl='composed' or impl='kernel'"
        )
    from tilefold.backends.arrays.torch import tensor_of
    from tilefold.implementations import torch

    q, k, v = as_array("q", q), as_array("k", k), as_array("v", v)
    arrays.common_dtype({"q": q, "k": k, "v": v})
    queries, keys, values = (tensor_of(array) for array in (q, k, v))
    o, lse = torch.native(queries, keys, values, request, wants_lse)
    assert o is not None
    return torch.array_of(o, q.dtype), None if lse is None else lse.numpy()


def tensorops(q: Any, k: Any, v: Any, *_: Any) -> tuple[Array, ...]:
    """Raises NotImplementedError, since NumPy arrays never lie on an Apple GPU."""
    raise NotImplementedError(
        "impl='tensorops' runs on Apple GPUs by Metal 4: q is a NumPy array; pass tensors on the"
        " device mps, or choose impl='composed', 'native' or 'kernel'"
    )
