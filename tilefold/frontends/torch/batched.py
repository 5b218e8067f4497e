"""Gradients of many losses at once: PyTorch's old `vmap`.

`is_grads_batched=True`, `jacobian(vectorize=True)` and `gradcheck(check_batched_grad=True)` map by
tensors without memory that `torch.func` does not know, and few operations have a rule for them. So
functions of tensors that may meet them are mapped by the `vmap` of `torch.func` in their place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

_is_batched: Any = torch._C._functorch.is_legacy_batchedtensor

Function = TypeVar("Function", bound=Callable[..., Any])


def batched(do: Tensor, dlse: Tensor | None) -> bool:
    """True if one of the tensors stands for many, in the old `vmap`."""
    return bool(_is_batched(do)) or (dlse is not None and bool(_is_batched(dlse)))


def mapped(function: Function) -> Function:
    """The function, whose arguments may have tensors that the old `vmap` maps.

    Its arguments and results are tensors, sequences with tensors, and other values.
    """

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not any(map(_is_batched, _tensors(args))):
            return function(*args)
        from torch.utils._pytree import tree_flatten, tree_unflatten

        leaves, structure = tree_flatten(args)
        level, sizes = _mapped_level(leaves)
        places = [number for number, size in enumerate(sizes) if size]

        def inside(*entries: Tensor) -> tuple[Tensor, ...]:
            for place, entry in zip(places, entries, strict=True):
                leaves[place] = entry
            found, outside.structure = tree_flatten(call(*tree_unflatten(leaves, structure)))
            outside.there = [isinstance(x, Tensor) for x in found]
            return tuple([x for x in found if isinstance(x, Tensor)])

        outside: Any = functools.partial(inside)  # keeps what is no tensor, which vmap refuses
        entries = [torch._remove_batch_dim(leaves[n], level, sizes[n], 0) for n in places]
        made = iter(torch.func.vmap(inside, randomness="same")(*entries))
        results = [
            torch._add_batch_dim(next(made), 0, level) if there else None for there in outside.there
        ]
        return tree_unflatten(results, outside.structure)

    return call  # type: ignore[return-value]


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (tuple, list)):
            yield from _tensors(tuple(x))


def _mapped_level(leaves: list[Any]) -> tuple[int, list[int]]:
    """The innermost level that maps one of the tensors, and the length of its axis in each.

    The length is 0 where the level does not map a tensor.
    """
    level = torch._C._vmapmode_increment_nesting()
    torch._C._vmapmode_decrement_nesting()
    sizes = [0]
    while not any(sizes):
        level -= 1
        sizes = [
            torch._remove_batch_dim(x, level, 0, 0).shape[0]
            if isinstance(x, Tensor) and _is_batched(x)
            else 0
            for x in leaves
        ]
    return level, sizes
