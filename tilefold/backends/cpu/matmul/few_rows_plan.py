"""The plan of a product with few rows of A: whether B is read where it lies, and in which form."""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.backends.cpu.device import Device
from tilefold.backends.cpu.matmul.blocks import TILES, parts, up, whole
from tilefold.backends.cpu.matmul.spec import ITEM_BYTES, FewRowsSpec, lanes_of
from tilefold.common.computed import computed
from tilefold.problems.matmul import Operand, Product

FEW_ROWS, _LEAST_READ = 16, 2**10
"""Products of at most so many rows read B where it lies, if it has more elements than so many for
each row; to pack a smaller one takes no time. (Zen 3: where it lies, 64 x 64 takes 0.6 of the time
for 1 row and 1.1 for 8, 128 x 128 0.9 for 8 and 1.1 for 16.)"""

_WIDE_COLUMNS, _DEEP_COLUMNS, _MOST_CHUNKS = 4096, 96, 16
"""Columns of an item by its form. Long lines are read fastest: of what reading takes, one row and
4096 x 4096 took the share 0.75 by lines of 512, 0.90 by 2048, 1.00 by 4096 (Xeon with AMX); on
Zen 3 0.70, 0.98 and 1.07."""

_SEVERAL_ROWS = {"avx2": 4}
"""Rows of a register tile at most where there are several. (Zen 3, B in the first cache: 12 rows
make 64 % of the multiply-adds that the units can make in tiles of 6 rows, and 84 % in tiles of 4.
16 rows take 0.95 of the time from memory as "wide", and 0.91 as "deep".) Not measured elsewhere."""

_LINES, _LINES_OF_SET = 8, {"avx2": 7}
"""Lines of B that the form "wide" walks at once, and where they share a set of the first cache,
since they are a multiple of 4 KiB apart: 8 of them fill it. (Zen 3, 4096 x 4096 float32 from
memory: one row reads 1.07, 0.76 and 0.54 of what reading takes by 8, 16 and 32 lines. 8 rows take
0.96 of the time by 7 lines, 16 rows the same as by 8. Where lines are 4,000 bytes apart, 8 rows
take 1.03 by 7.)"""

_ROWS_THAT_GAIN = 4
"""Rows from which on AVX2 gains by fewer lines and by requests. (Zen 3: 2 and 3 rows take 1.01 to
1.07 of the time with either.)"""

_SET_BYTES = 2**12
"""Lines so far apart share a set of a first cache of 64 sets."""

_ASK_NEXT, _AHEAD = ("amx", "avx512"), {"avx2": 192}
"""Where the form "wide" asks for B: for the lines that it walks next, or for bytes in its lines.
What is asked for comes into the second cache, and with AVX2 into the first one.
(Zen 3 follows lines by itself, and one row is slower with either. With requests for 192 bytes ahead
4 to 16 rows take 0.93 to 1.00 of the time, with those for the next lines more than without. The
form "deep" gains by requests for the next columns, 0.65 to 0.88 for four rows, but one row has 1.06
of what reading takes with them and 1.12 without. Those into the first cache give 4 to 16 rows 0.87
to 1.00 of the time of those into the second, and 2 rows 1.06.)"""


@dataclass(frozen=True)
class FewRowsPlan:
    """The kernel of a product with few rows of A, and what its workers share: like `GemmPlan`."""

    product: Product
    out: Operand
    spec: FewRowsSpec
    turned: bool
    block_k: int
    chunks: int
    chunk_k: int

    packs = False
    one_block = True
    row_blocks = 1
    panel_bytes = ahead = 0

    @property
    def column_blocks(self) -> int:
        """Blocks of columns of one matrix."""
        return parts(self.product.n, self.spec.columns)

    @computed
    def items(self) -> int:
        """Work items of all matrices."""
        return self.product.matrices * self.column_blocks * self.chunks

    @computed
    def parts_bytes(self) -> int:
        """Memory of the sums of all chunks."""
        return whole(self.items * self.sums_bytes) if self.chunks > 1 else 0

    @property
    def block_m(self) -> int:
        """All rows."""
        return self.spec.rows

    @property
    def block_n(self) -> int:
        """Columns of an item."""
        return self.spec.columns

    @property
    def _vector_bytes(self) -> int:
        return self.spec.lanes * ITEM_BYTES[self.spec.sums]

    @property
    def a_bytes(self) -> int:
        """A worker's scratch for the rows of A as whole vectors, with room behind them."""
        vectors = parts(self.product.k, self.spec.lanes)
        return whole(self.spec.rows * vectors * self._vector_bytes + 64)

    @property
    def b_bytes(self) -> int:
        """A worker's scratch for lines of B; of the form "deep", for a vector of each sum."""
        spec = self.spec
        vectors = spec.lines * spec.vectors if spec.form == "wide" else spec.rows * spec.columns
        return whole(vectors * self._vector_bytes)

    @property
    def sums_bytes(self) -> int:
        """A worker's scratch for sums, and for those of a gate."""
        seconds = 2 if self.spec.gate else 1
        return seconds * self.spec.rows * self.spec.columns * ITEM_BYTES[self.spec.sums]

    @computed
    def workspace_bytes(self) -> int:
        """All scratch of a worker."""
        return whole(self.a_bytes + self.b_bytes + self.sums_bytes)


def form_of(product: Product) -> str | None:
    """The form in which a product reads B where it lies; None where it packs B."""
    if (
        product.m > FEW_ROWS
        or product.sums == "int32"
        or product.n * product.k <= _LEAST_READ * product.m
    ):
        return None
    down, across = product.b.axes.strides[-2:]
    gate = product.gate.axes.strides[-2:] if product.gate else (down, across)
    if across == gate[1] == 1:
        return "wide"
    return "deep" if down == gate[0] == 1 else None


def few_rows_plan(
    product: Product, out: Operand, device: Device, form: str, turned: bool
) -> FewRowsPlan:
    """The plan of a product that reads B in a form of `form_of`."""
    spec = _spec(product, form, device)
    chunks = _chunks(product) if form == "wide" else 1
    sizes = _terms(spec, product.k, device), chunks, parts(product.k, chunks)
    return FewRowsPlan(product, out, spec, turned, *sizes)


def _chunks(product: Product) -> int:
    """Parts of the contraction, whatever the cores: what is added later is 1/16 of what is read.

    A chunk reads 256 KiB at least.
    """
    size = product.k * product.n * ITEM_BYTES[product.b.dtype]
    return max(1, min(_MOST_CHUNKS, product.k // (32 * product.m), size // 2**18))


def _terms(spec: FewRowsSpec, k: int, device: Device) -> int:
    """Terms at a time: all, or those whose x is half of the first cache."""
    if spec.form == "wide":
        return k
    half = (device.l1_bytes or 2**15) // 2
    return max(1, half // (spec.rows * spec.lanes * ITEM_BYTES[spec.sums])) * spec.lanes


def _spec(product: Product, form: str, device: Device) -> FewRowsSpec:
    lanes, wide = lanes_of(device, product.sums), form == "wide"
    tile_rows = TILES[device.isa][0]
    if product.m > tile_rows:
        tile_rows = _SEVERAL_ROWS.get(device.isa, tile_rows)
    tile_rows = parts(product.m, parts(product.m, tile_rows))
    # registers: the sums, a vector of B for each of them, x; "wide" needs one more while x comes
    vectors = min(4, (device.vector_registers - 1 - wide) // (tile_rows + 1))
    most = _WIDE_COLUMNS if wide else _DEEP_COLUMNS
    ahead = _AHEAD.get(device.isa, 0) if product.m >= _ROWS_THAT_GAIN else 0
    block = vectors * lanes if wide else lanes
    columns = up(parts(product.n, parts(product.n, most)), block)
    return FewRowsSpec(
        a=product.a.dtype,
        b=product.b.dtype,
        sums=product.sums,
        out=product.dtype,
        form=form,
        rows=product.m,
        tile_rows=tile_rows,
        vectors=vectors,
        columns=columns,
        width=block if wide else columns,
        asks=device.isa in _ASK_NEXT or ahead > 0 if wide else product.m > 1,
        lanes=lanes,
        native_half=device.converts_float16,
        c=product.c.dtype if product.c and product.beta else None,
        bias=product.bias.dtype if product.bias else None,
        activation=product.activation,
        gate=product.gate is not None,
        lines=_lines(product, device) if wide else _LINES,
        ahead=ahead if wide else 0,
        near=3 if ahead else 2,
    )


def _lines(product: Product, device: Device) -> int:
    """Lines of B that are walked at once."""
    apart = product.b.axes.strides[-2] * ITEM_BYTES[product.b.dtype]
    share = product.m >= _ROWS_THAT_GAIN and apart % _SET_BYTES == 0
    return _LINES_OF_SET.get(device.isa, _LINES) if share else _LINES
