"""Where a raw product becomes a score, and where dP and P become dS: the seam of modifications.

    S  <- score(Q K^T)                        forward, decode, and again in the backward kernels
    dS <- score_gradient(P, dP, delta)        backward_dq, backward_dkv, backward

A score is `natural / rest`: see `scale`. The formula of a modification on the natural scale (a
softcap, a bias, ALiBi, dropout) belongs here, and nowhere else. With one, `score` multiplies the
product by `rest` and modifies it, before the mask and the maximum see it, and from there on `rest`
is 1; `score_gradient` multiplies dS by the derivative of the modification. The derivative of the
scale waits for the finished sums: dQ and dK are multiplied by `power` and `rest` when they are
written, or K and dS in the fused kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilefold.backends.cpu.kernels import microkernel
from tilefold.backends.cpu.kernels.ir import Body, Value
from tilefold.backends.cpu.kernels.multiply import Products, Right
from tilefold.backends.cpu.kernels.tile import Matrix, Scores, Tile


def score(product: Value) -> Value:
    """The scores of a vector of products whose operand has the factor `power`."""
    return product


def score_tile(
    products: Products, tile: Tile, left: Sequence[Matrix], right: Right, use: Scores
) -> None:
    """`use(first row, block)` for each block of scores of a tile, before the mask."""

    def scored(row: Value, block: microkernel.Accumulators) -> None:
        use(row, [[score(product) for product in line] for line in block])

    products.scores(tile, left, right, products.spec.dim, scored)


def score_gradient(body: Body, weight: Value, dp: Value, delta: Value) -> Value:
    """dS <- P (dP - delta) in each lane, the gradient of the scores on the natural scale."""
    difference = body.binary("fsub", dp, delta, "e")
    return body.binary("fmul", weight, difference, "ds")
