"""Where a raw product becomes a score, and where dP and P become dS: the seam of modifications.

    S  <- score(Q K^T)                        forward, decode, and again in the backward kernels
    dS <- score_gradient(P, dP, delta)        backward_dq, backward_dkv, backward

Kernels take exponentials to base 2, so a score is `scale log2(e) q k`. No instruction multiplies it
today: `operand_factor` is multiplied into the operand of the parallel axis when that is packed (Q^T
in forward, decode and dQ, K^T in dK/dV). Pairs of bfloat16 would round the scaled operand once
more, so there each sum is multiplied as it leaves the product (`multiply.Right.factor`). In both
cases `score` is given the scaled product, and returns it.

The formula of a modification on the natural scale (a softcap, a bias, ALiBi, dropout) belongs here,
and nowhere else. With one, `operand_factor` is the scale alone; `score` modifies the product and
multiplies it by log2(e), before the mask and the maximum see it; `score_gradient` multiplies dS by
the derivative of the modification. The derivative of the scale waits for the finished sums:
`gradient_factor` multiplies dQ and dK when they are written, or K or dS in the fused kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilefold.backends.cpu.kernels import microkernel
from tilefold.backends.cpu.kernels.arguments import Arguments
from tilefold.backends.cpu.kernels.ir import Body, Value
from tilefold.backends.cpu.kernels.multiply import Products, Right
from tilefold.backends.cpu.kernels.softmax import LOG2_E
from tilefold.backends.cpu.kernels.tile import Matrix, Scores, Tile


def operand_factor(body: Body, arguments: Arguments, scalar: str) -> Value:
    """The factor of the packed operand: scale log2(e), rounded once to the kernel's type."""
    scale = body.cast("bitcast", arguments["scale"], "double", "scale")
    factor = body.binary("fmul", scale, body.constant(LOG2_E, "double"), "factor")
    return factor if scalar == "double" else body.cast("fptrunc", factor, scalar, "factor")


def gradient_factor(body: Body, arguments: Arguments, scalar: str) -> Value:
    """The factor of dQ and of dK: the scale, in the kernel's type."""
    scale = body.cast("bitcast", arguments["scale"], "double", "scale")
    return scale if scalar == "double" else body.cast("fptrunc", scale, scalar, "scale")


def score(product: Value) -> Value:
    """The scores, to base 2, of a vector of products that already have the operand's factor."""
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
