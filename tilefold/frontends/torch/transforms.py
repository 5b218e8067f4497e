"""PyTorch tensors in the transforms of `torch.func` and in forward mode; and second derivatives.

Two functions of autograd, one for each pass, say how it is differentiated, forward and backward,
and how it is vectorised. The passes themselves are the kernels. Their derivatives, beyond the first
backward pass, are in `derivatives`. Sinks are joined by torch's operations, which have all
derivatives. A small call takes 0.09 ms by such a function, and 0.05 ms by one that has a backward
pass alone (two cores of a Xeon, 16 queries and keys). So usual calls have functions of their own.

In `vmap` the axis joins the batch, and one call of a kernel serves all entries. With dropout each
entry has a call of its own, since the number in the batch decides which pairs fall out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilefold.backends.extra import names_of
from tilefold.frontends.torch import operators, tensors
from tilefold.frontends.torch.batched import mapped
from tilefold.frontends.torch.derivatives.attention import move, pull, push
from tilefold.frontends.torch.derivatives.sums import nested
from tilefold.frontends.torch.joined import with_sinks
from tilefold.frontends.torch.observed import unobserved
from tilefold.frontends.torch.outside import uncompiled
from tilefold.masks.expression import names
from tilefold.masks.repeated import repeated
from tilefold.problems.request import LAYOUTS, Request
from tilefold.scores.repeated import repeated_score
from tilefold.scores.score import Sizes

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


@mapped
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
    @uncompiled
    def forward(request: Request, further: tuple[str, ...], *given: Tensor) -> Tensors:
        if unobserved(*given):
            o, lse, low, *rest = tensors.forward_extended(request, further, *given)
        else:
            q, k, v, *arrays = given
            o, lse, kept, largest = operators.run(request, q, k, v, arrays, bool(further))
            return o, lse, kept, q.new_empty(0) if largest is None else largest
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
    @uncompiled
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
    @uncompiled
    @nested
    def jvp(ctx: Any, saved: Sequence[Any], *tangents: Tensor | None) -> Any:
        o, lse, _, q, k, v, *arrays = saved
        return (*move((q, k, v, o, lse), arrays, ctx.request, tangents[2:]), None, None)

    @staticmethod
    @uncompiled
    def vmap(info: Any, in_dims: Any, request: Request, further: Any, *given: Any) -> Any:
        def call(request: Request, *given: Any) -> Any:
            apply: Any = _Forward.apply
            return apply(request, further, *given)

        return vectorised(call, info.batch_size, in_dims[2:], request, given)


class _Backward(torch.autograd.Function):
    """The backward pass."""

    @staticmethod
    @uncompiled
    def forward(
        request: Request,
        wanted: tuple[bool, ...],
        dlse: Tensor | None,
        low: Tensor | None,
        *given: Tensor,
    ) -> Tensors:
        every = given if dlse is None else (*given, dlse)
        if unobserved(*every):
            return tensors.backward_extended(request, wanted, low, dlse, *given)
        *found, more = operators.run_backward(request, given[:6], given[6:], wanted, dlse, low)
        return (*found, *more)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.request, ctx.wanted, dlse, _, *given = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dlse, *given)
        ctx.save_for_forward(dlse, *given)

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *slopes: Tensor | None) -> Any:
        dlse, *given = ctx.saved_tensors
        asked = ctx.needs_input_grad[10:]
        of_given, of_dlse, of_arrays = second_gradients(
            given, dlse, ctx.request, ctx.wanted, slopes, asked
        )
        return (None, None, of_dlse, None, *of_given, *of_arrays)

    @staticmethod
    @uncompiled
    @nested
    def jvp(ctx: Any, saved: Sequence[Any], *tangents: Tensor | None) -> Any:
        dlse, *given = saved
        dq, dk, dv, *more = push(
            given[:6], given[6:], dlse, ctx.request, tangents[4:], tangents[2], ctx.wanted
        )
        return (dq, dk, dv, *[x for x, asked in zip(more, ctx.wanted, strict=True) if asked])

    @staticmethod
    @uncompiled
    def vmap(info: Any, in_dims: Any, request: Request, wanted: Any, *given: Any) -> Any:
        def call(request: Request, *given: Any) -> Any:
            apply: Any = _Backward.apply
            dlse, low, *rest = given
            return apply(request, wanted, dlse, low, *rest)

        size, dims = info.batch_size, in_dims[2:]
        return vectorised(call, size, dims, request, given, first=3, wanted=wanted)


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
    wanted: Sequence[bool] = (),
) -> tuple[Tensors, tuple[int, ...]]:
    """The results of `call(request, *given)` for each entry of an axis, stacked.

    `first` is the place of q. k follows it; the arrays begin 3 places after it, and 6 places after
    do where there is one. The gradients of the `wanted` arrays are the last results.
    """
    if request.dropout:
        made = _one_by_one(call, size, in_dims, request, given)
    else:
        last = first + 3 if first == 0 else first + 5
        folded = [
            x if x is None else _in_front(x, dim, size).flatten(0, 1)
            for x, dim in zip(given[:last], in_dims[:last], strict=True)
        ]
        arrays, dims = given[last:], in_dims[last:]
        asked = wanted or (False,) * len(arrays)
        own = [dim is not None or want for dim, want in zip(dims, asked, strict=True)]
        folded += [
            _in_front(x, dim, size) if its else x
            for x, dim, its in zip(arrays, dims, own, strict=True)
        ]
        q, k = (_one(given[n], in_dims[n], 0) for n in (first, first + 1))
        found = call(_repeated(request, q, k, size, own), *folded)
        rows = len(found) - sum(asked)
        made = (*[_unfold(x, size) for x in found[:rows]], *found[rows:])
    return made, (0,) * len(made)


def _one_by_one(
    call: Callable[..., Tensors],
    size: int,
    in_dims: Sequence[int | None],
    request: Request,
    given: Sequence[Any],
) -> Tensors:
    """`vectorised` by a call for each entry."""
    results = [
        call(request, *[_one(x, dim, number) for x, dim in zip(given, in_dims, strict=True)])
        for number in range(size)
    ]
    return tuple([torch.stack(each) for each in zip(*results, strict=True)])


def _one(x: Any, dim: int | None, number: int) -> Any:
    """An entry of an axis; what has no such axis belongs to every entry."""
    return x if dim is None else x.select(dim, number)


def _in_front(x: Tensor, dim: int | None, size: int) -> Tensor:
    """An axis as the first one; a tensor without the axis is repeated."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _unfold(x: Tensor, size: int) -> Tensor:
    return x.reshape(size, x.shape[0] // size if size else 0, *x.shape[1:])


def _repeated(request: Request, q: Tensor, k: Tensor, copies: int, own: Sequence[bool]) -> Request:
    """The request for several batches: a rule or score that asks for the batch counts within one.

    Each batch has an array of its `own` where the flag of the array says so.
    """
    axes = LAYOUTS[request.layout]
    batch, heads, len_q = (q.shape[axis] for axis in axes[:3])
    sizes = Sizes(batch, heads, len_q, k.shape[axes[2]])
    its = [name for name, one in zip(names_of(request, len(own)), own, strict=True) if one]
    data, inputs = (
        [int(name.removeprefix(kind)) for name in its if name.startswith(kind)]
        for kind in ("data", "input")
    )
    mask = repeated(request.mask, batch, len_q, sizes.len_k, data, copies)
    score = request.score
    if score is not None and (inputs or "b" in names(score.expression(sizes))):
        score = repeated_score(score, sizes, inputs, copies)
    return request.changed(mask=mask, score=score)
