"""PyTorch: calls with arrays beside q, k and v, which are what a score reads, sinks, and a seed.

The arrays are inputs of autograd as q, k and v are, and only the gradients that are wanted are
computed. The order of the arrays is that of `Extra`; their names follow from the request.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilefold.backends.arrays.torch import dtype_of, tensor_of
from tilefold.backends.extra import Extra, rows_of
from tilefold.backends.protocols import spoken
from tilefold.frontends.numpy import as_array
from tilefold.frontends.torch import operators, outside, tensors, transforms
from tilefold.frontends.torch.batched import batched
from tilefold.frontends.torch.joined import gradient_of_sinks
from tilefold.frontends.torch.observed import (
    lifted,
    recorded,
    unobserved,
    untraceable,
)
from tilefold.frontends.torch.spelled import options_of, request_of
from tilefold.problems.request import Request

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def attention(
    q: Tensor, k: Tensor, v: Tensor, request: Request, extra: Extra, further: tuple[str, ...] = ()
) -> tuple[Tensor, ...]:
    """o and lse, and the `further` results of the pass: "max" or none."""
    arrays = tensors_of(extra, q)
    given = q, k, v, *arrays
    if unobserved(*given):
        run = _ExtendedAttention.apply if recorded(*given) else tensors.forward_extended
        o, lse, _, *rest = run(request, further, *given)
        return (o, lse, *rest)
    if untraceable():
        results: tuple[Tensor, ...] = outside.extended_attention(q, k, v, request, extra, further)
        return results
    tensors.check(q=q, k=k, v=v)
    if lifted():
        return transforms.attention(q, k, v, request, arrays, further)
    o, lse, _, largest = operators.run(request, q, k, v, arrays, bool(further))
    return (o, lse) if largest is None else (o, lse, largest)


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    request: Request,
    lse_low: Tensor | None,
    dlse: Tensor | None,
    extra: Extra,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, and the gradients of all arrays that have one."""
    if untraceable():
        results: tuple[Tensor, ...] = outside.extended_backward(
            do, q, k, v, o, lse, request, lse_low, dlse, extra
        )
        return results
    arrays = tensors_of(extra, q)
    wanted = [f"d{name}" in extra.gradients for name in extra.names]
    given = (do, q, k, v, o, lse)
    *found, more = gradients(given, arrays, request, wanted, lse_low, dlse)
    if "sinks" in extra.names:
        place = extra.names.index("sinks")
        sinks = extra.arrays[place]
        dtype = str(sinks.dtype).removeprefix("torch.")
        more[place] = more[place].reshape(sinks.shape).to(getattr(torch, dtype))
    return (*found, *more)


outside.keep("extended_attention", attention)
outside.keep("extended_backward", attention_backward)


def tensors_of(extra: Extra, q: Tensor) -> tuple[Tensor, ...]:
    """The arrays as kernels read them: tensors on the device of `q`.

    Arrays of NumPy become such tensors. Sinks are rows, in the type of lse.
    """
    found = []
    for name, array in zip(extra.names, extra.arrays, strict=True):
        words = spoken(name)
        if not isinstance(array, Tensor):
            tensor = tensor_of(as_array(words, array)).to(q.device)
        else:
            tensor = array
            if tensor.device != q.device:
                raise ValueError(
                    f"{words} is on {tensor.device} and q is on {q.device}: pass it"
                    f" .to({str(q.device)!r})"
                )
            if tensor.layout is not torch.strided:
                raise TypeError(
                    f"{words} must be a strided tensor, got {tensor.layout}; pass its .to_dense()"
                )
        if name == "sinks":
            if not tensor.is_floating_point():
                raise TypeError(f"sinks must be an array of floats, got {dtype_of(tensor)}")
            tensor = rows_of(tensor).to(tensors.statistics(q))
        found.append(tensor)
    return tuple(found)


def gradients(
    given: Six,
    arrays: tuple[Tensor, ...],
    request: Request,
    wanted: list[bool],
    lse_low: Tensor | None,
    dlse: Tensor | None,
) -> tuple[Any, ...]:
    """dq, dk, dv, and a list of the gradients of the arrays that are wanted."""
    every = (*given, *arrays) if dlse is None else (*given, *arrays, dlse)
    mapped = lifted() or batched(given[0], dlse)
    again = mapped or recorded(*every)
    if again and request.sinks:
        return _apart_from_sinks(given, arrays, request, wanted, lse_low, dlse)
    direct = unobserved(*every)
    if not direct:
        tensors.check_all(*given, dlse)
    if mapped or (direct and again):
        dq, dk, dv, *more = transforms.attention_backward(
            given, request, dlse, lse_low, arrays, wanted
        )
        return dq, dk, dv, more
    if direct:
        run = tensors.backward_extended
        dq, dk, dv, *more = run(request, tuple(wanted), lse_low, dlse, *given, *arrays)
        return dq, dk, dv, more
    return operators.run_backward(request, given, arrays, wanted, dlse, lse_low)


def _apart_from_sinks(
    given: Six,
    arrays: tuple[Tensor, ...],
    request: Request,
    wanted: list[bool],
    lse_low: Tensor | None,
    dlse: Tensor | None,
) -> tuple[Any, ...]:
    """`gradients`, that of sinks by torch's operations, which have all derivatives."""
    place = len(arrays) - 1 - bool(request.dropout)
    others, asked = list(arrays), list(wanted)
    sinks, also = others.pop(place), asked.pop(place)
    plain = request.changed(sinks=0)
    dq, dk, dv, more = gradients(given, tuple(others), plain, asked, lse_low, dlse)
    if also:
        do, _, _, _, o, lse = given
        found = gradient_of_sinks(do, o, lse, dlse, sinks, request.layout)
        more = [*more[: sum(asked[:place])], found, *more[sum(asked[:place]) :]]
    return dq, dk, dv, more


class _ExtendedAttention(torch.autograd.Function):
    """The forward pass of calls that only autograd observes. What follows lse has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, request: Request, further: tuple[str, ...], *given: Tensor
    ) -> tuple[Tensor | None, ...]:
        o, lse, low, *rest = tensors.forward_extended(request, further, *given)
        ctx.request = request
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*rest)
        ctx.save_for_backward(o, lse, low, *given)
        return (o, lse, None, *rest)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, *_: None) -> Any:
        dq, dk, dv, more = _pulled(ctx, do, dlse, [*ctx.needs_input_grad[5:]])
        return (None, None, dq, dk, dv, *more)


def _pulled(
    ctx: Any, do: Tensor | None, dlse: Tensor | None, wanted: list[bool]
) -> tuple[Any, ...]:
    """dq, dk, dv, and the gradients of the arrays, with None for those that are not `wanted`."""
    o, lse, low, q, k, v, *arrays = ctx.saved_tensors
    given = torch.zeros_like(o) if do is None else do, q, k, v, o, lse
    *found, more = gradients(given, tuple(arrays), ctx.request, wanted, low, dlse)
    return (*found, transforms.spread(more, wanted))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, extra, ctx.text, ctx.numbers, _ = inputs
    o, lse, low, largest = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(low, largest)
    ctx.save_for_backward(o, lse, low if tensors.keeps_low(q) else None, q, k, v, *extra)


def _gradients(ctx: Any, do: Tensor | None, dlse: Tensor | None, *_: None) -> Any:
    o, lse, low, q, k, v, *extra = ctx.saved_tensors
    given = torch.zeros_like(o) if do is None else do, q, k, v, o, lse
    wanted = [*ctx.needs_input_grad[3]]
    again = recorded(*given, *extra) and options_of(ctx.text).sinks
    if lifted() or again:
        request, count = _request(ctx, extra)
        *found, more = gradients(given, tuple(extra[count:]), request, wanted[count:], low, dlse)
    else:
        backward = operators.attention_extended_backward
        *found, more = backward(*given, extra, ctx.text, ctx.numbers, wanted, dlse, low)
    return (*found, transforms.spread(more, wanted), None, None, None)


def _request(ctx: Any, extra: list[Tensor]) -> tuple[Request, int]:
    """The request of an operator, and the number of the arrays of its mask."""
    count = options_of(ctx.text).data
    return request_of(ctx.text, ctx.numbers, extra[:count]), count


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *given, extra, ctx.text, ctx.numbers, ctx.wanted, dlse, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dlse, *given, *extra)


def _second_gradients(ctx: Any, *slopes: Any) -> Any:
    dlse, *saved = ctx.saved_tensors
    given, extra = saved[:6], saved[6:]
    *usual, more = slopes
    more = [None] * sum(ctx.wanted) if more is None else more
    request, count = _request(ctx, extra)
    asked = [*ctx.needs_input_grad[6]][count:]
    found, of_dlse, of_arrays = transforms.second_gradients(
        [*given, *extra[count:]], dlse, request, ctx.wanted[count:], [*usual, *more], asked
    )
    extras = [*[None] * count, *of_arrays]
    return (*found, extras, None, None, None, of_dlse, None)


def _each_forward(info: Any, in_dims: Any, *inputs: Any) -> Any:
    """The operator in `vmap`: a call for each entry."""
    return _looped(operators.attention_extended, info.batch_size, in_dims, inputs)


def _each_backward(info: Any, in_dims: Any, *inputs: Any) -> Any:
    return _looped(operators.attention_extended_backward, info.batch_size, in_dims, inputs)


def _looped(call: Any, size: int, in_dims: Any, inputs: Any) -> Any:
    def entry(value: Any, dim: Any, number: int) -> Any:
        if isinstance(dim, (tuple, list)):
            return [entry(*pair, number) for pair in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, number)

    results = [
        call(*[entry(*pair, number) for pair in zip(inputs, in_dims, strict=True)])
        for number in range(size)
    ]
    made = [
        [torch.stack(parts) for parts in zip(*each, strict=True)]
        if isinstance(each[0], list)
        else torch.stack(each)
        for each in zip(*results, strict=True)
    ]
    return tuple(made), tuple([[0] * len(x) if isinstance(x, list) else 0 for x in made])


operators.attention_extended.register_autograd(_gradients, setup_context=_save)
operators.attention_extended_backward.register_autograd(
    _second_gradients, setup_context=_save_backward
)
operators.attention_extended.register_vmap(_each_forward)
operators.attention_extended_backward.register_vmap(_each_backward)
