"""Where a raw product becomes a score, and where dP and P become dS: the seam of modifications.

    s  = score(q k^T)                    forward, decode, tensorops, and again in dq and dkv
    ds = score_gradient(p, dp, delta)    dq and dkv

The score of a tile is its product; only its sign is that of the scaled one. A weight of the forward
pass is `weight(s, m)`, where the maximum m is one of such scores. Where the weight is not small,
s - m is exact, so a large score costs no accuracy, and no finite score overflows. A weight of the
backward passes is `weight_from_lse`: there the scale goes into the subtraction by one fused
multiply-add, and what is left of a large score is the rounding of lse itself.

A negative scale, a kernel of its own, turns the sign of each product before the mask and the
maximum come. In the backward passes there is no maximum, and the scale keeps its sign.

The formula of a modification on the natural scale (a softcap, a bias, ALiBi, dropout) belongs here,
and nowhere else. With one, `score` is the modification of `scale * product`, and `factor` is
log2(e); `score_gradient` is multiplied by the derivative of the modification. The derivative of the
scale waits for the finished sums: dq and dk are multiplied by `GRADIENT_FACTOR` when they are
written.
"""

from __future__ import annotations

FACTOR = "const float factor = fabs(scale) * M_LOG2E_F;"
"""The statement before `weight`: differences of scores times `factor` are exponents of 2."""

NATURAL_FACTOR = "const float factor = scale;"
"""The statement before `weight_from_lse`: products times `factor` are scores as lse has them."""

GRADIENT_FACTOR = "scale"
"""The factor of the finished sums dq and dk."""


def score(product: str, negative: bool) -> str:
    """The score of a product of a row of q and a row of k; `negative`: the scale is."""
    return f"-{product}" if negative else product


def weight(score: str, maximum: str) -> str:
    """The weight of a score beside a maximum."""
    return f"fast::exp2(({score} - {maximum}) * factor)"


def natural(maximum: str) -> str:
    """A maximum on the natural scale."""
    return f"{maximum} * fabs(scale)"


def lse(maximum: str, total: str) -> str:
    """The logarithm of the sum of a row's exponentials, from its maximum and its `total`."""
    return f"fma({maximum}, fabs(scale), log({total}))"


def weight_from_lse(product: str, lse: str) -> str:
    """The weight of a product, by the finished lse of its row."""
    return f"fast::exp2(fma({product}, factor, -{lse}) * M_LOG2E_F)"


def score_gradient(weight: str, dp: str, delta: str) -> str:
    """dS = P (dP - delta), the gradient of a score on the natural scale."""
    return f"{weight} * ({dp} - {delta})"
