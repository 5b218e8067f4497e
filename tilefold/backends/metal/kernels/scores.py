"""Where a raw product becomes a score, and where dP and P become dS: the seam of modifications.

    s  = score(q k^T)                    forward, decode, tensorops, and again in dq and dkv
    ds = score_gradient(p, dp, delta)    dq and dkv

Exponentials have base 2, so a score is `scale log2(e) q k`. Operands are read as they are, and each
product of a tile is multiplied by `factor` here, in the registers that hold it: in a loop of its
own in the forward pass, inside the exponential in the backward passes, and where scores are read
from threadgroup memory in `tensorops`. The mask and the maximum come after it.

The formula of a modification on the natural scale (a softcap, a bias, ALiBi, dropout) belongs here,
and nowhere else. With one, `score` is log2(e) times the modification of `scale * product`, and
`score_gradient` is multiplied by the derivative of the modification. The derivative of the scale
waits for the finished sums: dq and dk are multiplied by `GRADIENT_FACTOR` when they are written.
"""

from __future__ import annotations

FACTOR = "const float factor = scale * M_LOG2E_F;"
"""The statement that makes `factor`: products times `factor` are exponents of 2."""

GRADIENT_FACTOR = "scale"
"""The factor of the finished sums dq and dk."""


def score(product: str) -> str:
    """The score, to base 2, of a product of a row of q and a row of k."""
    return f"{product} * factor"


def score_gradient(weight: str, dp: str, delta: str) -> str:
    """dS = P (dP - delta), the gradient of a score on the natural scale."""
    return f"{weight} * ({dp} - {delta})"
