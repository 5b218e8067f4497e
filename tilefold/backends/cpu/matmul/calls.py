"""Products on the processor: planned once for operands that lie in one way, and run."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu import runtime, threads
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.dispatch import KEPT_BYTES, _local, _Memory, _workspace
from tilefold.backends.cpu.kernel import double_bits
from tilefold.backends.cpu.matmul import few_rows
from tilefold.backends.cpu.matmul.arguments import GEMM, OFFSETS, PACK
from tilefold.backends.cpu.matmul.gemm import PANELS_PER_ITEM, emit
from tilefold.backends.cpu.matmul.plan import (
    GemmPlan,
    Plan,
    alone,
    pack_spec,
    panel_bytes,
    plan,
)
from tilefold.backends.cpu.matmul.spec import FewRowsSpec, GemmSpec, PackSpec
from tilefold.common.first_use import undisturbed
from tilefold.common.single_flight import once
from tilefold.problems.matmul import Axes, Operand, Product

_CLAIM_FLOPS = 5e5
"""A worker takes items of at most so many operations at a time."""


@once(most=512)
def kernel(spec: GemmSpec | PackSpec | FewRowsSpec, device: Device) -> runtime.Loaded:
    """The kernel of a spec, compiled for the device unless the disk cache has it."""
    return undisturbed(lambda: runtime.kernel(source(spec), spec.kernel, device))


def source(spec: GemmSpec | PackSpec | FewRowsSpec) -> str:
    """The LLVM source of a kernel."""
    return few_rows.emit(spec) if isinstance(spec, FewRowsSpec) else emit(spec)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A product prepared for operands of certain strides; only addresses are missing."""

    plan: Plan
    loaded: runtime.Loaded
    packing: Packing | None
    block: NDArray[np.int64]
    alone: bool
    offsets: NDArray[np.int64]

    def run(self, a: int, b: int, out: int, c: int = 0, bias: int = 0, gate: int = 0) -> None:
        """Compute the product of operands at these addresses, 0 where there is none.

        The caller keeps the operands alive meanwhile.
        """
        made = self.plan
        if made.turned:
            a, b = b, a
        workers = 1 if self.alone else threads.number()
        panels = None
        if self.packing is not None:
            panels = _taken("panels", self.packing.size)
            b, gate = self.packing.run((b, gate), panels.pointer, workers)
        workers = min(workers, made.items)
        workspace = _workspace(workers * made.workspace_bytes)
        words = self.block.copy()
        for name, address in (("a", a), ("b", b), ("out", out), ("c", c), ("bias", bias)):
            words[_GEMM[name]] = address
        words[_GEMM["gate"]], words[_GEMM["workspace"]] = gate, workspace.pointer
        parts = None
        if made.chunks > 1:
            counters = 8 * (made.items // made.chunks)
            parts = _taken("parts", made.parts_bytes + counters)
            finished = parts.pointer + made.parts_bytes
            ctypes.memset(finished, 0, counters)
            words[_GEMM["parts"]], words[_GEMM["finished"]] = parts.pointer, finished
        threads.run(self.loaded.address, words.ctypes.data, workers)
        if workspace.size <= KEPT_BYTES:
            _local.workspace = workspace
        if panels is not None and panels.size <= KEPT_BYTES:
            _kept.panels = panels
        if parts is not None and parts.size <= KEPT_BYTES:
            _kept.parts = parts


@dataclass(frozen=True, eq=False)
class Packing:
    """The kernel that packs B, and the gate, before a product: their argument blocks.

    `starts` are where the matrices of each begin.
    """

    loaded: runtime.Loaded
    blocks: tuple[NDArray[np.int64], ...]
    starts: tuple[NDArray[np.int64], ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of all panels."""
        return sum(self.sizes)

    def run(self, arrays: Sequence[int], panels: int, workers: int) -> tuple[int, int]:
        """Pack B and the gate; return where the panels of each are."""
        found = []
        for array, block, size in zip(arrays, self.blocks, self.sizes, strict=False):
            words = block.copy()
            words[_PACK["array"]], words[_PACK["panels"]] = array, panels
            items = int(words[_PACK["items"]])
            threads.run(self.loaded.address, words.ctypes.data, min(workers, items))
            found.append(panels)
            panels += size
        return found[0], found[-1]


class _Kept(threading.local):
    """Memory of panels, and of sums of chunks, that a thread keeps for its next product.

    Fresh pages cost 3 % of it.
    """

    panels = _Memory(0)
    parts = _Memory(0)


_kept = _Kept()


def _taken(name: str, size: int) -> _Memory:
    """Memory for "panels" or "parts", taken out of its place, as scratch is in `dispatch`."""
    if size > KEPT_BYTES:
        return _Memory(size)
    held: _Memory = getattr(_kept, name)
    setattr(_kept, name, _Memory(0))
    return held if held.size >= size else _Memory(size)


_GEMM = {name: number for number, name in enumerate(GEMM)}
_PACK = {name: number for number, name in enumerate(PACK)}


def prepare(
    product: Product, out: Operand, device: Device | None = None, *, packed: bool = False
) -> Prepared:
    """Plan a product whose result lies as `out`, and load its kernels. No axis may be empty."""
    device = device or host()
    made = plan(product, out, device, packed)
    product, out, spec = made.product, made.out, made.spec
    offsets = np.zeros((product.matrices, len(OFFSETS)), np.int64)
    each = {"a": product.a, "b": product.b, "out": out, "c": product.c, "bias": product.bias}
    each["gate"] = product.gate
    for name, operand in each.items():
        if operand is not None:
            offsets[:, OFFSETS.index(name)] = _offsets(operand.axes, product.batch)
    packing = _packing(made, device, offsets) if isinstance(made, GemmPlan) and made.packs else None
    words = _words(made, offsets)
    return Prepared(made, kernel(spec, device), packing, words, alone(product), offsets)


@dataclass(frozen=True, eq=False)
class Panels:
    """A matrix B (k, n) in the order in which products with an A of type `a` read it."""

    a: str
    dtype: str
    shape: tuple[int, int]
    spec: PackSpec
    memory: _Memory

    @property
    def address(self) -> int:
        """The address of the first panel: B's for a product that was prepared as `packed`."""
        return self.memory.pointer


def pack(b: Operand, address: int, a: str, device: Device | None = None) -> Panels:
    """Pack a matrix (k, n) at an address. No axis may be empty."""
    device = device or host()
    spec, (k, n) = pack_spec(a, b.dtype, device), b.axes.lengths[-2:]
    size = panel_bytes(spec, k) * -(-n // spec.width)
    memory = _Memory(size)
    start = np.zeros(1, np.int64)
    words = _pack_words(spec, b, start, size)
    packing = Packing(kernel(spec, device), (words,), (start,), (size,))
    packing.run((address,), memory.pointer, threads.number())
    return Panels(a, b.dtype, (k, n), spec, memory)


def _packing(made: GemmPlan, device: Device, offsets: NDArray[np.int64]) -> Packing:
    """What packs B and the gate; their offsets become those of panels, in bytes."""
    blocks, all_starts, sizes = [], [], []
    for name, operand in (("b", made.product.b), ("gate", made.product.gate)):
        if operand is None:
            continue
        column = offsets[:, OFFSETS.index(name)]
        starts, places = np.unique(column, return_inverse=True)
        matrix_bytes = made.panels * made.panel_bytes
        column[:] = places.reshape(-1) * matrix_bytes
        blocks.append(_pack_words(made.spec.packing, operand, starts, matrix_bytes))
        all_starts.append(starts)
        sizes.append(len(starts) * matrix_bytes)
    loaded = kernel(made.spec.packing, device)
    return Packing(loaded, tuple(blocks), tuple(all_starts), tuple(sizes))


def _words(made: Plan, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The argument block of a product without its addresses."""
    product = made.product
    flops = 2 * product.m * product.n * max(1, product.k) / (made.row_blocks * made.column_blocks)
    claim = min(int(_CLAIM_FLOPS / flops), made.items // (4 * threads.number()))
    values: dict[str, int] = {
        "items": made.items,
        "items_per_claim": max(1, claim),
        "m": product.m,
        "n": product.n,
        "k": product.k,
        "block_m": made.block_m,
        "block_n": made.block_n,
        "block_k": made.block_k,
        "row_blocks": made.row_blocks,
        "column_blocks": made.column_blocks,
        "offsets": offsets.ctypes.data,
        "panel_bytes": made.panel_bytes,
        "alpha": double_bits(product.alpha),
        "beta": double_bits(product.beta),
        "ahead": made.ahead,
        "tiles_m": 0 if made.one_block else made.block_m // made.spec.rows,
        "workspace_bytes": made.workspace_bytes,
        "a_bytes": made.a_bytes,
        "b_bytes": made.b_bytes,
        "sums_bytes": made.sums_bytes,
        "chunks": made.chunks,
        "chunk_k": made.chunk_k,
    }

    for name, operand in (("out", made.out), ("c", product.c), ("bias", product.bias)):
        if operand is not None:
            values[f"{name}_m"], values[f"{name}_n"] = operand.axes.strides[-2:]
    values["a_m"], values["a_k"] = product.a.axes.strides[-2:]
    for name, operand in (("b", product.b), ("gate", product.gate)):
        if operand is not None:
            values[f"{name}_k"], values[f"{name}_n"] = operand.axes.strides[-2:]
    return np.array([values.get(name, 0) for name in GEMM], np.int64)


def _pack_words(
    spec: PackSpec, operand: Operand, starts: NDArray[np.int64], matrix_bytes: int
) -> NDArray[np.int64]:
    """The argument block of the kernel that packs B or the gate, without its addresses."""
    (k, n), (down, across) = operand.axes.lengths[-2:], operand.axes.strides[-2:]
    groups = -(-n // (spec.width * PANELS_PER_ITEM))
    values = {
        "items": len(starts) * groups,
        "offsets": starts.ctypes.data,
        "lane_stride": across,
        "c_stride": down,
        "n": n,
        "k": k,
        "groups": groups,
        "panel_bytes": panel_bytes(spec, k),
        "matrix_bytes": matrix_bytes,
    }
    return np.array([values.get(name, 0) for name in PACK], np.int64)


def _offsets(axes: Axes, batch: Sequence[int]) -> NDArray[np.int64]:
    """Where each matrix of a batch begins, in elements, from the innermost axis on."""
    total = np.zeros((), np.int64)
    for length, own, step in zip(batch, axes.batch, axes.strides[:-2], strict=True):
        steps = np.arange(length, dtype=np.int64) * (step if own > 1 else 0)
        total = total[..., None] + steps
    return np.ascontiguousarray(total.reshape(-1))
