"""Hugging Face transformers on tilefold: one line, and a model runs on it.

>>> import tilefold.transformers
>>> tilefold.transformers.register()
>>> from transformers import AutoModel, LlamaConfig
>>> small = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
>>> model = AutoModel.from_config(small, attn_implementation="tilefold")

A model gets a small object in place of a mask of all pairs of queries and keys. Padding, windows,
chunks and packed sequences become rules in it, and what they hide is never computed.
"""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from tilefold.frontends.transformers.attention import attention
from tilefold.frontends.transformers.sight import Mask, mask_of

__all__ = ["Mask", "register", "unregister"]

_NAME, _SDPA = "tilefold", "sdpa"

_before: dict[tuple[Any, str], Any] = {}
"""What was registered before, by interface and name; None for nothing."""


def register(*, replace_sdpa: bool = False) -> None:
    """Add "tilefold" to the attention functions of transformers.

    >>> import tilefold.transformers
    >>> tilefold.transformers.register()
    >>> from transformers import AttentionInterface
    >>> "tilefold" in AttentionInterface()
    True

    Then `from_pretrained(..., attn_implementation="tilefold")` loads a model that runs on tilefold,
    and `model.set_attn_implementation("tilefold")` changes one that is loaded.

    Arguments:
        replace_sdpa: tilefold also takes the place of "sdpa", which models have by default. So
            every model of the process runs on it. Continuous batching (`generate_batch`) takes
            only "sdpa" on processors, so it needs this

    A second call changes nothing. `unregister` undoes it.

    Raises:
        TypeError: replace_sdpa is no bool
    """
    if not isinstance(replace_sdpa, bool):
        raise TypeError(f"replace_sdpa must be True or False, got {replace_sdpa!r}")
    for name in (_NAME, _SDPA) if replace_sdpa else (_NAME,):
        for interface, function in (
            (AttentionInterface, attention),
            (AttentionMaskInterface, mask_of),
        ):
            _before.setdefault((interface, name), interface._global_mapping.get(name))
            interface.register(name, function)


def unregister() -> None:
    """Undo `register`: what the names stood for before, they stand for again.

    Models that have "tilefold" then raise KeyError: set another implementation first.
    """
    for (interface, name), function in _before.items():
        if function is None:
            interface._global_mapping.pop(name, None)
        else:
            interface.register(name, function)
    _before.clear()
