"""The mask functions of transformers as rules.

Transformers describes a mask by a function of the indices b, h, q and k, which is made of a few
functions by "and" and "or". Each of these is known by its code, and what it was made with stands in
its cells. A function that is none of them is evaluated at all pairs, exactly, block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import and_, or_
from types import CodeType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import masking_utils

from tilefold.masks.arrays import as_traced
from tilefold.masks.data_rules import Dense, documents
from tilefold.masks.position_rules import Rule, causal, chunked, full, local, rule

Function = Callable[..., Any]
"""A mask function of transformers: of the indices b, h, q and k."""

CAUSAL: Function = masking_utils.causal_mask_function
BIDIRECTIONAL: Function = masking_utils.bidirectional_mask_function

_FULL = full()
_BLOCK_PAIRS = 2**22
"""Pairs that are evaluated at once: their indices take 32 MiB each. Not tuned."""


class Place(NamedTuple):
    """The sizes of a mask, and the positions of its first query and its first key."""

    q: int
    k: int
    batch: int
    len_q: int
    len_k: int
    device: Any = None
    positions: NDArray[Any] | None = None
    """(batch, len_q), where positions begin anew in each of several packed sequences."""

    @property
    def shift(self) -> int:
        """Query i stands where key i + shift does."""
        return self.q - self.k

    @property
    def ends_together(self) -> bool:
        """True if the last query stands where the last key does."""
        return self.shift + self.len_q == self.len_k

    def cut(self, first: int, end: int) -> Place:
        """The same queries with the keys from `first` to `end` alone."""
        return self._replace(k=self.k + first, len_k=end - first)


def parts_of(function: Function) -> tuple[Function, ...]:
    """The functions that a function joins by "and", itself if it joins none."""
    if _code(function) != _AND:
        return (function,)
    return tuple([part for inner in _cells(function)["mask_functions"] for part in parts_of(inner)])


def reach(parts: Sequence[Function], place: Place) -> tuple[int, int]:
    """The first key that any query sees, and the end of those keys.

    Causal masks end them at the last query, windows begin them at the first.
    """
    first, end = 0, place.len_k
    for part in parts:
        if part is CAUSAL:
            end = min(end, place.shift + place.len_q)
        elif _code(part) == _SLIDING:
            first = max(first, place.shift + 1 - _cells(part)["sliding_window"])
    return (first, end) if first < end else (0, place.len_k)


def rule_of(parts: Sequence[Function], place: Place) -> Rule:
    """The rule of mask functions that are joined by "and"."""
    return _joined([_rule(part, place, parts) for part in parts])


def dense(function: Function, place: Place, use_vmap: bool = False) -> Tensor:
    """What a function says of all pairs, a tensor of bool (batch, 1, len_q, len_k)."""
    rows = max(_BLOCK_PAIRS // max(place.batch * place.len_k, 1), 1)
    blocks = []
    for start in range(0, place.len_q, rows):
        found = masking_utils.sdpa_mask(
            batch_size=place.batch,
            q_length=min(rows, place.len_q - start),
            kv_length=place.len_k,
            q_offset=place.q + start,
            kv_offset=place.k,
            mask_function=function,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=place.device,
        )
        blocks.append(found)
    return torch.cat(blocks, 2) if len(blocks) > 1 else blocks[0]


def _rule(function: Function, place: Place, beside: Sequence[Function]) -> Rule:
    """The rule of one function; `beside` are those that it is joined with by "and"."""
    if function is CAUSAL:
        return _causal(place)
    if function is BIDIRECTIONAL:
        return _FULL
    code = _code(function)
    known = _KNOWN.get(code) if code else None
    made = known(_cells(function), place, beside) if known else None
    if made is None:
        seen = dense(function, place, use_vmap=True)
        return Dense(as_traced("mask", seen, (4,), "bool"))
    return made


def _causal(place: Place) -> Rule:
    if place.shift >= place.len_k - 1:
        return _FULL
    if place.ends_together:
        return causal()
    shift = place.shift
    return rule(lambda q, k: k <= q + shift) if shift else causal(align="start")


def _sliding(cells: dict[str, Any], place: Place, beside: Sequence[Function]) -> Rule:
    """A query sees no key that is a window or more before it."""
    window, shift = cells["sliding_window"], place.shift
    if shift + place.len_q <= window:
        return _FULL
    if CAUSAL in beside and place.ends_together and window > 0:
        return local(window)
    return rule(lambda q, k: q - k < window - shift)


def _both_sides(cells: dict[str, Any], place: Place, _: Sequence[Function]) -> Rule:
    """A query sees the keys up to a distance, on both sides."""
    most, shift = cells["sliding_window"], place.shift
    if place.ends_together:
        return local(most + 1)
    return rule(lambda q, k: abs(q - k + shift) <= most)


def _chunked(cells: dict[str, Any], place: Place, _: Sequence[Function]) -> Rule:
    """A query sees the keys of its own chunk; chunks are counted from the end of left padding."""
    size, padding = cells["chunk_size"], _array(cells["left_padding"])
    if not padding.any() and place.positions is None and not place.q and not place.k:
        return chunked(size)
    q, k = _positions(place)
    return documents(*[(at - padding[:, None]) // size for at in (q, k)])


def _positions(place: Place) -> tuple[NDArray[Any], NDArray[Any]]:
    """The positions of queries and of keys, with an axis for the batch."""
    if place.positions is not None:
        return place.positions, place.positions
    return place.q + np.arange(place.len_q)[None], place.k + np.arange(place.len_k)[None]


def _same_block(cells: dict[str, Any], place: Place, _: Sequence[Function]) -> Rule:
    """A query sees the keys of its own block; -1 is no block."""
    ids = _array(cells["block_sequence_ids"])
    q, k = ids[:, place.q :][:, : place.len_q], ids[:, place.k :][:, : place.len_k]
    return documents(q, np.where(k < 0, -1 - np.abs(ids).max(initial=0) - np.abs(k), k))


def _packed(cells: dict[str, Any], place: Place, _: Sequence[Function]) -> Rule:
    """A query sees the keys of its own sequence."""
    ids = _array(cells["packed_sequence_mask"])
    q, k = ids[:, place.q :][:, : place.len_q], ids[:, place.k :][:, : place.len_k]
    return documents(q) if place.q == place.k and place.len_q == place.len_k else documents(q, k)


def _anew(cells: dict[str, Any], place: Place, beside: Sequence[Function]) -> Rule | None:
    """A function of positions that begin anew in each packed sequence.

    Within a sequence they count on by one, so what compares them may compare indices: pairs of
    different sequences are hidden by the function beside it. None where that is not so.
    """
    positions = _array(cells["position_ids"])
    ids = [_array(_cells(it)["packed_sequence_mask"]) for it in beside if _code(it) == _PACKED]
    if not ids or place.q or place.k or positions.shape != ids[0].shape:
        return None
    if not ((np.diff(positions) == 1) | (np.diff(ids[0]) > 0)).all() or (np.diff(ids[0]) < 0).any():
        return None
    inner = parts_of(cells["mask_function"])
    if not all(part in (CAUSAL, BIDIRECTIONAL) or _code(part) in _KNOWN for part in inner):
        return None
    return rule_of(inner, place._replace(positions=positions))


def _any(cells: dict[str, Any], place: Place, beside: Sequence[Function]) -> Rule:
    """Functions that are joined by "or"."""
    found = [
        _joined([_rule(part, place, (*parts, *beside)) for part in parts])
        for parts in map(parts_of, cells["mask_functions"])
    ]
    return reduce(or_, found) if found else ~_FULL


def _joined(rules: Sequence[Rule]) -> Rule:
    """Rules, joined by "and"."""
    hiding = [each for each in rules if each != _FULL]
    return reduce(and_, hiding) if hiding else _FULL


def _array(tensor: Any) -> NDArray[Any]:
    found: NDArray[Any] = torch.as_tensor(tensor).detach().cpu().numpy()
    return found


def _code(function: Function) -> CodeType | None:
    return getattr(function, "__code__", None)


def _cells(function: Any) -> dict[str, Any]:
    """What a function was made with, by name."""
    held = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, [c.cell_contents for c in held], strict=True))


def _codes() -> dict[str, CodeType]:
    """The code of the functions that transformers makes, by the name of their maker."""
    number = torch.zeros(1, 1, dtype=torch.int64)
    makers = {
        "and_masks": (CAUSAL,),
        "or_masks": (CAUSAL,),
        "sliding_window_overlay": (1,),
        "sliding_window_bidirectional_overlay": (1,),
        "chunked_overlay": (1, number),
        "blockwise_overlay": (number,),
        "packed_sequence_mask_function": (number,),
        "remap_positions_for_packed_sequence": (CAUSAL, number),
    }
    found = {}
    for name, given in makers.items():
        if make := getattr(masking_utils, name, None):  # not all versions have all of them
            found[name] = make(*given).__code__
    return found


_CODES = _codes()
_AND = _CODES["and_masks"]
_SLIDING = _CODES["sliding_window_overlay"]
_PACKED = _CODES["packed_sequence_mask_function"]

_RULES: dict[str, Callable[[dict[str, Any], Place, Sequence[Function]], Rule | None]] = {
    "or_masks": _any,
    "sliding_window_overlay": _sliding,
    "sliding_window_bidirectional_overlay": _both_sides,
    "chunked_overlay": _chunked,
    "blockwise_overlay": _same_block,
    "packed_sequence_mask_function": _packed,
    "remap_positions_for_packed_sequence": _anew,
}
_KNOWN = {_CODES[name]: made for name, made in _RULES.items() if name in _CODES}
