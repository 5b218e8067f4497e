"""The workload of a measurement: a case, its random arrays, and tilefold's call on them.

Operations are counted over visible pairs, 2 per multiply-add, with 2 products in the forward and 5
in the backward pass. An implementation may really compute more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold import api
from tilefold.common.array_files import element_type
from tilefold.planning.kernels import WORK
from tilefold.planning.roofline import Rates, bounds
from tilefold.problems.attention import Problem
from tilefold.scores.score import Score

Array = NDArray[Any]
Call = Callable[[], object]

OPERATIONS = ("forward", "backward")
"""The operations that a benchmark measures by default."""
BOTH = "forward+backward"
PASSES = {"forward": ("forward",), "backward": ("backward",), BOTH: OPERATIONS}


@dataclass(frozen=True)
class Case:
    """One case to time: a problem, one of `PASSES`, and the number of threads.

    `score` is the score of the problem with its arrays, which the problem leaves out.
    """

    problem: Problem
    operation: str = "forward"
    threads: int = 1
    score: Score | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of a call of `tilefold.attention`."""
        problem = self.problem
        return {"mask": problem.mask, "precision": problem.precision, "score": self.score}

    @property
    def rule(self) -> str:
        """The mask, and the score where there is one, as text."""
        mask = str(self.problem.mask)
        return mask if self.score is None else f"{mask} {self.score}"

    @property
    def shape(self) -> str:
        """The shape of q, such as `1,8,2048,64`, and after a slash the sizes of v that differ."""
        problem = self.problem
        q = (problem.batch, problem.heads_q, problem.len_q, problem.dim)
        v = (problem.batch, problem.heads_kv, problem.len_k, problem.dim_v)
        return "/".join(",".join(map(str, sizes)) for sizes in ([q] if q == v else [q, v]))

    def flops(self, pairs: int) -> int:
        """The number of floating-point operations over `pairs` pairs."""
        return sum(self.problem.flops(each, pairs) for each in PASSES[self.operation])

    def least_seconds(self, pairs: int, rates: Rates) -> tuple[float, str]:
        """The lower bound of the roofline in seconds, and the bound that binds in the last pass."""
        found = [bounds(self.problem, WORK[each], pairs, rates) for each in PASSES[self.operation]]
        return sum(each.seconds for each in found), found[-1].binding


@dataclass(frozen=True)
class Arrays:
    """The random inputs of a case, and the forward results that a backward pass needs."""

    q: Array
    k: Array
    v: Array
    do: Array
    o: Array
    lse: Array


def arrays(case: Case, seed: int = 0) -> Arrays:
    """Arrays of standard normal elements in the layout (batch, heads, sequence, dim)."""
    problem, rng = case.problem, np.random.default_rng(seed)
    dtype = element_type(problem.dtype)

    def random(heads: int, length: int, dim: int) -> Array:
        shape = (problem.batch, heads, length, dim)
        return rng.standard_normal(shape, np.float32).astype(dtype)

    q = random(problem.heads_q, problem.len_q, problem.dim)
    k = random(problem.heads_kv, problem.len_k, problem.dim)
    v = random(problem.heads_kv, problem.len_k, problem.dim_v)
    o, lse = api.attention(q, k, v, return_lse=True, **case.options)
    do = random(problem.heads_q, problem.len_q, problem.dim_v)
    return Arrays(q, k, v, do, o, lse)


def own(case: Case, a: Arrays) -> Call:
    """A call of tilefold through its public functions."""
    options = case.options
    if case.operation == "forward":
        return lambda: api.attention(a.q, a.k, a.v, **options)
    if case.operation == "backward":
        return lambda: api.attention_backward(a.do, a.q, a.k, a.v, a.o, a.lse, **options)

    def both() -> object:
        o, lse = api.attention(a.q, a.k, a.v, return_lse=True, **options)
        return api.attention_backward(a.do, a.q, a.k, a.v, o, lse, **options)

    return both
