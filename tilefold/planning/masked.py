"""A problem whose mask and score are bound to its sizes: what all planners read.

The rule of a problem becomes an expression of its lengths once per plan. From the expression follow
what a kernel's source contains (the skeleton, the bits of an index), what a launch is given
(parameters and tables), and which tiles are visited (runs). The score becomes an expression too.
What kernels compute of it differs: see `Scored`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from tilefold.common.check import shown
from tilefold.masks.derivative import derivatives
from tilefold.masks.evaluate import index_bits
from tilefold.masks.expression import (
    Boolean,
    Declared,
    Expression,
    Real,
    RealConstant,
    Several,
    Table,
    Truth,
    check_size,
    names,
)
from tilefold.masks.graph import ordered
from tilefold.masks.hiding import may_hide
from tilefold.masks.runs import Runs, runs
from tilefold.masks.skeleton import Parts, Skeleton, split
from tilefold.masks.tables import Input
from tilefold.planning.visited import MASK_STEP
from tilefold.problems.attention import STATISTICS, Problem


@dataclass(frozen=True, eq=False)
class Scored:
    """What a kernel computes of a score: the parts of an expression of several values.

    By `computed` the values are:

    - "value": the score F
    - "slope": F and dF/ds
    - "entries": F, and for each entry that is read from one of the inputs that are asked for: the
      derivative of F with respect to it, and its indices

    `entries` names the inputs of the entries. `hides`: F may be -inf, which hides the pair.
    """

    parts: Parts
    entries: tuple[Input, ...]
    hides: bool


def _check_numbers(problem: Problem, score: Real) -> None:
    """Raises ValueError for a number of a score that the type of the computation does not hold.

    A number that is too large would be an infinity, and one that is too small might be 0: scores
    of 0 would be NaN.
    """
    kind = STATISTICS[problem.dtype]
    limits = np.finfo(kind)
    for node, _ in ordered(score):
        size = abs(node.value) if isinstance(node, RealConstant) else 0.0
        if size and math.isfinite(size) and not limits.tiny <= size <= limits.max:
            raise ValueError(
                f"score={shown(problem.score)} computes with {node.value:g}, and {kind} has"
                f" numbers from {limits.tiny:.3g} to {limits.max:.3g} in size: choose another"
                " number, or pass float64 arrays"
            )


def _scored(score: Real, computed: str, inputs: tuple[int, ...], mask: Skeleton) -> Scored:
    values: list[Expression] = [score]
    entries: list[Input] = []
    if computed == "slope":
        values.append(derivatives(score).score)
    elif computed == "entries":
        for entry, slope in derivatives(score).entries:
            if isinstance(entry.table, Input) and entry.table.number in inputs:
                entries.append(entry.table)
                values += [slope, *entry.indices]
    parts = split(Several(tuple(values)), mask)
    return Scored(parts, tuple(entries), may_hide(score))


@dataclass(frozen=True, eq=False)
class MaskedProblem:
    """A problem, its mask as an expression, and the parts of that expression.

    The runs of each block width are found when they are first asked for, and kept as long as this
    value lives.

    >>> from tilefold import causal
    >>> masked = MaskedProblem.of(Problem.of((1, 1, 64, 16), mask=causal()))
    >>> masked.index_bits, masked.visited_by("q", 32).runs.tolist()
    (32, [[0, 32, 1], [0, 32, 0], [32, 64, 1]])
    """

    problem: Problem
    expression: Boolean
    skeleton: Skeleton
    parameters: tuple[int, ...]
    tables: tuple[Table | Declared, ...]
    index_bits: int
    score: Real | None = None
    _runs: dict[tuple[str, int, int], Runs] = field(default_factory=dict, repr=False)
    _scores: dict[tuple[str, tuple[int, ...]], Scored] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(problem: Problem) -> MaskedProblem:
        """Bind the mask of a problem to its lengths; raises ValueError if it is too large."""
        expression = problem.mask.bind(problem.len_q, problem.len_k)
        check_size(problem.mask, expression)
        sizes = problem.score_sizes
        bits, score = index_bits(expression, *sizes), None
        if problem.score is not None:
            score = problem.score.expression(sizes)
            check_size(problem.score, score)
            _check_numbers(problem, score)
            bits = max(bits, index_bits(score, *sizes))
        return MaskedProblem(problem, expression, *split(expression), bits, score)

    def scored(self, computed: str, inputs: tuple[int, ...] = ()) -> Scored | None:
        """What a kernel computes of the score; None where it is not modified.

        `inputs` are the numbers of the arrays whose entries are asked for.
        """
        if self.score is None:
            return None
        key = computed, inputs
        found = self._scores.get(key)
        if found is None:
            found = self._scores[key] = _scored(self.score, computed, inputs, self.skeleton)
        return found

    @property
    def score_parts(self) -> dict[Skeleton, Parts]:
        """The numbers and tables of all that kernels compute of the score, by their skeletons."""
        return {found.parts.skeleton: found.parts for found in self._scores.values()}

    @property
    def constant(self) -> bool:
        """True where the rule says the same of all pairs: nothing is left to ask."""
        return isinstance(self.expression, Truth)

    @property
    def by_head(self) -> bool:
        """True where heads may see different keys."""
        return "h" in names(self.expression)

    def visited_by(self, parallel: str, width: int) -> Runs:
        """The runs of block rows that are `width` elements high along `parallel`."""
        return self._found(parallel, width, 1)

    def visited_together(self, heads: int) -> Runs:
        """The runs of all queries as one block row, for each of `heads` groups of query heads."""
        return self._found("q", self.problem.len_q, self.problem.heads_q // heads)

    def _found(self, parallel: str, width: int, group: int) -> Runs:
        key = (parallel, width, group)
        found = self._runs.get(key)
        if found is None:
            problem = self.problem
            length, traversed = problem.len_q, problem.len_k
            if parallel == "k":
                length, traversed = traversed, length
            found = self._runs[key] = runs(
                self.expression,
                parallel=parallel,
                batch=problem.batch,
                heads=problem.heads_q,
                len_parallel=length,
                len_traverse=traversed,
                block_parallel=width,
                block_traverse=MASK_STEP,
                group=group,
            )
        return found
