"""Decoding with keys that grow: the plan of one number of keys, made from that of another.

A loop that generates text calls with one key more each time. Where every query sees every key, as
one query does under a causal mask, only the last split grows, so the plan of the call before serves
with other runs of keys. A score is bound to the new length: its kernel is the same one while its
skeleton is. The plan is the same as one from the beginning: `tests/cpu/test_growth.py` compares
them.
"""

from __future__ import annotations

import itertools

import numpy as np

from tilefold.backends.cpu.plan import CpuPlan
from tilefold.backends.cpu.splits import KeySplitter
from tilefold.common.copies import changed
from tilefold.masks.expression import Boolean, Truth
from tilefold.masks.runs import Runs
from tilefold.planning.masked import MaskedProblem
from tilefold.problems.attention import Problem


def with_keys(made: CpuPlan, problem: Problem) -> CpuPlan | None:
    """The plan of a problem, made from that of one which differs in its number of keys alone.

    None where another one must be planned: keys are hidden, there are many queries, the keys are
    split into more or fewer parts than before, or by the cores of this machine.
    """
    launch = made.launches[0]
    if not (launch.spec.row.by_query and made.anywhere) or problem.empty:
        return None
    bound = problem.mask.bind(problem.len_q, problem.len_k)
    if not (_hides_none(launch.spec.mask.expression) and _hides_none(bound)):
        return None
    scores = made.scores
    if problem.score is not None:  # a whole problem costs each key more 13 us
        masked = MaskedProblem.of(problem)
        scored = masked.scored("value")
        assert scored is not None
        asked = (scored.parts.skeleton, scored.hides, masked.index_bits)
        if asked != (launch.spec.score, launch.spec.hides, launch.spec.index_bits):
            return None
        scores = masked.score_parts
    keys = KeySplitter(problem, None, launch.spec.lanes).fixed_keys(problem.len_k)
    if -(-problem.len_k // keys) != launch.block_rows:
        return None
    ends = [*range(0, problem.len_k, keys), problem.len_k]
    spans = np.array([(*span, 0) for span in itertools.pairwise(ends)], np.int64)
    grown = changed(launch, problem=problem, runs=Runs(launch.runs.rows, spans, 1, 1))
    return changed(made, problem=problem, launches=(grown,), scores=scores)


def _hides_none(expression: Boolean) -> bool:
    """True where an expression says at once that every query sees every key."""
    return isinstance(expression, Truth) and expression.value
