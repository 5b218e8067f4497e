"""Where a raw product becomes a score, and where dP and P become dS: the seam of modifications.

    s  = score(q k^T)                    every kernel that makes scores, Hopper's two among them
    ds = score_gradient(p, dp, delta)    backward_dq, backward_dkv, backward, backward_inputs

The score `s` of a tile is the raw product; only its sign is that of the scaled one. `exponent`
multiplies by `factor`, |scale| log2(e), and subtracts a base: one fused multiply-add for each
weight, which rounds the difference alone. A negative scale has its sign in the operand of the
parallel axis (`frame.fetch`); Hopper's kernel, whose operands go to shared memory by TMA, has it
here (`turn`).

A rounded base is an error of |score| eps, one for all weights of a row. Forward it cancels: sums
and lse belong to the base as it is rounded. Backward the base is lse to base 2, in two parts
(`base_of_lse`), so weights have the error of lse itself, |lse| eps, and no second one. `factor` is
rounded too, so lse is converted by the ratio of the rounded `factor` to |scale| (`ratio`).

A modification (a softcap, a bias, ALiBi) is made here, and nowhere else. With one, `score`
multiplies by the scale, sign included, and modifies: it calls `modified` of the module, with
indices that lie inside the problem. `factor` is log2(e) alone, and `score_gradient` multiplies ds
by the derivative, `change`. A modification that `hides` makes a score of -inf of a pair that may
not meet, so `seen` is there in all tiles, and all are asked for what is not finite. The derivative
of the scale waits for the finished sums, dq and dk: `gradient`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilefold.backends.triton.kernels import mask
from tilefold.backends.triton.kernels.frame import Walk, chosen
from tilefold.backends.triton.kernels.storage import storage
from tilefold.backends.triton.kernels.text import Text
from tilefold.backends.triton.spec import TritonSpec

LOG2_E = 1.4426950408889634


def size(spec: TritonSpec) -> str:
    """The size of the scale that waits for the exponent; a modified score has it already."""
    if spec.score is not None:
        return "1.0"
    return "-scale" if spec.negative else "scale"


def factor(text: Text, spec: TritonSpec) -> None:
    """`factor`, by which scores become exponents of 2: never below 0."""
    if spec.score is not None:
        text(f"factor = {constant(spec, LOG2_E)}")
    else:
        text(f"factor = {size(spec)} * {LOG2_E}")


def constant(spec: TritonSpec, number: float) -> str:
    """A number of the type of the statistics: one alone would be of float32."""
    return f"tl.full([], {number}, tl.{spec.statistics})"


def ratio(text: Text, spec: TritonSpec, name: str, *, natural: bool) -> None:
    """A ratio in two parts, `name` and `name`_rest: |scale| over `factor` where results are to be
    natural, else the inverse. It does not depend on the scale, which may be 0, but by rounding.
    """
    one = constant(spec, 1.0)
    per_e = one if spec.score is not None else f"tl.where(scale == 0, 1.0, {size(spec)})"
    text(f"per_e = {per_e}", f"per_2 = per_e * {LOG2_E}")
    over, under = ("per_e", "per_2") if natural else ("per_2", "per_e")
    text(
        f"{name} = {over} / {under}",
        f"{name}_rest = tl.fma(-{name}, {under}, {over}) / {under}",
    )


def score(text: Text, spec: TritonSpec, walk: Walk, head: str, beside: Sequence[str] = ()) -> None:
    """The scores `s` of a tile from its products `s`, before the maximum.

    `seen` is there unless the tile is a whole one, and loses the pairs that a score hides. `head`
    is the head of the queries. `beside` names the values that stand beside the score.
    """
    if spec.score is None:
        return
    other = "k" if spec.parallel == "q" else "q"
    at = "start + row_traverse"
    if walk is Walk.WHOLE:
        text(f"{other}_safe = {at}")
    elif not mask.masks(spec.mask):
        text(f"{other}_safe = tl.minimum({at}, len_{other} - 1)")
    modify(text, spec, "s * scale", head, ("change",) if spec.slope_varies else beside)
    if spec.hides:
        shown = 's != float("-inf")'
        text(f"seen = {shown}" if walk is Walk.WHOLE else f"seen = seen & ({shown})")


def modify(text: Text, spec: TritonSpec, s: str, head: str, beside: Sequence[str]) -> None:
    """The modified scores `s` of natural ones at `q_safe` and `k_safe`, and what is beside them."""
    assert spec.score is not None
    given = {spec.parallel: f"{spec.parallel}_safe[:, None]"}
    given = {axis: given.get(axis, f"{axis}_safe[None, :]") for axis in "qk"}
    call = mask.modified_call(spec.score, s=s, b="b", h=head, **given)
    text(f"{', '.join(['s', *beside])} = {call}")


def turn(text: Text, spec: TritonSpec) -> None:
    """The scores of a negative scale where no operand was negated."""
    if spec.negative:
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


def score_gradient(
    text: Text, spec: TritonSpec, walk: Walk, delta: str, *, guarded: bool = False
) -> None:
    """`ds` of a tile, 0 where pairs may not meet, rounded to the type of the operands.

    `guarded`: what rows along the parallel axis have that are not there is 0 too.
    """
    text(f"ds = p * (dp - {delta})")
    if spec.slope_varies:
        text("ds = ds * change")
    if chosen(spec, walk):
        text("ds = tl.where(seen, ds, 0.0)")
    if guarded and walk is Walk.WHOLE and spec.slope_varies:
        text("ds = tl.where(within_parallel[:, None], ds, 0.0)  # 0 * change may be NaN")
    text(f"ds = {storage(spec.dtype).write('ds')}")


def gradient(total: str, slope: str = "scale") -> str:
    """A finished sum of dq or dk as it is written."""
    return f"({total} * {slope})"
