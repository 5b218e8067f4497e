"""A model of the instructions that a Metal kernel issues, from what the emulator counts.

No Apple GPU has run these kernels, so nothing here is a measurement of one. The emulator counts
what a source does: products of fragments, exponentials, shuffles, accesses to memory and to the
elements of fragments. Each is weighed by what public measurements say that it takes of a core, a
multiply-add of one lane being 1. What a kernel must do anyway is the count of Turner (2024):
2 D + 5 for each pair of query and key in the forward pass, 3 D + 5 and 4 D + 5 in the backward ones
(`roofline.instruction_count`).

    issued per useful one = sum over operations of (weight x count) / ((2 D + 5) pairs)

Its inverse is the share of the peak that is left to a core that issues one instruction after the
other and never waits, without arithmetic of addresses, loops and masks, and without spilled
registers. Neighbours that a lane reads are counted one by one, where a GPU may read them at once,
and since M3 several units of a core work side by side. So a GPU may be above it or below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.metal import dispatch
from tilefold.backends.metal.dispatch import Emulated
from tilefold.backends.metal.plan import Launch, MetalPlan, plan
from tilefold.backends.metal.spec import KERNELS, SIMD
from tilefold.planning.roofline import instruction_count
from tilefold.problems.attention import Problem

WEIGHTS = {
    "multiplies": 512.0,  # 8 x 8 x 8 multiply-adds
    "exponentials": 4.0,  # a core makes 32 in a cycle, and 128 multiply-adds
    "shuffles": 2.0 * SIMD,  # 256 bytes in a cycle: 64 lanes of 4
    "elements": 0.5,  # of a fragment in registers: most statements read one and set one
    "device_loads": 1.0,
    "device_stores": 1.0,
    "threadgroup_loads": 1.0,
    "threadgroup_stores": 1.0,
}
"""Instructions of single lanes for each operation that the emulator counts. Rates are from
github.com/philipturner/metal-benchmarks for M1; where it has none, an operation is one."""

MODELLED = ("forward", "backward_dq", "backward_dkv")
"""Kernels that are modelled: they serve long sequences."""


@dataclass(frozen=True)
class Model:
    """What one kernel does for a tile that a threadgroup visits, `pairs` of queries and keys."""

    kernel: str
    dim: int
    pairs: int
    counts: Mapping[str, int]

    @property
    def shares(self) -> dict[str, float]:
        """Instructions issued for each useful one, by operation."""
        useful = instruction_count(KERNELS[self.kernel], self.pairs, self.dim)
        return {name: WEIGHTS[name] * self.counts[name] / useful for name in WEIGHTS}

    @property
    def issued(self) -> float:
        """Instructions issued for each useful one."""
        return sum(self.shares.values())


def model(family: str, kernel: str, dtype: str, dim: int, check: str = "count") -> Model:
    """Run a kernel on the emulator over two tiles and over three: the difference is one tile.

    With the check "fast" accesses to memory are not counted. Raises NotImplementedError, with the
    reason, where the emulator cannot run.
    """
    machine = _Listening(family, check)
    blocks = launch(family, kernel, dtype, dim, tiles=2).spec.blocks
    fewer, more = (_counted(machine, kernel, dtype, dim, tiles) for tiles in (2, 3))
    counts = {name: more[name] - fewer[name] for name in WEIGHTS}
    return Model(kernel, dim, blocks.parallel * blocks.traverse, counts)


def launch(family: str, kernel: str, dtype: str, dim: int, *, tiles: int) -> Launch:
    """The launch of one threadgroup that visits `tiles` whole tiles; no mask."""
    spec = _launch(_problem(kernel, dtype, dim, 64, 64), family, kernel).spec
    blocks = spec.blocks
    problem = _problem(kernel, dtype, dim, blocks.parallel, tiles * blocks.traverse)
    return _launch(problem, family, kernel)


def _problem(kernel: str, dtype: str, dim: int, parallel: int, traverse: int) -> Problem:
    """One head, its lengths by which of them the kernel traverses."""
    long_q = KERNELS[kernel].parallel == "k"
    len_q, len_k = (traverse, parallel) if long_q else (parallel, traverse)
    return Problem.of((1, 1, len_q, dim), (1, 1, len_k, dim), dtype=dtype)


def _launch(problem: Problem, family: str, kernel: str) -> Launch:
    name = kernel.partition("_")[0]
    launches = plan(problem, family, name, form="tiled").launches
    return next(each for each in launches if each.spec.kernel == kernel)


@dataclass(frozen=True, eq=False)
class _Listening(Emulated):
    """The emulator, which keeps what it compiled; with the check "nothing" it compiles nothing."""

    texts: list[str] = field(default_factory=list)
    libraries: list[Any] = field(default_factory=list)

    def compile(self, text: str) -> Any:
        """The kernels of a source."""
        self.texts.append(text)
        entries = {f"tilefold_{kernel}": None for kernel in MODELLED}
        self.libraries.append(
            SimpleNamespace(**entries) if self.checks == "nothing" else super().compile(text)
        )
        return self.libraries[-1]

    def at(self, kernel: str) -> int:
        """Index of the library that holds a kernel."""
        found = [n for n, text in enumerate(self.texts) if f" tilefold_{kernel}(" in text]
        assert len(found) == 1, found
        return found[0]


def text_of(family: str, kernel: str, dtype: str, dim: int) -> str:
    """The source that a machine compiles for contiguous operands; nothing is compiled here."""
    machine = _Listening(family, "nothing")
    made, operands = _call(family, kernel, dtype, dim, tiles=2)
    strides = {name: dispatch.strides_of(name, array) for name, array in operands.items()}
    dispatch.prepare(made, machine, strides, dispatch.alignment_of(operands))
    return machine.texts[machine.at(kernel)]


def _counted(
    machine: _Listening, kernel: str, dtype: str, dim: int, tiles: int
) -> Mapping[str, int]:
    """What the emulator counts in the launch of one threadgroup."""
    made, operands = _call(machine.family, kernel, dtype, dim, tiles)
    dispatch.execute(made, machine, operands)
    counters: Mapping[str, int] = machine.libraries[machine.at(kernel)].counters
    return counters


def _call(
    family: str, kernel: str, dtype: str, dim: int, tiles: int
) -> tuple[MetalPlan, Mapping[str, NDArray[Any]]]:
    """A plan in which one threadgroup of the kernel visits `tiles` tiles, and its operands."""
    blocks = launch(family, kernel, dtype, dim, tiles=tiles).spec.blocks
    problem = _problem(kernel, dtype, dim, blocks.parallel, tiles * blocks.traverse)
    made = plan(problem, family, kernel.partition("_")[0], form="tiled")
    rng = np.random.default_rng(0)
    lengths = {"q": problem.len_q, "k": problem.len_k, "v": problem.len_k, "o": problem.len_q}
    operands = {
        f"{front}{name}": rng.normal(size=(1, 1, length, dim)).astype(dtype)
        for name, length in lengths.items()
        for front in ("", "d")
    }
    operands["lse"] = np.full((1, 1, problem.len_q), 8, np.float32)
    return made, operands
