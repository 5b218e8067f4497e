"""The kernels of products on processors as values: all that decides their source, and no sizes."""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.backends.cpu.device import Device

ITEM_BYTES = {"float64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int8": 1} | {
    "uint8": 1
}


@dataclass(frozen=True)
class Unit:
    """What multiplies, and how many neighbours along the contraction one instruction takes.

    "fma" multiplies single elements, "dot" pairs of bfloat16 (AVX512-BF16).
    """

    name: str
    depth: int

    @property
    def item(self) -> str | None:
        """The type of packed elements; None is that of the sums."""
        return None if self.depth == 1 else "bfloat16"


FMA, DOT = Unit("fma", 1), Unit("dot", 2)


@dataclass(frozen=True)
class PackSpec:
    """A kernel that packs B: panels of `width` columns, in which an input follows the other."""

    dtype: str
    sums: str
    unit: Unit
    width: int
    lanes: int
    native_half: bool
    kernel: str = "pack_b"


@dataclass(frozen=True)
class GemmSpec:
    """A kernel of products.

    A register tile has `rows` rows by `vectors` vectors of `lanes` sums. Without `packed` each item
    packs its part of B. `direct`: whole tiles are summed in the result itself. `gate`: there is a
    second B, whose sums multiply the activation.
    """

    a: str
    b: str
    sums: str
    out: str
    unit: Unit
    rows: int
    vectors: int
    lanes: int
    native_half: bool
    packed: bool
    direct: bool
    c: str | None = None
    bias: str | None = None
    activation: str | None = None
    gate: bool = False
    kernel: str = "gemm"

    @property
    def width(self) -> int:
        """Columns of a panel of B."""
        return self.vectors * self.lanes

    @property
    def packing(self) -> PackSpec:
        """The kernel that packs B before this one runs."""
        return PackSpec(self.b, self.sums, self.unit, self.width, self.lanes, self.native_half)


@dataclass(frozen=True)
class QuantizedSpec:
    """A kernel of products with a quantised matrix, whose panels have 32 columns.

    It makes `rows` rows by `vectors` vectors of `lanes` sums at a time. `scales` is the type of
    scales and zeros, or None. `permutes`: tables are registers (AVX-512). `whole`: each group has
    whole steps of inputs.
    """

    scheme: str
    rows: int
    vectors: int
    lanes: int
    scales: str | None
    out: str
    native_half: bool
    permutes: bool
    whole: bool
    bias: str | None = None
    activation: str | None = None
    c: None = None
    gate: bool = False
    sums: str = "float32"
    kernel: str = "qgemm"

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return 32

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return {"int4": 4, "int4_symmetric": 4, "palette6": 6}.get(self.scheme, 8)

    @property
    def item_bytes(self) -> int:
        """Bytes from column to column: of a word, or of a code."""
        return 1 if self.bits == 8 else 4


def lanes_of(device: Device, sums: str) -> int:
    """Sums in one vector."""
    return device.vector_bytes // ITEM_BYTES[sums]
