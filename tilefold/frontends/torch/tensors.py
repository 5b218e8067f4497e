"""Calls of kernels on PyTorch tensors, below autograd, and the checks of these tensors.

Tensors are read in place, with any strides. Tensors on an Apple GPU ("mps") go to the Metal
kernels, and tensors on a GPU of NVIDIA or AMD ("cuda") to the Triton kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilefold.backends import calls, registry
from tilefold.backends.arrays import torch as arrays
from tilefold.backends.arrays.torch import check_place, common_dtype, dtype_of
from tilefold.backends.extra import names_of
from tilefold.backends.protocols import (
    BACKWARD,
    BACKWARD_LOW,
    FORWARD,
    FORWARD_LOW,
    Machine,
    Pass,
    spoken,
)
from tilefold.problems.attention import ITEM_BYTES, STATISTICS, check_lse
from tilefold.problems.request import Request


def forward(q: Tensor, k: Tensor, v: Tensor, request: Request) -> tuple[Tensor, Tensor]:
    """o and lse, below autograd."""
    o, lse = run(FORWARD, (q, k, v), q, request)
    return o, lse


def forward_low(
    q: Tensor, k: Tensor, v: Tensor, request: Request
) -> tuple[Tensor, Tensor, Tensor | None]:
    """o, lse and what rounding took from lse: gradients with it are exact for large scores too.

    The latter is None on machines that do not keep it.
    """
    if not keeps_low(q):
        return *forward(q, k, v, request), None
    o, lse, low = run(FORWARD_LOW, (q, k, v), q, request)
    return o, lse, low


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    request: Request,
    lse_low: Tensor | None = None,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, below autograd; `lse_low` is the last result of `forward_low`.

    `dlse` is the gradient of lse; None means 0.
    """
    wanted, every = _backward((do, q, k, v, o, lse), lse_low, dlse)
    dq, dk, dv = run(wanted, every, q, request)
    return dq, dk, dv


def forward_extended(request: Request, further: tuple[str, ...], *given: Tensor) -> tuple[Any, ...]:
    """The results of `forward_low`, and `further` ones; extra arrays follow q, k and v."""
    q, low = given[0], keeps_low(given[0])
    wanted = (FORWARD_LOW if low else FORWARD).plus(names_of(request, len(given) - 3), further)
    o, lse, *rest = run(wanted, given, q, request)
    return (o, lse, *rest) if low else (o, lse, None, *rest)


def backward_extended(
    request: Request,
    wanted: tuple[bool, ...],
    lse_low: Tensor | None,
    dlse: Tensor | None,
    *given: Tensor,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, and the gradients that are `wanted` of the extra arrays, which follow lse."""
    names = names_of(request, len(given) - 6)
    slopes = tuple([f"d{name}" for name, asked in zip(names, wanted, strict=True) if asked])
    made, every = _backward(given[:6], lse_low, dlse)
    return run(made.plus(names, slopes), every + given[6:], given[1], request)


def _backward(
    given: tuple[Tensor, ...], lse_low: Tensor | None, dlse: Tensor | None
) -> tuple[Pass, tuple[Tensor, ...]]:
    """The backward pass of do, q, k, v, o and lse with what is known beside them; its arrays."""
    wanted = BACKWARD
    if lse_low is not None:
        wanted, given = BACKWARD_LOW, (*given, lse_low)
    if dlse is not None and (machine_of(given[1]).reads_dlse or bool(dlse.any())):
        wanted, given = wanted.plus(("dlse",)), (*given, dlse)
    return wanted, given


def keeps_low(q: Tensor) -> bool:
    """True if kernels for the tensor keep what rounding takes from lse: on processors alone."""
    return q.is_cpu and machine_of(q).keeps_low


def machine_of(tensor: Tensor) -> Machine:
    """The machine that runs kernels for a tensor."""
    return registry.machine("cpu" if tensor.is_cpu else tensor.device)


def run(wanted: Pass, given: tuple[Tensor, ...], q: Tensor, request: Request) -> tuple[Tensor, ...]:
    """The results of a pass of tensors, below autograd, where q lies."""
    bits = 0
    for x in given:
        try:
            address = x.data_ptr()
        except RuntimeError:
            raise NotImplementedError(
                "a tensor has no memory: torch's old vmap maps gradients alone here; use"
                " torch.func.vmap"
            ) from None
        bits |= address
        if address < LOWEST:
            for name, tensor in zip(wanted.given, given, strict=True):
                arrays.check_held(spoken(name), tensor)
    if bits % _WIDEST and q.is_cpu:  # a tensor whose items are misaligned is copied
        given = tuple([x if x.data_ptr() % x.itemsize == 0 else x.clone() for x in given])
    try:
        return calls.run(machine_of(q), arrays, wanted, given, request)
    except RuntimeError:  # nested tensors have no shape
        for name, tensor in zip(wanted.given, given, strict=True):
            arrays.check_dense(spoken(name), tensor)
        raise


LOWEST = 2**36
"""Tensors begin at higher addresses, but for a few. A view of a freed storage begins at its offset,
which is lower in storages below 64 GiB. So a repeated call finds those at no cost. `backends/calls`
checks the sizes of all storages at the first call of a kind, and machines of GPUs at each.
"""

_WIDEST = max(ITEM_BYTES.values())


def same_gpu(tensor: Tensor, first: Tensor) -> bool:
    """True if two tensors lie on one GPU that has kernels."""
    return (tensor.is_cuda or tensor.is_mps) and tensor.device == first.device


def check(**tensors: Tensor) -> str:
    """The common type of tensors. Raises unless they are dense and lie on one device.

    Fake tensors of a compiler pass these checks too.
    """
    return common_dtype(tensors)


def check_all(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dlse: Tensor | None = None,
) -> None:
    """Raises if a backward pass cannot read the tensors."""
    dtype = check(q=q, k=k, v=v, do=do, o=o)
    for name, tensor in (("lse", lse), ("dlse", dlse)):
        if tensor is not None:
            check_place(name, tensor, do.device)
            check_lse(dtype_of(tensor), dtype, name)


_DTYPES = {getattr(torch, name): getattr(torch, kind) for name, kind in STATISTICS.items()}


def statistics(tensor: Tensor) -> torch.dtype:
    """The type of lse if `tensor` is q."""
    kind: torch.dtype = _DTYPES[tensor.dtype]
    return kind
