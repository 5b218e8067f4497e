"""A score whose batch is repeated: what `vmap` makes of one when its axis joins the batch."""

from __future__ import annotations

from collections.abc import Sequence

from tilefold.masks.expression import as_real, evaluate, names
from tilefold.masks.rewrite import Repeater
from tilefold.scores.score import Score, Sizes
from tilefold.scores.traced import Traced


def repeated_score(score: Score, sizes: Sizes, own: Sequence[int], copies: int) -> Score:
    """The form of a score for `copies` batches of these sizes, one after the other.

    The arrays of the numbers `own` have a first axis with an entry for each of these batches.

    >>> import numpy as np
    >>> from tilefold import bias
    >>> form = bias(np.zeros((2, 1, 5, 6), np.float32)).form.score
    >>> repeated_score(form, Sizes(2, 4, 5, 6), (), 3)
    score(lambda s, b, q, k: s + input0:float32[2x1x5x6][(b % 2), 0, q, k])
    >>> repeated_score(form, Sizes(2, 4, 5, 6), (0,), 3)
    score(lambda s, b, q, k: s + input0:float32[3x2x1x5x6][(b // 2), (b % 2), 0, q, k])
    """
    made = evaluate(score.expression(sizes), Repeater(sizes.batch, own, copies))
    read = names(made)
    return Traced(as_real(made), ("s", *[name for name in "bhqk" if name in read]))
