"""Masks of torch in memory that are rules: what they hide is then skipped.

A dense mask in which each query sees one interval of keys is causal, a window, padding on either
side, blocks such as documents that lie side by side, or several of these joined by "and". Each call
reads the mask once and finds the intervals, or the first row that is none. So an answer is never
stale, however the memory was changed; nothing is kept for a tensor, and none is kept alive. Reading
takes far less time than attention by the mask: each head would read all of it too.

A plan for new intervals takes some milliseconds. So intervals become a rule where that saves more,
or where they come again, as they do in the layers of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tilefold.backends.cpu.scan import Bits, Plane, intervals
from tilefold.common.lru import LruCache
from tilefold.masks.expression import Boolean, Index, Lookup, Table
from tilefold.masks.position_rules import causal, full
from tilefold.masks.rule import Rule

Ints = NDArray[np.int32]

FEWEST_ROWS = 16
"""Masks of fewer queries, as in decoding, are read by the kernels: there is little to skip."""

FEWEST_FLOPS = 5e7
"""Smaller calls, of less than 0.5 ms, read their masks: to look for a rule takes 0.03 ms."""

WORTH_FLOPS = 1e9
"""Intervals that hide so much become a rule at once; others when they come again.

To plan the forward and the backward pass took 5 ms for 512 queries and 12 ms for 2,048 (two cores
of a Xeon with AVX-512), and the cores compute 1e9 operations of attention in about 10 ms.
"""

_FLOATS = {
    torch.float32: (torch.int32, 4),
    torch.float64: (torch.int64, 8),
    torch.float16: (torch.int16, 2),
    torch.bfloat16: (torch.int16, 2),
}


def _bits_of(dtype: torch.dtype, kind: torch.dtype, item: int) -> Bits:
    """What shows is 0 or -0; what hides is -inf, or the lowest number, which transformers adds."""
    numbers = [0.0, -0.0, -torch.inf, torch.finfo(dtype).min]
    zero, minus, infinite, least = torch.tensor(numbers, dtype=dtype).view(kind).tolist()
    return Bits(item, (zero, minus), (infinite, least), infinite)


_BITS = {dtype: _bits_of(dtype, *row) for dtype, row in _FLOATS.items()}
_BITS[torch.bool] = Bits(1, (1, 1), (0, 0), 0)


@dataclass(frozen=True, repr=False)
class Intervals(Rule):
    """Each query sees the keys from `first` up to `end`; `axes` name what both depend on."""

    axes: str
    first: Table
    end: Table

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """True for the keys between two entries."""
        if not self.axes:
            return (Index("k") >= int(self.first.array)) & (Index("k") < int(self.end.array))
        at = tuple([Index(name) for name in self.axes])
        return (Lookup(self.first, at) <= Index("k")) & (Index("k") < Lookup(self.end, at))

    def __repr__(self) -> str:
        return f"intervals({self.axes or 'all'}, {self.first}, {self.end})"

    def __hash__(self) -> int:
        return hash((self.axes, self.first, self.end))


_seen: LruCache[Rule] = LruCache(most=64, most_bytes=2**24)
"""The rules of the newest intervals."""


def rule_of(mask: Tensor, pairs: tuple[int, int, int, int], dim: int) -> Rule | None:
    """The rule of a mask with four axes that broadcasts to `pairs`, or None.

    The mask is a plain tensor on the processor, of bool or of floats. `dim` is the sum of those of
    keys and values, to which the work of a pair is proportional.
    """
    flops = 2.0 * dim * pairs[0] * pairs[1] * pairs[2] * pairs[3]
    if pairs[2] < FEWEST_ROWS or flops < FEWEST_FLOPS or mask.shape[3] != pairs[3]:
        return None
    found = _intervals_of(mask)
    if found is None:
        return None
    axes, first, end = found
    if _is_causal(axes, first, end, pairs[3]):
        return causal("start")
    if not first.any() and bool((end == pairs[3]).all()):
        return full()
    key = axes, first.shape, first.tobytes(), end.tobytes()
    rule = _seen.get(key)
    if rule is not None:
        return rule
    rule = _seen.put(key, Intervals(axes, Table(first), Table(end)), 2 * first.nbytes)
    seen = float((end - first).mean()) / max(1, pairs[3])
    return rule if (1 - seen) * flops > WORTH_FLOPS else None


def _intervals_of(mask: Tensor) -> tuple[str, Ints, Ints] | None:
    """The axes on which the intervals of a mask depend, the first keys, and those past the last."""
    bits = _BITS.get(mask.dtype)
    strides = mask.stride()
    if bits is None or strides[3] != 1 or mask.numel() == 0:
        return None
    sizes = [1 if step == 0 else size for size, step in zip(mask.shape, strides, strict=True)]
    steps = [bits.item * step for step in strides]
    start = mask.data_ptr()
    planes = [start + b * steps[0] + h * steps[1] for b, h in product(*map(range, sizes[:2]))]
    found = intervals(bits, Plane(sizes[2], sizes[3], steps[2]), planes)
    if found is None:
        return None
    first, end = (array.reshape(sizes[:3]) for array in found)
    axes = ""
    for axis, name in zip((2, 1, 0), "qhb", strict=True):
        if all(bool((array == array.take([0], axis)).all()) for array in (first, end)):
            first, end = (np.asarray(array.take(0, axis)) for array in (first, end))
        else:
            axes = name + axes
    return axes, first, end


def _is_causal(axes: str, first: Ints, end: Ints, keys: int) -> bool:
    """True if query i sees the keys up to i, all that there are."""
    if axes != "q" or first.any():
        return False
    return bool((end == np.minimum(np.arange(1, len(end) + 1), keys)).all())
