"""Attention for PyTorch: torch's own functions by tilefold's kernels.

>>> import torch
>>> import tilefold.torch
>>> q = k = v = torch.randn(1, 4, 128, 64)
>>> tilefold.torch.scaled_dot_product_attention(q, k, v, is_causal=True).shape
torch.Size([1, 4, 128, 64])

The functions have the names, the arguments and the meanings of those that they stand for.
`tilefold.attention` takes tensors too, and says more: rules in place of masks, scores, and sinks.

`enable()` puts tilefold in the place of torch's own attention, for models as they are:

>>> with tilefold.torch.enabled():
...     o = torch.nn.functional.scaled_dot_product_attention(q, k, v)
>>> tilefold.torch.stats()["hits"] > 0
True
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from tilefold.frontends.torch import overrides, sdpa
from tilefold.frontends.torch.flash import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from tilefold.frontends.torch.flex.attention import flex_attention
from tilefold.frontends.torch.flex.block_mask import create_block_mask
from tilefold.products.linear import QuantizedLinear, quantize_

__all__ = [
    "QuantizedLinear",
    "create_block_mask",
    "disable",
    "enable",
    "enabled",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "flex_attention",
    "quantize_",
    "scaled_dot_product_attention",
    "stats",
]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` by tilefold's kernels.

    >>> import torch
    >>> import tilefold.torch
    >>> q, k, v = torch.randn(3, 2, 4, 16, 8).unbind()
    >>> o = tilefold.torch.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> bool(torch.allclose(o[:, :, 0], v[:, :, 0]))  # the first query sees the first key alone
    True

    Arguments:
        query: (..., heads, queries, dim), or without heads. All tensors are of float32, float64,
            float16 or bfloat16; autocast makes them its type
        key: (..., key heads, keys, dim)
        value: (..., key heads, keys, dim of values)
            The axes before the last two broadcast
        attn_mask: what broadcasts to (..., heads, queries, keys): of bool, where True is seen; or
            of floats, which are added to the scores, and have a gradient
        dropout_p: the probability that a weight is dropped, in training and elsewhere. Which ones
            are dropped follows from `torch.manual_seed`; they are others than torch drops
        is_causal: query i sees the keys up to i, whatever their number; a mask hides more
        scale: the factor of the scores; None means 1 / sqrt(dim)
        enable_gqa: the heads of query are a multiple of those of key and value; neighbours share

    Returns:
        o, (..., heads, queries, dim of values), in the type of query. A query that sees no key gets
        0. It is differentiable any number of times.

    Raises:
        TypeError: an argument is no tensor, or is_causal no bool
        RuntimeError: the tensors do not fit together
        NotImplementedError: the tensors lie on a device that has no kernels
    """
    return sdpa.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def enable() -> None:
    """Let torch's `scaled_dot_product_attention` run tilefold's kernels, in the whole process.

    >>> import torch
    >>> import tilefold.torch
    >>> tilefold.torch.enable()
    >>> layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    >>> x = torch.randn(2, 16, 32)
    >>> layer(x, x, x, need_weights=False)[0].shape
    torch.Size([2, 16, 32])
    >>> tilefold.torch.disable()

    It serves tensors on the processor, in every thread: in models of torch, transformers, diffusers
    and others that call the function, also compiled ones. Tensors on other devices are not
    concerned. What tilefold cannot do goes to torch's own kernels, and a RuntimeWarning says so
    once for each reason; `stats` counts. A second `enable` changes nothing.

    Masks in memory that are causal, windows, padding or blocks are recognised, and what they hide
    is skipped. With dropout other weights fall out than in torch, by torch's generator. The layers
    of torch that have a fast path without this function (`torch.backends.mha`) leave it meanwhile.

    From torch 2.13 on this is `torch.nn.attention.activate_flash_attention_impl("tilefold")`.
    """
    overrides.enable()


def disable() -> None:
    """Undo `enable`. In blocks of `enabled` that run, tilefold stays until they end.

    >>> import tilefold.torch
    >>> tilefold.torch.disable()  # nothing happens where it was not enabled
    """
    overrides.disable()


def enabled() -> AbstractContextManager[None]:
    """A block in which tilefold is enabled, in the whole process; afterwards it is as before.

    >>> import torch
    >>> import tilefold.torch
    >>> q = k = v = torch.randn(1, 4, 128, 64)
    >>> with tilefold.torch.enabled():
    ...     o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    Blocks may lie in each other, and run in several threads: tilefold stays until the last ends.
    """
    return overrides.enabled()


def stats() -> dict[str, Any]:
    """What became of the calls of torch's attention since the process began.

    >>> import tilefold.torch
    >>> sorted(tilefold.torch.stats())
    ['hits', 'misses', 'reasons']

    Returns:
        A dict. "hits": the calls that tilefold computed. "misses": those that it left to torch.
        "reasons": why, each with its number of calls. Calls of compiled programs that are no flash
        operator of torch are not seen, and are not counted.
    """
    return overrides.stats()
