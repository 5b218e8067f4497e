"""Where a raw product becomes a score, and where dP and P become dS: the seam of modifications.

    s  = score(q k^T)                    every kernel that makes scores, Hopper's two among them
    ds = score_gradient(p, dp, delta)    backward_dq, backward_dkv, backward

The score `s` of a tile is the raw product; only its sign is that of the scaled one. The maximum is
one of such scores, and `exponent` multiplies by `factor`, |scale| log2(e), together with the
subtraction of the maximum or of lse: one fused multiply-add for each weight. A negative scale has
its sign in the operand of the parallel axis (`frame.fetch`); Hopper's kernel, whose operands go to
shared memory by TMA, has it here (`opposite`).

The formula of a modification on the natural scale (a softcap, a bias, ALiBi, dropout) belongs here,
and nowhere else. With one, `score` multiplies by the scale, sign included, and modifies; `factor`
is log2(e) alone; `score_gradient` multiplies ds by the derivative of the modification. The
derivative of the scale waits for the finished sums, dq and dk: `gradient`.
"""

from __future__ import annotations

from tilefold.backends.triton.kernels.frame import Walk
from tilefold.backends.triton.kernels.storage import storage
from tilefold.backends.triton.kernels.text import Text
from tilefold.backends.triton.spec import TritonSpec

LOG2_E = 1.4426950408889634


def factor(text: Text, spec: TritonSpec) -> None:
    """`factor`, by which scores become exponents of 2: never below 0."""
    text(f"factor = {'-' if spec.negative else ''}scale * {LOG2_E}")


def score(text: Text, *, opposite: bool = False) -> None:
    """The scores `s` of a tile from its products `s`, before the mask and the maximum.

    `opposite`: the scale is negative, and no operand was negated.
    """
    if opposite:
        text("s = -s")


def exponent(score: str, base: str) -> str:
    """The exponent of 2 of a weight: its score less `base`, which has the factor already."""
    return f"{score} * factor - {base}"


def score_gradient(text: Text, spec: TritonSpec, walk: Walk, delta: str) -> None:
    """`ds` of a tile, 0 where pairs may not meet, rounded to the type of the operands."""
    text(f"ds = p * (dp - {delta})")
    if walk is not Walk.WHOLE:
        text("ds = tl.where(seen, ds, 0.0)")
    text(f"ds = {storage(spec.dtype).write('ds')}")


def gradient(total: str) -> str:
    """A finished sum of dq or dk as it is written."""
    return f"({total} * scale)"
