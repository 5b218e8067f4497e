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

from tilefold.backends.extra import NOTHING, Extra, taken_apart
from tilefold.frontends.torch import calls
from tilefold.frontends.torch.autocast import cast
from tilefold.frontends.torch.masked import additive, joined, shown
from tilefold.frontends.torch.observed import recorded, unobserved
from tilefold.frontends.torch.recognised import rule_of
from tilefold.masks.position_rules import Rule, full
from tilefold.scores.modifications import bias
from tilefold.scores.score import Score

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
    query, key, value = cast(query, key, value)
    _check_types(query, key, value, attn_mask)
    q, k, v, batch = _four(query, key, value, enable_gqa)
    rule, score, data = joined(is_causal), None, NOTHING
    if attn_mask is not None:
        pairs = *batch, q.shape[1], q.shape[2], k.shape[2]
        rule, score, data = _masked(rule, _mask_of_four(attn_mask, pairs), q, k, v)
    o = attended(q, k, v, rule, score, data, scale, dropout_p)
    axes = max(query.ndim, key.ndim, value.ndim)
    return o if axes == 4 else o.reshape(*batch, *o.shape[4 - min(axes, 3) :])


def attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    score: Score | None = None,
    data: Extra = NOTHING,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """o of tensors as kernels take them; `data` are the arrays that the rule reads."""
    given, turned = (q, k, v), _heads_first(q)
    if turned:  # so o lies as q does, and later layers need no copy of it
        given = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    chance = calls.chance_of(dropout_p) if 0 < dropout_p < 1 else 0.0
    request = calls.request_of(rule, scale, "bnhd" if turned else "bhnd", "highest")
    seed = calls.seed_of(None, q) if chance else None
    request, extra = taken_apart(request, score, None, chance, seed, calls.extended_request)
    extra = Extra(data.names + extra.names, data.arrays + extra.arrays)
    o = calls.attention(*given, request, extra)[0]
    if dropout_p == 1:
        o = torch.dropout(o, 1.0, train=True)
    return o.transpose(1, 2) if turned else o


def _masked(
    rule: Rule, mask: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Rule, Score | None, Extra]:
    """The rule, the score and the operands of a call with a mask of four axes beside a rule.

    A mask that is a rule is read once. Another one is read by the kernels: of bool as an operand of
    the rule, or as what it adds to scores, where gradients are wanted: these then have derivatives.
    Either way it is neither hashed nor planned.
    """
    here = unobserved(q, k, v, mask) and q.is_cpu
    if here and not recorded(mask):
        sizes = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        found = rule_of(mask, sizes, q.shape[3] + v.shape[3])
        if found is not None:
            return rule & found if rule != full() else found, None, NOTHING
        if mask.dtype == torch.bool and not recorded(q, k, v):
            return rule & shown(mask.shape), None, Extra(("data0",), (mask,))
    return rule, bias(additive(mask, q.dtype)), NOTHING


def _heads_first(q: Tensor) -> bool:
    """True for a view (batch, length, heads, dim).transpose(1, 2), as layers make it."""
    return q.ndim == 4 and not torch.compiler.is_compiling() and q.stride(1) < q.stride(2)


class Fitted(NamedTuple):
    """q, k and v with four axes, and the sizes of the axes before the heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    batch: tuple[int, ...]


def _check(q: Any, k: Any, v: Any, mask: Any, dropout: Any, is_causal: Any) -> None:
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
    if dropout is None or isinstance(dropout, str):
        raise TypeError(f"dropout_p must be a number, got {type(dropout).__name__}")
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
    if mask is not None and mask.dtype not in allowed and cast(mask)[0].dtype != q.dtype:
        raise RuntimeError(
            f"attn_mask must be of bool, of float32, or of query's {q.dtype}, got {mask.dtype}"
        )


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
