"""The mask that travels through a model in place of a tensor of all pairs.

Transformers makes one mask for each forward pass, or one for each kind of layer. So what a mask
costs, here its rule, is paid once. Its layers read the same plan.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import masking_utils

from tilefold.frontends.torch import calls
from tilefold.frontends.transformers.closures import (
    BIDIRECTIONAL,
    CAUSAL,
    Place,
    parts_of,
    reach,
    rule_of,
)
from tilefold.frontends.transformers.models import kind_of
from tilefold.masks.arrays import as_traced
from tilefold.masks.data_rules import Dense, Lengths, dense, lengths
from tilefold.masks.given import RuleForm, form_of
from tilefold.masks.position_rules import Rule, causal, full, local

_FULL = full()

_LARGE = 2**17
"""Pairs of query and key from which padding is data of the plan, which then skips it. Below, it
comes with each call: a new plan takes 0.7 ms, and reads of the data 5 to 90 us in each layer.
(Intel Xeon with 2 cores, 12 heads of dim 32: 16 x 64 x 64 is even, 32 x 128 x 128 saves 1 ms in
each layer.)"""

_ADDS = ("add", "radd", "iadd")


class Mask:
    """What each query of a batch sees, as transformers' own masks of shape (batch, 1, q, k) say it.

    Code of models that computes with a mask gets the tensor: the mask has its attributes.
    """

    ndim = 4

    def __init__(self, rule: Rule, keys: tuple[int, int] | None, given: dict[str, Any]) -> None:
        traced = torch.compiler.is_compiling()
        form = RuleForm(rule, ()) if traced else form_of(rule)
        self.rule = form.rule
        """The rule of the keys that any query sees."""
        self.arrays = form.arrays
        """The arrays of the rule that come with each call."""
        self.bias = None
        self.keys = keys
        """The first key that any query sees and the end of those keys; None means all."""
        self.shape = (given["batch_size"], 1, given["q_length"], given["kv_length"])
        self.given = given
        """The keywords that transformers made the mask of."""
        self._requests: dict[Any, Any] = {}

    def request(self, scale: float | None, layout: str = "bnhd") -> Any:
        """The request of the layers that scale their scores in this way."""
        if torch.compiler.is_compiling():
            return request_of(self.rule, scale, layout)
        found = self._requests.get((scale, layout))
        if found is None:
            found = self._requests[scale, layout] = request_of(self.rule, scale, layout)
        return found

    def dense(self) -> Tensor:
        """The mask as a tensor of bool, which transformers makes."""
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        made: Tensor = masking_utils.sdpa_mask(**{**self.given, **skips})
        return made

    def __getitem__(self, at: Any) -> Tensor:
        return self.dense()[at]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "").strip("_") in _ADDS:
            raise NotImplementedError(
                "a mask of tilefold is of bool, and this model adds it to scores: load the model"
                " with attn_implementation='eager'"
            )
        given = [x.dense() if isinstance(x, Mask) else x for x in args]
        named = {k: x.dense() if isinstance(x, Mask) else x for k, x in (kwargs or {}).items()}
        return function(*given, **named)


def request_of(rule: Rule, scale: float | None, layout: str) -> Any:
    """The request of a layer, whose arrays have their axes in the order of `layout`."""
    return calls.request_of(rule, scale, layout, "highest")


def mask_of(**given: Any) -> Mask | Tensor | None:
    """The mask function of "tilefold", with the keywords that transformers gives."""
    padding = given["attention_mask"]
    if isinstance(padding, Mask):  # `generate` makes it before a model does
        return padding
    if torch.compiler.is_compiling():
        return _traced(given)
    config: Any = type(given.get("config"))
    kind = kind_of(config)
    if not kind.asks:
        return _theirs(given)
    place = _place(given)
    parts = parts_of(given["mask_function"])
    first, end = reach(parts, place)
    keys = None if (first, end) == (0, place.len_k) else (first, end)
    rule = alone = rule_of(parts, place if keys is None else place.cut(first, end))
    if padding is not None:
        shown = _shown(padding, place.k + first, place.k + end)
        if shown is not None:
            hidden = _hidden(shown, place)
            rule = hidden if rule == _FULL else rule & hidden
    none = rule is alone and keys is None and kind.takes_none
    if none and _may_be_none(rule, parts, place, given):
        return None
    return Mask(rule, keys, given)


def _theirs(given: dict[str, Any]) -> Tensor | None:
    """The mask of a model that computes its attention itself: torch's, where it knows "sdpa"."""
    config = given["config"]
    if config._attn_implementation == "sdpa":
        made: Tensor | None = masking_utils.sdpa_mask(**given)
        return made
    raise NotImplementedError(
        f"the model of {type(config).__name__} computes its attention itself, and does not ask"
        " AttentionInterface for it: load it with attn_implementation='eager'"
    )


def _place(given: dict[str, Any]) -> Place:
    return Place(
        int(given["q_offset"]),
        int(given["kv_offset"]),
        given["batch_size"],
        given["q_length"],
        given["kv_length"],
        given["device"],
    )


def _may_be_none(rule: Rule, parts: Any, place: Place, given: dict[str, Any]) -> bool:
    """True where a layer knows this mask from `is_causal` alone, and transformers allows None."""
    if given.get("allow_is_bidirectional_skip"):
        return rule == _FULL
    same = CAUSAL in parts and (place.len_q == place.len_k or place.len_q == 1)
    alone = rule == causal() or (rule == _FULL and place.len_q == 1)
    return bool(given.get("allow_is_causal_skip", True)) and same and alone


def _shown(padding: Tensor, start: int, end: int) -> Tensor | None:
    """Which keys from `start` to `end` are no padding; None if all are. What is missing is."""
    missing = end - padding.shape[1]
    if missing > 0:
        padding = torch.nn.functional.pad(padding, (0, missing))
    if start or end != padding.shape[1]:
        padding = padding[:, start:end]
    return None if bool(padding.all()) else padding


def _hidden(shown: Tensor, place: Place) -> Rule:
    """The rule that hides padding, on the left, on the right, or anywhere."""
    array: NDArray[Any] = shown.cpu().numpy()
    rises = array[:, 1:] >= array[:, :-1]
    data = place.batch * place.len_q * place.len_k >= _LARGE
    if rises.all():  # left: the number of hidden keys stays as it is while more are appended
        return ~_counted(array.shape[1] - array.sum(1), shown, data)
    if (array[:, 1:] <= array[:, :-1]).all():
        return _counted(array.sum(1), shown, data)
    pairs = shown[:, None, None, :]
    return dense(pairs.cpu()) if data else Dense(as_traced("mask", pairs, (4,), "bool"))


def _counted(numbers: NDArray[Any], like: Tensor, data: bool) -> Rule:
    """The rule of numbers of keys: as data of the plan, or as an array of each call."""
    if data:
        return lengths(numbers)
    counts = torch.from_numpy(numbers.astype(np.int32)).to(like.device)
    return Lengths(as_traced("lengths", counts, (1,), "int32"))


def _traced(given: dict[str, Any]) -> Mask | Tensor | None:
    """The mask in a function that is compiled: its tensors are inputs of the graph.

    A compiler cannot look into functions, so few of them are known. The others, and those of one
    query, become a tensor as transformers makes it.
    """
    rule = _traced_rule(given)
    if rule is None:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        made: Tensor = masking_utils.sdpa_mask(**{**given, **skips})
        return made
    padding, first = given["attention_mask"], given["kv_offset"]
    if padding is None:
        return Mask(rule, None, given)
    end = first + given["kv_length"]
    padding = torch.nn.functional.pad(padding, (0, max(end - padding.shape[1], 0)))
    return Mask(rule & dense(padding[:, None, None, first:end]), None, given)


def _traced_rule(given: dict[str, Any]) -> Rule | None:
    """The rule of a function over positions alone; None where that is not known.

    Transformers allows to skip a mask only where nothing but a window joins it.
    """
    function, window = given["mask_function"], given.get("local_size")
    together = given["q_offset"] + given["q_length"] == given["kv_offset"] + given["kv_length"]
    if function is BIDIRECTIONAL:
        return full()
    if given["q_length"] == 1 or isinstance(together, Tensor) or not together:
        return None
    if function is CAUSAL:
        return causal()
    chunk = getattr(given.get("config"), "attention_chunk_size", None)
    if not window or window == chunk or given.get("use_vmap", False):
        return None
    if given.get("allow_is_causal_skip", True):
        return causal() & local(window)
    if given.get("allow_is_bidirectional_skip", False):
        return local(window + 1)
    return None
