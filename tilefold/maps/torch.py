"""Attention maps of PyTorch tensors, on any device.

The weights of a region are made by torch's own operations, which have all derivatives. The mask is
folded on the processor. The mass of keys is a kernel on processors; elsewhere it is the sum of the
weights of some rows after others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilefold.backends import calls
from tilefold.backends.arrays import torch as arrays
from tilefold.backends.extra import NOTHING
from tilefold.backends.protocols import KEY_MASS
from tilefold.backends.registry import machine
from tilefold.frontends.torch import tensors
from tilefold.frontends.torch.calls import attention as attend
from tilefold.frontends.torch.derivatives.formula import Formula
from tilefold.frontends.torch.extended import tensors_of
from tilefold.frontends.torch.observed import lifted, recorded
from tilefold.maps.region import Asked, Region
from tilefold.problems.attention import Problem, check_lse, check_shape, describe, shape_lse
from tilefold.problems.request import LAYOUTS, Request

_PAIRS = 2**24
"""Pairs of a block of rows, over batch and heads, where the mass is summed by torch: 64 MiB."""


def key_mass(q: Tensor, k: Tensor, lse: Tensor | None, asked: Asked) -> Tensor:
    """See `tilefold.key_mass`."""
    inputs = [x for _, x in asked.extra.inputs if isinstance(x, Tensor)]
    every = [q, k, *([] if lse is None else [lse]), *inputs]
    if recorded(*every) or lifted():
        raise NotImplementedError(
            "key_mass has no derivatives, and no place in transforms of torch.func: call it under"
            " torch.no_grad(), or sum tilefold.weights over its rows"
        )
    problem = _problem(q, k, asked.plain)
    lse = _lse(q, k, lse, asked, problem)
    if q.is_cpu:
        given = q, k, lse, *_inputs(asked, q)
        wanted = KEY_MASS.plus(tuple([name for name, _ in asked.extra.inputs]))
        found: tuple[Tensor, ...] = calls.run(machine("cpu"), arrays, wanted, given, asked.plain)
        return found[0]
    mass = lse.new_zeros(problem.batch, problem.heads_q, problem.len_k)
    step = max(1, _PAIRS // max(1, problem.batch * problem.heads_q * problem.len_k))
    for first in range(0, problem.len_q, step):
        part = Region.of(problem, slice(first, first + step), slice(None))
        mass += _weights(q, k, lse, part, asked).sum(dim=2)
    return mass


def weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    rows: Any,
    columns: Any,
    asked: Asked,
) -> Tensor:
    """See `tilefold.weights`."""
    problem = _problem(q, k, asked.plain)
    region = Region.of(problem, rows, columns)
    lse = _lse(q, k, lse, asked, problem)
    return _weights(q, k, lse, region, asked)


def _problem(q: Tensor, k: Tensor, request: Request) -> Problem:
    dtype = tensors.check(q=q, k=k)
    return describe(tuple(q.shape), tuple(k.shape), tuple(k.shape), dtype, request)


def _lse(q: Tensor, k: Tensor, lse: Tensor | None, asked: Asked, problem: Problem) -> Tensor:
    """The given lse, or that of the forward pass, with one element of each key as its value."""
    if lse is None:
        values = k.narrow(LAYOUTS[asked.plain.layout].index(3), 0, 1)
        more = () if asked.extra is NOTHING else (asked.extra,)
        return attend(q, k, values, asked.request, *more)[1]
    check_lse(arrays.dtype_of(lse), problem.dtype)
    check_shape("lse", tuple(lse.shape), shape_lse(problem))
    asked.check_sinks(problem.heads_q)
    return lse


def _inputs(asked: Asked, q: Tensor) -> list[Tensor]:
    """The arrays of the score as tensors on the device of `q`."""
    named = zip(asked.extra.names, tensors_of(asked.extra, q), strict=True)
    return [tensor for name, tensor in named if name.startswith("input")]


def _weights(q: Tensor, k: Tensor, lse: Tensor, region: Region, asked: Asked) -> Tensor:
    axes, problem = LAYOUTS[asked.plain.layout], region.problem
    rows, columns = (torch.from_numpy(x).to(q.device) for x in (region.rows, region.columns))
    queries = q.permute(axes).index_select(2, rows).to(lse.dtype) * problem.scale
    keys = k.permute(axes).index_select(2, columns).to(lse.dtype)
    shape = (*queries.shape[:3], keys.shape[2])
    if 0 in shape:
        return lse.new_zeros(shape)
    grouped = queries.reshape(*keys.shape[:2], -1, problem.dim)
    s = (grouped @ keys.transpose(2, 3)).reshape(shape)
    hidden = torch.from_numpy(~region.visible()).to(q.device)
    if problem.score is not None:
        score = problem.score.expression(problem.score_sizes)
        s = Formula(score, region.indices)(s, *_inputs(asked, q))
        hidden = hidden | (s == -torch.inf)
    shift = s - lse.index_select(2, rows).unsqueeze(3)
    return shift.masked_fill(hidden, -torch.inf).exp()
