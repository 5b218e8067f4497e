"""The attention function of models of transformers.

Queries, keys and values are views of (batch, length, heads, dim). They are read in place, and the
result lies as a model wants it, so nothing is copied or transposed.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilefold.backends.extra import Extra, taken_apart
from tilefold.frontends.torch import calls
from tilefold.frontends.transformers.packed import packed
from tilefold.frontends.transformers.sight import Mask, request_of
from tilefold.masks.arrays import as_traced
from tilefold.masks.data_rules import Dense, dense
from tilefold.masks.given import form_of
from tilefold.masks.position_rules import Rule, causal, full
from tilefold.scores.modifications import bias, softcap
from tilefold.scores.score import Score


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """What `AttentionInterface` calls: o (batch, queries, heads, dim), and no weights.

    `given` has what some models pass: softcap, s_aux (sinks), and cu_seq_lens_q of packed
    sequences. What is not named here does not change the result of any attention function.
    """
    if given.get("output_attentions"):
        _warn_of_weights()
    if query.shape[0] != key.shape[0]:  # queries that a model learns have a batch of 1
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if given.get("cu_seq_lens_q") is not None:
        seen = _packed(module, query, key, attention_mask, is_causal, given)
    elif isinstance(attention_mask, Mask):
        seen = _seen(attention_mask, key)
    elif attention_mask is None:
        seen = _unmasked(query, key, is_causal)
    else:
        seen = _by_tensor(attention_mask, key)
    if seen.keys is not None:
        first, end = seen.keys
        key, value = key[:, :, first:end], value[:, :, first:end]
        if position_bias is not None:
            position_bias = position_bias[..., first:end]
    scores: list[Score] = []
    if given.get("softcap") is not None:
        scores.append(softcap(given["softcap"]))
    if position_bias is not None:
        scores.append(bias(position_bias))
    if seen.bias is not None:
        scores.append(bias(seen.bias))
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return _run(q, k, v, seen, scaling, scores, given.get("s_aux"), dropout), None


class Seen(NamedTuple):
    """What a layer's mask says: a rule of some keys, arrays of the rule, and a bias of scores."""

    rule: Rule
    keys: tuple[int, int] | None = None
    arrays: tuple[Tensor, ...] = ()
    bias: Tensor | None = None
    mask: Mask | None = None


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    scale: float | None,
    scores: list[Score],
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """The result, (batch, queries, heads, dim)."""
    request = seen.mask.request(scale) if seen.mask is not None else request_of(seen.rule, scale)
    extra = Extra((), ())
    if scores or sinks is not None or dropout:
        chance = calls.chance_of(dropout)
        seed = calls.seed_of(None, q) if chance else None
        score, extend = scores or None, calls.extended_request
        request, extra = taken_apart(request, score, sinks, chance, seed, extend)
    if seen.arrays:
        names = [f"data{number}" for number in range(len(seen.arrays))]
        extra = Extra((*names, *extra.names), (*seen.arrays, *extra.arrays))
    return calls.attention(q, k, v, request, extra)[0]


def _seen(mask: Mask, key: Tensor) -> Seen:
    """What a mask says. Raises ValueError for another number of keys."""
    if mask.shape[3] != key.shape[2]:
        raise ValueError(
            f"attention_mask was made for {mask.shape[3]} keys, and the layer has {key.shape[2]}"
        )
    return Seen(mask.rule, mask.keys, mask.arrays, mask=mask)


def _unmasked(query: Tensor, key: Tensor, is_causal: bool) -> Seen:
    """What a layer sees without a mask: one query sees all, several see all or the past.

    More keys than queries are those of a cache that is not full yet: query i stands at key i.
    """
    queries, keys = query.shape[2], key.shape[2]
    if not is_causal or queries == 1:
        return Seen(full())
    if keys > queries:
        return Seen(causal(), (0, queries))
    return Seen(causal() if keys == queries else causal(align="start"))


def _by_tensor(mask: Tensor, key: Tensor) -> Seen:
    """What a caller's own mask says: bool, or floats that are added to the scores."""
    if mask.shape[-1] > key.shape[2]:
        mask = mask[..., : key.shape[2]]
    if mask.dtype != torch.bool:
        return Seen(full(), bias=mask)
    if torch.compiler.is_compiling():
        return Seen(dense(mask))
    rule, arrays = form_of(Dense(as_traced("attention_mask", mask, (2, 3, 4), "bool")))
    return Seen(rule, arrays=arrays)


def _packed(
    module: Any, query: Tensor, key: Tensor, mask: Any, is_causal: bool, given: dict[str, Any]
) -> Seen:
    """What sequences see that lie one behind the other, whatever mask says the same of all pairs.

    Continuous batching says is_causal=False, since its mask holds that too.
    """
    if query.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q is for packed sequences, a batch of 1; got one of {query.shape[0]}"
        )
    cu_k = given.get("cu_seq_lens_k")
    past = is_causal or (isinstance(mask, Tensor) and getattr(module, "is_causal", True))
    cu = given["cu_seq_lens_q"], given["cu_seq_lens_q"] if cu_k is None else cu_k
    return Seen(packed(*cu, query.shape[2], key.shape[2], past, given.get("sliding_window")))


def _warn_of_weights() -> None:
    warnings.warn(
        "output_attentions=True: tilefold never stores the weights, so attentions has none; load"
        " the model with attn_implementation='eager' to get them",
        stacklevel=2,
    )
