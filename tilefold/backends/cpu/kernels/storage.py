"""Storage of elements: how they lie in memory, and how kernels read and write them.

    type       memory   registers   read                      written
    float64    double   double      as it is                  as it is
    float32    float    float       as it is                  as it is
    float16    half     float       widened, exact            rounded to the nearest even
    bfloat16   i16      float       widened, exact            rounded to the nearest even

One row of `_ROWS` is all that a kernel knows of a type; a new way to keep elements is a new row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tilefold.backends.cpu.kernels import convert, masked
from tilefold.backends.cpu.kernels.ir import Body, Value, vector


@dataclass(frozen=True)
class Storage:
    """Elements of one type in memory and in registers.

    `stored` and `scalar` are LLVM's names of the type in memory and in registers. `pairs`: two
    neighbours in memory are a word that products of pairs of bfloat16 take as it is. `short`: an
    element is the exact sum of two parts in bfloat16, and rounding never makes one infinite.
    """

    dtype: str
    stored: str
    scalar: str
    _widen: Callable[[Body, Value, str], Value] = convert.unchanged
    _narrow: Callable[[Body, Value], Value] = convert.unchanged
    pairs: bool = False
    short: bool = False

    @property
    def computed(self) -> Storage:
        """Storage of the elements in scratch, where none has to be converted."""
        return _ROWS["float64" if self.scalar == "double" else "float32"]

    @property
    def converts(self) -> bool:
        """True where memory and registers hold different types."""
        return self.stored != self.scalar

    def at(self, body: Body, base: Value, index: Value | int, hint: str = "p") -> Value:
        """The address of `base[index]`."""
        return body.offset(base, self.stored, index, hint)

    def load(self, body: Body, pointer: Value, lanes: int = 1, hint: str = "x") -> Value:
        """Read `lanes` neighbours, ready to compute with."""
        return self.widen(body, body.load(pointer, vector(lanes, self.stored), hint), hint)

    def load_first(
        self, body: Body, pointer: Value, lanes: int, exist: int, hint: str = "x"
    ) -> Value:
        """Read as `load` does where only the first `exist` elements exist; the others become 0."""
        bits = self.bits_of_first(body, pointer, lanes, exist, hint)
        return self.widen(body, body.cast("bitcast", bits, vector(lanes, self.stored)), hint)

    def bits_of_first(
        self, body: Body, pointer: Value, lanes: int, exist: int, hint: str = "x"
    ) -> Value:
        """The bits that `load_first` reads, half types as integers, which masked loads know."""
        stored = "i16" if self.converts else self.stored
        picks = ", ".join(f"i1 {'true' if lane < exist else 'false'}" for lane in range(lanes))
        exists = Value(f"<{picks}>", vector(lanes, "i1"))
        return masked.load(body, pointer, vector(lanes, stored), exists, hint)

    def store(self, body: Body, value: Value, pointer: Value) -> None:
        """Write neighbours, rounded to what memory holds."""
        body.store(self.narrow(body, value), pointer)

    def widen(self, body: Body, bits: Value, hint: str = "x") -> Value:
        """Convert loaded elements to those that kernels compute with: exact."""
        return self._widen(body, bits, hint)

    def narrow(self, body: Body, value: Value) -> Value:
        """Convert elements to the type in memory, rounded to the nearest, ties to even."""
        return self._narrow(body, value)


_ROWS = {
    row.dtype: row
    for row in (
        Storage("float64", "double", "double"),
        Storage("float32", "float", "float"),
        Storage(
            "float16",
            "half",
            "float",
            convert.widen_float16,
            convert.narrow_float16,
            short=True,
        ),
        Storage(
            "bfloat16",
            "i16",
            "float",
            convert.widen_bfloat16,
            convert.narrow_bfloat16,
            pairs=True,
        ),
    )
}

_NATIVE_FLOAT16 = Storage(
    "float16", "half", "float", convert.extend_float16, convert.truncate_float16, short=True
)

SCALARS = {dtype: row.scalar for dtype, row in _ROWS.items()}
"""LLVM's name of the type that kernels compute in, by the type that arrays hold."""


def storage(dtype: str, native_half: bool = False) -> Storage:
    """The storage of an array's type; with `native_half` the machine converts float16 itself."""
    return _NATIVE_FLOAT16 if native_half and dtype == "float16" else _ROWS[dtype]


def storage_in(dtype: str, scalar: str) -> Storage:
    """The storage of an array's type in a kernel that computes in another one, such as double."""
    own = _ROWS[dtype]
    if own.scalar == scalar:
        return own
    out, back = ("fptrunc", "fpext") if own.scalar == "double" else ("fpext", "fptrunc")

    def widen(body: Body, bits: Value, hint: str) -> Value:
        return body.cast(out, own.widen(body, bits, hint), vector(bits.lanes, scalar), hint)

    def narrow(body: Body, value: Value) -> Value:
        return own.narrow(body, body.cast(back, value, vector(value.lanes, own.scalar)))

    return replace(own, scalar=scalar, _widen=widen, _narrow=narrow)
