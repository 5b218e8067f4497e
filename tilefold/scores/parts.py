"""A score for a part of the batch and of the heads: what a process has of a larger problem."""

from __future__ import annotations

from tilefold.masks.expression import as_real, evaluate, names
from tilefold.masks.rewrite import Placer
from tilefold.scores.score import Score, Sizes
from tilefold.scores.traced import Traced


def part_of_score(score: Score, sizes: Sizes, b0: int, h0: int) -> Score:
    """The form of a score of these sizes, for the batch from `b0` on and the heads from `h0` on.

    >>> from tilefold import alibi, softcap
    >>> part_of_score(softcap(2.0), Sizes(2, 4, 5, 6), 0, 2)
    softcap(2)
    >>> part_of_score(alibi(), Sizes(2, 4, 5, 6), 0, 2)
    score(lambda s, h, q, k: s - (exp((((h + 2) + 1) * -1.3862943611198906)) * abs(((k - q) - 1))))
    """
    whole = score.expression(sizes)
    if not {"b", "h"} & {*names(whole)}:
        return score
    made = as_real(evaluate(whole, Placer(b0, h0)))
    return Traced(made, ("s", *[name for name in "bhqk" if name in names(made)]))
