"""`torch.nn.functional.scaled_dot_product_attention` by tilefold's kernels, with torch's meaning.

The arguments are brought into the one form of kernels: four axes, a batch that all tensors have,
and heads of which those of keys and values are equal. This changes views, and copies where axes
before the heads cannot be joined in place. Torch's errors keep their types.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilefold.backends.extra import taken_apart
from tilefold.frontends.torch import calls
from tilefold.masks.position_rules import causal, full
from tilefold.scores.modifications import bias

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
    """See `tilefold.torch.scaled_dot_product_attention`."""
    _check(query, key, value, attn_mask, dropout_p, is_causal)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = _cast(query, key, value)
    _check_types(query, key, value, attn_mask)
    q, k, v, batch = _four(query, key, value, enable_gqa)
    score = None
    if attn_mask is not None:
        pairs = *batch, q.shape[1], q.shape[2], k.shape[2]
        score = bias(_additive(_mask_of_four(attn_mask, pairs), q.dtype))
    chance = calls.chance_of(dropout_p) if 0 < dropout_p < 1 else 0.0
    rule = causal("start") if is_causal else full()
    request = calls.request_of(rule, scale, "bhnd", "highest")
    seed = calls.seed_of(None, q) if chance else None
    request, extra = taken_apart(request, score, None, chance, seed, calls.extended_request)
    o = calls.attention(q, k, v, request, extra)[0]
    if dropout_p == 1:
        o = torch.dropout(o, 1.0, train=True)
    axes = max(query.ndim, key.ndim, value.ndim)
    return o if axes == 4 else o.reshape(*batch, *o.shape[4 - min(axes, 3) :])


class Fitted(NamedTuple):
    """q, k and v with four axes, and the sizes of the axes before the heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    batch: tuple[int, ...]


def _check(q: Any, k: Any, v: Any, mask: Any, dropout: float, is_causal: Any) -> None:
    """Raises TypeError for what is no tensor, and RuntimeError for tensors of too few axes."""
    given = {"query": q, "key": k, "value": v}
    for name, x in given.items() if mask is None else (*given.items(), ("attn_mask", mask)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        if x.device != q.device:
            raise RuntimeError(f"query is on {q.device} and {name} on {x.device}: move one of them")
        if x.ndim < 2 and name != "attn_mask":
            raise RuntimeError(
                f"{name} must have at least the axes (length, dim), got shape {tuple(x.shape)}"
            )
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False, got {type(is_causal).__name__}")
    if not 0 <= dropout <= 1:
        raise RuntimeError(f"dropout_p must be a probability from 0 to 1, got {dropout}")


def _check_types(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Raises RuntimeError for types that do not fit together."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _FLOATS:
        raise RuntimeError(
            "query, key and value must have one type: float32, float64, float16 or bfloat16; got"
            f" {q.dtype}, {k.dtype} and {v.dtype}"
        )
    allowed = (torch.bool, torch.float32, q.dtype)
    if mask is not None and mask.dtype not in allowed and not _casts(mask):
        raise RuntimeError(
            f"attn_mask must be of bool, of float32, or of query's {q.dtype}, got {mask.dtype}"
        )


def _casts(x: Tensor) -> bool:
    """True if autocast takes a tensor, as it takes floats of all types but float64."""
    floats = x.is_floating_point() and x.dtype != torch.float64
    return floats and torch.is_autocast_enabled(x.device.type)


def _cast(*given: Tensor) -> list[Tensor]:
    """Tensors in the type of autocast, where it takes them."""
    return [x.to(torch.get_autocast_dtype(x.device.type)) if _casts(x) else x for x in given]


def _four(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> Fitted:
    """The tensors as kernels take them. Raises RuntimeError if they do not fit together."""
    batch = _common_batch(q, k, v)
    q, k, v = _common_heads([_joined(x, batch) for x in (q, k, v)], enable_gqa)
    if q.shape[3] != k.shape[3]:
        raise RuntimeError(f"query has a dim of {q.shape[3]} and key one of {k.shape[3]}")
    if k.shape[2] != v.shape[2]:
        raise RuntimeError(f"there are {k.shape[2]} keys and {v.shape[2]} values")
    return Fitted(q, k, v, batch)


def _common_batch(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """The sizes of the axes before the heads, to which those of all tensors broadcast."""
    if q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        return tuple(q.shape[:-3])
    shapes = [x.shape[:-3] for x in (q, k, v)]
    try:
        return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise RuntimeError(
            "the axes of query, key and value before the heads must broadcast, got"
            f" {', '.join(str(tuple(shape)) for shape in shapes)}"
        ) from None


def _joined(x: Tensor, batch: Sequence[int]) -> Tensor:
    """A tensor whose axes before the heads became one axis."""
    if x.ndim == 4 and x.shape[:1] == batch:
        return x
    if x.ndim == 2:
        x = x[None]
    x = x.expand(*batch, *x.shape[-3:])
    return x.reshape(math.prod(batch), *x.shape[-3:])


def _common_heads(given: list[Tensor], enable_gqa: bool) -> list[Tensor]:
    """The tensors with as many heads of values as of keys, which divide those of queries."""
    q, *both = given
    heads = [x.shape[1] for x in given]
    if heads[0] == heads[1] == heads[2]:
        return given
    if enable_gqa:
        if 0 in heads or heads[0] % heads[1] or heads[0] % heads[2]:
            raise RuntimeError(
                "with enable_gqa the heads of key and of value must divide those of query, got"
                f" {heads[0]}, {heads[1]} and {heads[2]}"
            )
        if heads[1] == heads[2]:
            return given
        return [q, *[x.repeat_interleave(heads[0] // x.shape[1], 1) for x in both]]
    most = max(heads) if 0 not in heads else 0
    if any(number not in (1, most) for number in heads):
        raise RuntimeError(
            "query, key and value must have one number of heads, or 1, got"
            f" {heads[0]}, {heads[1]} and {heads[2]}; fewer heads of key and value need enable_gqa"
        )
    shared = heads[1] == heads[2] == 1
    return given if shared else [x.expand(-1, most, -1, -1) for x in given]


def _mask_of_four(mask: Tensor, pairs: tuple[int, ...]) -> Tensor:
    """A mask that broadcasts to `pairs` as one that broadcasts to (batch, heads, queries, keys)."""
    shape = (1,) * (len(pairs) - mask.ndim) + tuple(mask.shape)
    fits = len(shape) == len(pairs) and all(a in (1, b) for a, b in zip(shape, pairs, strict=True))
    if not fits:
        raise RuntimeError(
            "attn_mask must broadcast to (..., heads, queries, keys)"
            f" {tuple(pairs)}, got {tuple(mask.shape)}"
        )
    if len(shape) == 4:
        return mask if mask.ndim == 4 else mask.reshape(shape)
    if math.prod(shape[:-3]) == 1:
        return mask.reshape(1, *shape[-3:])
    return mask.reshape(shape).expand(*pairs[:-3], *shape[-3:]).reshape(-1, *shape[-3:])


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the scores: 0 or -inf for a mask of bool."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)
