"""A score whose batch is repeated: what `vmap` makes of one when its axis joins the batch."""

from __future__ import annotations

from collections.abc import Sequence

from tilefold.masks.expression import (
    AnyTable,
    Expression,
    Index,
    Rebuild,
    as_real,
    evaluate,
    names,
)
from tilefold.masks.tables import Input
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
    made = evaluate(score.expression(sizes), _Repeater(sizes.batch, own, copies))
    read = names(made)
    return Traced(as_real(made), ("s", *[name for name in "bhqk" if name in read]))


class _Repeater(Rebuild):
    """b is counted within a batch, and arrays of its own are asked for those of the batch."""

    def __init__(self, batch: int, own: Sequence[int], copies: int) -> None:
        self.within, self.which = Index("b") % batch, Index("b") // batch
        self.own, self.copies = own, copies

    def index(self, name: str) -> Expression:
        return self.within if name == "b" else Index(name)

    def lookup(self, table: AnyTable, indices: tuple[Expression, ...]) -> Expression:
        if isinstance(table, Input) and table.number in self.own:
            table = Input(table.number, table.dtype, (self.copies, *table.shape))
            indices = (self.which, *indices)
        return super().lookup(table, indices)
