"""Where a raw product becomes a score, and where dP and P become dS: the seam of modifications.

    S  <- score(Q K^T)                        forward, decode, and again in the backward kernels
    dS <- score_gradient(P, dP, delta)        backward_dq, backward_dkv, backward

A score is `natural / rest`: see `scale`. A modified score (a softcap, a bias, ALiBi) is natural:
the product times `rest` goes through the expression of the modification (`mask.ScoreText`), before
the mask and the maximum see it. The backward kernels keep the products, and make the score and its
derivative from them at once; `score_gradient` multiplies dS by the derivative. A score of -inf
hides its pair where the modification `hides`. The derivative of the scale waits for the finished
sums: dQ and dK are multiplied by `power` and `rest` when they are written, or K and dS in the fused
kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilefold.backends.cpu.kernels import microkernel
from tilefold.backends.cpu.kernels.ir import Body, Value
from tilefold.backends.cpu.kernels.mask import ScoreText
from tilefold.backends.cpu.kernels.multiply import Products, Right
from tilefold.backends.cpu.kernels.tile import Matrix, Scores, Tile


def score_tile(
    products: Products,
    tile: Tile,
    left: Sequence[Matrix],
    right: Right,
    use: Scores,
    modified: ScoreText | None = None,
) -> None:
    """`use(first row, block)` for each block of scores of a tile, before the mask."""
    body = tile.body

    def scored(row: Value, block: microkernel.Accumulators) -> None:
        if modified is not None:
            rows = [tile.inside(body.add(row, i)) for i in range(len(block))]
            block = [
                list(modified.row(index, line)[0]) for index, line in zip(rows, block, strict=True)
            ]
        use(row, block)

    products.scores(tile, left, right, products.spec.dim, scored)


def is_shown(body: Body, score: Value) -> Value:
    """A truth per lane: the score is not -inf, which hides its pair."""
    return body.compare("une", score, body.constant(float("-inf"), score.type), "shown")


def is_hidden(body: Body, score: Value) -> Value:
    """A truth per lane: the score is -inf."""
    return body.compare("oeq", score, body.constant(float("-inf"), score.type), "hidden")


def score_gradient(
    body: Body,
    weight: Value,
    dp: Value,
    delta: Value,
    slope: Value | None = None,
    keep: Value | None = None,
) -> Value:
    """dS <- P (dP - delta) in each lane, the gradient of the scores on the natural scale.

    `slope` is the derivative of a modified score. `keep` is the factor of dropout, of dP.
    """
    if keep is None:
        difference = body.binary("fsub", dp, delta, "e")
    else:
        minus_delta = body.binary("fsub", body.constant(-0.0, delta.type), delta, "e")
        difference = body.multiply_add(dp, keep, minus_delta, "e")
    change = body.binary("fmul", weight, difference, "ds")
    return change if slope is None else body.binary("fmul", change, slope, "ds")
