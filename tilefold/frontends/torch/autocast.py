"""Autocast: calls take the type that torch's own attention takes in such a region."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

autocasts: Any = torch._C._is_any_autocast_enabled
"""True in a region of autocast, of any device. It takes 0.08 us."""

Function = TypeVar("Function", bound=Callable[..., Any])


def cast(*given: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type of autocast, where it is on for their device.

    As in torch, float64 stays, and so does what is no float. Arrays of scores and sinks are not
    given here: kernels read them in the type that they have, whatever that of q is.
    """
    return tuple([_cast(x) for x in given]) if autocasts() else given


def _cast(x: Tensor) -> Tensor:
    kind = x.device.type
    if not x.is_floating_point() or x.dtype is torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def exact(function: Function) -> Function:
    """The function with autocast off: its products are of the types of its own tensors."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not autocasts():
            return function(*args)
        kind = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.autocast(kind, enabled=False):
            return function(*args)

    return call  # type: ignore[return-value]


def lowered(function: Function) -> Function:
    """The function of q, k, v and more, of what `cast` makes of them; autocast is off in it."""
    run = exact(function)

    @functools.wraps(function)
    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        return run(*cast(q, k, v), *rest)

    return call  # type: ignore[return-value]
