"""The kernels of products on processors as values: all that decides their source, and no sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

from tilefold.backends.cpu.device import Device

ITEM_BYTES = {"float64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int8": 1} | {
    "uint8": 1
}


@dataclass(frozen=True)
class Unit:
    """What multiplies: the neighbours along the contraction that one step takes, and their bits.

    "fma"   one element in the type of the sums
    "dot"   a word of two numbers of bfloat16 (AVX512-BF16)
    "madd"  a word of two integers of 16 bits (all x86)
    "vnni"  a word of four integers of 8 bits, of one side without a sign (AVX512-VNNI)
    "amx"   16 words of two numbers of bfloat16, a row of a tile
    "amx8"  16 words of four integers of 8 bits
    """

    name: str
    depth: int
    bits: int = 0

    @property
    def tiles(self) -> bool:
        """True where tile registers multiply."""
        return self.name.startswith("amx")

    @property
    def of_bfloat16(self) -> bool:
        """True where numbers of bfloat16 are multiplied."""
        return self.name in ("dot", "amx")

    @property
    def per_word(self) -> int:
        """Elements of a word."""
        return 32 // self.bits

    @property
    def words(self) -> int:
        """Words of one step, of one lane."""
        return self.depth // self.per_word

    def step_bytes(self, sums: str) -> int:
        """Bytes of one step of one lane."""
        return 4 * self.words if self.bits else ITEM_BYTES[sums]

    def head_bytes(self, width: int) -> int:
        """Bytes before a panel of B: what the sums of a panel without signs have too much."""
        return 4 * width if self.name == "vnni" else 0


FMA, DOT, MADD, VNNI = Unit("fma", 1), Unit("dot", 2, 16), Unit("madd", 2, 16), Unit("vnni", 4, 8)
AMX, AMX8 = Unit("amx", 32, 16), Unit("amx8", 64, 8)


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
    second B, whose sums multiply the activation. `split`: items have chunks of the contraction.
    `a_in_place`: A is read where it lies, and its terms are neighbours. `clipped`: tiles
    write the rows and columns of the result that exist; without it tiles at its edges are
    `finish`ed.
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
    split: bool = False
    a_in_place: bool = field(default=False, repr=False)
    clipped: bool = field(default=False, repr=False)
    kernel: str = "gemm"

    @property
    def shortens(self) -> bool:
        """True if the last tiles of an item have a row less, so that few of their rows are idle."""
        return self.a_in_place and self.clipped and self.rows > 1

    @property
    def more(self) -> tuple[str, ...]:
        """What a tile is given beside what all tiles are given."""
        rows = ("rows",) if self.a_in_place or self.clipped else ()
        strides = ("left_stride",) if self.a_in_place else ()
        return rows + strides + (("columns",) if self.clipped else ())

    @property
    def flips(self) -> bool:
        """True if integers of A become those of the other type: see `panels`."""
        return self.unit.name == "vnni" and self.a == self.b

    @property
    def width(self) -> int:
        """Columns of a panel of B."""
        return self.vectors * self.lanes

    @property
    def step_bytes(self) -> int:
        """Bytes of one step of the contraction, of one row or column."""
        return self.unit.step_bytes(self.sums)

    @property
    def finished(self) -> str:
        """The type in which sums become results."""
        return self.sums if self.sums != "int32" or self.out == "int32" else "float32"

    @property
    def packing(self) -> PackSpec:
        """The kernel that packs B before this one runs."""
        return PackSpec(self.b, self.sums, self.unit, self.width, self.lanes, self.native_half)


@dataclass(frozen=True)
class RoundingSpec:
    """A kernel that rounds rows of float32 to 8 bits, and makes tiles of `rows` rows of them.

    A word of 32 bits has `per_word` of these numbers. `split`: no two neighbours of four are large.
    """

    rows: int
    lanes: int
    per_word: int
    split: bool
    kernel: str = "round_rows"


@dataclass(frozen=True)
class QuantizedSpec:
    """A kernel of products with a quantised matrix, whose panels have 32 columns.

    It makes `rows` rows by `vectors` vectors of `lanes` sums at a time. `scales` is the type of
    scales and zeros, or None. `permutes`: tables are registers (AVX-512). `whole`: each group has
    whole steps of inputs. `shared`: many rows share a widened panel. `integers`: x is rounded to 8
    bits. What multiplies them: `vnni`, words of four numbers (AVX512-VNNI); `fours`, these where
    rows are split (AVX2); `pairs`, words of two numbers of 16 bits (other x86); or none of them.
    `digits`: a row is split into digits of 8 bits, and sums of integers are exact (AVX2).
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
    shared: bool
    integers: bool = False
    vnni: bool = False
    pairs: bool = False
    fours: bool = False
    bias: str | None = None
    activation: str | None = None
    c: None = None
    gate: bool = False
    sums: str = "float32"
    digits: bool = field(default=False, repr=False)
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
    def finished(self) -> str:
        """The type in which sums become results."""
        return self.sums

    @property
    def per_word(self) -> int:
        """Rounded numbers of a word of 32 bits."""
        return 2 if self.pairs else 4

    @property
    def item_bytes(self) -> int:
        """Bytes from column to column: of a word, or of a code."""
        return 1 if self.bits == 8 else 4


@dataclass(frozen=True)
class FewRowsSpec:
    """A kernel of products with few rows of A, of which B is read where it lies.

    `form` is "wide" where columns of B are neighbours, and "deep" where inputs are. A register tile
    has at most `tile_rows` rows by `vectors` vectors of columns, or by `vectors` columns. An item
    has `columns`, whose sums lie in blocks of `width` columns, row by row. `asks`: it asks for B
    before it reads it, as `near` as `prefetch` says. "wide" walks `lines` of B at once, and asks
    for those that it walks next, or so many bytes `ahead` in the same ones.
    """

    a: str
    b: str
    sums: str
    out: str
    form: str
    rows: int
    tile_rows: int
    vectors: int
    columns: int
    width: int
    asks: bool
    lanes: int
    native_half: bool
    c: str | None = None
    bias: str | None = None
    activation: str | None = None
    gate: bool = False
    lines: int = field(default=8, repr=False)
    ahead: int = field(default=0, repr=False)
    near: int = field(default=2, repr=False)
    kernel: str = "few_rows"

    @property
    def finished(self) -> str:
        """The type in which sums become results."""
        return self.sums


def lanes_of(device: Device, sums: str) -> int:
    """Sums in one vector."""
    return device.vector_bytes // ITEM_BYTES[sums]
