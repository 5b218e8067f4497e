"""The other implementations on NumPy arrays: attention composed of NumPy's own operations.

NumPy has no fused attention, so "native" is PyTorch's attention on the same memory, if PyTorch is
installed. Neither computes gradients, since NumPy arrays carry none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.arrays.numpy import common_dtype
from tilefold.common.imports import why_not
from tilefold.frontends.numpy import as_array
from tilefold.problems.attention import STATISTICS, describe
from tilefold.problems.request import LAYOUTS, Request

Array = NDArray[Any]


def composed(
    q: Any,
    k: Any,
    v: Any,
    request: Request,
    wants_lse: bool,
) -> tuple[Array, Array]:
    """o and lse by two matrix products and a softmax, in the type of lse, for all pairs at once."""
    q, k, v = as_array("q", q), as_array("k", k), as_array("v", v)
    dtype = common_dtype({"q": q, "k": k, "v": v})
    problem = describe(q.shape, k.shape, v.shape, dtype, request)
    axes, kind = LAYOUTS[request.layout], STATISTICS[dtype]
    visible = request.mask.to_dense(problem.len_q, problem.len_k, problem.batch, problem.heads_q)
    queries, keys, values = (x.transpose(axes).astype(kind, copy=False) for x in (q, k, v))
    every = (problem.batch, problem.heads_q, problem.len_q)
    rows = (problem.batch, problem.heads_kv, -1)  # all queries that share a key head: one matrix
    if problem.empty:
        o = np.zeros((*every, problem.dim_v), q.dtype)
        return np.ascontiguousarray(o.transpose(axes)), np.full(every, -np.inf, kind)
    with np.errstate(all="ignore"):
        grouped = queries.reshape(*rows, problem.dim)
        s = (grouped @ keys.swapaxes(2, 3)).reshape(*every, problem.len_k)
        s = np.where(visible, s * s.dtype.type(problem.scale), -np.inf)
        m = s.max(axis=3, keepdims=True)
        p = np.exp(s - np.where(m == -np.inf, s.dtype.type(0), m))
        total = p.sum(axis=3, keepdims=True)
        lse = (m + np.log(total))[..., 0]
        o = (p / total).reshape(*rows, problem.len_k) @ values
        seen = np.broadcast_to(visible.any(axis=3, keepdims=True), (*every, 1))
        o = np.where(seen, o.reshape(*every, problem.dim_v), 0)
    return np.ascontiguousarray(o.transpose(axes)).astype(q.dtype, copy=False), lse


def native(
    q: Any,
    k: Any,
    v: Any,
    request: Request,
    wants_lse: bool,
) -> tuple[Array, Array | None]:
    """o and lse by PyTorch's fused attention, on tensors that share memory with the arrays."""
    if reason := why_not("torch"):
        raise ImportError(
            f"impl='native' is PyTorch's fused attention, since NumPy has none, and torch {reason}:"
            " pip install torch, or choose impl='composed' or impl='kernel'"
        )
    from tilefold.backends.arrays.torch import tensor_of
    from tilefold.implementations import torch

    q, k, v = as_array("q", q), as_array("k", k), as_array("v", v)
    common_dtype({"q": q, "k": k, "v": v})
    queries, keys, values = (tensor_of(array) for array in (q, k, v))
    o, lse = torch.native(queries, keys, values, request, wants_lse)
    return torch.array_of(o, q.dtype), None if lse is None else lse.numpy()


def tensorops(q: Any, k: Any, v: Any, *_: Any) -> tuple[Array, Array]:
    """Raises NotImplementedError, since NumPy arrays never lie on an Apple GPU."""
    raise NotImplementedError(
        "impl='tensorops' runs on Apple GPUs by Metal 4: q is a NumPy array; pass tensors on the"
        " device mps, or choose impl='composed', 'native' or 'kernel'"
    )
