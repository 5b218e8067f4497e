"""The 8x8 fragment, `simdgroup_matrix`: what simdgroups of Apple GPUs multiply, as typed text.

A fragment is spread over the 32 lanes of a simdgroup, two neighbours of one row in each. Apple's
Metal Shading Language Specification (6.7) defines the functions but not that layout; it has been
the same on every GPU from M1 to M4, and MLX, llama.cpp and PyTorch rely on it as we do.

    >>> tile = Fragment("float16")
    >>> print(tile.declare("a"))
    simdgroup_matrix<half, 8, 8> a;
    >>> print(tile.load("a", "source", 64, origin=(8, 0), transpose=True))
    simdgroup_load(a, source, 64, ulong2(8, 0), true);
    >>> print(multiply_accumulate("d", "a", "b"))
    simdgroup_multiply_accumulate(d, a, b, d);
"""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.backends.metal.spec import SIDE
from tilefold.common.check import choice

TYPES = {"float32": "float", "float16": "half", "bfloat16": "bfloat"}
"""Elements of a fragment. bfloat needs Metal 3.1 (macOS 14)."""

PLACE = (
    "const ushort fragment_row = (lane / 2) % 4 + 4 * (lane / 16);",
    "const ushort fragment_column = 2 * (lane % 2) + 4 * ((lane / 8) % 2);",
)
"""A lane's place: element e of a lane stands in this row, and column `fragment_column + e`."""

ROW_LANES = (1, 8)
"""A row lies in the lanes that differ in these bits: reduce over it with `simd_shuffle_xor`."""

COLUMN_LANES = (2, 4, 16)
"""A column lies in the lanes that differ in these bits."""


@dataclass(frozen=True)
class Fragment:
    """Fragments of one type. `dtype` is float32, float16 or bfloat16, else ValueError.

    Functions give statements; names, sources and strides are text. Sources are in device or
    threadgroup memory, rows `stride` elements apart; an origin is (column, row), in elements.
    """

    dtype: str

    def __post_init__(self) -> None:
        choice("dtype", self.dtype, tuple(TYPES))

    @property
    def element(self) -> str:
        """The type of an element."""
        return TYPES[self.dtype]

    @property
    def type(self) -> str:
        """The type of a fragment."""
        return f"simdgroup_matrix<{self.element}, {SIDE}, {SIDE}>"

    def declare(self, name: str, count: int | None = None) -> str:
        """A fragment, or an array of `count`; its elements are not set."""
        return f"{self.type} {name};" if count is None else f"{self.type} {name}[{count}];"

    def fill(self, name: str, value: str = "0") -> str:
        """Set every element."""
        filled = f"make_filled_simdgroup_matrix<{self.element}, {SIDE}, {SIDE}>"
        return f"{name} = {filled}({self.element}({value}));"

    def load(
        self,
        name: str,
        source: str,
        stride: int | str,
        *,
        origin: tuple[int | str, int | str] = (0, 0),
        transpose: bool = False,
    ) -> str:
        """Read 8x8 elements from memory."""
        return f"simdgroup_load({_move(name, source, stride, origin, transpose)});"

    def store(
        self,
        name: str,
        target: str,
        stride: int | str,
        *,
        origin: tuple[int | str, int | str] = (0, 0),
        transpose: bool = False,
    ) -> str:
        """Write 8x8 elements to memory."""
        return f"simdgroup_store({_move(name, target, stride, origin, transpose)});"


def _move(
    name: str,
    place: str,
    stride: int | str,
    origin: tuple[int | str, int | str],
    transpose: bool,
) -> str:
    words = [name, place, str(stride)]
    if origin != (0, 0) or transpose:
        words.append(f"ulong2({origin[0]}, {origin[1]})")
    if transpose:
        words.append("true")
    return ", ".join(words)


def at(name: str, e: int | str) -> str:
    """Element e, 0 or 1, of the fragment that this lane holds: to read or to set.

    e is a number, or the variable of an unrolled loop: Apple's header keeps the elements in a
    vector of 64, in which an index that is known at run time alone selects among 64 registers.
    """
    return f"{name}.thread_elements()[{e}]"


def multiply(d: str, a: str, b: str) -> str:
    """Set d to a b."""
    return f"simdgroup_multiply({d}, {a}, {b});"


def multiply_accumulate(d: str, a: str, b: str, c: str | None = None) -> str:
    """Set d to a b + c, c being d where not given. a and b are of one type, d and c of it or float.

    float32 sums of half products are what llama.cpp ships on every Apple GPU.
    """
    return f"simdgroup_multiply_accumulate({d}, {a}, {b}, {c or d});"
