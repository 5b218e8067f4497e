"""Planning for Apple GPUs: the kernels of an operation, what each threadgroup visits, and scratch.

A plan knows lengths and masks but no strides: the sources that follow from it serve them all.
Backward is two kernels, since the second one reads the delta that the first one writes. A forward
pass with few queries and many keys is two kernels too: keys are split among threadgroups, whose
parts are then merged in a fixed order. A third kernel of the backward pass, for each array that a
score reads, sums up its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.metal import families
from tilefold.backends.metal.choice import Choice, choose
from tilefold.backends.metal.families import MetalFamily
from tilefold.backends.metal.heuristics import DEFAULT, Heuristics
from tilefold.backends.metal.kernels.arguments import spills
from tilefold.backends.metal.kernels.fragment import TYPES
from tilefold.backends.metal.spec import KERNELS, Blocks, MetalSpec
from tilefold.common import check
from tilefold.common.lru import LruCache
from tilefold.masks.runs import Runs
from tilefold.masks.tables import Input
from tilefold.planning.entries import (
    Added,
    Entry,
    apart,
    entries_of,
    parts_of,
    reads_of,
    units,
)
from tilefold.planning.masked import MaskedProblem, Scored
from tilefold.planning.plan import Plan, Scratch, split_scratch
from tilefold.planning.tiles import runs_to_tiles
from tilefold.planning.visited import MASK_STEP, cut, heaviest_first, nothing
from tilefold.problems.attention import Problem, check_problem

FORMS = {"forward": ("auto", "tiled", "decode"), "backward": ("auto", "tiled")}
"""Forms of an operation: "decode" splits the keys of few queries."""

LARGEST_SCALE = 2.0**127
"""The largest |scale|: with its factor log2(e) it is a number of float32."""

Asked = Blocks | Mapping[str, Blocks] | None
"""Blocks for all kernels of a plan, or by kernel."""

AskedCached = Sequence[str] | Mapping[str, Sequence[str]] | None
"""Cached operands of the only kernel of a plan, or by kernel."""

EXTRA = {"forward": ("max",), "backward": ("dlse", "dsinks")}
"""Operands of an operation that a call may ask for, beside those that follow from the problem, and
the gradients of the arrays of its score."""


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel of a plan, and the work that its threadgroups share.

    `grid` counts threadgroups, over block rows, heads and batch. `order` gives each threadgroup
    along the first axis its block row, the heaviest first over all heads; in the decode kernel that
    is row block * splits + split. `scored` is what the kernel computes of a modified score. `added`
    is the array whose gradient it sums up: there `order` has the units, and `splits` counts parts.
    """

    spec: MetalSpec
    choice: Choice
    runs: Runs
    order: NDArray[np.int64]
    grid: tuple[int, int, int]
    splits: int = 1
    scored: Scored | None = None
    added: Added | None = None

    @property
    def arrays(self) -> tuple[NDArray[np.int64], ...]:
        """The arrays that say where its threadgroups work."""
        return (self.runs.rows, self.runs.runs, self.order)

    @property
    def threads(self) -> tuple[int, int, int]:
        """Threads of the whole grid, each threadgroup having `spec.threads` of them."""
        groups, heads, batch = self.grid
        return (groups * self.spec.threads, heads, batch)


@dataclass(frozen=True, eq=False, kw_only=True)
class MetalPlan(Plan[Launch]):
    """The kernels of one operation on a GPU family; buffers in `cleared` begin with zeros."""

    family: MetalFamily
    cleared: tuple[str, ...] = ()

    def explain(self) -> list[str]:
        """What becomes of the scores, and the choice for each kernel and its reasons, as lines."""
        lines = self.explain_score()
        for launch in self.launches:
            lines += launch.choice.explain()
            groups, heads, batch = launch.grid
            size = launch.spec.threads
            lines.append(f"  grid {groups} x {heads} x {batch} threadgroups of {size} threads")
        return lines + self.explain_scratch()


_recent: LruCache[MetalPlan] = LruCache(most=128, most_bytes=256 * 2**20)


def plan(
    problem: Problem,
    family: str,
    operation: str,
    *,
    form: str = "auto",
    blocks: Asked = None,
    cached: AskedCached = None,
    extra: tuple[str, ...] = (),
) -> MetalPlan:
    """The plan of an operation, "forward" or "backward", on a GPU of a family such as "apple9".

    `form` is how it is done: see `FORMS`. `blocks` and `cached` override the tables; by
    kernel ("forward", "decode", "backward_dq", "backward_dkv") where they differ. Results depend
    on all of these only by rounding. `extra` are operands beside those that every problem of the
    kind has: see `EXTRA`. Without a name `blocks` are for the kernels that
    have several simdgroups.

    Raises ValueError for what no GPU of the family can run, NotImplementedError for float64 and for
    a scale beyond float32.
    """
    check_problem(problem)
    if abs(problem.scale) > LARGEST_SCALE:
        raise NotImplementedError(
            f"scale is {problem.scale:g}, and Apple GPUs multiply in float32, up to"
            f" {LARGEST_SCALE:.1e}: multiply q or k by a part of it"
        )
    _check(blocks, cached)
    key = (problem, family, operation, form, _frozen(blocks), _frozen(cached), extra)
    found = _recent.get(key)
    if found is None:
        planner = Planner(problem, families.family(family), blocks, cached, extra=extra)
        made = planner.plan(operation, form)
        found = _recent.put(key, made, made.data_bytes)
    return found


def _check(blocks: Asked, cached: AskedCached) -> None:
    """Raises for blocks that are none, and for kernels that there are not."""
    for name, asked in (("blocks", blocks), ("cached", cached)):
        for kernel in asked if isinstance(asked, Mapping) else ():
            check.choice(f"a kernel of {name}", kernel, tuple(KERNELS))
    for one in blocks.values() if isinstance(blocks, Mapping) else (blocks,):
        if not isinstance(one, Blocks | None):
            shown = check.shown(one)
            raise TypeError(f"blocks must be Blocks, or Blocks by kernel, got {shown}")


def _frozen(asked: Any) -> object:
    """An option as a part of a key."""
    if isinstance(asked, Mapping):
        return tuple((name, _frozen(value)) for name, value in sorted(asked.items()))
    return asked if asked is None or isinstance(asked, Blocks) else tuple(asked)


class Planner:
    """One problem on one family."""

    def __init__(
        self,
        problem: Problem,
        family: MetalFamily,
        blocks: Asked = None,
        cached: AskedCached = None,
        heuristics: Heuristics = DEFAULT,
        extra: tuple[str, ...] = (),
    ) -> None:
        self._problem, self._family, self._heuristics = problem, family, heuristics
        self._extra = {*extra, *(("sinks",) if problem.sinks else ())}
        self._blocks, self._cached = blocks, cached
        self._masked = MaskedProblem.of(problem)

    def plan(self, operation: str, form: str = "auto") -> MetalPlan:
        """The plan of an operation in a form; see `plan`."""
        check.choice("operation", operation, tuple(FORMS))
        check.choice("form", form, FORMS[operation])
        self._check_operands(operation)
        row = (self._problem.batch, self._problem.heads_q, self._problem.len_q)
        buffers: dict[str, Scratch] = {}
        if operation == "backward":
            buffers["delta"] = Scratch(row, "float32")
            launches = [self._tiled("backward_dq"), self._tiled("backward_dkv")]
            if "dsinks" in self._extra:
                launches.append(self._alone("backward_sinks", (self._problem.sinks, row[1], 1)))
            launches += self._gradients_of_inputs()
        elif self._decodes(form):
            launches = self._decode()
            buffers |= split_scratch(self._problem, launches[0].splits, "float32")
        else:
            launches = [self._tiled("forward")]
        for launch in launches:
            buffers |= {name: self._spill(launch.spec, name) for name in spills(launch.spec)}
            if launch.added is not None:
                shape = (launch.splits, *launch.added.given.shape)
                buffers[launch.added.parts] = Scratch(shape, "float32")
        return MetalPlan(
            problem=self._problem,
            family=self._family,
            operation=operation,
            launches=tuple(launches),
            parameters=self._masked.parameters,
            tables=self._masked.tables,
            buffers=buffers,
            scores=self._masked.score_parts,
            cleared=tuple([launch.added.parts for launch in launches if launch.added]),
        )

    def _check_operands(self, operation: str) -> None:
        """Raises NotImplementedError for operands that no kernel of the operation has."""
        for given in self._problem.score.inputs if self._problem.score else ():
            if given.dtype not in TYPES:
                raise NotImplementedError(
                    f"the array {given.number} of score is of {given.dtype}, which Apple GPUs do"
                    " not have: pass float32"
                )
        gradients = [f"dinput{n}" for n in self._inputs] if operation == "backward" else []
        for name in sorted(self._extra - {"sinks", *EXTRA[operation], *gradients}):
            raise NotImplementedError(
                f"Metal kernels have no operand {name} in a {operation} pass: compute it on the CPU"
            )

    def _spill(self, spec: MetalSpec, name: str) -> Scratch:
        """A spilled sum: float32, as the operand's rows but contiguous."""
        problem, operand = self._problem, name.removesuffix("_spill")
        rows = (problem.batch, spec.row.heads(problem), spec.row.length(problem))
        return Scratch((*rows, spec.width(operand)), "float32")

    def _spec(self, kernel: str) -> tuple[MetalSpec, Choice]:
        problem, family = self._problem, self._family
        blocks, cached = self._blocks, self._cached
        row = KERNELS[kernel]
        if isinstance(blocks, Blocks) and (not row.visits or row.computed == "entries"):
            blocks = None  # one simdgroup makes each result of these
        made = choose(
            family,
            kernel,
            problem.dtype,
            problem.dim,
            problem.dim_v,
            blocks=blocks.get(kernel) if isinstance(blocks, Mapping) else blocks,
            cached=cached.get(kernel) if isinstance(cached, Mapping) else cached,
            heuristics=self._heuristics,
        )
        scored = self._scored(kernel)
        spec = MetalSpec(
            kernel=kernel,
            dtype=problem.dtype,
            dim=problem.dim,
            dim_v=problem.dim_v,
            blocks=made.blocks,
            cached=made.cached,
            staged=family.staged,
            bfloat=family.bfloat,
            mask=self._masked.skeleton,
            index_bits=self._masked.index_bits,
            negative=problem.scale < 0 and problem.score is None,
            dropout=problem.dropout > 0,
            extra=tuple([name for name in KERNELS[kernel].optional if name in self._extra]),
            natural=problem.score is not None,
            score=None if scored is None else scored.parts.skeleton,
            hides=scored is not None and scored.hides,
        )
        return spec, made

    def _scored(self, kernel: str) -> Scored | None:
        """What a kernel computes of a modified score, if it visits pairs."""
        row = KERNELS[kernel]
        inputs = self._inputs if row.computed == "entries" else ()
        return self._masked.scored(row.computed, inputs) if row.visits else None

    @property
    def _inputs(self) -> tuple[int, ...]:
        """The numbers of the arrays of a score whose gradients are asked for."""
        score = self._problem.score
        numbers = {given.number for given in score.inputs} if score else ()
        return tuple([n for n in sorted(numbers) if f"dinput{n}" in self._extra])

    def _gradients_of_inputs(self) -> list[Launch]:
        """A kernel for each array whose gradient is asked for, but those that no pair reads."""
        found: list[Launch] = []
        if not self._inputs:
            return found
        problem, limits = self._problem, self._heuristics
        main = self._tiled("backward_inputs")
        assert main.scored is not None
        sizes = {"b": problem.batch, "h": problem.heads_q, "q": main.runs.block_rows}
        for number in self._inputs:
            given, entries = entries_of(main.scored, number)
            if given is None:
                continue
            self._check_places(given, main, entries)
            order, shared = units(sizes, apart(main.scored, entries))
            groups = len(order) // shared
            parts = parts_of(given, shared, -(-limits.enough_groups // groups), limits)
            found.append(
                replace(
                    main,
                    spec=replace(main.spec, entries=entries),
                    order=order.astype(np.int64),
                    grid=(parts * groups, 1, 1),
                    splits=parts,
                    added=Added(given, shared),
                )
            )
        return found

    def _tiled(self, kernel: str) -> Launch:
        """A kernel whose threadgroups own a block row each."""
        problem = self._problem
        spec, made = self._spec(kernel)
        visited = self._masked.visited_by(spec.row.parallel, spec.blocks.parallel)
        visited = runs_to_tiles(visited, spec.blocks.traverse)
        grid = (visited.block_rows, spec.row.heads(problem), problem.batch)
        order = heaviest_first(visited)
        return Launch(spec, made, visited, order, grid, scored=self._scored(kernel))

    def _check_places(self, given: Input, main: Launch, entries: tuple[Entry, ...]) -> None:
        """Raises NotImplementedError where places of entries that are looked for pass 31 bits."""
        assert main.spec.score is not None
        size = math.prod(given.shape)
        ways = [read.way for read in reads_of(main.spec.score, entries)]
        if size >= 2**31 and "scattered" in ways:
            raise NotImplementedError(
                f"the gradient of the array {given.number} of score, of {size} entries, is"
                " implemented on Apple GPUs for up to 2147483647: compute it on the CPU"
            )

    def _decodes(self, form: str) -> bool:
        problem = self._problem
        if form == "decode" and problem.empty:
            raise ValueError("form 'decode' splits keys, and there is no query or no key")
        limits = self._heuristics
        few = problem.len_q <= limits.few_queries and problem.len_k >= limits.many_keys
        return form == "decode" or (form == "auto" and few and not problem.empty)

    def _decode(self) -> list[Launch]:
        """The kernel that leaves a part for each split, and the one that merges them."""
        problem = self._problem
        spec, made = self._spec("decode")
        group = problem.heads_q // problem.heads_kv
        visited = self._masked.visited_together(problem.heads_kv)
        blocks = -(-group * problem.len_q // spec.blocks.parallel)
        # By one key head of one batch entry alone: its bits do not depend on what is beside it.
        least = problem.len_k * blocks // self._heuristics.enough_groups
        keys = max(self._heuristics.keys_per_split, -(-least // MASK_STEP) * MASK_STEP)
        visited = cut(visited, keys)
        count = visited.block_rows
        order = (heaviest_first(visited)[:, None] + count * np.arange(blocks)).ravel()
        grid = (len(order), problem.heads_kv, problem.batch)
        rows = (problem.len_q, problem.heads_q, problem.batch)
        return [
            Launch(spec, made, visited, order, grid, count, self._scored("decode")),
            self._alone("merge", rows, count),
        ]

    def _alone(self, kernel: str, grid: tuple[int, int, int], splits: int = 1) -> Launch:
        """A kernel that visits no pairs."""
        return Launch(*self._spec(kernel), nothing(), np.zeros(1, np.int64), grid, splits)
