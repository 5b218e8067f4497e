"""The operators `tilefold::attention` and `tilefold::attention_backward` of PyTorch.

All take the options of a call as `spelled` writes them: a text, which is a constant of a compiled
graph, and numbers, which are inputs of it. The arrays of a mask stand first among the extra arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tilefold.common.foreign_arrays import constant_of
from tilefold.frontends.torch import tensors
from tilefold.frontends.torch.observed import faked
from tilefold.frontends.torch.spelled import (
    Spelled,
    options_of,
    request_of,
    spelled,
    spelled_request,
)
from tilefold.masks.traced import Traced
from tilefold.problems.request import (
    LAYOUTS,
    Request,
    as_rule,
    as_scale,
    check_layout,
    check_precision,
    check_scale,
)


def _constant(rule: Traced) -> None:
    """A rule of a user's own is never a part of a graph: its text is."""
    raise AssertionError(rule)


def _register(kind: Any) -> None:
    """Register a class, so that its values are constants to a compiler, which guards them."""
    from torch._library import opaque_object

    kind.__fx_repr__ = _constant
    if hasattr(opaque_object, "register_custom_class"):  # its name in PyTorch 2.15
        opaque_object.register_custom_class(kind, typ="constant")
    else:
        opaque_object.register_opaque_type(kind, typ="value")


_register(Traced)


def traced_request(mask: Any, scale: Any, layout: Any, precision: Any) -> Spelled:
    """The request of a call that a compiler traces; it raises the errors of the checks."""
    rule, factor = as_rule(mask), as_scale(constant_of(scale))
    check_layout(layout)
    check_precision(precision)
    if factor is not None:
        check_scale(factor)
    return spelled(rule, factor, layout, precision)


def _empty(q: Tensor, v: Tensor, request: str) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `attention`, whose elements are not set."""
    axes = LAYOUTS[options_of(request).layout]
    sizes = [q.shape[axes[0]], q.shape[axes[1]], q.shape[axes[2]], v.shape[axes[3]]]
    lse = q.new_empty(sizes[:3], dtype=tensors.statistics(q))
    low = lse.new_empty(lse.shape if tensors.keeps_low(q) else 0)
    return q.new_empty([sizes[axis] for axis in axes]), lse, low


def _filled(
    request: str, numbers: Sequence[int], extra: Sequence[Tensor]
) -> tuple[Request, Sequence[Tensor]]:
    """The request with the arrays of its mask, and the other extra arrays."""
    count = options_of(request).data
    return request_of(request, numbers, extra[:count]), extra[count:]


@torch.library.custom_op(
    "tilefold::attention", mutates_args=(), device_types=("cpu", "mps", "cuda")
)
def attention(
    q: Tensor, k: Tensor, v: Tensor, request: str, numbers: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse, and what rounding took from lse; the arguments are as for `tilefold.attention`.

    The last result is for the backward pass. It has no elements where no kernel makes it.
    """
    o, lse, low = tensors.forward_low(q, k, v, request_of(request, numbers, ()))
    return o, lse, lse.new_empty(0) if low is None else low


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, request: str, numbers: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q, v, request)


@torch.library.custom_op(
    "tilefold::attention_backward", mutates_args=(), device_types=("cpu", "mps", "cuda")
)
def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    request: str,
    numbers: Sequence[int],
    dlse: Tensor | None = None,
    lse_low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; the arguments are as for `tilefold.attention_backward`.

    `dlse` is the gradient of lse, where there is one. `lse_low` is the last result of `attention`,
    where it has elements.
    """
    options = request_of(request, numbers, ())
    return tensors.backward(do, q, k, v, o, lse, options, lse_low, dlse)


@attention_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    request: str,
    numbers: Sequence[int],
    dlse: Tensor | None = None,
    lse_low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op(
    "tilefold::attention_extended", mutates_args=(), device_types=("cpu", "mps", "cuda")
)
def attention_extended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra: list[Tensor],
    request: str,
    numbers: Sequence[int],
    wants_max: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of `attention`, and the largest score of each query, with extra arrays.

    The last result has no elements unless it is wanted. This is an operator of its own, since
    PyTorch dispatches one with a list of tensors more slowly.
    """
    further = ("max",) if wants_max else ()
    options, arrays = _filled(request, numbers, extra)
    o, lse, low, *rest = tensors.forward_extended(options, further, q, k, v, *arrays)
    return o, lse, lse.new_empty(0) if low is None else low, rest[0] if rest else lse.new_empty(0)


@attention_extended.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra: list[Tensor],
    request: str,
    numbers: Sequence[int],
    wants_max: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o, lse, low = _empty(q, v, request)
    largest = lse.new_empty(lse.shape if wants_max else 0)
    return o, lse, low, largest


@torch.library.custom_op(
    "tilefold::attention_extended_backward", mutates_args=(), device_types=("cpu", "mps", "cuda")
)
def attention_extended_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    extra: list[Tensor],
    request: str,
    numbers: Sequence[int],
    wanted: list[bool],
    dlse: Tensor | None = None,
    lse_low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The results of `attention_backward`, and the gradients of extra arrays that are `wanted`."""
    options, arrays = _filled(request, numbers, extra)
    given, asked = (do, q, k, v, o, lse, *arrays), tuple(wanted[len(extra) - len(arrays) :])
    dq, dk, dv, *more = tensors.backward_extended(options, asked, lse_low, dlse, *given)
    return dq, dk, dv, more


@attention_extended_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    extra: list[Tensor],
    request: str,
    numbers: Sequence[int],
    wanted: list[bool],
    dlse: Tensor | None = None,
    lse_low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    more = [x.new_empty(x.shape) for x, asked in zip(extra, wanted, strict=True) if asked]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), more


def run(
    request: Request | Spelled,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    arrays: Sequence[Tensor] = (),
    wants_max: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The results of the operator that a call takes; the last is None unless it is wanted."""
    asked = _taken(request)
    if not asked.data and not arrays and not wants_max:
        return (*attention(q, k, v, asked.text, asked.numbers), None)
    extra = [*_data(asked), *arrays]
    found = attention_extended(q, k, v, extra, asked.text, asked.numbers, wants_max)
    return (*found[:3], found[3] if wants_max else None)


def run_backward(
    request: Request | Spelled,
    given: Sequence[Tensor],
    arrays: Sequence[Tensor] = (),
    wanted: Sequence[bool] = (),
    dlse: Tensor | None = None,
    lse_low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]:
    """The results of the operator of the backward pass; `given` are do, q, k, v, o and lse."""
    asked = _taken(request)
    if not asked.data and not arrays:
        return (*attention_backward(*given, asked.text, asked.numbers, dlse, lse_low), ())
    extra, flags = [*_data(asked), *arrays], [*(False for _ in asked.data), *wanted]
    options = asked.text, asked.numbers, flags, dlse, lse_low
    found: tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]
    found = attention_extended_backward(*given, extra, *options)
    return found


def _taken(request: Request | Spelled) -> Spelled:
    return request if isinstance(request, Spelled) else spelled_request(request)


def _data(asked: Spelled) -> Sequence[Tensor]:
    """The arrays of the mask; where a mode has tensors without data, so are these."""
    if torch.compiler.is_compiling() or not faked():
        return asked.data
    return [torch.ops.aten.lift_fresh_copy(x) for x in asked.data]
