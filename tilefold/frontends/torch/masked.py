"""The requests of calls whose masks are tensors in memory: as a rule, or as an operand.

A mask that is a rule is read once. Another one is read by the kernels: of bool as an array of the
rule, of floats as what is added to scores. Either way it is neither hashed nor planned.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tilefold.backends.arrays.torch import dtype_of
from tilefold.frontends.torch.recognised import rule_of
from tilefold.masks.data_rules import Dense
from tilefold.masks.position_rules import Rule, causal, full
from tilefold.masks.tables import Given, Input
from tilefold.problems.request import Request
from tilefold.scores.modifications import Bias

Pairs = tuple[int, int, int, int]


class Asked(NamedTuple):
    """A request, and the array that it reads beside q, k and v: its one operand, or None."""

    request: Request
    array: Tensor | None


def joined(is_causal: bool, rule: Rule | None = None) -> Rule:
    """The rule of `is_causal`, which counts from the first query and key, and another one."""
    if rule is None:
        return causal("start") if is_causal else full()
    return causal("start") & rule if is_causal else rule


def asked(mask: Tensor, pairs: Pairs, dim: int, is_causal: bool, scale: float | None) -> Asked:
    """The request of a mask with four axes; `dim` is the sum of those of keys and values."""
    rule = rule_of(mask, pairs, dim)
    if rule is not None:
        return Asked(ruled_request(is_causal, scale, rule), None)
    if mask.dtype == torch.bool:
        return Asked(_seen_request(is_causal, scale, mask.shape), mask)
    return Asked(_added_request(is_causal, scale, mask.shape, dtype_of(mask)), mask)


def shown(shape: tuple[int, ...]) -> Rule:
    """The rule of a mask of bool, whose entries come with each call as `data0`."""
    return Dense(Given(tuple(shape), "bool", 0, 1))


@lru_cache(maxsize=256)
def plain_request(is_causal: bool, scale: float | None) -> Request:
    """The request of these options alone. Raises ValueError for a scale that is not finite."""
    return Request(joined(is_causal), scale)


@lru_cache(maxsize=32)  # few: rules hold tables
def ruled_request(is_causal: bool, scale: float | None, rule: Rule) -> Request:
    """The request of a mask that is a rule."""
    return Request(joined(is_causal, rule), scale)


@lru_cache(maxsize=256)
def _seen_request(is_causal: bool, scale: float | None, shape: tuple[int, ...]) -> Request:
    return Request(joined(is_causal, shown(shape)), scale)


@lru_cache(maxsize=256)
def _added_request(
    is_causal: bool, scale: float | None, shape: tuple[int, ...], dtype: str
) -> Request:
    return Request(joined(is_causal), scale, score=Bias(Input(0, dtype, tuple(shape))))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the scores: 0 or -inf for a mask of bool."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def four(mask: Tensor) -> Tensor:
    """A mask of up to four axes with four."""
    return mask if mask.ndim == 4 else mask[(None,) * (4 - mask.ndim)]
