"""A rule for a part of the batch and of the heads: what a process has of a larger problem."""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.masks.expression import Boolean, names
from tilefold.masks.rewrite import place
from tilefold.masks.rule import Rule


@dataclass(frozen=True, repr=False)
class Part(Rule):
    """The rule of `batch` entries and `heads`, for those from `b0` and `h0` on."""

    rule: Rule
    batch: int
    heads: int
    b0: int
    h0: int

    def bind(self, len_q: int, len_k: int) -> Boolean:
        """The expression of the rule, with b and h counted from the first of the part."""
        return place(self.rule.bind(len_q, len_k), self.b0, self.h0)

    def check(self, batch: int, heads: int, len_q: int, len_k: int) -> None:
        """Raises ValueError unless the rule fits the whole problem."""
        self.rule.check(self.batch, self.heads, len_q, len_k)

    def __repr__(self) -> str:
        return f"({self.rule!r} from batch {self.b0} and head {self.h0})"


def part(rule: Rule, sizes: tuple[int, int, int, int], b0: int, h0: int) -> Rule:
    """A rule for a part; one that asks for neither batch nor head stays as it is.

    `sizes` are batch, heads, len_q and len_k of the whole.

    >>> from tilefold import causal, lengths
    >>> part(causal(), (2, 4, 3, 3), 1, 0)
    causal()
    >>> part(lengths([1, 2]), (2, 4, 1, 3), 1, 0).to_dense(1, 3, batch=1).astype(int)
    array([[[[1, 1, 0]]]])
    """
    batch, heads, *lengths = sizes
    asks = {"b", "h"} & {*names(rule.bind(*lengths))}
    return Part(rule, batch, heads, b0, h0) if asks else rule
