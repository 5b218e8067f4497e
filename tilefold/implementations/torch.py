"""The other implementations on torch tensors, on any device, differentiable by torch's own ops.

"composed" and "native" are written as a user of torch would write them. So NaN and infinity behave
as in torch: a hidden key is multiplied by 0, and 0 * NaN is NaN. The precision of products of
float32 tensors is torch's setting (`torch.set_float32_matmul_precision`). A query that sees no key
has tilefold's results: o = 0, lse = -inf and gradients 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tilefold.backends import calls
from tilefold.backends.arrays import torch as arrays
from tilefold.backends.extra import NOTHING, Extra
from tilefold.backends.protocols import BACKWARD
from tilefold.common.lru import LruCache
from tilefold.frontends.torch.autocast import lowered
from tilefold.frontends.torch.derivatives.formula import Formula
from tilefold.frontends.torch.extended import tensors_of
from tilefold.implementations import refuse_extra
from tilefold.masks.hiding import may_hide
from tilefold.masks.position_rules import causal, full
from tilefold.planning.masked import MaskedProblem
from tilefold.problems import dropout
from tilefold.problems.attention import (
    STATISTICS,
    Problem,
    common_dtype,
    describe,
    shape_lse,
    shape_o,
)
from tilefold.problems.request import LAYOUTS, Request

Array = NDArray[Any]


@lowered
def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: Request,
    wants_lse: bool,
    extra: Extra = NOTHING,
    further: tuple[str, ...] = (),
) -> tuple[Tensor | None, ...]:
    """o and lse by two matrix products and a softmax, in the type of lse, for all pairs at once.

    With "max" as a `further` result also the largest scores.
    """
    problem = _problem(q, k, v, request)
    named = _named(problem, extra, q)
    axes = LAYOUTS[request.layout]
    queries, keys, values = (x.permute(axes) for x in (q, k, v))
    s, nothing = _scores(problem, queries, keys, named)
    p = s.softmax(dim=3)
    if nothing is not None:
        p = p.masked_fill(nothing, 0)
    p = p[..., : problem.len_k]
    if problem.dropout:
        sizes = problem.batch, problem.heads_q, problem.len_q, problem.len_k
        kept = dropout.factors(int(named["seed"]), problem.dropout, *sizes)
        p = p * torch.from_numpy(kept).to(p)
    o = _of_groups(problem, p) @ values.to(s.dtype)
    o = o.reshape(problem.batch, problem.heads_q, problem.len_q, problem.dim_v)
    lse = _lse(s, nothing) if wants_lse else None
    largest = [_largest(s.detach()[..., : problem.len_k], nothing) for _ in further]
    return o.permute(axes).to(q.dtype).contiguous(), lse, *largest


@lowered
def native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: Request,
    wants_lse: bool,
    extra: Extra = NOTHING,
    further: tuple[str, ...] = (),
) -> tuple[Tensor | None, ...]:
    """o by `scaled_dot_product_attention`, and lse by the scores of "composed" if it is wanted."""
    refuse_extra("native", request, further)
    problem = _problem(q, k, v, request)
    if problem.empty:  # no fused kernel takes a length of 0
        return composed(q, k, v, request, wants_lse)
    axes = LAYOUTS[request.layout]
    queries, keys, values = (x.permute(axes) for x in (q, k, v))
    options: dict[str, Any] = {"scale": problem.scale}
    if problem.heads_q != problem.heads_kv:
        options["enable_gqa"] = True
    nothing = None
    if _is_causal(problem):
        options["is_causal"] = True
    elif request.mask != full():
        hidden, nothing = _hidden(problem, q.device)
        options["attn_mask"] = ~hidden
    o = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, **options)
    if nothing is not None:
        o = o.masked_fill(nothing, 0)
    lse = _lse(*_scores(problem, queries, keys, {})) if wants_lse else None
    return o.permute(axes).contiguous(), lse


@lowered
def tensorops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: Request,
    wants_lse: bool,
    extra: Extra = NOTHING,
    further: tuple[str, ...] = (),
) -> tuple[Tensor | None, ...]:
    """o and lse by Metal's tensor operations; gradients by tilefold's other Metal kernels.

    Raises NotImplementedError, with the reason, if there are no tensor operations.
    """
    refuse_extra("tensorops", request, further)
    problem = _problem(q, k, v, request)
    reason = f"q is on {q.device}"
    if q.is_mps:
        from tilefold.backends.metal import gated, runtime

        found = gated.missing()
        if found is None:
            run: Any = _TensorOps.apply
            result: tuple[Tensor, Tensor] = run(runtime.gpu(), problem, request, q, k, v)
            return result
        reason = found
    raise NotImplementedError(
        f"impl='tensorops' runs on Apple GPUs by Metal 4: {reason}; choose impl='composed',"
        " 'native' or 'kernel'"
    )


class _TensorOps(torch.autograd.Function):
    """A forward pass by tensor operations on a machine of Metal kernels."""

    @staticmethod
    def forward(ctx: Any, machine: Any, problem: Problem, request: Request, *given: Tensor) -> Any:
        from tilefold.backends.metal import dispatch, gated

        axes = LAYOUTS[request.layout]
        o = given[0].new_empty(shape_o(problem, request.layout))
        lse = given[0].new_empty(shape_lse(problem), dtype=torch.float32)
        if problem.empty:
            o.zero_()
            lse.fill_(-torch.inf)
        else:
            views = (tensor.permute(axes) for tensor in (*given, o))
            operands = dict(zip(("q", "k", "v", "o"), views, strict=True), lse=lse)
            dispatch.execute(gated.plan(problem, machine.family), machine, operands)
        ctx.rest = machine, request
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, o, lse)
        return o, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Any:
        machine, request = ctx.rest
        q, k, v, o, lse = ctx.saved_tensors
        given: tuple[Tensor, ...] = torch.zeros_like(o) if do is None else do, q, k, v, o, lse
        wanted = BACKWARD
        if dlse is not None:
            wanted, given = wanted.plus(("dlse",)), (*given, dlse)
        gradients = calls.run(machine, arrays, wanted, given, request)
        return (None, None, None, *gradients)


def devices() -> tuple[str, ...]:
    """The devices of this machine by torch's names: the CPU, and an accelerator if there is one."""
    there = torch.accelerator.current_accelerator(check_available=True)
    return ("cpu",) if there is None else ("cpu", there.type)


def finish(device: str) -> None:
    """Wait until a device has finished its work; the CPU has finished when a call returns."""
    if device != "cpu":
        torch.accelerator.synchronize()


def array_of(tensor: Tensor, dtype: np.dtype[Any]) -> Array:
    """The memory of a tensor as an array; `dtype` is NumPy's name of the tensor's type."""
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(dtype)
    return tensor.numpy()


def _scores(
    problem: Problem, queries: Tensor, keys: Tensor, named: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Scores of all pairs, -inf for hidden ones, and the rows that see nothing (None if none do).

    Sinks are further columns. A row that sees nothing keeps other numbers: the softmax of a row of
    -inf, and its gradients, would be NaN.
    """
    kind = getattr(torch, STATISTICS[problem.dtype])
    scaled = _of_groups(problem, queries.to(kind) * problem.scale)
    s = scaled @ keys.to(kind).transpose(2, 3)
    s = s.reshape(problem.batch, problem.heads_q, problem.len_q, problem.len_k)
    if problem.score is not None or problem.sinks:
        return _modified(problem, s, named)
    if problem.mask == full():
        return s, None
    hidden, nothing = _hidden(problem, queries.device)
    return s.masked_fill(hidden, -torch.inf), nothing


def _modified(
    problem: Problem, s: Tensor, named: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """`_scores` of scaled products, with a modified score or with sinks."""
    hidden = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=s.device)
    if problem.mask != full():
        hidden, nothing = _hidden(problem, s.device)
        hidden = hidden if nothing is None else hidden | nothing
    masked = MaskedProblem.of(problem)
    if masked.score is not None:
        indices = dict(zip("bhqk", np.ogrid[tuple(map(slice, s.shape))], strict=True))
        s = Formula(masked.score, indices)(s, *[named[x] for x in named if x.startswith("input")])
        hidden = hidden | (s == -torch.inf) if may_hide(masked.score) else hidden
    s = s.masked_fill(hidden, -torch.inf)
    if problem.sinks:
        sinks = named["sinks"][:, None].expand(problem.batch, -1, problem.len_q, -1)
        hidden = torch.cat((hidden.expand(s.shape), sinks == -torch.inf), dim=3)
        s = torch.cat((s, sinks), dim=3)
    nothing = hidden.expand(s.shape).all(dim=3, keepdim=True)
    return s.masked_fill(nothing, 0), nothing


def _of_groups(problem: Problem, rows: Tensor) -> Tensor:
    """The rows of all query heads that share a key head, as the rows of one matrix."""
    group = problem.heads_q // max(1, problem.heads_kv)
    shape = problem.batch, problem.heads_kv, group * problem.len_q, rows.shape[3]
    return rows.reshape(shape)


def _lse(s: Tensor, nothing: Tensor | None) -> Tensor:
    """The log-sum-exp of each row of scores."""
    lse = s.logsumexp(dim=3)
    return lse if nothing is None else lse.masked_fill(nothing[..., 0], -torch.inf)


def _largest(s: Tensor, nothing: Tensor | None) -> Tensor:
    """The largest score of each row, -inf for those that see nothing."""
    largest = s.amax(dim=3) if s.shape[3] else s.new_full(s.shape[:3], -torch.inf)
    return largest if nothing is None else largest.masked_fill(nothing[..., 0], -torch.inf)


_masks: LruCache[tuple[Tensor, Tensor | None]] = LruCache(most=8, most_bytes=64 * 2**20)


def _hidden(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The hidden pairs of rows that see something, and the rows that see nothing, if any."""
    sizes = problem.len_q, problem.len_k, problem.batch, problem.heads_q
    key = (problem.mask, *sizes, device)
    made = _masks.get(key)
    if made is None:
        visible = problem.mask.to_dense(*sizes)
        nothing = ~visible.any(axis=3, keepdims=True)
        hidden = torch.from_numpy(~(visible | nothing)).to(device)
        empty = torch.from_numpy(nothing).to(device) if nothing.any() else None
        made = _masks.put(key, (hidden, empty), visible.nbytes)
    return made


def _is_causal(problem: Problem) -> bool:
    """True if the rule equals torch's causal flag, which aligns the first query and key."""
    square = problem.len_q == problem.len_k
    return problem.mask == causal("start") or (square and problem.mask == causal())


def _named(problem: Problem, extra: Extra, q: Tensor) -> dict[str, Tensor]:
    """Extra arrays by their names, as kernels read them. Raises for those that do not fit."""
    named = dict(zip(extra.names, tensors_of(extra, q), strict=True))
    calls.check_extra(arrays, named, problem)
    return named


def _problem(q: Tensor, k: Tensor, v: Tensor, request: Request) -> Problem:
    """The problem of a call. Raises errors that torch would not raise, or not as clearly."""
    names = {"q": q, "k": k, "v": v}
    for name, tensor in names.items():
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {tensor.device}")
        arrays.check_held(name, tensor)
    dtype = common_dtype({name: str(x.dtype).removeprefix("torch.") for name, x in names.items()})
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    return describe(*shapes, dtype, request)
