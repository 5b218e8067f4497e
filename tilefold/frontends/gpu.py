"""Tensors on a GPU: which machine runs their kernels, and how one call of it is made."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tilefold.masks.position_rules import Rule


def same(tensor: Tensor, first: Tensor) -> bool:
    """Whether two tensors are on one GPU that has kernels."""
    return (tensor.is_cuda or tensor.is_mps) and tensor.device == first.device


def machine(tensor: Tensor) -> Any:
    """What runs kernels for a tensor on a GPU; None on the CPU."""
    if tensor.is_cpu:
        return None
    if tensor.is_cuda:
        from tilefold.backends.triton import runtime as gpus

        return gpus.gpu(tensor.device.index)
    from tilefold.backends.metal import runtime as apple

    return apple.gpu()


def run(
    machine: Any,
    operation: str,
    given: tuple[Tensor, ...],
    mask: Rule,
    scale: float | None,
    layout: str,
    precision: str,
) -> tuple[Tensor, ...]:
    """The results of an operation, "forward" or "backward", of kernels on a machine.

    Machines of Triton's have an architecture, those of Metal's a family. Metal's multiply float32
    in float32 whatever the precision.
    """
    results: tuple[Tensor, ...]
    if hasattr(machine, "architecture"):
        from tilefold.backends.triton import calls

        call: Any = {"forward": calls.forward, "backward": calls.backward}[operation]
        results = call(machine, *given, mask, scale, layout, precision)
    else:
        from tilefold.backends.metal import calls as bound

        bind: Any = {"forward": bound.forward, "backward": bound.backward}[operation]
        results = bind(machine, *given, mask, scale, layout).run()
    return results
