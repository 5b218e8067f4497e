"""Models that ask `AttentionInterface` for their attention, and those that do not.

The others compute scores themselves, and add a mask of floats to them. They cannot run on tilefold,
and its masks, of bool or None, would mean something else to them.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedModel


class Kind(NamedTuple):
    """What the models of a configuration do; both are true where nobody can tell."""

    asks: bool
    """They ask `AttentionInterface`."""
    takes_none: bool
    """They know `sdpa`: with None in place of a mask, their layers say whether they are causal."""


@lru_cache(maxsize=128)
def kind_of(config: Any) -> Kind:
    """The kind of the models whose configuration is of this type.

    Transformers tells models that ask by the text of their modules. These lie beside the module of
    the configuration.
    """
    beside = config.__module__.rpartition(".")[0] + ".modeling_"
    modules = [module for name, module in [*sys.modules.items()] if name.startswith(beside)]
    models: list[Any] = [
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type)
        and issubclass(each, PreTrainedModel)
        and getattr(each, "config_class", None) is config
        and hasattr(each, "_can_set_attn_implementation")  # not in all versions
    ]
    if not models:
        return Kind(True, True)
    asks = any(model._can_set_attn_implementation() for model in models)
    return Kind(asks, any(model._supports_sdpa for model in models))
