"""`flex_attention`: torch's function by tilefold's kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.attention import flex_attention as theirs

from tilefold.frontends.torch import calls
from tilefold.frontends.torch.flex.block_mask import mask_mod_of
from tilefold.frontends.torch.flex.requests import request_of
from tilefold.frontends.torch.flex.tracing import traced

_AUX: Any = getattr(theirs, "AuxOutput", None)  # from torch 2.9 on


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
    mask_mod: Callable[..., Any] | None = None,
) -> Any:
    """`torch.nn.attention.flex_attention.flex_attention` by tilefold's kernels, with gradients.

    >>> import torch
    >>> import tilefold.torch
    >>> q, k, v = torch.randn(3, 1, 4, 256, 32).unbind()
    >>> slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], requires_grad=True)
    >>> def alibi(score, b, h, q_idx, kv_idx):
    ...     return score + slopes[h] * (kv_idx - q_idx)
    >>> def causal(b, h, q_idx, kv_idx):
    ...     return q_idx >= kv_idx
    >>> o = tilefold.torch.flex_attention(q, k, v, score_mod=alibi, mask_mod=causal)
    >>> o.sum().backward()
    >>> slopes.grad.shape
    torch.Size([4])

    The functions are called with symbols in every call, and what they compute becomes the text of a
    kernel. The memory is linear in the lengths, tiles that a mask hides are skipped, and the
    derivatives are found by themselves. Tensors that the functions read are read in every call, and
    get gradients if they are of floats.

    Arguments:
        query: (batch, heads, queries, dim), of float32, float64, float16 or bfloat16
        key: (batch, key heads, keys, dim); with a block_mask the batch may be 1
        value: (batch, key heads, keys, dim of values)
        score_mod: a function of score, b, h, q_idx, kv_idx, scalar tensors, that returns the new
            score
        block_mask: of `create_block_mask`, or of torch's. Of a mask of torch's that has no mask_mod
            the blocks say what is seen
        scale: the factor of the scores; None means 1 / sqrt(dim)
        enable_gqa: the heads of query are a multiple of those of key and value
        return_lse: also return the log-sum-exp of each query's scores; torch wants return_aux
        kernel_options: no effect: kernels choose their own
        return_aux: `AuxRequest(lse=True, max_scores=True)` of torch: also return an `AuxOutput`
        mask_mod: a function of b, h, q_idx, kv_idx that returns whether the query sees the key.
            It needs no block_mask; with one, both must hold

    Returns:
        o, (batch, heads, queries, dim of values), in the type of query. lse and max_scores are
        (batch, heads, queries), natural, of float32, and of float64 for float64. A query that sees
        no key gets 0, and -inf in both.

    Raises:
        TypeError, ValueError: the arguments do not fit together
        IndexError: a function may read beyond a tensor
        NotImplementedError: a function does what the language of kernels has not, or the tensors
            lie on a device that has no kernels

    The language is by Dong et al. (2024, arXiv:2412.05496).
    """
    _check(query, key, value, enable_gqa)
    if return_lse and return_aux is not None:
        raise ValueError("flex_attention: give return_lse or return_aux, got both")
    sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    _check_mask(block_mask, sizes, key.shape[0])
    if key.shape[0] != query.shape[0]:
        key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    masks = [each for each in (mask_mod_of(block_mask), mask_mod) if each is not None]
    found = traced(score_mod, _both(masks), sizes)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    request, extra = request_of(found, factor)
    wants_max = return_aux is not None and return_aux.max_scores
    further = ("max",) if wants_max else ()
    o, lse, *largest = calls.attention(query, key, value, request, extra, further)
    if return_aux is not None:
        return o, _AUX(lse if return_aux.lse else None, largest[0] if wants_max else None)
    return (o, lse) if return_lse else o


def _both(masks: list[Callable[..., Any]]) -> Callable[..., Any] | None:
    if len(masks) < 2:
        return masks[0] if masks else None
    first, second = masks
    return lambda *indices: first(*indices) & second(*indices)


def _check(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """Raises what torch's function raises for tensors that do not fit together."""
    for name, tensor in zip(("query", "key", "value"), (query, key, value), strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"flex_attention: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise NotImplementedError(
                f"flex_attention: {name} must have 4 axes (batch, heads, sequence, dim), got shape"
                f" {tuple(tensor.shape)}"
            )
    heads, fewer = query.shape[1], key.shape[1]
    if not enable_gqa and heads != fewer:
        raise ValueError(
            f"flex_attention: query has {heads} heads and key has {fewer}: pass enable_gqa=True"
        )
    if fewer and heads % fewer:
        raise ValueError(
            f"flex_attention: the heads of query must be a multiple of those of key, got {heads}"
            f" and {fewer}"
        )


def _check_mask(mask: Any, sizes: tuple[int, int, int, int], batch: int) -> None:
    """Raises ValueError unless a mask was made for these sizes."""
    if mask is None:
        if batch != sizes[0]:
            raise ValueError(
                f"flex_attention: query has a batch of {sizes[0]} and key of {batch}: only with a"
                " block_mask may key have a batch of 1"
            )
        return
    shape = tuple(mask.shape)
    if shape[-2:] != sizes[2:] and max(mask.BLOCK_SIZE) < 2**30:
        raise ValueError(
            f"flex_attention: block_mask is for {shape[-2]} queries and {shape[-1]} keys, got"
            f" {sizes[2]} and {sizes[3]}; make another one, or block_mask._adjust(len_q, len_k)"
        )
    for name, have, size in zip(("batch", "heads"), shape[:-2], sizes[:2], strict=False):
        if have not in (1, size):
            raise ValueError(f"flex_attention: block_mask has {name}={have}, the call {size}")
