"""The functions of `protocols.Arrays` for PyTorch tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tilefold.problems import attention
from tilefold.problems.attention import Shape


def layout_key(given: Sequence[Tensor]) -> tuple[Any, ...]:
    """Shapes, strides and types."""
    return tuple([(tensor.shape, tensor.stride(), tensor.dtype) for tensor in given])


def strides(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The strides of an argument in elements."""
    return tensor.stride()


def dtype_of(tensor: Tensor) -> str:
    """The name of a tensor's type."""
    return str(tensor.dtype).removeprefix("torch.")


def common_dtype(tensors: Mapping[str, Tensor]) -> str:
    """The common type of tensors. Raises unless they are dense and lie on one device.

    Fake tensors of a compiler pass these checks too.
    """
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        check_place(name, tensor, device)
    return attention.common_dtype({name: dtype_of(tensor) for name, tensor in tensors.items()})


def check_place(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises unless a tensor is dense and lies on the device."""
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
    check_dense(name, tensor)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises TypeError for a nested or a sparse tensor."""
    if tensor.layout is torch.jagged:
        raise TypeError(
            f"{name} must be a strided tensor, got a nested one: pass {name}.to_padded_tensor(0.0),"
            f" with mask=tilefold.lengths({name}.offsets().diff()) for the lengths of keys"
        )
    if tensor.is_nested:
        raise TypeError(
            f"{name} must be one tensor, got a nested one: pass"
            f" {name}.contiguous().to_padded_tensor(0.0), with mask=tilefold.lengths(n) for the"
            " lengths n of keys"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a strided tensor, got {tensor.layout}; pass {name}.to_dense()"
        )


def check_held(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that reaches past the end of its storage.

    FSDP frees parameters so: it resizes their storages to 0, and the tensors keep their shapes.
    """
    check_dense(name, tensor)
    held = tensor.untyped_storage().nbytes()
    needed = tensor.nbytes + tensor.storage_offset() * tensor.itemsize
    if held >= needed and tensor.is_contiguous():
        return
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((length - 1) * step for length, step in pairs)
    needed = (last + 1) * tensor.itemsize if tensor.numel() else 0
    if held < needed:
        raise ValueError(
            f"{name} needs {needed} bytes of memory, and its storage holds {held}: it was freed or"
            " resized, as FSDP does with parameters; fill it again before the call"
        )


def native_dtype(like: Tensor, dtype: str) -> torch.dtype | None:
    """The type with this name; None means the type of `like`, which torch takes faster."""
    found: torch.dtype = getattr(torch, dtype)
    return None if found == like.dtype else found


def empty(like: Tensor, wanted: Sequence[tuple[Shape, torch.dtype | None]]) -> tuple[Tensor, ...]:
    """Tensors of shapes and types on the device of another, whose elements are not set."""
    # Sizes one by one are faster, but no sizes at all are only taken as a tuple.
    sizes = [(shape or ((),), dtype) for shape, dtype in wanted]
    return tuple(
        [
            like.new_empty(*shape) if dtype is None else like.new_empty(*shape, dtype=dtype)
            for shape, dtype in sizes
        ]
    )


def tensor_of(array: NDArray[Any]) -> Tensor:
    """A tensor that shares the memory of an array, or a copy where torch has no such tensor.

    Torch takes no negative strides, no strides within an element, no other byte order, and no
    read-only memory. It takes bfloat16 only as integers.
    """
    odd = any(stride < 0 or stride % array.itemsize for stride in array.strides)
    if odd or not array.flags.writeable or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def packed(tensor: Tensor) -> Tensor:
    """The tensor if it is contiguous, else a contiguous copy."""
    return tensor.contiguous()


def is_packed(tensor: Tensor) -> bool:
    """True for a contiguous tensor."""
    return tensor.is_contiguous()


def is_writable(tensor: Tensor) -> bool:
    """True: torch has no read-only tensors."""
    return True


pointer = Tensor.data_ptr
"""The address of the first element."""
