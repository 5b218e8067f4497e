"""PyTorch tensors: two operators that autograd, `torch.compile` and `opcheck` understand.

PyTorch takes longer to dispatch such an operator than a whole small call takes. So a call that only
autograd can observe runs directly, with a `torch.autograd.Function` if gradients are wanted.
Compilers, tracers, modes, profilers and subclasses see the operators. The transforms of
`torch.func`, forward mode and second derivatives go through `transforms`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilefold.backends import extra as extra_arrays
from tilefold.backends.arrays.torch import check_held, dtype_of
from tilefold.backends.extra import NOTHING, Extra
from tilefold.common.foreign_arrays import constant_of
from tilefold.frontends.torch import (
    extended,
    operators,
    outside,
    parts,
    tensors,
    transforms,
)
from tilefold.frontends.torch.autocast import autocasts, cast
from tilefold.frontends.torch.batched import batched
from tilefold.frontends.torch.joined import joined
from tilefold.frontends.torch.observed import (
    PLAIN,
    lifted,
    recorded,
    unobserved,
    untraceable,
)
from tilefold.frontends.torch.spelled import Spelled, whole
from tilefold.frontends.torch.spelled import request_of as request_of_text
from tilefold.masks.given import given_of
from tilefold.masks.rule import Rule
from tilefold.problems.attention import check_parts
from tilefold.problems.dropout import check_probability, check_seed
from tilefold.problems.request import Request
from tilefold.scores.score import Score

__all__ = [
    "PLAIN",
    "attention",
    "attention_backward",
    "chance_of",
    "extended_request",
    "merge",
    "request_of",
    "seed_of",
]

# 2.13 passes all tests. 2.10 and 2.12 passed those of compiled functions, scores and enable(), but
# for torch.func within compiled functions in 2.10.
OLDEST = "2.10"

if torch.__version__ < OLDEST:  # a TorchVersion, which compares releases
    raise ImportError(
        f"tensors need PyTorch {OLDEST} or newer, found {torch.__version__}; upgrade it, or pass"
        " arrays (tensor.numpy())"
    )


def request_of(mask: Any, scale: Any, layout: Any, precision: Any) -> Any:
    """The request of a call, from its options. Raises for a scale that wants a gradient."""
    if scale is not None and isinstance(scale, Tensor) and recorded(scale):
        raise NotImplementedError(
            "scale wants a gradient, and it has none: multiply q by it and pass scale=1.0, or pass"
            " scale.item()"
        )
    if torch.compiler.is_compiling():
        return operators.traced_request(mask, scale, layout, precision)
    try:
        return Request(mask, scale, layout, precision)
    except TypeError:
        if not (isinstance(mask, Rule) and given_of(mask)):
            raise
        return whole(operators.traced_request(mask, scale, layout, precision))


def extended_request(
    request: Request, score: Score | None, sinks: int, dropout: float
) -> tuple[Request, tuple[Any, ...]]:
    """The request with a modified score, a number of sinks, and dropout; the score's arrays."""
    if isinstance(request, Spelled):
        form, arrays = (None, ()) if score is None else score.new_form()
        return request.extended(form, sinks, dropout), arrays
    if torch.compiler.is_compiling():  # in a frame of its own, after one that left its graph
        made: tuple[Request, tuple[Any, ...]]
        made = outside.extended_request(request, score, sinks, dropout)
        return made
    return extra_arrays.extended_request(request, score, sinks, dropout)


outside.keep("extended_request", extra_arrays.extended_request)


def chance_of(dropout: Any) -> float:
    """The probability that an argument is; to a compiler it is a constant of the graph."""
    return check_probability(constant_of(dropout))


def seed_of(seed: Any, q: Tensor) -> Tensor:
    """The seed of dropout on the device of `q`; one from torch's generator where it is None."""
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=q.device)
    traced = torch.compiler.is_compiling() and isinstance(seed, (int, torch.SymInt))
    number: Any = seed if traced else check_seed(seed)
    return torch.full((1,), number, dtype=torch.int64, device=q.device)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: Request,
    extra: Extra = NOTHING,
    further: tuple[str, ...] = (),
) -> tuple[Tensor, ...]:
    """Return o and lse, and `further` results of the pass; see `tilefold.attention`."""
    request = whole(request)
    if autocasts():
        q, k, v = cast(q, k, v)
    if parts.in_parts(q, k, v):
        return parts.attention(attention, q, k, v, request, extra, further)
    if extra.names or further:
        return extended.attention(q, k, v, request, extra, further)
    result: tuple[Tensor, ...]
    if unobserved(q, k, v):
        run = _Attention.apply if recorded(q, k, v) else tensors.forward
        result = run(q, k, v, request)
    elif untraceable():
        result = outside.attention(q, k, v, request)
    else:
        tensors.check(q=q, k=k, v=v)
        if lifted():
            o, lse = transforms.attention(q, k, v, request)
        else:
            o, lse, *_ = operators.run(request, q, k, v)
        result = o, lse
    return result


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    request: Request,
    lse_low: Tensor | None = None,
    dlse: Tensor | None = None,
    extra: Extra = NOTHING,
) -> tuple[Tensor, ...]:
    """Return dq, dk, dv, and gradients of extra arrays; see `tilefold.attention_backward`.

    Autocast casts the arguments as it casts those of `attention`; gradients have the types of q, k
    and v all the same.
    """
    if parts.in_parts(q, k, v):
        parts.refuse_backward()
    if not autocasts():
        return gradients(do, q, k, v, o, lse, request, lse_low, dlse, extra)
    kinds = q.dtype, k.dtype, v.dtype
    do, q, k, v, o = cast(do, q, k, v, o)
    found = gradients(do, q, k, v, o, lse, request, lse_low, dlse, extra)
    first = [made.to(kind) for made, kind in zip(found, kinds, strict=False)]
    return (*first, *found[3:])


def gradients(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    request: Request,
    lse_low: Tensor | None = None,
    dlse: Tensor | None = None,
    extra: Extra = NOTHING,
) -> tuple[Tensor, ...]:
    """`attention_backward` of tensors in the types that they have."""
    request = whole(request)
    if extra.names:
        return extended.attention_backward(do, q, k, v, o, lse, request, lse_low, dlse, extra)
    given = do, q, k, v, o, lse
    every = given if dlse is None else (*given, dlse)
    result: tuple[Tensor, ...]
    if unobserved(*every):
        if batched(do, dlse) or recorded(*every):
            result = transforms.attention_backward(given, request, dlse, lse_low)
        else:
            result = tensors.backward(*given, request, lse_low, dlse)
    elif untraceable():
        result = outside.gradients(*given, request, lse_low, dlse)
    else:
        tensors.check_all(*every)
        if lifted() or batched(do, dlse):
            result = transforms.attention_backward(given, request, dlse, lse_low)
        else:
            result = operators.run_backward(request, given, (), (), dlse, lse_low)[:3]
    return result


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Return o and lse; see `tilefold.merge`."""
    given = {"o1": o1, "lse1": lse1, "o2": o2, "lse2": lse2}
    if not torch.compiler.is_compiling():
        for name, tensor in given.items():
            check_held(name, tensor)
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    check_parts(shapes, {name: dtype_of(tensor) for name, tensor in given.items()}, layout)
    return joined((o1, o2), (lse1, lse2), layout)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    """Save what the backward pass needs: also what rounding took from lse, where it is known."""
    q, k, v, ctx.request = inputs
    o, lse, low = output
    ctx.set_materialize_grads(False)  # None tells that a result has no part in the loss
    ctx.save_for_backward(q, k, v, o, lse, low if tensors.keeps_low(q) else None)


def _gradients(
    ctx: Any, do: Tensor | None, dlse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, low = ctx.saved_tensors
    given = torch.zeros_like(o) if do is None else do, q, k, v, o, lse
    return (*gradients(*given, ctx.request, low, dlse), None)


def _save_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what the operator's backward pass needs; its last result is no function of the inputs.

    To autograd, that is.
    """
    *given, ctx.text, ctx.numbers = inputs
    ctx.mark_non_differentiable(output[2])
    _save(ctx, (*given, None), output)


def _operator_gradients(
    ctx: Any, do: Tensor | None, dlse: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, low = ctx.saved_tensors
    given = torch.zeros_like(o) if do is None else do, q, k, v, o, lse
    if lifted():
        request = request_of_text(ctx.text, ctx.numbers, ())
        return (*transforms.attention_backward(given, request, dlse, low), None, None)
    return (*operators.attention_backward(*given, ctx.text, ctx.numbers, dlse, low), None, None)


class _Attention(torch.autograd.Function):
    """`tilefold::attention` for calls that only autograd observes."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = tensors.forward_low(*inputs)
        _save(ctx, inputs, output)
        return output[:2]

    backward = staticmethod(_gradients)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what the derivative of the backward pass needs."""
    *given, ctx.text, ctx.numbers, dlse, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dlse, *given)


def _second_gradients(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
    dlse, *given = ctx.saved_tensors
    request = request_of_text(ctx.text, ctx.numbers, ())
    found, of_dlse, _ = transforms.second_gradients(given, dlse, request, (), slopes, ())
    return (*found, None, None, of_dlse, None)


def _each_forward(info: Any, in_dims: Any, *inputs: Any) -> Any:
    """The operator in `vmap`."""
    *given, text, numbers = inputs
    request = request_of_text(text, numbers, ())

    def call(request: Request, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return operators.run(request, q, k, v)[:3]

    return transforms.vectorised(call, info.batch_size, in_dims[:3], request, given)


def _each_backward(info: Any, in_dims: Any, *inputs: Any) -> Any:
    """The operator of the backward pass in `vmap`."""
    *given, text, numbers, dlse, low = inputs
    request, dims = request_of_text(text, numbers, ()), (*in_dims[8:], *in_dims[:6])

    def call(request: Request, dlse: Any, low: Any, *given: Tensor) -> Any:
        return operators.run_backward(request, given, (), (), dlse, low)[:3]

    every = dlse, low, *given
    return transforms.vectorised(call, info.batch_size, dims, request, every, first=3)


operators.attention.register_autograd(_operator_gradients, setup_context=_save_operator)
operators.attention_backward.register_autograd(_second_gradients, setup_context=_save_backward)
operators.attention.register_vmap(_each_forward)
operators.attention_backward.register_vmap(_each_backward)

outside.keep("attention", attention)
outside.keep("gradients", gradients)
