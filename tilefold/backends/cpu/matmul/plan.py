"""The plan of a product on a processor: its kernel, its blocks, and what its workers share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.matmul.blocks import (
    CLIPPED,
    TILES,
    TUNED,
    GemmBlocks,
    a_in_place,
    parts,
    split,
    unit_of,
    up,
    usual,
    whole,
)
from tilefold.backends.cpu.matmul.few_rows_plan import (
    FEW_ROWS,
    FewRowsPlan,
    few_rows_plan,
    form_of,
)
from tilefold.backends.cpu.matmul.spec import (
    ITEM_BYTES,
    GemmSpec,
    PackSpec,
    Unit,
    lanes_of,
)
from tilefold.common.computed import computed
from tilefold.common.first_use import imported
from tilefold.common.tuned_store import is_kept
from tilefold.problems.matmul import Operand, Product, sums

ALONE_FLOPS = 1e6
"""Products with fewer operations run on one thread, as in `dispatch`. Each matrix is an item, which
packs its own B. (Zen 3: 33 x 33 x 33 takes 0.72 of the time by four items, 40 x 24 x 56 0.75.)"""


@dataclass(frozen=True)
class GemmPlan:
    """The kernel of a product, and its blocks in rows, columns and terms.

    `packs`: B is packed by a kernel that runs before. `turned`: the transposed product is computed.
    """

    product: Product
    out: Operand
    spec: GemmSpec
    block_m: int
    block_n: int
    block_k: int
    packs: bool
    turned: bool
    chunks: int = 1
    chunk_k: int = 0

    @property
    def row_blocks(self) -> int:
        """Blocks of rows of one matrix."""
        return -(-self.product.m // self.block_m)

    @property
    def column_blocks(self) -> int:
        """Blocks of columns of one matrix."""
        return -(-self.product.n // self.block_n)

    @computed
    def items(self) -> int:
        """Work items of all matrices."""
        return self.product.matrices * self.row_blocks * self.column_blocks * self.chunks

    @computed
    def parts_bytes(self) -> int:
        """Memory of the sums of all chunks."""
        seconds = 2 if self.spec.gate else 1
        return self.items * seconds * self.sums_bytes if self.chunks > 1 else 0

    @property
    def panels(self) -> int:
        """Panels of one B."""
        return -(-self.product.n // self.spec.width)

    @property
    def panel_bytes(self) -> int:
        """Bytes of a panel of B with all terms."""
        return self._size(self.product.k)

    def _size(self, k: int) -> int:
        return panel_bytes(self.spec.packing, k)

    @property
    def one_block(self) -> bool:
        """True if the contraction is one block."""
        return self.chunks == 1 and self.product.k <= self.block_k

    @property
    def ahead(self) -> int:
        """Bytes of the next panel of B that a step of a tile asks for: all tiles ask for all."""
        line = self.spec.width * self.spec.step_bytes
        return max(8, up(parts(line, self.block_m // self.spec.rows), 8))

    @property
    def a_bytes(self) -> int:
        """A worker's scratch for panels of A, with room behind the last one."""
        if self.spec.a_in_place:
            return 0
        steps = parts(self.block_k, self.spec.unit.depth)
        return whole(self.block_m * steps * self.spec.step_bytes + 64)

    @property
    def b_bytes(self) -> int:
        """A worker's scratch for panels of B."""
        if self.spec.packed:
            return 0
        return whole(self.block_n // self.spec.width * self._size(self.block_k))

    @property
    def sums_bytes(self) -> int:
        """A worker's scratch for sums."""
        size = self.spec.rows * self.spec.width
        if not self.one_block:
            size = self.block_m * self.block_n
        return whole(size * ITEM_BYTES[self.spec.sums])

    @computed
    def workspace_bytes(self) -> int:
        """All scratch of a worker."""
        seconds = 2 if self.spec.gate else 1
        return self.a_bytes + seconds * (self.b_bytes + self.sums_bytes)


def panel_bytes(spec: PackSpec, k: int) -> int:
    """Bytes of a panel of B with k terms."""
    unit, width = spec.unit, spec.width
    return parts(k, unit.depth) * width * unit.step_bytes(spec.sums) + unit.head_bytes(width)


Plan = GemmPlan | FewRowsPlan


def plan(
    product: Product,
    out: Operand,
    device: Device,
    packed: bool = False,
    blocks: GemmBlocks | None = None,
) -> Plan:
    """The plan of a product whose result lies as `out`. `packed`: B comes in panels.

    `blocks` take the place of tuned and of usual ones, where B is packed in the call.
    Raises NotImplementedError for what no kernel computes.
    """
    if product.dtype == "int32" and (product.activation or product.gate):
        raise NotImplementedError("a result of int32 has no activation and no gate")
    turned = not packed and product.gate is None and _is_turned(product, out)
    if turned:
        product, out = _transposed(product), out.turned()
    form = None if packed else form_of(product)
    if form:
        return few_rows_plan(product, out, device, form, turned)
    return _plan(product, out, device, packed, turned, blocks)


def _plan(
    product: Product,
    out: Operand,
    device: Device,
    packed: bool,
    turned: bool,
    blocks: GemmBlocks | None,
) -> GemmPlan:
    """The plan of a product that multiplies panels."""
    unit = unit_of(product.a.dtype, product.b.dtype, device)
    if not (blocks or packed):
        blocks = _tuned_blocks(product, unit, device)
    blocks = blocks or usual(product, unit, device)
    rows, vectors, block_k = blocks.rows, blocks.vectors, blocks.block_k
    lanes = lanes_of(device, product.sums)
    width = vectors * lanes
    chunks, chunk_k = split(product, unit)
    block_m, block_n = blocks.block_m, blocks.block_n
    if alone(product):
        block_m, block_n = up(product.m, rows), up(product.n, width)
    packs = not packed and product.m > block_m
    plain = product.alpha == 1 and not (product.beta or product.bias or product.gate)
    direct = (
        plain
        and chunks == 1
        and product.activation is None
        and product.dtype == product.sums
        and (out.axes.strides[-1] == 1 or product.n == 1)
    )
    spec = GemmSpec(
        a=product.a.dtype,
        b=product.b.dtype,
        sums=product.sums,
        out=product.dtype,
        unit=unit,
        rows=rows,
        vectors=vectors,
        lanes=lanes,
        native_half=device.converts_float16,
        packed=packed or packs,
        direct=direct,
        c=product.c.dtype if product.c and product.beta else None,
        bias=product.bias.dtype if product.bias else None,
        activation=product.activation,
        gate=product.gate is not None,
        split=chunks > 1,
        a_in_place=a_in_place(product, unit, device, block_n // width),
        clipped=direct and device.isa in CLIPPED,
    )
    sizes = block_m, block_n, block_k
    return GemmPlan(product, out, spec, *sizes, packs, turned, chunks, chunk_k)


def _tuned_blocks(product: Product, unit: Unit, device: Device) -> GemmBlocks | None:
    """The blocks that were measured for a product on this machine, if any were."""
    if not is_kept(TUNED, "tilefold.backends.cpu.matmul.tuned"):
        return None
    found: GemmBlocks | None = _tuned().blocks(product, unit, device)
    return found


@imported
def _tuned() -> ModuleType:
    from tilefold.backends.cpu.matmul import tuned

    return tuned


def alone(product: Product) -> bool:
    """True if one thread makes a product."""
    return 2 * product.matrices * product.m * product.n * product.k < ALONE_FLOPS


def pack_spec(a: str, b: str, device: Device) -> PackSpec:
    """The kernel that packs a B of one type for products with an A of another one."""
    kind = sums(a, b)
    lanes = lanes_of(device, kind)
    width = TILES[device.isa][1] * lanes
    return PackSpec(b, kind, unit_of(a, b, device), width, lanes, device.converts_float16)


def _is_turned(product: Product, out: Operand) -> bool:
    """True if neighbours of the result lie along its rows' axis, so columns become rows."""
    down, across = out.axes.strides[-2:]
    if product.n <= FEW_ROWS < product.m:
        return form_of(_transposed(product)) is not None
    return down == 1 and across != 1 and product.m > 1


def _transposed(product: Product) -> Product:
    """B^T A^T: the same sums, of which rows and columns change places."""
    other = {None: None, "row": "column", "column": "row"}
    return replace(
        product,
        a=product.b.turned(),
        b=product.a.turned(),
        bias=product.bias.turned() if product.bias else None,
        bias_axis=other[product.bias_axis],
        c=product.c.turned() if product.c else None,
    )
