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

A modification (a softcap, a bias, ALiBi) is made here, and nowhere else: `modified` is the one of
`scale * product`, at indices inside the problem. With one, scores are on the natural scale in all
kernels (`MetalSpec.natural`), `factor` is log2(e), and `score_gradient` is multiplied by the
derivative. A modification that `hides` makes -inf of a pair that may not meet; so every tile is one
at an edge. The derivative of the scale waits for the finished sums: dq and dk are multiplied by
`GRADIENT_FACTOR` when they are written.
"""

from __future__ import annotations

from tilefold.backends.metal.kernels import mask
from tilefold.backends.metal.spec import MetalSpec

GRADIENT_FACTOR = "scale"
"""The factor of the finished sums dq and dk."""


def factor(spec: MetalSpec) -> str:
    """The statement before `weight`: differences of scores times `factor` are exponents of 2."""
    value = "M_LOG2E_F" if spec.natural else "fabs(scale) * M_LOG2E_F"
    return f"const float factor = {value};"


def natural_factor(spec: MetalSpec) -> list[str]:
    """The statement before `weight_from_lse`: products times `factor` are scores as lse has them.

    Modified scores are that already.
    """
    return [] if spec.natural else ["const float factor = scale;"]


def score(product: str, negative: bool) -> str:
    """The score of a product of a row of q and a row of k; `negative`: the scale is."""
    return f"-{product}" if negative else product


def modified(spec: MetalSpec, product: str, parallel: str, traverse: str) -> str:
    """The modified score of a product, or a struct of `mask.values`.

    `parallel` and `traverse` are the indices of the pair, inside the problem.
    """
    assert spec.score is not None
    queries = spec.row.parallel == "q"
    q, k = (parallel, traverse) if queries else (traverse, parallel)
    return mask.modified_call(spec.score, s=f"{product} * scale", b="b", h="h", q=q, k=k)


def weight(score: str, maximum: str) -> str:
    """The weight of a score beside a maximum."""
    return f"fast::exp2(({score} - {maximum}) * factor)"


def natural(spec: MetalSpec, maximum: str) -> str:
    """A maximum on the natural scale."""
    return maximum if spec.natural else f"{maximum} * fabs(scale)"


def lse(spec: MetalSpec, maximum: str, total: str) -> str:
    """The logarithm of the sum of a row's exponentials, from its maximum and its `total`."""
    if spec.natural:
        return f"{maximum} + log({total})"
    return f"fma({maximum}, fabs(scale), log({total}))"


def weight_from_lse(spec: MetalSpec, product: str, lse: str) -> str:
    """The weight of a product, or of a modified score, by the finished lse of its row."""
    if spec.natural:
        return f"fast::exp2(({product} - {lse}) * M_LOG2E_F)"
    return f"fast::exp2(fma({product}, factor, -{lse}) * M_LOG2E_F)"


def score_gradient(weight: str, dp: str, delta: str) -> str:
    """dS = P (dP - delta), the gradient of a score on the natural scale."""
    return f"{weight} * ({dp} - {delta})"
