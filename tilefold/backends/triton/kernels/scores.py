"""Where a raw product becomes a score, and where dP and P become dS: the seam of modifications.

    s  = score(q k^T)                    every kernel that makes scores, Hopper's two among them
    ds = score_gradient(p, dp, delta)    backward_dq, backward_dkv, backward

The score `s` of a tile is the raw product; only its sign is that of the scaled one. `exponent`
multiplies by `factor`, |scale| log2(e), and subtracts a base: one fused multiply-add for each
weight, which rounds the difference alone. A negative scale has its sign in the operand of the
parallel axis (`frame.fetch`); Hopper's kernel, whose operands go to shared memory by TMA, has it
here (`opposite`).

A rounded base is an error of |score| eps, one for all weights of a row. Forward it cancels: sums
and lse belong to the base as it is rounded. Backward the base is lse to base 2, in two parts
(`base_of_lse`), so weights have the error of lse itself, |lse| eps, and no second one. `factor` is
rounded too, so lse is converted by the ratio of the rounded `factor` to |scale| (`ratio`).

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


def size(spec: TritonSpec) -> str:
    """The size of the scale."""
    return "-scale" if spec.negative else "scale"


def factor(text: Text, spec: TritonSpec) -> None:
    """`factor`, by which scores become exponents of 2: never below 0."""
    text(f"factor = {size(spec)} * {LOG2_E}")


def ratio(text: Text, spec: TritonSpec, name: str, *, natural: bool) -> None:
    """A ratio in two parts, `name` and `name`_rest: |scale| over `factor` where results are to be
    natural, else the inverse. It does not depend on the scale, which may be 0, but by rounding.
    """
    text(
        f"per_e = tl.where(scale == 0, 1.0, {size(spec)})",
        f"per_2 = per_e * {LOG2_E}",
    )
    over, under = ("per_e", "per_2") if natural else ("per_2", "per_e")
    text(
        f"{name} = {over} / {under}",
        f"{name}_rest = tl.fma(-{name}, {under}, {over}) / {under}",
    )


def score(text: Text, *, opposite: bool = False) -> None:
    """The scores `s` of a tile from its products `s`, before the mask and the maximum.

    `opposite`: the scale is negative, and no operand was negated.
    """
    if opposite:
        text("s = -s")


def exponent(score: str, base: str) -> str:
    """The exponent of 2 of a weight: its score less `base`, which has the factor already."""
    return f"tl.fma({score}, factor, -{base})"


def base_of_lse(text: Text, lse: str) -> None:
    """`base` + `rest` are lse to base 2, by `ratio`; where lse is infinite, `rest` is 0."""
    text(
        f"natural = {lse}",
        "base = natural * ratio",
        "rest = tl.fma(natural, ratio, -base) + natural * ratio_rest",
        'rest = tl.where(tl.abs(base) < float("inf"), rest, 0.0)',
    )


def score_gradient(text: Text, spec: TritonSpec, walk: Walk, delta: str) -> None:
    """`ds` of a tile, 0 where pairs may not meet, rounded to the type of the operands."""
    text(f"ds = p * (dp - {delta})")
    if walk is not Walk.WHOLE:
        text("ds = tl.where(seen, ds, 0.0)")
    text(f"ds = {storage(spec.dtype).write('ds')}")


def gradient(total: str, slope: str = "scale") -> str:
    """A finished sum of dq or dk as it is written."""
    return f"({total} * {slope})"
