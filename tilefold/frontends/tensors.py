"""What is done with PyTorch tensors below autograd: checks, and calls of kernels.

Tensors are read where they lie, whatever their strides. Those on a GPU of Apple's ("mps"), NVIDIA's
or AMD's ("cuda") meet the kernels of Metal or Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilefold.backends.cpu import dispatch
from tilefold.frontends import gpu
from tilefold.masks.position_rules import Rule
from tilefold.problems.attention import (
    STATISTICS,
    Problem,
    check_lse,
    check_shape,
    common_dtype,
    describe,
    shape_lse,
    shape_o,
)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Rule, scale: float | None, layout: str, precision: str
) -> tuple[Tensor, Tensor]:
    """o and lse, below autograd."""
    machine = gpu.machine(q)
    if machine is not None:
        o, lse = gpu.run(machine, "forward", (q, k, v), mask, scale, layout, precision)
        return o, lse
    q, k, v = _copy_if_misaligned(q), _copy_if_misaligned(k), _copy_if_misaligned(v)
    key = (
        "torch forward",
        mask,
        scale,
        layout,
        precision,
        *_array_key(q),
        *_array_key(k),
        *_array_key(v),
    )
    call = dispatch.recent(key)
    if call is None:
        check(q=q, k=k, v=v)
        problem = _problem(q, k, v, scale, mask, layout, precision)
        if problem.empty:
            o = q.new_zeros(shape_o(problem, layout))
            return o, q.new_full(shape_lse(problem), -torch.inf, dtype=statistics(q))
        strides = q.stride(), k.stride(), v.stride()
        call = dispatch.keep(key, dispatch.forward(problem, layout, *strides))
    shape, rows = call.results
    o, lse = q.new_empty(*shape), q.new_empty(*rows, dtype=statistics(q))
    call.run(q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), lse.data_ptr())
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Rule,
    scale: float | None,
    layout: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, below autograd."""
    machine = gpu.machine(q)
    if machine is not None:
        rest = mask, scale, layout, precision
        dq, dk, dv = gpu.run(machine, "backward", (do, q, k, v, o, lse), *rest)
        return dq, dk, dv
    do, q, k, v, o, lse = given = [_copy_if_misaligned(tensor) for tensor in (do, q, k, v, o, lse)]
    key = (
        "torch backward",
        mask,
        scale,
        layout,
        precision,
        *[_array_key(tensor) for tensor in given],
    )
    call = dispatch.recent(key)
    if call is None:
        check_all(*given)
        problem = _problem(q, k, v, scale, mask, layout, precision)
        check_shape("do", tuple(do.shape), shape_o(problem, layout))
        check_shape("o", tuple(o.shape), shape_o(problem, layout))
        check_shape("lse", tuple(lse.shape), shape_lse(problem))
        if problem.empty:
            return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        strides = [tensor.stride() for tensor in given]
        call = dispatch.keep(key, dispatch.backward(problem, layout, *strides))
    dq, dk, dv = (q.new_empty(*shape) for shape in call.results)
    call.run(*[tensor.data_ptr() for tensor in (*given, dq, dk, dv)])
    return dq, dk, dv


def _copy_if_misaligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one whose items lie across their natural boundaries."""
    return tensor if tensor.data_ptr() % tensor.itemsize == 0 else tensor.clone()


def _array_key(tensor: Tensor) -> tuple[Any, ...]:
    """All of a tensor that a prepared call depends on."""
    return tensor.shape, tensor.stride(), tensor.dtype


def check_all(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> None:
    """Raises for tensors that a backward pass cannot read."""
    dtype = check(q=q, k=k, v=v, do=do, o=o)
    _check_place("lse", lse, do.device)
    check_lse(name_of(lse), dtype)


def check(**tensors: Tensor) -> str:
    """The one type of dense tensors on one device. A compiler's stand-ins pass too; raises."""
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        _check_place(name, tensor, device)
    return common_dtype({name: name_of(tensor) for name, tensor in tensors.items()})


def _check_place(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device.type not in ("cpu", "mps", "cuda", "meta"):
        raise NotImplementedError(
            f"{name} is on {tensor.device}, and there are kernels for the CPU, for GPUs of"
            f" NVIDIA's and AMD's (cuda) and for Apple's (mps); pass {name}.cpu()"
        )
    if tensor.device != device:
        raise ValueError(
            f"{name} is on {tensor.device} and others are on {device}: pass"
            f" {name}.to({str(device)!r}), or the others on {tensor.device}"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a strided tensor, got {tensor.layout}; pass {name}.to_dense()"
        )


def name_of(tensor: Tensor) -> str:
    """The name of a tensor's type."""
    return str(tensor.dtype).removeprefix("torch.")


_DTYPES = {getattr(torch, name): getattr(torch, kind) for name, kind in STATISTICS.items()}


def statistics(tensor: Tensor) -> torch.dtype:
    """The type of lse where q is a tensor of this type."""
    kind: torch.dtype = _DTYPES[tensor.dtype]
    return kind


def _problem(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Rule, layout: str, precision: str
) -> Problem:
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    return describe(*shapes, name_of(q), scale, mask, layout, precision)
