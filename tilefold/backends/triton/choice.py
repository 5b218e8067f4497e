"""The blocks of a kernel on an architecture: what is asked for, or the table's row, made to fit.

Blocks that a caller asks for are taken or refused. A row of a table was compiled for its head
dimension, so it fits; where it was not (more rows of queries are decoded together, say), it shrinks
until the estimates of `resources` fit: pipeline stages go first, which costs no traffic, then rows
of the traversed tile. What is too large even then is streamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tilefold.backends.triton import resources, tables
from tilefold.backends.triton.architectures import Architecture
from tilefold.backends.triton.heuristics import DEFAULT, Heuristics
from tilefold.backends.triton.resources import kind as kind_of
from tilefold.backends.triton.spec import KERNELS, LEAST, Blocks, power_of_two
from tilefold.common import check

Asked = Blocks | Mapping[str, Blocks] | None
"""Blocks for all kernels of a plan, or by kernel."""


@dataclass(frozen=True)
class Choice:
    """Blocks, and why, in words.

    `descriptors`: tiles should be moved by descriptors where operands lie so that they can be.
    `shared_bytes` and `registers` are estimates: see `resources`.
    """

    kernel: str
    blocks: Blocks
    reasons: tuple[str, ...] = ()
    descriptors: bool = False
    shared_bytes: int = 0
    registers: int = 0

    def explain(self) -> list[str]:
        """Lines of text."""
        return [f"{self.kernel}: {self.blocks}", *(f"  {why}" for why in self.reasons)]


def check_asked(blocks: Asked) -> None:
    """Raises for blocks that are none, and for kernels that there are not."""
    by_kernel = blocks if isinstance(blocks, Mapping) else {}
    for kernel in by_kernel:
        check.choice("a kernel of blocks", kernel, tuple(KERNELS))
    for one in by_kernel.values() if by_kernel else (blocks,):
        if not isinstance(one, Blocks | None):
            raise TypeError(f"blocks must be Blocks, or Blocks by kernel, got {check.shown(one)}")


def choose(
    architecture: Architecture,
    kernel: str,
    dtype: str,
    dim: int,
    dim_v: int,
    *,
    float32_mode: str = "ieee",
    blocks: Blocks | None = None,
    rows: int | None = None,
    dropout: bool = False,
    scored: bool = False,
    pair_bytes: int = 0,
    heuristics: Heuristics = DEFAULT,
) -> Choice:
    """The blocks of a kernel, asked for or of the tables; `rows` along the parallel axis, if given.

    Rows of the tables were compiled without `dropout` and without modified scores, `scored`, which
    take shared memory of their own. `pair_bytes` are the bytes of arrays that a score reads for
    each pair: such tiles are under way as those of keys are.
    Raises ValueError for blocks that the architecture cannot hold, NotImplementedError where it
    holds none.

    >>> from tilefold.backends.triton.architectures import architecture
    >>> print(choose(architecture("sm_80"), "forward", "float16", 128, 128).blocks)
    128 x 64, 8 warps, 3 stages
    """
    sizes = kernel, dtype, dim, dim_v
    options = dropout, scored, pair_bytes
    asked = _Asked(architecture, *sizes, float32_mode, heuristics, *options)
    row, words = asked.row()
    if blocks is not None:
        why = "" if asked.compiled(row) and blocks == row.blocks else asked.too_much(blocks)
        if why:
            raise ValueError(why)
        return asked.choice(blocks, ["blocks that were asked for"])
    found, compiled = row.blocks, asked.compiled(row)
    if rows is not None and rows != found.parallel:
        found, compiled = replace(found, parallel=rows), False
        words.append(f"{rows} rows of queries are decoded together")
    most = asked.most_rows
    if most is not None and found.parallel > most:
        found, compiled = replace(found, parallel=most), False
        words.append(f"{architecture.name} multiplies {most} rows of float64 at most")
    first = found
    while not compiled and (why := asked.too_much(found)):
        smaller = _smaller(found, heuristics.most_warps if "registers" in why else 0)
        if smaller is None and not found.streamed:
            smaller = replace(first, stages=min(first.stages, 2), streamed=True)
        if smaller is None:
            raise NotImplementedError(f"{why}: use the CPU, or impl='composed'")
        words.append(f"{found} shrink to {smaller}: {why.partition(': ')[2]}")
        found = smaller
    return asked.choice(found, words)


def _smaller(blocks: Blocks, most_warps: int) -> Blocks | None:
    """The next blocks to try where these do not fit; up to `most_warps` warps would help."""
    if blocks.stages > 2:
        return replace(blocks, stages=blocks.stages - 1)
    if blocks.traverse > LEAST:
        return replace(blocks, traverse=blocks.traverse // 2)
    if blocks.stages > 1:
        return replace(blocks, stages=1)
    if blocks.parallel > LEAST:
        return replace(blocks, parallel=blocks.parallel // 2)
    if blocks.warps < most_warps:
        return replace(blocks, warps=blocks.warps * 2)
    return None


@dataclass(frozen=True)
class _Asked:
    """The kernel that a choice is made for."""

    device: Architecture
    kernel: str
    dtype: str
    dim: int
    dim_v: int
    float32_mode: str
    heuristics: Heuristics
    dropout: bool
    scored: bool
    pair_bytes: int

    @property
    def kind(self) -> str:
        return kind_of(self.dtype, self.float32_mode)

    @property
    def most_rows(self) -> int | None:
        """Rows of a block along the parallel axis, at most; None where resources alone say it."""
        multiplied = self.dtype == "float64" and KERNELS[self.kernel].visits
        return self.device.float64_rows if multiplied else None

    def row(self) -> tuple[tables.Row, list[str]]:
        """Where to start, and the words for it."""
        widest = max(self.dim, self.dim_v)
        if not KERNELS[self.kernel].visits:
            most = self.heuristics.most_row_elements
            rows = power_of_two(most // resources.padded(widest) + 1) // 2
            blocks = Blocks(max(LEAST, min(64, rows)), LEAST, 4, 1)
            return tables.Row(widest, blocks, 0), ["a block that nobody tuned"]
        found = tables.row(self.device.table, self.kernel, self.kind, widest)
        words = [f"table {self.device.table}, {self.kind}, {found}"]
        if widest > found.dim or found.spills is None:
            words.append("nobody compiled it for this")
        elif found.spills:
            words.append(
                f"by the compiler it spills {found.spills} numbers of a thread for each tile"
            )
        return found, words

    def compiled(self, row: tables.Row) -> bool:
        """True if a row was compiled for just these heads: narrower ones may have more pieces."""
        dims = {resources.padded(self.dim), resources.padded(self.dim_v), row.dim}
        whole = KERNELS[self.kernel].visits and not (self.dropout or self.scored)
        return whole and row.spills is not None and len(dims) == 1

    def too_much(self, blocks: Blocks) -> str:
        """Why blocks do not fit, in a line; "" where they do."""
        device = self.device
        words = f"{self.kernel} of {self.dtype}, dim {self.dim}, dim_v {self.dim_v}, {blocks}"
        most = self.most_rows
        if most is not None and blocks.parallel > most:
            return f"{words}: {device.name} multiplies {most} rows of float64 at most"
        shared = self._shared(blocks)
        if shared > device.shared_bytes:
            return (
                f"{words}: about {shared} bytes of shared memory, and {device.name} has"
                f" {device.shared_bytes}"
            )
        registers, room = self._registers(blocks), resources.room(device, self.kind, blocks)
        if registers > room:
            return f"{words}: {registers} registers of a thread for sums and scores, of {room}"
        visits = KERNELS[self.kernel].visits
        sums_apart = device.tensor_memory and resources.asynchronous(device, self.kind, blocks)
        if visits and sums_apart:
            columns = resources.tensor_columns(
                self.kernel, self.dim, self.dim_v, self.float32_mode, blocks
            )
            if columns > resources.TENSOR_COLUMNS:
                return (
                    f"{words}: about {columns} columns of tensor memory, and {device.name} has"
                    f" {resources.TENSOR_COLUMNS}"
                )
        return ""

    def choice(self, blocks: Blocks, words: list[str]) -> Choice:
        """These blocks, with what they take: no more than there is, where they were compiled."""
        device = self.device
        shared = min(self._shared(blocks), device.shared_bytes)
        registers, room = self._registers(blocks), resources.room(device, self.kind, blocks)
        visits = KERNELS[self.kernel].visits
        if visits:
            words.append(
                f"shared memory about {shared} of {device.shared_bytes} bytes, sums and scores"
                f" {registers} of {room} registers of a thread"
            )
        tma = resources.tma(device, self.kernel, self.kind, blocks)
        return Choice(self.kernel, blocks, tuple(words), tma, shared, registers)

    def _shared(self, blocks: Blocks) -> int:
        sizes = self.dim, self.dim_v
        found = resources.shared_bytes(
            self.device, self.kernel, self.dtype, *sizes, self.float32_mode, blocks
        )
        if self.dropout and KERNELS[self.kernel].visits:
            found += blocks.parallel * blocks.traverse  # truths, which change hands
        if self.scored and KERNELS[self.kernel].visits:  # scores do too
            pair = resources.item_of_statistics(self.dtype)
            pair += self.pair_bytes * max(1, blocks.stages - 1)
            found += blocks.parallel * blocks.traverse * pair
        return found

    def _registers(self, blocks: Blocks) -> int:
        return resources.registers(
            self.device, self.kernel, self.dtype, self.dim, self.dim_v, self.float32_mode, blocks
        )
