"""The running softmax of a block of queries, to base 2 (Milakov and Gimelshein, 2018).

The maximum `m` is one of scores without the scale, which is multiplied in with the subtraction (see
`scores`): one fused multiply-add and one exponential for each weight.
"""

from __future__ import annotations

from tilefold.backends.triton.kernels.frame import Walk
from tilefold.backends.triton.kernels.scores import exponent
from tilefold.backends.triton.kernels.storage import storage
from tilefold.backends.triton.kernels.text import Text
from tilefold.backends.triton.spec import TritonSpec

LN_2 = 0.6931471805599453


def begin(text: Text, spec: TritonSpec) -> None:
    """No key yet."""
    kind = f"tl.{spec.statistics}"
    text(f"m = tl.full([PARALLEL], {storage(spec.dtype).lowest}, {kind})")
    text(f"l = tl.full([PARALLEL], 0.0, {kind})")


def fold(text: Text, spec: TritonSpec, sums: list[str], walk: Walk) -> None:
    """Fold a tile of scores `s` into m and l; sums are scaled; `p` are the tile's weights."""
    if walk is not Walk.WHOLE:
        text(f"s = tl.where(seen, s, {storage(spec.dtype).lowest})")
    text("top = tl.maximum(m, tl.max(s, 1))")
    text(f"p = tl.exp2({exponent('s', '(top * factor)[:, None]')})")
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
