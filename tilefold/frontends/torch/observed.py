"""Who observes operations on PyTorch tensors: autograd, or a part of torch that sees operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tilefold.frontends.torch import tensors

PLAIN = (Tensor, torch.nn.Parameter)
"""Tensor types whose operations never call back into Python."""

# a small call looks at these: each name that is not looked up again saves 20 ns
_torch, _autograd, _strided = torch._C, torch._C._autograd, torch.strided


def unobserved(*given: Tensor) -> bool:
    """True if these are plain tensors, and no part of torch observes operations on them."""
    if _watched():
        return False
    here = given[0].is_cpu
    for tensor in given:
        if not (
            type(tensor) in PLAIN
            and (tensor.is_cpu if here else tensors.same_gpu(tensor, given[0]))
            and tensor.layout is _strided
            and not tensor.is_neg()
        ):
            return False
    return True


def recorded(*given: Tensor) -> bool:
    """True if autograd records a call on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)


def lifted() -> bool:
    """True inside a transform of `torch.func` and in forward mode, where functions of autograd go.

    False where a compiler traces it, which takes operators.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def untraceable() -> bool:
    """True where a compiler traces what operators of Python cannot do: functions leave its graph.

    In forward mode they lose tangents without a word, and `torch.func.grad` refuses them.
    """
    if not torch.compiler.is_compiling():
        return False
    active = torch._C._are_functorch_transforms_active()
    return forward_ad._current_level >= 0 or (bool(active) and _differentiated())


def _differentiated() -> bool:
    """True if a transform around a call is another one than `vmap`."""
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or ()
    return any(each.key() != functorch.TransformType.Vmap for each in stack)


# The compiler runs it while it traces, within the same transforms.
_differentiated._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _watched() -> bool:
    """True where something observes operators.

    It is a compiler, a tracer or a transform, which must see one operator, a mode, or a profiler.
    """
    return bool(
        torch.compiler.is_compiling()
        or _torch._are_functorch_transforms_active()
        or _torch._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or _torch._len_torch_function_stack()
        or _torch._len_torch_dispatch_stack()
        or _autograd._profiler_enabled()
    )


def traced() -> bool:
    """True where a graph is made of operations, in which functions of Python leave no trace."""
    return torch._C._get_tracing_state() is not None or faked()


def faked() -> bool:
    """True if a mode makes tensors without data, or records operations."""
    kinds = torch._C._TorchDispatchModeKey
    modes = kinds.FAKE, kinds.PROXY, kinds.FUNCTIONAL
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in modes)
