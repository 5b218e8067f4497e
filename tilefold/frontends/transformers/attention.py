"""The attention function of models of transformers.

Queries, keys and values are views of (batch, length, heads, dim). They are read in place, and the
result lies as a model wants it, so nothing is copied or transposed.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilefold.backends.extra import NOTHING, Extra, taken_apart
from tilefold.backends.protocols import FORWARD
from tilefold.frontends.torch import calls, direct, recognised, tensors
from tilefold.frontends.torch.autocast import autocasts
from tilefold.frontends.torch.masked import Asked
from tilefold.frontends.torch.observed import recorded, unobserved
from tilefold.frontends.transformers.packed import packed
from tilefold.frontends.transformers.sight import Mask, request_of
from tilefold.masks.arrays import as_traced
from tilefold.masks.data_rules import Dense, dense
from tilefold.masks.given import form_of
from tilefold.masks.position_rules import Rule, causal, full
from tilefold.scores.modifications import bias
from tilefold.scores.modifications import softcap as softcap_of
from tilefold.scores.score import Score

_NONE: tuple[Tensor, ...] = ()
_NOTHING = (None,)
_READING = [FORWARD.plus(tuple([f"data{n}" for n in range(many)])) for many in range(4)]
"""The forward pass without arrays of a rule, and with one, two and three."""


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What `AttentionInterface` calls: o (batch, queries, heads, dim), and no weights.

    `s_aux` are sinks, and `cu_seq_lens_q` has the lengths of packed sequences. Of `others` only
    those of packed sequences change a result.
    """
    if output_attentions:
        _warn_of_weights()
    if query.shape[0] != key.shape[0]:  # queries that a model learns have a batch of 1
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if cu_seq_lens_q is not None:
        past = is_causal or (attention_mask is not None and getattr(module, "is_causal", True))
        seen: Seen | Mask = _packed(query, key, cu_seq_lens_q, past, others)
    elif attention_mask is None:
        plain = position_bias is None and softcap is None and s_aux is None and not dropout
        if plain and (o := _direct(query, key, value, is_causal, scaling)) is not None:
            return o, None
        seen = _unmasked(query, key, is_causal)
    elif isinstance(attention_mask, Mask):
        check_keys(attention_mask, key)
        seen = attention_mask
    else:
        seen = _by_tensor(attention_mask, query, key, value)
    if seen.keys is not None:
        first, end = seen.keys
        key, value = key[:, :, first:end], value[:, :, first:end]
        if position_bias is not None:
            position_bias = position_bias[..., first:end]
    plain = position_bias is None and softcap is None and s_aux is None and not dropout
    if plain and len(seen.arrays) < 2 and seen.bias is None and _is_direct(query, key, value):
        asked = Asked(seen.request(scaling, "bhnd"), *(seen.arrays or _NOTHING))
        return direct.output_masked(query, key, value, asked).transpose(1, 2), None
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    request, arrays = seen.request(scaling), seen.arrays
    scores = _scores(softcap, position_bias, seen.bias)
    if scores is None and s_aux is None and not dropout and len(arrays) < len(_READING):
        if not (autocasts() or recorded(q, k, v)) and unobserved(q, k, v, *arrays):
            wanted = _READING[len(arrays)]  # straight to the kernels: it saves 5 us of a call
            return tensors.run(wanted, (q, k, v, *arrays), q, request)[0], None
        if not arrays:
            return calls.attention(q, k, v, request)[0], None
    return _extended(q, k, v, request, arrays, scores, s_aux, dropout), None


def _is_direct(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a layer may take the way of `tilefold.torch.enable`: it saves 40 of 99 us of a call.

    Its results lie as q does. A model wants the heads of a position side by side.
    """
    heads_inside = q.is_cpu and q.stride(1) <= q.stride(2)
    return heads_inside and not (autocasts() or recorded(q, k, v)) and unobserved(q, k, v)


def _direct(q: Tensor, k: Tensor, v: Tensor, past: bool, scale: float | None) -> Tensor | None:
    """The result of a layer that sees all keys, or the past of as many; None for other calls."""
    if (past and q.shape[2] != k.shape[2] and q.shape[2] != 1) or not _is_direct(q, k, v):
        return None
    options = past and q.shape[2] != 1, scale, True
    o = direct.output(q, k, v, *options)
    return (direct.forward(q, k, v, *options)[0] if o is None else o).transpose(1, 2)


class Seen(NamedTuple):
    """What a layer's mask says: a rule of some keys, arrays of the rule, and a bias of scores."""

    rule: Rule
    keys: tuple[int, int] | None = None
    arrays: tuple[Tensor, ...] = _NONE
    bias: Tensor | None = None

    def request(self, scale: float | None, layout: str = "bnhd") -> Any:
        """The request of a layer that scales its scores in this way."""
        return request_of(self.rule, scale, layout)


def _scores(cap: float | None, *biases: Tensor | None) -> list[Score] | None:
    """What becomes of the scores; None for nothing."""
    made = [bias(each) for each in biases if each is not None]
    return ([softcap_of(cap), *made] if cap is not None else made) or None


def _extended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: Any,
    arrays: tuple[Tensor, ...],
    scores: list[Score] | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """The result of a layer with tensors beside q, k and v."""
    extra = NOTHING
    if scores or sinks is not None or dropout:
        chance = calls.chance_of(dropout)
        seed = calls.seed_of(None, q) if chance else None
        extend = calls.extended_request
        request, extra = taken_apart(request, scores, sinks, chance, seed, extend)
    names = tuple([f"data{number}" for number in range(len(arrays))])
    extra = Extra((*names, *extra.names), (*arrays, *extra.arrays))
    return calls.attention(q, k, v, request, extra)[0]


def check_keys(mask: Mask, key: Tensor) -> None:
    """Raises ValueError for another number of keys than a mask was made for."""
    if mask.shape[3] != key.shape[2]:
        raise ValueError(
            f"attention_mask was made for {mask.shape[3]} keys, and the layer has {key.shape[2]}"
        )


def _unmasked(query: Tensor, key: Tensor, is_causal: bool) -> Seen:
    """What a layer sees without a mask: one query sees all, several see all or the past.

    More keys than queries are those of a cache that is not full yet: query i stands at key i.
    """
    queries, keys = query.shape[2], key.shape[2]
    if not is_causal or queries == 1:
        return _ALL
    if keys == queries:
        return _PAST
    return Seen(causal(), (0, queries)) if keys > queries else Seen(causal(align="start"))


_ALL, _PAST = Seen(full()), Seen(causal())


def _by_tensor(mask: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Seen:
    """What a caller's own mask says: bool, or floats that are added to the scores.

    One that is a rule is read once: see `recognised`. Another one is read by the kernels.
    """
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention_mask must be of bool or of floats, got {mask.dtype}")
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.shape[3] > key.shape[2]:
        mask = mask[..., : key.shape[2]]
    if unobserved(query, key, value, mask) and query.is_cpu and not recorded(mask):
        pairs = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
        found = recognised.rule_of(mask, pairs, query.shape[3] + value.shape[3])
        if found is not None:
            return Seen(found)
    if mask.dtype != torch.bool:
        return Seen(full(), bias=mask)
    if torch.compiler.is_compiling():
        return Seen(dense(mask))
    rule, arrays = form_of(Dense(as_traced("attention_mask", mask, (4,), "bool")))
    return Seen(rule, arrays=arrays)


def _packed(query: Tensor, key: Tensor, cu: Tensor, past: bool, others: dict[str, Any]) -> Seen:
    """What sequences see that lie one behind the other, whatever mask says the same of all pairs.

    Continuous batching says is_causal=False and gives a mask, which holds the order too.
    """
    if query.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q is for packed sequences, a batch of 1; got one of {query.shape[0]}"
        )
    cu_k = others.get("cu_seq_lens_k")
    sides = cu, cu if cu_k is None else cu_k
    return Seen(packed(*sides, query.shape[2], key.shape[2], past, others.get("sliding_window")))


def _warn_of_weights() -> None:
    warnings.warn(
        "output_attentions=True: tilefold never stores the weights, so attentions has none; load"
        " the model with attn_implementation='eager' to get them",
        stacklevel=2,
    )
