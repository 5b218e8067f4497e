"""Sequences that lie one behind the other, by their cumulative lengths.

Continuous batching and packed training give `cu_seq_lens_q` and `cu_seq_lens_k`: sequence i has the
queries from cu_seq_lens_q[i] to cu_seq_lens_q[i + 1], and keys likewise. The last query of a
sequence stands where its last key does.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tilefold.masks.data_rules import documents
from tilefold.masks.expression import Index, Lookup, Table
from tilefold.masks.position_rules import Rule, local
from tilefold.masks.traced import Traced


def packed(
    cu_q: Tensor, cu_k: Tensor, len_q: int, len_k: int, causal: bool, window: int | None
) -> Rule:
    """The rule of sequences by their cumulative lengths; what lies past the last one sees nothing.

    Raises ValueError for lengths that do not fit together.
    """
    if torch.compiler.is_compiling():
        return _traced(cu_q, cu_k, len_q, causal, window)
    sides = [cu.detach().cpu().numpy().astype(np.int64) for cu in (cu_q, cu_k)]
    for name, cu, length in zip(("q", "k"), sides, (len_q, len_k), strict=True):
        if cu.ndim != 1 or not cu.size or (np.diff(cu) < 0).any() or cu[0] or cu[-1] > length:
            raise ValueError(
                f"cu_seq_lens_{name} must rise from 0 to at most {length}, got {cu.tolist()}"
            )
    if sides[0].size != sides[1].size:
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k must be of as many sequences, got"
            f" {sides[0].size - 1} and {sides[1].size - 1}"
        )
    return _rule(sides[0].tobytes(), sides[1].tobytes(), len_q, len_k, causal, window)


@lru_cache(maxsize=16)  # all layers of a forward pass ask for the same
def _rule(
    cu_q: bytes, cu_k: bytes, len_q: int, len_k: int, causal: bool, window: int | None
) -> Rule:
    queries, keys = np.frombuffer(cu_q, np.int64), np.frombuffer(cu_k, np.int64)
    ids_q, ids_k = _ids(queries, len_q, -1), _ids(keys, len_k, -2)
    rule = documents(ids_q, ids_k, causal=causal)
    if window is None:
        return rule
    from_end = [_from_end(cu, n) for cu, n in ((queries, len_q), (keys, len_k))]
    q, k = (
        Lookup(Table(at), (Index(name),)) for at, name in zip(from_end, ("q", "k"), strict=True)
    )
    return rule & Traced(k - q < window, ("q", "k"))


def _traced(cu_q: Tensor, cu_k: Tensor, length: int, causal: bool, window: int | None) -> Rule:
    """The rule in a function that is compiled, where nobody knows the lengths."""
    if cu_q is not cu_k:
        raise NotImplementedError(
            "a compiled function takes packed sequences that have as many keys as queries: pass one"
            " tensor as cu_seq_lens_q and cu_seq_lens_k"
        )
    at = torch.arange(length, device=cu_q.device)
    rule = documents(torch.bucketize(at, cu_q[1:], right=True).to(torch.int32), causal=causal)
    if window is None:
        return rule
    return rule & local(window, causal=causal)


def _ids(cu: NDArray[np.int64], length: int, past: int) -> NDArray[np.int32]:
    """The number of the sequence at each place, and `past` after the last sequence."""
    ids = np.full(length, past, np.int32)
    ids[: cu[-1]] = np.repeat(np.arange(cu.size - 1), np.diff(cu))
    return ids


def _from_end(cu: NDArray[np.int64], length: int) -> NDArray[np.int32]:
    """The distance of each place from the end of its sequence."""
    distance = np.zeros(length, np.int32)
    distance[: cu[-1]] = np.repeat(cu[1:], np.diff(cu)) - 1 - np.arange(cu[-1])
    return distance
