"""Few queries against many keys: keys are split among programs, whose parts are merged in order.

The queries of all heads that share a key head are the rows of blocks, each of which reads a key
once for all of its rows (Flash-Decoding: Dao, Haziza, Massa, Sizov, 2023; the grouped rows are
those of FlashAttention-3). A part is m, l and the sum that belongs to them, which the second kernel
joins from the first split to the last. Where a split saw scores of -inf alone, its m is -inf.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilefold.backends.triton.kernels import dropout, scores, softmax
from tilefold.backends.triton.kernels.forward import folded
from tilefold.backends.triton.kernels.frame import (
    RECOMPUTED,
    USUAL,
    Walk,
    column,
    guard,
    load,
    write,
    written,
    zeros,
)
from tilefold.backends.triton.kernels.frame import parallel as rows_parallel
from tilefold.backends.triton.kernels.mask import masks
from tilefold.backends.triton.kernels.storage import storage
from tilefold.backends.triton.kernels.text import Text
from tilefold.backends.triton.spec import TritonSpec

DECODE = (
    "rows are the queries of all heads of a key head",
    "o, m, l = 0, lowest, 0",
    "for each tile of keys of the split:",
    "    s = q k^T",
    "    fold s and v into o, m, l as the forward pass does",
    "parts of the split are o, m, l",
)

MERGE = (
    "o, m, l = 0, lowest, 0",
    "for each split in order:",
    "    top = max(m, m of the split)",
    "    o = o exp (m - top) + o of the split exp (m of the split - top), and l likewise",
    "    m = top",
    "o, lse = o / l, m + log l",
)


def emit(spec: TritonSpec) -> str:
    """The module of the kernel that leaves a part for each split."""
    assert not spec.descriptors, "rows of several heads do not lie in one tile"
    text = Text()
    text("part, block = block // splits, block % splits")
    text("row = part * PARALLEL + row_parallel")
    text("member, q_at = row // len_q, row % len_q")
    text("within_parallel = member < group")
    text("h_q = h * group + tl.minimum(member, group - 1)")
    if masks(spec.mask) or spec.score:
        text("q_safe = q_at")
    scores.factor(text, spec)
    text("q_block = q + b.to(tl.int64) * q_b")
    text("q_rows = q_block + (h_q.to(tl.int64) * q_h + q_at.to(tl.int64) * q_n)[:, None]")
    for i, piece in enumerate(spec.pieces("q") if spec.preloaded else ()):
        tile = load(spec, "q", piece, "within_parallel")
        text(f"q_{i} = {storage(spec.dtype).negated(tile) if spec.negative else tile}")
    text("odd = 0")
    _part(text, spec, USUAL)
    with text.block("if odd != 0"):
        _part(text, spec, RECOMPUTED)
    return written(spec, "Attention of few queries: the part of one split.", DECODE, text)


def _part(text: Text, spec: TritonSpec, walks: Sequence[Walk]) -> None:
    """The part of the split, from its first tile to memory."""
    sums = folded(text, spec, walks, keys="h", head="h_q[:, None]")
    if walks is RECOMPUTED:
        softmax.scaled(text, spec)
    text("row_n = ((b.to(tl.int64) * heads * group + h_q) * splits + block) * len_q + q_at")
    text("tl.store(part_m + row_n, m, mask=within_parallel)")
    text("tl.store(part_l + row_n, l, mask=within_parallel)")
    for name, piece in zip(sums, spec.pieces("v"), strict=True):
        where = guard(piece, "within_parallel")
        at = f"part_o + row_n[:, None] * {spec.dim_v} + {column(piece)}[None, :]"
        text(f"tl.store({at}, {name}, mask={where})")


def emit_merge(spec: TritonSpec) -> str:
    """The module of the kernel that merges the parts of all splits."""
    text = Text()
    values = range(len(spec.pieces("v")))
    sums = [f"o_{i}" for i in values]
    rows_parallel(text, spec)
    text("met = tl.full([PARALLEL], 0, tl.int32)")
    softmax.begin(text, spec)
    for name, piece in zip(sums, spec.pieces("v"), strict=True):
        text(f"{name} = {zeros(spec, 'PARALLEL', piece.width)}")
    with text.block("for split in tl.range(0, splits)"):
        text("row_n = ((b.to(tl.int64) * heads + h) * splits + split) * len_q + q_at")
        lowest = storage(spec.dtype).lowest
        text(f"m_s = tl.load(part_m + row_n, mask=within_parallel, other={lowest})")
        text("l_s = tl.load(part_l + row_n, mask=within_parallel, other=0.0)")
        text("top = tl.maximum(m, m_s)")
        text('met |= (m_s == float("-inf")).to(tl.int32)')
        text("shrink, share = tl.exp2(m - top), tl.exp2(m_s - top)")
        text("l = l * shrink + l_s * share", "m = top")
        for name, piece in zip(sums, spec.pieces("v"), strict=True):
            where = guard(piece, "within_parallel")
            at = f"part_o + row_n[:, None] * {spec.dim_v} + {column(piece)}[None, :]"
            text(f"part = tl.load({at}, mask={where}, other=0.0)")
            text(f"{name} = {name} * shrink[:, None] + part * share[:, None]")
    text(softmax.LOSE)
    softmax.end(text, spec, Walk.WHOLE)
    means = [dropout.scaled(spec, f"({name} / share[:, None])") for name in sums]
    write(text, spec, "o", "h", "first_q", means)
    softmax.write_statistics(text, spec)
    return written(spec, "Attention of few queries: the parts, merged.", MERGE, text)
