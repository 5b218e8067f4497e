"""A model of the instructions that a Metal kernel issues, from the counts of the emulator.

No Apple GPU has run these kernels, so nothing here is a measurement of a GPU. The emulator counts
the operations of a source: products of fragments, exponentials, shuffles, accesses to memory and to
the elements of fragments. Each operation has a weight: its cost on a core by public measurements,
where a multiply-add of one lane is 1. The useful instructions are the count of Turner (2024):
2 D + 5 for each pair of query and key in the forward pass, 3 D + 5 and 4 D + 5 in the backward pass
(`roofline.instruction_count`).

    issued per useful one = sum over operations of (weight x count) / ((2 D + 5) pairs)

The inverse is the share of the peak that a core reaches if it issues one instruction after the
other and never waits, without arithmetic of addresses, loops and masks, and without spills. The
model counts adjacent elements that a lane reads one by one, while a GPU may read them at once, and
since M3 several units of a core work side by side. So a GPU may be above the model or below it.
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
"""The instructions of single lanes for each operation that the emulator counts. The rates are from
github.com/philipturner/metal-benchmarks for M1; an operation without a rate there counts as one."""

MODELLED = ("forward", "backward_dq", "backward_dkv")
"""The modelled kernels, which serve long sequences."""


@dataclass(frozen=True)
class Model:
    """The operations of one kernel for one visited tile of `pairs` pairs of query and key."""

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
    """The model of a kernel: the emulator runs two tiles and three; the difference is one tile.

    The check "fast" does not count accesses to memory. Raises NotImplementedError, with the reason,
    if the emulator cannot run.
    """
    machine = _Listening(family, check)
    blocks = launch(family, kernel, dtype, dim, tiles=2).spec.blocks
    fewer, more = (_counted(machine, kernel, dtype, dim, tiles) for tiles in (2, 3))
    counts = {name: more[name] - fewer[name] for name in WEIGHTS}
    return Model(kernel, dim, blocks.parallel * blocks.traverse, counts)


def launch(family: str, kernel: str, dtype: str, dim: int, *, tiles: int) -> Launch:
    """The launch of one threadgroup that visits `tiles` whole tiles without a mask."""
    spec = _launch(_problem(kernel, dtype, dim, 64, 64), family, kernel).spec
    blocks = spec.blocks
    problem = _problem(kernel, dtype, dim, blocks.parallel, tiles * blocks.traverse)
    return _launch(problem, family, kernel)


def _problem(kernel: str, dtype: str, dim: int, parallel: int, traverse: int) -> Problem:
    """A problem of one head, with lengths of the parallel and the traversed axis."""
    long_q = KERNELS[kernel].parallel == "k"
    len_q, len_k = (traverse, parallel) if long_q else (parallel, traverse)
    return Problem.of((1, 1, len_q, dim), (1, 1, len_k, dim), dtype=dtype)


def _launch(problem: Problem, family: str, kernel: str) -> Launch:
    name = kernel.partition("_")[0]
    launches = plan(problem, family, name, form="tiled").launches
    return next(each for each in launches if each.spec.kernel == kernel)


@dataclass(frozen=True, eq=False)
class _Listening(Emulated):
    """The emulator, which keeps the sources; with the check "nothing" it compiles nothing."""

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
    """The emulator's counts in the launch of one threadgroup."""
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
