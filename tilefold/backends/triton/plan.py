"""Planning for Triton: the kernels of an operation, what each program visits, and scratch.

A plan knows lengths and masks but no strides: the sources that follow from it serve them all. A
backward pass is two kernels (split) or three (fused); a forward pass of few queries is two: keys
are split among programs, whose parts are merged in a fixed order.

Nothing here depends on the number of multiprocessors. Where results are to be the same bits
anywhere, all that decides them (forms, blocks, splits of keys, owners and their blocks) follows
from one key head with its query heads, in one batch entry, and not from what else is in the call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tilefold.backends.triton import inputs, tuned
from tilefold.backends.triton.architectures import Architecture, architecture
from tilefold.backends.triton.choice import Asked, Choice, check_asked, choose
from tilefold.backends.triton.heuristics import DEFAULT, Heuristics
from tilefold.backends.triton.kernels import hopper_launch
from tilefold.backends.triton.kernels.scores import LOG2_E
from tilefold.backends.triton.launch import Launch, TritonPlan
from tilefold.backends.triton.spec import (
    BY_PRECISION,
    KERNELS,
    LEAST,
    MOST_DIM,
    TritonSpec,
    power_of_two,
)
from tilefold.common import check, generation, reproducible, settings
from tilefold.common.lru import LruCache
from tilefold.masks.runs import Runs
from tilefold.planning import roofline
from tilefold.planning.masked import MaskedProblem, Scored
from tilefold.planning.plan import Scratch, split_scratch
from tilefold.planning.tiles import parted, runs_to_tiles
from tilefold.planning.visited import MASK_STEP, cut, heaviest_first
from tilefold.problems.attention import STATISTICS, Problem, check_problem

FORMS = {
    "forward": ("auto", "tiled", "hopper", "decode"),
    "backward": ("auto", "split", "fused"),
}
"""Forms of an operation: "tiled" is the plain kernel of every GPU, "hopper" the one in Gluon, which
"auto" takes on sm_90 where it serves and TILEFOLD_HOPPER does not turn it off. "auto" takes "split"
for a backward pass: the fused form reads and writes dQ in memory for every tile, and nobody has
measured yet where that pays."""

EXTRA = {"forward": ("max",), "backward": ("dlse", "dsinks")}
"""Operands of an operation that a call may ask for, beside the gradients of a score's arrays."""

_NO_RUNS = np.zeros((1, 2), np.int32)

_recent: LruCache[TritonPlan] = LruCache(most=128, most_bytes=256 * 2**20)


def plan(
    problem: Problem,
    name: str,
    operation: str,
    *,
    form: str = "auto",
    blocks: Asked = None,
    owners: int | None = None,
    scope: str | None = None,
    extra: tuple[str, ...] = (),
) -> TritonPlan:
    """The plan of an operation, "forward" or "backward", on an architecture such as "sm_90".

    `form` is how it is done: see `FORMS`. `blocks` override the tables; by kernel ("forward",
    "decode", "backward_dq", ...) where they differ. `owners` of each key head share the fused
    backward pass. Results depend on all of these only by rounding. `scope` is "anywhere" or
    "machine", as set by `set_reproducible` where it is None. `extra` are operands beside those that
    every problem of the kind has: "max" of a forward pass; "dlse", "dsinks" and "dinput0", ... of a
    backward pass.

    Raises ValueError for what no GPU of the architecture can run, NotImplementedError for heads
    that are too wide, TypeError for other blocks.
    """
    check_problem(problem)
    check_asked(blocks)
    asked = tuple(sorted(blocks.items())) if isinstance(blocks, Mapping) else blocks
    hopper, scope = settings.HOPPER.get(), scope or reproducible.get_reproducible()
    key = (generation.number, problem, name, operation, form, asked, owners, hopper, scope, extra)
    found = _recent.get(key)
    if found is None:
        anywhere = scope == "anywhere"
        device = architecture(name)
        planner = Planner(problem, device, blocks, owners, anywhere=anywhere, extra=extra)
        made = planner.plan(operation, form)
        found = _recent.put(key, made, made.data_bytes)
    return found


class Planner:
    """One problem on one architecture."""

    def __init__(
        self,
        problem: Problem,
        device: Architecture,
        blocks: Asked = None,
        owners: int | None = None,
        heuristics: Heuristics = DEFAULT,
        *,
        anywhere: bool = True,
        extra: tuple[str, ...] = (),
    ) -> None:
        self._problem, self._device, self._heuristics = problem, device, heuristics
        self._blocks, self._owners, self._anywhere = blocks, owners, anywhere
        self._extra = {*extra, *(("sinks",) if problem.sinks else ())}
        self._masked = MaskedProblem.of(problem)

    def plan(self, operation: str, form: str = "auto") -> TritonPlan:
        """The plan of an operation in a form; see `plan`."""
        problem = self._problem
        check.choice("operation", operation, tuple(FORMS))
        check.choice("form", form, FORMS[operation])
        self._check(operation)
        row = (problem.batch, problem.heads_q, problem.len_q)
        kind = STATISTICS[problem.dtype]
        buffers: dict[str, Scratch] = {}
        cleared: tuple[str, ...] = ()
        if operation == "backward":
            buffers["delta"] = Scratch(row, kind)
            if form == "fused":
                launches = self._fused()
                buffers["dq_parts"] = Scratch((launches[1].splits, *row, problem.dim), kind)
                cleared = ("dq_parts",)
            else:
                launches = [self._tiled("backward_dq"), self._tiled("backward_dkv")]
            for launch in self._gradients_of_inputs():
                assert launch.added is not None
                launches.append(launch)
                parts = (launch.splits, *launch.added.given.shape)
                buffers[launch.added.parts] = Scratch(parts, kind)
                cleared += (launch.added.parts,)
        elif self._decodes(form):
            launches = self._decode()
            buffers |= split_scratch(problem, launches[0].splits, kind)
        else:
            launches = [self._forward(form)]
        return TritonPlan(
            problem=problem,
            architecture=self._device,
            operation=operation,
            launches=tuple(launches),
            parameters=self._masked.parameters,
            tables=self._masked.tables,
            buffers=buffers,
            scores=self._masked.score_parts,
            cleared=cleared,
        )

    def _check(self, operation: str) -> None:
        """Raises NotImplementedError for what has no kernels, and ValueError for a scale that the
        type of the sums cannot hold.
        """
        problem = self._problem
        for name in sorted(self._extra - {"sinks"}):
            input_of = name.removeprefix("dinput")
            if name not in EXTRA[operation] and not (
                operation == "backward" and input_of.isdigit()
            ):
                raise NotImplementedError(
                    f"Triton's kernels have no operand {name} in a {operation} pass: compute it on"
                    " the CPU, or by impl='composed'"
                )
        least, most = scales(STATISTICS[problem.dtype])
        if problem.scale and not least <= abs(problem.scale) <= most:
            raise ValueError(
                f"scale must be 0 or from {least:.3g} to {most:.3g} in size on a GPU, where sums of"
                f" {problem.dtype} are {STATISTICS[problem.dtype]}, got {problem.scale}: multiply q"
                " or k by a part of it"
            )
        if max(problem.dim, problem.dim_v) > MOST_DIM:
            raise NotImplementedError(
                f"heads of up to {MOST_DIM} numbers are implemented for GPUs, got dim"
                f" {problem.dim} and dim_v {problem.dim_v}: use the CPU, or impl='composed'"
            )

    def _spec(self, kernel: str, rows: int | None = None) -> tuple[TritonSpec, Choice]:
        problem = self._problem
        float32_mode = "ieee"
        if problem.dtype == "float32" and self._device.kind == "cuda":
            float32_mode = BY_PRECISION[problem.precision]
        made = self._choose(kernel, float32_mode, rows)
        scored = self._scored(kernel)
        spec = TritonSpec(
            kernel=kernel,
            dtype=problem.dtype,
            dim=problem.dim,
            dim_v=problem.dim_v,
            blocks=made.blocks,
            mask=self._masked.skeleton,
            index_bits=self._masked.index_bits,
            float32_mode=float32_mode,
            negative=problem.scale < 0 and scored is None,
            dropout=problem.dropout > 0,
            score=None if scored is None else scored.parts.skeleton,
            hides=scored is not None and scored.hides and KERNELS[kernel].visits,
            extra=tuple([name for name in KERNELS[kernel].optional if name in self._extra]),
        )
        return spec, made

    @property
    def _inputs(self) -> tuple[int, ...]:
        """The numbers of the arrays of a score whose gradients are asked for."""
        wanted = [name.removeprefix("dinput") for name in self._extra if name.startswith("dinput")]
        return tuple(sorted(map(int, wanted)))

    def _scored(self, kernel: str) -> Scored | None:
        computed = KERNELS[kernel].computed
        return self._masked.scored(computed, self._inputs if computed == "entries" else ())

    def _choose(self, kernel: str, float32_mode: str, rows: int | None) -> Choice:
        """The blocks that were asked for, or measured here, or of the tables."""
        problem, asked = self._problem, self._blocks
        sizes = kernel, problem.dtype, problem.dim, problem.dim_v
        choice = functools.partial(
            choose,
            self._device,
            *sizes,
            float32_mode=float32_mode,
            dropout=problem.dropout > 0,
            scored=problem.score is not None,
            pair_bytes=inputs.pair_bytes(self._scored(kernel)),
            heuristics=self._heuristics,
        )
        if wanted := asked.get(kernel) if isinstance(asked, Mapping) else asked:
            return choice(blocks=wanted)
        key = tuned.Key(
            self._device.name, *sizes, float32_mode, self._masked.skeleton.text, rows or 0
        )
        if measured := tuned.find(key):
            try:
                made = choice(blocks=measured)
            except ValueError as error:  # an older version kept them
                made = choice(rows=rows)
                why = f"what was measured does not fit: {error}"
            else:
                why = "the fastest that were measured here"
            return replace(made, reasons=(*made.reasons, why))
        return choice(rows=rows)

    def _tiled(self, kernel: str) -> Launch:
        """A kernel whose programs own a block row each."""
        spec, made = self._spec(kernel)
        visited = self._masked.visited_by(spec.parallel, spec.blocks.parallel)
        return self._launch(spec, made, visited, spec.row.heads(self._problem))

    def _forward(self, form: str) -> Launch:
        """The kernel of Hopper with the plain one behind it, or the plain one."""
        reason = self._not_hopper()
        if form == "hopper":
            if reason:
                raise ValueError(f"form 'hopper' is not possible: {reason}")
            return self._hopper()
        plain = self._tiled("forward")
        if form == "tiled" or reason or self._blocks or not settings.HOPPER.get():
            return plain
        columns = hopper_launch.padded(self._problem.dim) + hopper_launch.padded(
            self._problem.dim_v
        )
        if columns > self._heuristics.most_padding * (self._problem.dim + self._problem.dim_v):
            return plain
        return replace(self._hopper(), plain=plain)

    def _not_hopper(self) -> str | None:
        """Why the kernel in Gluon cannot serve."""
        if self._device.name != "sm_90":
            return f"it is written for sm_90, not for {self._device.name}"
        problem = self._problem
        if problem.empty:
            return "no query meets a key"
        if problem.dropout:
            return "it drops no pairs"
        if problem.score is not None:
            return "it does not modify scores"
        if self._extra:
            return f"it has no operand {min(self._extra)}"
        return hopper_launch.fits(self._spec_of_hopper())

    def _spec_of_hopper(self) -> TritonSpec:
        problem = self._problem
        return TritonSpec(
            kernel="forward",
            dtype=problem.dtype,
            dim=problem.dim,
            dim_v=problem.dim_v,
            blocks=hopper_launch.blocks(problem.dim, problem.dim_v),
            mask=self._masked.skeleton,
            index_bits=self._masked.index_bits,
            negative=problem.scale < 0,
            gluon=True,
        )

    def _hopper(self) -> Launch:
        """The forward kernel in Gluon."""
        problem, spec = self._problem, self._spec_of_hopper()
        reasons = ("in Gluon, for Hopper: two warpgroups of 64 queries and a warp that loads",)
        made = Choice("forward", spec.blocks, reasons)
        visited = self._masked.visited_by("q", spec.blocks.parallel)
        return self._launch(spec, made, visited, problem.heads_q)

    def _launch(
        self, spec: TritonSpec, made: Choice, visited: Runs, heads: int, blocks: int | None = None
    ) -> Launch:
        """The launch of a kernel that visits runs.

        Decoding has `blocks` of queries, and then each block row is a split of the keys of all.
        """
        visited = runs_to_tiles(visited, spec.blocks.traverse)
        rows = visited.block_rows
        height, splits = spec.blocks.parallel, 1
        if blocks is not None:
            height, splits = self._problem.len_q, rows
        pairs = roofline.computed_pairs(self._problem, spec.parallel, visited, height, splits)
        order = (heaviest_first(visited)[:, None] + rows * np.arange(blocks or 1)).ravel()
        run_rows, spans = parted(visited, spec.blocks.traverse)
        return Launch(
            spec,
            made,
            order.astype(np.int32),
            run_rows,
            spans if len(spans) else _NO_RUNS,
            (visited.planes_b, visited.planes_h),
            rows,
            len(order),
            heads,
            len(order) * heads * self._problem.batch,
            pairs,
            scored=self._scored(spec.kernel),
        )

    def _simple(self, kernel: str, splits: int) -> Launch:
        """A kernel that visits no pairs: rows of queries, head by head."""
        problem = self._problem
        spec, made = self._spec(kernel)
        rows = -(-problem.len_q // spec.blocks.parallel)
        nothing = np.zeros(1, np.int32)
        programs = rows * problem.heads_q * problem.batch
        rest = (1, 1), 0, rows, problem.heads_q, programs, 0, splits
        return Launch(spec, made, nothing, nothing, _NO_RUNS, *rest)

    def _fused(self) -> list[Launch]:
        """delta, then all but dq, then the parts of dq added."""
        problem = self._problem
        main = self._tiled("backward")
        heads, limits = problem.batch * problem.heads_kv, self._heuristics
        usual = limits.fixed_owners
        if not self._anywhere:
            usual = -(-limits.enough_programs // max(1, heads))
        owners = max(1, min(self._owners or usual, main.block_rows))
        main = replace(main, splits=owners, programs=owners * heads)
        if self._anywhere and math.prod(main.planes) > 1:
            # The order is that of the sums of an owner; by weight it would follow from all planes.
            main = replace(main, order=np.arange(main.block_rows, dtype=np.int32))
        return [self._simple("delta", 1), main, self._simple("reduce_dq", owners)]

    def _gradients_of_inputs(self) -> list[Launch]:
        """A kernel for each array of the score whose gradient is asked for."""
        if not self._inputs:
            return []
        main = self._tiled("backward_inputs")
        return inputs.launches(main, self._problem, self._inputs, self._heuristics)

    def _decodes(self, form: str) -> bool:
        problem = self._problem
        if form == "decode" and problem.empty:
            raise ValueError("form 'decode' splits keys, and there is no query or no key")
        grouped = problem.heads_q > problem.heads_kv
        limits = self._heuristics
        few = problem.len_q <= (limits.packed_queries if grouped else limits.few_queries)
        many = problem.len_k >= limits.many_keys
        return form == "decode" or (form == "auto" and few and many and not problem.empty)

    def _decode(self) -> list[Launch]:
        """The kernel that leaves a part for each split, and the one that merges them."""
        problem = self._problem
        group = problem.heads_q // problem.heads_kv
        limits = self._heuristics
        rows = min(limits.most_decode_rows, max(LEAST, power_of_two(group * problem.len_q)))
        spec, made = self._spec("decode", rows)
        blocks = -(-group * problem.len_q // spec.blocks.parallel)
        visited = self._masked.visited_together(problem.heads_kv)
        met, least, splits = visited.met, limits.fixed_keys, limits.fixed_splits
        if not self._anywhere:
            programs = problem.batch * problem.heads_kv * blocks
            met, least = met.max(initial=0), limits.keys_per_split
            splits = max(1, limits.enough_programs // programs)
        step = max(MASK_STEP, spec.blocks.traverse)
        visited = cut(visited, -(-np.maximum(least, -(-met // splits)) // step) * step)
        launch = self._launch(spec, made, visited, problem.heads_kv, blocks)
        launch = replace(launch, splits=visited.block_rows)
        return [launch, self._simple("merge", launch.splits)]


def scales(statistics: str) -> tuple[float, float]:
    """The least and the most size of a scale whose product with log2(e) is a normal number."""
    limits = np.finfo(statistics)
    return float(limits.tiny), float(limits.max) / LOG2_E


def key_of(spec: TritonSpec, name: str) -> tuned.Key:
    """The key of the measured blocks of a kernel, on an architecture."""
    sizes = spec.dtype, spec.dim, spec.dim_v, spec.float32_mode
    rows = spec.blocks.parallel if spec.kernel == "decode" else 0
    return tuned.Key(name, spec.kernel, *sizes, spec.mask.text, rows)
