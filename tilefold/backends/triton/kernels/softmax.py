"""The running softmax of a block of queries, to base 2 (Milakov and Gimelshein, 2018).

The maximum `m` is of scores as they are, and the scale is multiplied in with the subtraction: one
fused multiply-add and one exponential for each weight. That wants a scale that is not negative, so
where it is, queries are negated first.
"""

from __future__ import annotations

from tilefold.backends.triton.kernels.frame import LOWEST, Walk
from tilefold.backends.triton.kernels.text import Text
from tilefold.backends.triton.spec import TritonSpec

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


def factor(text: Text, spec: TritonSpec) -> None:
    """The scale of scores to base 2, never below 0."""
    text(f"factor = {'-' if spec.negative else ''}scale * {LOG2_E}")


def begin(text: Text, spec: TritonSpec) -> None:
    """No key yet."""
    kind = f"tl.{spec.statistics}"
    text(f"m = tl.full([PARALLEL], {LOWEST[spec.statistics]}, {kind})")
    text(f"l = tl.full([PARALLEL], 0.0, {kind})")


def fold(text: Text, spec: TritonSpec, sums: list[str], walk: Walk) -> None:
    """Fold a tile of scores `s` into m and l; sums are scaled; `p` are the tile's weights."""
    if walk is not Walk.WHOLE:
        text(f"s = tl.where(seen, s, {LOWEST[spec.statistics]})")
    text("top = tl.maximum(m, tl.max(s, 1))")
    text("p = tl.exp2(s * factor - (top * factor)[:, None])")
    if walk is not Walk.WHOLE:
        text("p = tl.where(seen, p, 0.0)")
    text("shrink = tl.exp2((m - top) * factor)")
    text("l = l * shrink + tl.sum(p, 1)", "m = top")
    text(*(f"{total} = {total} * shrink[:, None]" for total in sums))


def end(text: Text) -> None:
    """`share`, by which sums are divided, and `lse`; a query that saw no key has sums of 0."""
    text(
        "share = tl.where(l == 0, 1.0, l)",
        f'log = tl.where(l == 0, float("-inf"), (m * factor + tl.log2(share)) * {LN_2})',
    )
