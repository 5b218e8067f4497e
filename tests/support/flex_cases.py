"""Masks and modifications of FlexAttention, and their definition in dense float64.

They are those of attention-gym and of papers, written from their definitions. The reference calls
the same functions with tensors of all indices, which broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as theirs

BATCH, HEADS, LENGTH, DIM = 2, 4, 64, 8
WIDTH = 8
Mod = Callable[..., Any]


class Case(NamedTuple):
    """Functions of FlexAttention, and the floats that they read."""

    score: Mod | None = None
    mask: Mod | None = None
    leaves: tuple[Tensor, ...] = ()


def learnable(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def sliding_window(size: int) -> Mod:
    return lambda b, h, q, k: (q >= k) & (q - k <= size)


def prefix_lm(length: int) -> Mod:
    return theirs.or_masks(lambda b, h, q, k: k < length, causal)


def documents(ids: Tensor) -> Mod:
    """Causal within documents, with positions counted from each document's start."""
    starts = torch.tensor([0, 10, 30, 50])

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        local_q, local_k = q - starts[ids[q]], k - starts[ids[k]]
        return (ids[q] == ids[k]) & (local_q >= local_k)

    return mask


def dilated(window: int, dilation: int) -> Mod:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        distance = torch.abs(q - k)
        return (distance <= window) & ((distance % dilation) == 0) & (k <= q)

    return mask


def natten(place: Mod, kernel: int) -> Mod:
    """A square neighbourhood of each pixel, which is moved inside at the border."""

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        seen: Any = True
        for mine, other in zip(place(q), place(k), strict=True):
            middle = mine.clamp(kernel // 2, WIDTH - 1 - kernel // 2)
            seen = seen & ((middle - other).abs() <= kernel // 2)
        return seen

    return mask


def by_rows(index: Any) -> tuple[Any, Any]:
    return index // WIDTH, index % WIDTH


def by_tiles(index: Any) -> tuple[Any, Any]:
    """Pixels in tiles of 4 x 4, row by row."""
    tile, inner = index // 16, index % 16
    return tile // 2 * 4 + inner // 4, tile % 2 * 4 + inner % 4


def by_morton(index: Any) -> tuple[Any, Any]:
    """Pixels in Morton's order: the bits of both coordinates take turns."""

    def even(x: Any) -> Any:
        x = x & 0x15
        x = (x | (x >> 1)) & 0x13
        return (x | (x >> 2)) & 0x07

    return even(index >> 1), even(index)


def static_tiles(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Sliding tile attention: a tile of 2 x 2 pixels sees the tiles beside it."""
    seen: Any = None
    for axis in range(2):
        mine, other = by_rows(q)[axis] // 2, by_rows(k)[axis] // 2
        near = torch.abs(mine.clamp(1, 2) - other) <= 1
        seen = near if seen is None else torch.logical_and(seen, near)
    return seen


def transfusion(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Text is causal, and each image sees all of itself: starts and sizes by batch entry."""
    seen = q >= k
    for place in range(2):
        start, size = IMAGES[b, place, 0], IMAGES[b, place, 1]
        seen = seen | ((q >= start) & (k < start + size) & (k >= start) & (q < start + size))
    return seen


IMAGES = torch.tensor([[[3, 8], [20, 9]], [[0, 0], [40, 24]]])


def batchified(inner: Mod, length: int) -> Mod:
    """Several sequences as one."""
    return lambda b, h, q, k: (q // length == k // length) & inner(b, h, q % length, k % length)


def flamingo(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Text sees the image before it, whose keys are a range."""
    image = SEEN_IMAGE[b, q]
    return (k >= BORDERS[image]) & (k < BORDERS[image + 1])


SEEN_IMAGE = (torch.arange(LENGTH)[None] * torch.tensor([[1], [2]]) // 40).clamp(max=2)
BORDERS = torch.tensor([0, 16, 40, 64])


def global_and_local(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (torch.abs(q - k) < 6) | IS_GLOBAL[q] | IS_GLOBAL[k]


IS_GLOBAL = torch.arange(LENGTH) % 17 == 3


def streaming(b: Any, h: Any, q: Any, k: Any) -> Any:
    """The first tokens, and a window."""
    return (k <= q) & torch.logical_or(k < 4, q - k < 8)


def hashed(b: Any, h: Any, q: Any, k: Any) -> Any:
    """A random half of all pairs, other ones in each head."""
    mixed = (q * 40503 + k * 30011 + h * 9176 + b) % 65521
    return ((mixed ^ 0x2D) * 7919 % 65521 < 32760) | (q == k)


def per_head(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Another window in each head; the first sees everything."""
    return (q - k).abs() < torch.where(h == 0, LENGTH, h * 5)


def offset(b: Any, h: Any, q: Any, k: Any) -> Any:
    """Decoding: the position of the first query is a tensor."""
    return q + FIRST >= k


FIRST = torch.tensor(5)


def likely(b: Any, h: Any, q: Any, k: Any) -> Any:
    """A comparison of floats, and one of integers."""
    return (CHANCE[h, q] + CHANCE[h, k] > 0.4) & (q >= k) | (q == k)


CHANCE = torch.rand(HEADS, LENGTH, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([0, 10, 30, 50]).bincount(minlength=LENGTH).cumsum(0) - 1

MASKS: dict[str, Mod] = {
    "causal": causal,
    "sliding window": sliding_window(10),
    "prefix LM": prefix_lm(20),
    "documents": documents(IDS),
    "dilated window": dilated(20, 4),
    "NATTEN": natten(by_rows, 5),
    "NATTEN in tiles": natten(by_tiles, 5),
    "NATTEN in Morton's order": natten(by_morton, 3),
    "static tiles": static_tiles,
    "transfusion": transfusion,
    "batchified": batchified(sliding_window(5), 16),
    "flamingo": flamingo,
    "global and local": global_and_local,
    "streaming": theirs.and_masks(streaming, lambda b, h, q, k: q != 9),
    "hashed": hashed,
    "per head": per_head,
    "offset": offset,
    "floats": likely,
    "checkerboard": lambda b, h, q, k: (q + k) % 2 == 0,
    "nothing": lambda b, h, q, k: q < 0,
}
"""A mask that hides all keys of some queries or of all is among them."""


def bucket(relative: Any, count: int = 8, most: int = 32) -> Any:
    """The bucket of T5, in both directions."""
    count //= 2
    found = (relative > 0).to(torch.long) * count
    distance = torch.abs(relative)
    exact = count // 2
    grown = torch.log(distance.float() / exact) / math.log(most / exact) * (count - exact)
    large = torch.min(exact + grown.to(torch.long), torch.full_like(distance, count - 1))
    return found + torch.where(distance < exact, distance, large)


def alibi() -> Case:
    slopes = learnable(HEADS)
    return Case(lambda s, b, h, q, k: s + slopes[h] * (k - q), causal, (slopes,))


def t5() -> Case:
    weights = learnable(8, HEADS)
    return Case(lambda s, b, h, q, k: s + weights[bucket(k - q), h], None, (weights,))


def softcap_with_approximate_tanh() -> Case:
    def tanh(x: Any) -> Any:
        x = torch.clamp(x, -4.9, 4.9)
        square = x**2
        above = x * (135135 + square * (17325 + square * (378 + square)))
        return above / (135135 + square * (62370 + square * (3150 + 28 * square)))

    return Case(lambda s, b, h, q, k: 2 * tanh(s / 2))


def relative_bias() -> Case:
    table, offsets = learnable(HEADS, 2 * LENGTH + 2), torch.tensor([3, -2])
    return Case(
        lambda s, b, h, q, k: s + table[h, q - k + offsets[b] + LENGTH - 1].to(s.dtype),
        None,
        (table,),
    )


def wrapped() -> Case:
    """Negative indices count from the end, as everywhere in PyTorch."""
    table = learnable(LENGTH)
    return Case(lambda s, b, h, q, k: s * table[q - k], None, (table,))


def of_buckets() -> Case:
    """A table that is read by the entries of another one, and a scalar that learns."""
    table, scale, kinds = learnable(3, HEADS), learnable(), torch.arange(LENGTH) % 3
    return Case(
        lambda s, b, h, q, k: s + scale * torch.where(q == k, 0.0, table[kinds[k], h] * s),
        None,
        (table, scale),
    )


def hidden_by_the_score() -> Case:
    """Inverse causal order and documents in the score."""
    return Case(
        lambda s, b, h, q, k: torch.where(
            (q <= k) & (IDS[q] == IDS[k]), s - 0.125 * (k - q), -float("inf")
        )
    )


def waves() -> Case:
    """Functions that kernels have not, of one integer."""
    phases = learnable(HEADS)
    return Case(
        lambda s, b, h, q, k: (
            s * torch.sin((q - k) / 5) + torch.floor(torch.sqrt(q.float())) * phases[h]
        ),
        lambda b, h, q, k: torch.sqrt(q.float()).round() >= torch.sqrt(k.float()).floor(),
        (phases,),
    )


SCORES: dict[str, Callable[[], Case]] = {
    "alibi": alibi,
    "T5": t5,
    "softcap": lambda: Case(lambda s, b, h, q, k: 3 * torch.tanh(s / 3)),
    "approximate tanh": softcap_with_approximate_tanh,
    "relative bias": relative_bias,
    "wrapped": wrapped,
    "buckets": of_buckets,
    "hidden": hidden_by_the_score,
    "waves": waves,
    "checkerboard": lambda: Case(
        lambda s, b, h, q, k: torch.where((k - q).abs() % 2 == 1, s * 0.5, s * 2)
    ),
    "activations": lambda: Case(
        lambda s, b, h, q, k: (
            torch.nn.functional.gelu(s, approximate="tanh")
            + torch.nn.functional.silu(s) * (h == 1)
            - torch.nn.functional.softplus(s) * (h == 2).float()
            + torch.relu(s) ** 2 / 4
        )
    ),
    "learned temperature": lambda: (
        (t := learnable(HEADS)),
        Case(lambda s, b, h, q, k: s * torch.exp(t[h]) / (q + 2.0), causal, (t,)),
    )[1],
}


def inputs(*, gqa: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    heads = (HEADS, HEADS // 2, HEADS // 2) if gqa else (HEADS,) * 3
    shapes = [(BATCH, each, LENGTH, DIM) for each in heads]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def dense(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and the largest score of each query, by the definition."""
    k, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(DIM)
    sizes = scores.shape
    axes = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
    if case.score is not None:
        scores = case.score(scores, *axes)
    if case.mask is not None:
        scores = torch.where(case.mask(*axes).expand(sizes), scores, -math.inf)
    largest = scores.amax(-1)
    weights = torch.exp(scores - largest.clamp(min=-1e300)[..., None])
    total = weights.sum(-1)
    return weights @ v / total.clamp(min=1e-300)[..., None], torch.log(total) + largest, largest


def agree(found: Any, expected: Any, tolerance: float = 1e-11) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
