"""A rule whose batch is repeated: what `vmap` makes of one when its axis joins the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilefold.masks.expression import Boolean, names
from tilefold.masks.rewrite import repeat
from tilefold.masks.rule import Rule


@dataclass(frozen=True, repr=False)
class Repeated(Rule):
    """The rule of a batch of `batch` entries, for several such batches one after the other.

    The arrays of the numbers `own`, which come with each call, have a first axis with an entry for
    each of the `copies` of the batch.
    """

    rule: Rule
    batch: int
    own: tuple[int, ...] = ()
    copies: int = 1

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """The expression of the rule, with b counted within a batch."""
        return repeat(self.rule.bind(len_q, len_k), self.batch, self.own, self.copies)

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless the rule fits one batch."""
        self.rule.check(self.batch, heads, len_q, len_k)

    def __repr__(self) -> str:
        return f"({self.rule!r} repeated after {self.batch})"


def repeated(
    rule: Rule, batch: int, len_q: int, len_k: int, own: Sequence[int] = (), copies: int = 1
) -> Rule:
    """A rule for several batches; a rule that does not ask for the batch stays as it is.

    >>> from tilefold import causal, lengths
    >>> repeated(causal(), 2, 4, 4), repeated(lengths([1, 2]), 2, 4, 4)
    (causal(), (lengths(n_k[2]) repeated after 2))
    >>> repeated(lengths([1, 2]), 2, 1, 2).to_dense(1, 2, batch=4).astype(int).reshape(4, 2)
    array([[1, 0],
           [1, 1],
           [1, 0],
           [1, 1]])
    """
    asks = own or "b" in names(rule.bind(len_q, len_k))
    return Repeated(rule, batch, tuple(sorted(own)), copies) if asks else rule
