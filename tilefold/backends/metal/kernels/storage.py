"""Storage of elements: how they lie in memory, and how kernels read and write them.

    type       memory   multiplied as   read                 written
    float32    float    float           as it is             as it is
    float16    half     half            converted            converted
    bfloat16   bfloat   bfloat          converted            converted
    bfloat16   ushort   float           by `widen`           by `narrow`     without `bfloat`

One row of `_ROWS` is all that a kernel knows of a type; a new way to keep elements is a new row.
"""

from __future__ import annotations

from dataclasses import dataclass

_BFLOAT_CONVERSIONS = """
// bfloat16 is the upper half of a float. GPUs before Apple9 emulate it, slower than this.
static inline float widen(const ushort bits) {
    return as_type<float>(uint(bits) << 16);
}

// To the nearest, ties to even; a NaN stays one.
static inline ushort narrow(const float x) {
    const uint bits = as_type<uint>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return ushort((bits >> 16) | 0x40u);
    }
    return ushort((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
""".strip()

BYTES = {"float": 4, "half": 2, "bfloat": 2, "ushort": 2}
"""Bytes of an element, by Metal's name of its type."""


@dataclass(frozen=True)
class Storage:
    """Elements of one type: in memory, and in the products of a kernel.

    `memory` and `compute` are Metal's names of the type in memory and of the one that fragments
    have. `widen` and `narrow` name the functions that convert to float and back, which the source
    `conversions` defines; without them the language converts. `ds` is the type in which dS is
    multiplied: dS may pass what half holds, bfloat has the range of float.
    """

    memory: str
    compute: str
    ds: str
    widen: str = ""
    narrow: str = ""
    conversions: str = ""

    @property
    def converts(self) -> bool:
        """True where memory and products have different types."""
        return self.memory != self.compute

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element in the type that is multiplied."""
        return BYTES[self.compute]

    def read(self, value: str, to: str = "") -> str:
        """The expression of an element of memory as `to`, or as the type that is multiplied."""
        to = to or self.compute
        found = self.memory
        if self.widen:
            value, found = f"{self.widen}({value})", "float"
        return value if found == to else f"{to}({value})"

    def write(self, value: str) -> str:
        """The expression of a float as it is written to memory."""
        if self.narrow:
            return f"{self.narrow}({value})"
        return value if self.memory == "float" else f"{self.memory}({value})"


_ROWS = {
    "float32": Storage("float", "float", "float"),
    "float16": Storage("half", "half", "float"),
    "bfloat16": Storage("bfloat", "bfloat", "bfloat"),
}

_EMULATED_BFLOAT16 = Storage(
    "ushort", "float", "float", "widen", "narrow", conversions=_BFLOAT_CONVERSIONS
)


def storage(dtype: str, bfloat: bool) -> Storage:
    """The storage of an array's type; without `bfloat` the GPU does not multiply bfloat16 itself.

    >>> storage("bfloat16", bfloat=False).read("q[0]")
    'widen(q[0])'
    """
    return _EMULATED_BFLOAT16 if dtype == "bfloat16" and not bfloat else _ROWS[dtype]
