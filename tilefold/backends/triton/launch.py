"""Plans: kernels in the order in which they run, their work, and the reasons for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.triton import datasheets
from tilefold.backends.triton.architectures import Architecture
from tilefold.backends.triton.choice import Choice
from tilefold.backends.triton.spec import TritonSpec
from tilefold.planning import roofline
from tilefold.planning.entries import Added
from tilefold.planning.masked import Scored
from tilefold.planning.plan import Plan


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel of a plan, and the work that its programs share.

    `order` gives each program of a head its block row, the heaviest first; in the decode kernel
    that is row block * splits + split. `run_rows` and `runs` are as `tiles.parted` makes them,
    `planes` how many of the batch and of the heads have runs of their own (1 where all are alike).
    `pairs` counts pairs of a query and a key in the tiles that are visited, over batch and heads.
    `plain` takes the place of a launch where the arrays lie so that it cannot serve; without one
    that is an error. `scored` is what the kernel computes of a modified score, `added` the array
    whose gradient it sums up.
    """

    spec: TritonSpec
    choice: Choice
    order: NDArray[np.int32]
    run_rows: NDArray[np.int32]
    runs: NDArray[np.int32]
    planes: tuple[int, int]
    visited_rows: int
    block_rows: int
    heads: int
    programs: int
    pairs: int = 0
    splits: int = 1
    plain: Launch | None = None
    scored: Scored | None = None
    added: Added | None = None

    @property
    def arrays(self) -> tuple[NDArray[np.int32], ...]:
        """The arrays that say where its programs work."""
        return (self.order, self.run_rows, self.runs)

    @property
    def persistent(self) -> bool:
        """True if programs stay: as many as multiprocessors, each with several block rows."""
        return self.spec.gluon


@dataclass(frozen=True, eq=False, kw_only=True)
class TritonPlan(Plan[Launch]):
    """The kernels of one operation on an architecture; buffers in `cleared` begin with zeros."""

    architecture: Architecture
    cleared: tuple[str, ...] = ()

    def explain(self) -> list[str]:
        """What becomes of the scores, and the choice for each kernel and its reasons, as lines."""
        lines = self.explain_score()
        for launch in self.launches:
            lines += launch.choice.explain()
            lines.append(f"  {launch.programs} programs")
            lines += [f"  {line}" for line in self._bounds(launch)]
        return lines + self.explain_scratch()

    def _bounds(self, launch: Launch) -> list[str]:
        """The share of pairs that a launch computes, and its least time."""
        problem, spec = self.problem, launch.spec
        if not launch.pairs:
            return []
        every = problem.batch * problem.heads_q * problem.len_q * problem.len_k
        lines = [f"{launch.pairs / every:.1%} of all pairs lie in the tiles that are visited"]
        if rates := datasheets.rates(self.architecture.name, spec.dtype, spec.float32_mode):
            least = roofline.bounds(problem, spec.row, launch.pairs, rates)
            lines.append(
                f"no faster than {least.seconds * 1e3:.3g} ms ({least.binding}) on"
                f" {'an' if rates.device[0] in 'AHLMR' else 'a'} {rates.device}, by its data sheet"
            )
        return lines
