"""Which blocks a kernel gets and what it keeps in registers: a row of the tables, made to fit.

A simdgroup holds 8 rows of an operand in its 32 lanes, so a row of width W costs each thread W / 4
elements: inputs in the type that is multiplied, sums in float32. A tile of scores costs a quarter
of its columns, in float32. Where that is more than the family's budget, first the traverse block
shrinks, which costs no traffic while the sums are in registers; then operands leave, in the order
in which they leave the tables: inputs, which are read again for each tile, before sums, which are
read and written for each tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tilefold.backends.metal import tables
from tilefold.backends.metal.families import MetalFamily
from tilefold.backends.metal.heuristics import DEFAULT, Heuristics
from tilefold.backends.metal.kernels.fragment import TYPES
from tilefold.backends.metal.kernels.frame import stage_elements
from tilefold.backends.metal.kernels.storage import storage
from tilefold.backends.metal.spec import KERNELS, SIDE, SIMD, SUMS, Blocks, MetalSpec, whole
from tilefold.masks.expression import Truth
from tilefold.masks.skeleton import split

_STEP = 2 * SIDE
_ANY = split(Truth(True))[0]


class Eviction(NamedTuple):
    """An operand that the table keeps in registers and the choice does not, and why."""

    operand: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """The blocks and cached operands of a kernel, and what they take of each thread and group.

    `start` says where they come from; `registers` are bytes of each thread, by what they hold.
    """

    family: MetalFamily
    kernel: str
    start: str
    blocks: Blocks
    cached: tuple[str, ...]
    registers: tuple[tuple[str, int], ...]
    threadgroup_bytes: int
    shrunk: str = ""
    evicted: tuple[Eviction, ...] = ()

    @property
    def register_bytes(self) -> int:
        """Bytes of tiles that a thread keeps alive."""
        return sum(size for _, size in self.registers)

    @property
    def takes(self) -> str:
        """The registers that the blocks take, in words."""
        return f"{self.blocks} takes {self.register_bytes} bytes of registers"

    @property
    def fits(self) -> bool:
        """True if the registers do."""
        return self.register_bytes <= self.family.register_bytes

    def explain(self) -> list[str]:
        """The choice and its reasons, as lines of text."""
        parts = ", ".join(f"{name} {size}" for name, size in self.registers) or "no tiles"
        return [
            f"{self.kernel}: {self.blocks}, cached {' '.join(self.cached) or 'nothing'}",
            f"  from {self.start}",
            *([f"  {self.shrunk}"] if self.shrunk else []),
            *(f"  {name} leaves the registers: {reason}" for name, reason in self.evicted),
            f"  registers {self.register_bytes} of {self.family.register_bytes} bytes: {parts}",
            f"  threadgroup {self.threadgroup_bytes} of {self.family.threadgroup_bytes} bytes",
        ]


def choose(
    family: MetalFamily,
    kernel: str,
    dtype: str,
    dim: int,
    dim_v: int,
    *,
    blocks: Blocks | None = None,
    cached: Sequence[str] | None = None,
    heuristics: Heuristics = DEFAULT,
) -> Choice:
    """The choice for a kernel. `blocks` and `cached` override the tables, and are kept as given.

    Raises ValueError where what is given does not fit the family, NotImplementedError for float64.

    >>> from tilefold.backends.metal.families import family
    >>> for line in choose(family("apple7"), "forward", "float16", 96, 96).explain():
    ...     print(line)
    forward: 32 x 64 x 32, cached q o
      from table apple7, dim up to 96: 32 x 128 x 32, cached q o
      traverse shrinks to 64: 32 x 128 x 32 takes 272 bytes of registers
      registers 208 of 216 bytes: q 48, o 96, tiles 64
      threadgroup 5124 of 32768 bytes
    """
    if dtype not in TYPES:
        raise NotImplementedError(
            f"{dtype} is not a type of Apple's GPUs, which have {', '.join(TYPES)}: compute it on"
            " the CPU"
        )
    others = [name for name in cached or () if name not in KERNELS[kernel].resident]
    if others:
        allowed = ", ".join(KERNELS[kernel].resident) or "nothing"
        raise ValueError(f"{kernel} keeps any of {allowed} in registers, got {others[0]}")
    asked = _Asked(family, kernel, dtype, dim, dim_v)
    start, row_blocks, row_cached = asked.row()
    first = asked.choice(start, blocks or row_blocks, row_cached if cached is None else cached)
    asked.check(first)
    leaving = (
        [] if cached is not None else [x for x in KERNELS[kernel].leaving if x in first.cached]
    )
    evicted: list[Eviction] = []
    for operand in (*leaving, None):
        kept = [name for name in first.cached if all(name != gone for gone, _ in evicted)]
        longest = first.blocks.traverse
        least = longest if blocks else _STEP if cached is not None else _least(kept, heuristics)
        traverses = [longest, *range((longest - 1) // _STEP * _STEP, least - 1, -_STEP)]
        options = [asked.choice(start, replace(first.blocks, traverse=n), kept) for n in traverses]
        for made in options:
            if made.fits:
                return replace(made, shrunk=_shrunk(options[0], made), evicted=tuple(evicted))
        tightest = options[-1]
        if operand is not None:
            evicted.append(Eviction(operand, f"with it {tightest.takes}"))
    raise ValueError(
        f"{kernel} of {dtype}, dim {dim}, dim_v {dim_v}, with {' '.join(kept) or 'nothing'}"
        f" cached: {tightest.takes} per thread; {family.name} has {family.register_bytes}"
    )


def _least(kept: Sequence[str], limits: Heuristics) -> int:
    """Length to which the traverse block shrinks before another operand leaves."""
    if not kept:
        return _STEP
    sums = any(name in SUMS for name in kept)
    return limits.least_traverse if sums else limits.least_spilled


def _shrunk(before: Choice, after: Choice) -> str:
    if before.blocks == after.blocks:
        return ""
    return f"traverse shrinks to {after.blocks.traverse}: {before.takes}"


@dataclass(frozen=True)
class _Asked:
    """The kernel that a choice is made for."""

    family: MetalFamily
    kernel: str
    dtype: str
    dim: int
    dim_v: int

    def row(self) -> tuple[str, Blocks, tuple[str, ...]]:
        """Where to start: the words for it, blocks and cached operands."""
        if untuned := KERNELS[self.kernel].untuned:
            return "a block that nobody tuned", *untuned
        widest = max(self.dim, self.dim_v)
        row = tables.row(self.family.table, self.kernel, self.dtype, widest)
        return f"table {self.family.table}, {row}", row.blocks, row.cached

    def choice(self, start: str, blocks: Blocks, cached: Sequence[str]) -> Choice:
        """These blocks and operands, with what they take; no head block is wider than a row."""
        blocks = replace(blocks, head=min(blocks.head, whole(max(self.dim, self.dim_v))))
        row = KERNELS[self.kernel]
        held = tuple(name for name in row.resident if name in cached)
        spec = self._spec(blocks, held)
        number = storage(self.dtype, self.family.bfloat).compute_bytes
        registers = [
            (name, whole(spec.width(name)) // 4 * (4 if name in SUMS else number)) for name in held
        ]
        if row.visits:
            registers.append(("tiles", row.score_tiles * blocks.traverse))
        if any(name in SUMS and name not in held for name in row.resident):
            registers.append(("spill", blocks.head))
        # A tile of a traversed operand, and for each simdgroup a truth.
        shared = stage_elements(spec) * number + spec.simdgroups if row.visits else 0
        return Choice(self.family, self.kernel, start, blocks, held, tuple(registers), shared)

    def _spec(self, blocks: Blocks, cached: tuple[str, ...]) -> MetalSpec:
        return MetalSpec(
            kernel=self.kernel,
            dtype=self.dtype,
            dim=self.dim,
            dim_v=self.dim_v,
            blocks=blocks,
            cached=cached,
            staged=self.family.staged,
            bfloat=self.family.bfloat,
            mask=_ANY,
            index_bits=32,
        )

    def check(self, made: Choice) -> None:
        """Raises ValueError for blocks that no eviction makes legal."""
        threads = SIMD * made.blocks.parallel // SIDE
        if threads > self.family.threads:
            raise ValueError(
                f"blocks {made.blocks} take {threads} threads, 32 for each 8 of the parallel block;"
                f" {self.family.name} has {self.family.threads} in a threadgroup"
            )
        if made.threadgroup_bytes > self.family.threadgroup_bytes:
            raise ValueError(
                f"blocks {made.blocks} of {self.dtype} take {made.threadgroup_bytes} bytes of"
                f" threadgroup memory; {self.family.name} has {self.family.threadgroup_bytes}"
            )
