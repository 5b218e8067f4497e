"""Products on the processor: planned once for operands that lie in one way, and run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu import claims, runtime, threads
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.dispatch import _Memory
from tilefold.backends.cpu.kernel import double_bits, noted
from tilefold.backends.cpu.matmul import few_rows
from tilefold.backends.cpu.matmul.arguments import GEMM, OFFSETS, PACK
from tilefold.backends.cpu.matmul.blocks import GemmBlocks
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
from tilefold.backends.cpu.native import Memory, Step, words
from tilefold.backends.cpu.records import Recorded
from tilefold.common.first_use import undisturbed
from tilefold.common.single_flight import once
from tilefold.problems.matmul import Axes, Operand, Product


@once(most=512)
def kernel(spec: GemmSpec | PackSpec | FewRowsSpec, device: Device) -> runtime.Loaded:
    """The kernel of a spec, compiled for the device unless the disk cache has it."""
    return undisturbed(lambda: noted(spec, device, lambda: (source(spec), 0)))[0]


def source(spec: GemmSpec | PackSpec | FewRowsSpec) -> str:
    """The LLVM source of a kernel."""
    return few_rows.emit(spec) if isinstance(spec, FewRowsSpec) else emit(spec)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A product prepared for operands of certain strides; only addresses are missing.

    `kept`: arrays that the steps read.
    """

    plan: Plan
    recorded: Recorded
    kept: tuple[NDArray[np.int64], ...]

    def run(self, a: int, b: int, out: int, c: int = 0, bias: int = 0, gate: int = 0) -> None:
        """Compute the product of operands at these addresses, 0 where there is none.

        The caller keeps the operands alive meanwhile.
        """
        self.recorded.run(a, b, c, bias, gate, out)

    @property
    def nbytes(self) -> int:
        """Bytes that grow with the batch."""
        return sum(array.nbytes for array in self.kept)


OPERANDS = ("a", "b", "c", "bias", "gate", "out")
"""The order of the addresses of a record."""


def prepare(
    product: Product,
    out: Operand,
    device: Device | None = None,
    *,
    packed: bool = False,
    blocks: GemmBlocks | None = None,
) -> Prepared:
    """Plan a product as `plan` does, and load its kernels. No axis may be empty."""
    device = device or host()
    made = plan(product, out, device, packed, blocks)
    product, out, spec = made.product, made.out, made.spec
    offsets = np.zeros((product.matrices, len(OFFSETS)), np.int64)
    each = {"a": product.a, "b": product.b, "out": out, "c": product.c, "bias": product.bias}
    each["gate"] = product.gate
    for name, operand in each.items():
        if operand is not None:
            offsets[:, OFFSETS.index(name)] = _offsets(operand.axes, product.batch)
    counters = made.items // made.chunks if made.chunks > 1 else 0
    memory = Memory(8 * (len(GEMM) + counters), 8 * len(PACK))
    where = dict(zip(OPERANDS, range(len(OPERANDS)), strict=True))
    if made.turned:
        where["a"], where["b"] = where["b"], where["a"]
    places = {name: (operand, 0) for name, operand in where.items()}
    steps, kept = [], [offsets]
    if isinstance(made, GemmPlan) and made.packs:
        for name, operand in (("b", product.b), ("gate", product.gate)):
            if operand is not None:
                step, panels, starts = _packing(
                    made, name, operand, places[name], offsets, device, memory
                )
                steps.append(step)
                kept.append(starts)
                places[name] = (-1, panels)
    if made.chunks > 1:
        places["parts"] = (-1, memory.reserve(made.parts_bytes))
        places["finished"] = (-1, 8 * len(GEMM))
    places["workspace"] = (-1, memory.bytes)
    template = np.concatenate((_words(made, offsets), np.zeros(counters, np.int64)))
    entries = [(GEMM.index(name), *place) for name, place in places.items()]
    steps.append(Step(kernel(spec, device), made.items, template, words(entries)))
    by_one = alone(product)
    recorded = Recorded.of(steps, memory.bytes, made.workspace_bytes, alone=by_one)
    return Prepared(made, recorded, (*kept,))


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
    template = _pack_words(spec, b, start, size)
    places = words([(PACK.index("array"), 0, 0), (PACK.index("panels"), 1, 0)])
    step = Step(kernel(spec, device), int(template[PACK.index("items")]), template, places)
    Recorded.of([step], 8 * len(PACK), 0, alone=False).run(address, memory.pointer)
    return Panels(a, b.dtype, (k, n), spec, memory)


def _packing(
    made: GemmPlan,
    name: str,
    operand: Operand,
    place: tuple[int, int],
    offsets: NDArray[np.int64],
    device: Device,
    memory: Memory,
) -> tuple[Step, int, NDArray[np.int64]]:
    """What packs B or the gate, where its panels lie, and where its matrices begin.

    The offsets of the product become those of panels, in bytes.
    """
    column = offsets[:, OFFSETS.index(name)]
    starts, numbers = np.unique(column, return_inverse=True)
    matrix_bytes = made.panels * made.panel_bytes
    column[:] = numbers.reshape(-1) * matrix_bytes
    panels = memory.reserve(len(starts) * matrix_bytes)
    template = _pack_words(made.spec.packing, operand, starts, matrix_bytes)
    places = words([(PACK.index("array"), *place), (PACK.index("panels"), -1, panels)])
    loaded, items = kernel(made.spec.packing, device), int(template[PACK.index("items")])
    return Step(loaded, items, template, places), panels, starts


def _words(made: Plan, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The argument block of a product without its addresses."""
    product = made.product
    flops = 2 * product.m * product.n * max(1, product.k) / (made.row_blocks * made.column_blocks)
    values: dict[str, int] = {
        "items": made.items,
        "items_per_claim": claims.items_per_claim(
            claims.FLOPS / flops, made.items, threads.number()
        ),
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
