"""Hugging Face diffusers on tilefold: a backend of its attention.

>>> import torch
>>> import tilefold.diffusers
>>> tilefold.diffusers.register()
>>> from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
>>> q = torch.randn(1, 16, 4, 8)  # batch, length, heads, dim
>>> with attention_backend("tilefold"):
...     dispatch_attention_fn(q, q, q).shape
torch.Size([1, 16, 4, 8])

Transformers of diffusers (Flux, and most models since) ask this registry. Its older models, such as
the UNet of Stable Diffusion, call torch's own attention: `tilefold.torch.enable()` serves them.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention_dispatch
from torch import Tensor

from tilefold import api
from tilefold.frontends.torch.masked import additive
from tilefold.masks.position_rules import causal, full
from tilefold.scores.modifications import bias

__all__ = ["register"]

_NAME = "tilefold"


def register() -> None:
    """Add "tilefold" to the attention backends of diffusers.

    >>> import tilefold.diffusers
    >>> tilefold.diffusers.register()
    >>> from diffusers.models.attention_dispatch import AttentionBackendName
    >>> AttentionBackendName("tilefold").value
    'tilefold'

    Then `model.set_attention_backend("tilefold")` and `attention_backend("tilefold")` take it. A
    second call changes nothing.

    Raises:
        ImportError: diffusers has no such registry, as before 0.35
    """
    try:
        names: Any = attention_dispatch.AttentionBackendName
        registry = attention_dispatch._AttentionBackendRegistry
    except AttributeError:
        raise ImportError("attention backends need diffusers 0.35 or newer; upgrade it") from None
    if _NAME in names._value2member_map_:
        return
    # The names are an enumeration, which is closed: a member is made as its class makes one.
    member = str.__new__(names, _NAME)
    member._name_, member._value_ = _NAME.upper(), _NAME
    setattr(names, member._name_, member)
    names._member_map_[member._name_] = names._value2member_map_[_NAME] = member
    names._member_names_.append(member._name_)
    registry.register(member)(attend)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    """What diffusers calls: o (batch, length, heads, dim), and lse (batch, length, heads) if asked.

    `attn_mask` is (batch, keys), or what broadcasts to (batch, heads, queries, keys): of bool, or
    of floats that are added to the scores.
    """
    if _parallel_config is not None:
        raise NotImplementedError(
            "context parallelism asks for attention that communicates, and tilefold has none:"
            " choose the backend 'native'"
        )
    score = None
    if attn_mask is not None:
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise TypeError(f"attn_mask must be of bool or of floats, got {attn_mask.dtype}")
        mask = attn_mask[:, None, None] if attn_mask.ndim == 2 else attn_mask
        score = bias(additive(mask, query.dtype))
    made = api.attention(
        query,
        key,
        value,
        mask=causal(align="start") if is_causal else full(),
        scale=scale,
        score=score,
        dropout=dropout_p or api.NO_DROPOUT,
        layout="bnhd",
        return_lse=return_lse,
    )
    return (made[0], made[1].transpose(1, 2)) if return_lse else made
