"""PyTorch tensors in the transforms of `torch.func` and in forward mode; and second derivatives.

Two functions of autograd, one for each pass, say how it is differentiated, forward and backward,
and how it is vectorised. The passes themselves are the kernels. Their derivatives, beyond the first
backward pass, are in `derivatives`. Sinks are joined by torch's operations, which have all
derivatives. A small call takes 0.09 ms by such a function, and 0.05 ms by one that has a backward
pass alone (two cores of a Xeon, 16 queries and keys). So usual calls have functions of their own.

In `vmap` the axis joins the batch, and one call of a kernel serves all entries. Where entries have
arrays, pairs that fall out, or gradients of arrays of their own, each entry has a call of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilefold.frontends.torch import tensors
from tilefold.frontends.torch.derivatives.attention import move, pull, push
from tilefold.frontends.torch.derivatives.sums import nested
from tilefold.frontends.torch.joined import with_sinks
from tilefold.frontends.torch.observed import OPERATORS, unobserved
from tilefold.masks.expression import names
from tilefold.masks.repeated import repeated
from tilefold.problems.request import LAYOUTS, Request
from tilefold.scores.score import Sizes

if OPERATORS:
    from tilefold.frontends.torch import operators

Tensors = tuple[Tensor, ...]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: Request,
    arrays: Tensors = (),
    further: tuple[str, ...] = (),
) -> Tensors:
    """o and lse, and the `further` results of the pass, differentiable in every way."""
    inputs = arrays
    if request.sinks:
        place = len(arrays) - 1 - bool(request.dropout)
        inputs = arrays[:place] + arrays[place + 1 :]
    apply: Any = _Forward.apply
    o, lse, _, largest = apply(request.changed(sinks=0), further, q, k, v, *inputs)
    if request.sinks:
        o, lse = with_sinks(o, lse, arrays[place], request.layout)
    return (o, lse, largest) if further else (o, lse)


def attention_backward(
    given: Tensors,
    request: Request,
    dlse: Tensor | None,
    lse_low: Tensor | None,
    arrays: Tensors = (),
    wanted: Sequence[bool] = (),
) -> Tensors:
    """dq, dk, dv and the gradients of the wanted arrays, differentiable in every way.

    `given` are do, q, k, v, o and lse. There are no sinks: they are a part of lse.
    """
    apply: Any = _Backward.apply
    results: Tensors = apply(request, tuple(wanted), dlse, lse_low, *given, *arrays)
    return results


class _Forward(torch.autograd.Function):
    """The forward pass. The results after lse are no functions of the inputs to autograd."""

    @staticmethod
    def forward(request: Request, further: tuple[str, ...], *given: Tensor) -> Tensors:
        if not OPERATORS or unobserved(*given):
            o, lse, low, *rest = tensors.forward_extended(request, further, *given)
        else:
            q, k, v, *arrays = given
            if not arrays and not further:
                return (*operators.attention(q, k, v, request), q.new_empty(0))
            results: Tensors = operators.attention_extended(q, k, v, arrays, request, bool(further))
            return results
        nothing = lse.new_empty(0)
        return o, lse, nothing if low is None else low, rest[0] if rest else nothing.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.request, _, *given = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[:3], *given)
        ctx.save_for_forward(*output[:3], *given)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, *_: None) -> Any:
        o, lse, low, q, k, v, *arrays = ctx.saved_tensors
        given = torch.zeros_like(o) if do is None else do, q, k, v, o, lse
        kept = low if low.numel() else None
        wanted = ctx.needs_input_grad[5:]
        dq, dk, dv, *more = attention_backward(
            given, ctx.request, dlse, kept, tuple(arrays), wanted
        )
        return (None, None, dq, dk, dv, *spread(more, wanted))

    @staticmethod
    @nested
    def jvp(ctx: Any, saved: Sequence[Any], *tangents: Tensor | None) -> Any:
        o, lse, _, q, k, v, *arrays = saved
        return (*move((q, k, v, o, lse), arrays, ctx.request, tangents[2:]), None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, request: Request, further: Any, *given: Any) -> Any:
        def call(request: Request, *given: Any) -> Any:
            apply: Any = _Forward.apply
            return apply(request, further, *given)

        return vectorised(call, info.batch_size, in_dims[2:], request, given)


class _Backward(torch.autograd.Function):
    """The backward pass."""

    @staticmethod
    def forward(
        request: Request,
        wanted: tuple[bool, ...],
        dlse: Tensor | None,
        low: Tensor | None,
        *given: Tensor,
    ) -> Tensors:
        every = given if dlse is None else (*given, dlse)
        if not OPERATORS or unobserved(*every):
            return tensors.backward_extended(request, wanted, low, dlse, *given)
        if len(given) == 6:
            plain: Tensors = operators.attention_backward(*given, request, dlse, low)
            return plain
        backward = operators.attention_extended_backward
        *found, more = backward(*given[:6], [*given[6:]], request, [*wanted], dlse, low)
        return (*found, *more)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.request, ctx.wanted, dlse, _, *given = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dlse, *given)
        ctx.save_for_forward(dlse, *given)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> Any:
        dlse, *given = ctx.saved_tensors
        asked = ctx.needs_input_grad[10:]
        of_given, of_dlse, of_arrays = second_gradients(
            given, dlse, ctx.request, ctx.wanted, slopes, asked
        )
        return (None, None, of_dlse, None, *of_given, *of_arrays)

    @staticmethod
    @nested
    def jvp(ctx: Any, saved: Sequence[Any], *tangents: Tensor | None) -> Any:
        dlse, *given = saved
        dq, dk, dv, *more = push(
            given[:6], given[6:], dlse, ctx.request, tangents[4:], tangents[2], ctx.wanted
        )
        return (dq, dk, dv, *[x for x, asked in zip(more, ctx.wanted, strict=True) if asked])

    @staticmethod
    def vmap(info: Any, in_dims: Any, request: Request, wanted: Any, *given: Any) -> Any:
        def call(request: Request, *given: Any) -> Any:
            apply: Any = _Backward.apply
            dlse, low, *rest = given
            return apply(request, wanted, dlse, low, *rest)

        size, dims = info.batch_size, in_dims[2:]
        return vectorised(call, size, dims, request, given, first=3, apart=any(wanted))


def second_gradients(
    given: Sequence[Tensor],
    dlse: Tensor | None,
    request: Request,
    wanted: Sequence[bool],
    slopes: Sequence[Tensor | None],
    asked: Sequence[bool],
) -> tuple[Sequence[Tensor | None], Tensor | None, Sequence[Tensor | None]]:
    """The gradients of the arguments of the backward pass.

    `given` are do, q, k, v, o, lse and the arrays. `slopes` are the gradients of dq, dk, dv and of
    the gradients of the `wanted` arrays. Returned are the gradients of do, q, k, v, o and lse; of
    dlse; and of the arrays that are `asked` for.
    """
    six, arrays = given[:6], given[6:]
    if all(slope is None for slope in slopes):
        return [None] * 6, None, [None] * len(arrays)
    every = [*slopes[:3], *spread(slopes[3:], wanted)]
    of_do, of_dlse, *rest = pull(six, arrays, dlse, request, every, asked)
    return [of_do, *rest[:5]], None if dlse is None else of_dlse, rest[5:]


def spread(values: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    """The values at the places of the flags, None elsewhere."""
    left = iter(values)
    return [next(left) if flag else None for flag in flags]


def vectorised(
    call: Callable[..., Tensors],
    size: int,
    in_dims: Sequence[int | None],
    request: Request,
    given: Sequence[Any],
    *,
    first: int = 0,
    apart: bool = False,
) -> tuple[Tensors, tuple[int, ...]]:
    """The results of `call(request, *given)` for each entry of an axis, stacked.

    `first` is the place of q. k follows it; the arrays begin 3 places after it, and 6 places after
    do where there is one. `apart`: results are summed over the batch, so no entry may join it.
    """
    last = first + 3 if first == 0 else first + 5
    apart = apart or any(dim is not None for dim in in_dims[last:])
    q, k = (
        given[n] if in_dims[n] is None else given[n].select(in_dims[n], 0)
        for n in (first, first + 1)
    )
    if apart or _counts(request, q, k):
        results = [
            call(
                request,
                *[
                    x if dim is None else x.select(dim, number)
                    for x, dim in zip(given, in_dims, strict=True)
                ],
            )
            for number in range(size)
        ]
        made = tuple([torch.stack(each) for each in zip(*results, strict=True)])
    else:
        folded = [
            x if n >= last or x is None else _fold(x, in_dims[n], size) for n, x in enumerate(given)
        ]
        joined = call(_repeated(request, q, k), *folded)
        made = tuple([_unfold(x, size) for x in joined])
    return made, (0,) * len(made)


def _counts(request: Request, q: Tensor, k: Tensor) -> bool:
    """True where the number of an entry in the batch is asked for, by a score or by dropout."""
    if request.score is None or request.dropout:
        return bool(request.dropout)
    batch, heads, len_q, _ = (q.shape[axis] for axis in LAYOUTS[request.layout])
    len_k = k.shape[LAYOUTS[request.layout][2]]
    return "b" in names(request.score.expression(Sizes(batch, heads, len_q, len_k)))


def _fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    """An axis as a part of the batch, its slower part; a tensor without the axis is repeated."""
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _unfold(x: Tensor, size: int) -> Tensor:
    return x.reshape(size, x.shape[0] // size if size else 0, *x.shape[1:])


def _repeated(request: Request, q: Tensor, k: Tensor) -> Request:
    """The request for several batches: a rule that asks for the batch counts within one."""
    axes = LAYOUTS[request.layout]
    len_q, len_k = (x.shape[axes[2]] for x in (q, k))
    mask = repeated(request.mask, q.shape[axes[0]], len_q, len_k)
    return request.changed(mask=mask)
