"""The operators `tilefold::attention` and `tilefold::attention_backward` of PyTorch.

Both take the options of a call as one `Request`. It is registered as an opaque value: a constant of
the compiled graph that is guarded by equality, so another request compiles another graph. Rules are
opaque values too. Rules over positions may be made and combined inside a compiled function. Rules
that carry data, and `rule(...)`, are made outside of it and used inside. The form of a score is
such a constant too, and its arrays are inputs of the graph. PyTorch takes opaque values from 2.12
on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilefold.frontends.torch import tensors
from tilefold.frontends.torch.spelled import Spelled, spelling
from tilefold.masks.coordinates import Coordinates
from tilefold.masks.expression import Table
from tilefold.masks.position_rules import Rule
from tilefold.problems.request import (
    LAYOUTS,
    Request,
    as_rule,
    as_scale,
    check_layout,
    check_precision,
    check_scale,
)
from tilefold.scores.score import Score

_constants: dict[str, object] = {}


def _constant(key: str) -> object:
    """The value behind a name in a compiled graph."""
    return _constants[key]


def _write(value: object) -> tuple[str, dict[str, Any]]:
    """The code that stands for a value in a compiled graph, and the values of the names in it."""
    key = repr(value)
    while _constants.setdefault(key, value) != value:  # data is not part of what a rule prints
        key += "'"
    return f"_constant({key!r})", {"_constant": _constant}


def _register(kind: Any) -> None:
    """Register a class, so that its values are constants of compiled graphs."""
    from torch._library import opaque_object

    kind.__fx_repr__ = _write
    if hasattr(opaque_object, "register_custom_class"):  # its name in PyTorch 2.15
        opaque_object.register_custom_class(kind, typ="constant")
    else:
        opaque_object.register_opaque_type(kind, typ="value")


_register(Coordinates)
_register(Table)  # coordinates may end at the lengths of one
_register(Rule)
_register(Request)


def constant_of(number: Any) -> Any:
    """A number that a compiler traces as a constant of its graph; other values as they are."""
    if isinstance(number, (int, float, torch.SymInt, torch.SymFloat)):
        from torch.fx.experimental.symbolic_shapes import guard_scalar

        return guard_scalar(number)
    return number


def traced_request(mask: Any, scale: Any, layout: Any, precision: Any) -> Request:
    """The request of a call that a compiler traces; it raises the errors of the checks."""
    rule, factor = as_rule(mask), as_scale(constant_of(scale))
    check_layout(layout)
    check_precision(precision)
    if factor is not None:
        check_scale(factor)
    return Spelled(spelling(rule), factor, layout, precision)


def traced_extension(request: Request, form: Score | None, sinks: int, dropout: float) -> Request:
    """A request with a modified score, sinks, and dropout, in what a compiler traces."""
    options = request.mask, request.scale, request.layout, request.precision
    return Spelled(*options, spelling(form), sinks, dropout)


def _empty(q: Tensor, v: Tensor, request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `attention`, whose elements are not set."""
    axes = LAYOUTS[request.layout]
    sizes = [q.shape[axes[0]], q.shape[axes[1]], q.shape[axes[2]], v.shape[axes[3]]]
    lse = q.new_empty(sizes[:3], dtype=tensors.statistics(q))
    low = lse.new_empty(lse.shape if tensors.keeps_low(q) else 0)
    return q.new_empty([sizes[axis] for axis in axes]), lse, low


@torch.library.custom_op(
    "tilefold::attention", mutates_args=(), device_types=("cpu", "mps", "cuda")
)
def attention(q: Tensor, k: Tensor, v: Tensor, request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse, and what rounding took from lse; the arguments are as for `tilefold.attention`.

    The last result is for the backward pass. It has no elements where no kernel makes it.
    """
    o, lse, low = tensors.forward_low(q, k, v, request)
    return o, lse, lse.new_empty(0) if low is None else low


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, request: Request) -> tuple[Tensor, Tensor, Tensor]:
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
    request: Request,
    dlse: Tensor | None = None,
    lse_low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; the arguments are as for `tilefold.attention_backward`.

    `dlse` is the gradient of lse, where there is one. `lse_low` is the last result of `attention`,
    where it has elements.
    """
    return tensors.backward(do, q, k, v, o, lse, request, lse_low, dlse)


@attention_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    request: Request,
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
    request: Request,
    wants_max: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of `attention`, and the largest score of each query, with extra arrays.

    The last result has no elements unless it is wanted. This is an operator of its own, since
    PyTorch dispatches one with a list of tensors more slowly.
    """
    further = ("max",) if wants_max else ()
    o, lse, low, *rest = tensors.forward_extended(request, further, q, k, v, *extra)
    return o, lse, lse.new_empty(0) if low is None else low, rest[0] if rest else lse.new_empty(0)


@attention_extended.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra: list[Tensor],
    request: Request,
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
    request: Request,
    wanted: list[bool],
    dlse: Tensor | None = None,
    lse_low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The results of `attention_backward`, and the gradients of extra arrays that are `wanted`."""
    given = do, q, k, v, o, lse, *extra
    dq, dk, dv, *more = tensors.backward_extended(request, tuple(wanted), lse_low, dlse, *given)
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
    request: Request,
    wanted: list[bool],
    dlse: Tensor | None = None,
    lse_low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    more = [x.new_empty(x.shape) for x, asked in zip(extra, wanted, strict=True) if asked]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), more
