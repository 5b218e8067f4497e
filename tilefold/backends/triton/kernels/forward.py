"""The forward pass: one program for each block of queries, which walks over the keys it sees.

FlashAttention-2 (Dao, 2023, arXiv:2307.08691), Algorithm 1. Tiles without a mask come first, in a
loop of their own that asks for nothing; tiles with one after them. Sums do not depend on the number
of programs, so results are the same from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilefold.backends.triton.kernels import dropout, scores, softmax
from tilefold.backends.triton.kernels.frame import (
    RECOMPUTED,
    USUAL,
    Walk,
    add_product,
    fetch,
    inspect,
    multiply,
    parallel,
    seen,
    take,
    tiles,
    within,
    write,
    written,
    zeros,
)
from tilefold.backends.triton.kernels.storage import storage
from tilefold.backends.triton.kernels.text import Text
from tilefold.backends.triton.spec import TritonSpec

ALGORITHM = (
    "o, m, l = 0, lowest, 0",
    "for each tile of keys that the block of queries sees:",
    "    s = scale q k^T",
    "    m, shrink = max(m, max s), exp (m_before - m)",
    "    p = exp (s - m)",
    "    l = l shrink + sum p",
    "    o = o shrink + p v",
    "o, lse = o / l, m + log l",
)


def emit(spec: TritonSpec) -> str:
    """The module of the forward kernel."""
    text = Text()
    parallel(text, spec)
    text("h_k = h // group", "odd = 0")
    scores.factor(text, spec)
    fetch(text, spec, "q", "parallel", "h", "first_q", "within_parallel")
    _block(text, spec, USUAL)
    with text.block("if odd != 0"):
        _block(text, spec, RECOMPUTED)
    return written(spec, "Attention, forward.", ALGORITHM, text)


def _block(text: Text, spec: TritonSpec, walks: Sequence[Walk]) -> None:
    """The block of queries from its first tile to its results."""
    sums = folded(text, spec, walks, keys="h_k", head="h")
    softmax.end(text, spec, walks[-1])
    means = [dropout.scaled(spec, f"({name} / share[:, None])") for name in sums]
    write(text, spec, "o", "h", "first_q", means)
    softmax.write_statistics(text, spec)


def folded(
    text: Text, spec: TritonSpec, walks: Sequence[Walk], *, keys: str, head: str
) -> list[str]:
    """m, l and the sums of a block over all of its tiles; returns the names of the sums.

    `keys` is the head of the keys, `head` that of the queries, as the rule is asked. Scores that
    are too large for the usual walks are `odd` like NaN.
    """
    sums = [f"o_{i}" for i in range(len(spec.pieces("v")))]
    softmax.begin(text, spec)
    for name, piece in zip(sums, spec.pieces("v"), strict=True):
        text(f"{name} = {zeros(spec, 'PARALLEL', piece.width)}")
    none = "tl.full([PARALLEL], 0, tl.int32)"
    if walks is RECOMPUTED:
        text(f"met = {none}")
    for walk in walks:
        with tiles(text, spec, "h", walk):
            fetch(text, spec, "k", "traverse", keys, "start", within(walk))
            multiply(text, spec, "s", "q", "k", walk)
            if walk is not Walk.WHOLE:
                seen(text, spec, head)
            scores.score(text, spec, walk, head)
            if walk is Walk.CAREFUL:
                text(softmax.MEET)
            softmax.fold(text, spec, sums, walk)
            dropout.kept(text, spec, head)
            text(f"weights = {storage(spec.dtype).write(dropout.weights(spec))}")
            fetch(text, spec, "v", "traverse", keys, "start", within(walk))
            for i, name in enumerate(sums):
                take(text, spec, "v", i, within(walk))
                inspect(text, spec, f"v_{i}", walk)
                add_product(text, spec, name, "weights", f"v_{i}", walk)
    if walks is RECOMPUTED:
        text(softmax.LOSE)
    else:
        text(f"odd |= tl.max({softmax.far(spec)}.to(tl.int32), 0)")
        if not spec.hides:  # then no pair that may meet has a score of -inf
            softmax.lost(text, spec, head, tiles(text, spec, "h", Walk.CAREFUL), none)
    return sums
