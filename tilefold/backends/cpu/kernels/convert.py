"""How numbers lie in memory and how kernels compute with them: half types widen on the way in.

float16 and bfloat16 are stored in 16 bits and computed with in float32. Widening is exact, and what
goes out is rounded once, to the nearest, ties to even; denormals, infinities and NaN survive both
ways. bfloat16 is the upper half of a float32, so integer shifts serve on every machine. float16
takes the machine's conversion where there is one (F16C, AVX-512, NEON), else arithmetic on the
exponent field. The AVX512-BF16 conversion is not used here: it takes denormals for 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.backends.cpu.kernels.ir import Body, Value, alignment, overload, vector
from tilefold.problems.attention import STATISTICS

_STORED = {"float64": "double", "float32": "float", "float16": "half", "bfloat16": "i16"}

SCALARS = {dtype: _STORED[STATISTICS[dtype]] for dtype in _STORED}
"""LLVM's name of the type that kernels compute in, by the type that arrays hold."""

_SIGN, _MAGNITUDE = 0x80000000, 0x7FFFFFFF
_INFINITY = 0x7F800000


@dataclass(frozen=True)
class Storage:
    """Numbers of one type in memory. `native`: the machine converts float16 itself."""

    dtype: str
    native: bool

    @property
    def scalar(self) -> str:
        """The type of one number in a register."""
        return SCALARS[self.dtype]

    @property
    def stored(self) -> str:
        """The type of one number in memory."""
        return _STORED[self.dtype]

    @property
    def computed(self) -> Storage:
        """How numbers are kept where none has to be converted."""
        return Storage(STATISTICS[self.dtype], self.native)

    @property
    def converts(self) -> bool:
        """Whether memory and registers differ."""
        return self.stored != self.scalar

    def at(self, body: Body, base: Value, index: Value | int, hint: str = "p") -> Value:
        """The address of `base[index]`."""
        return body.offset(base, self.stored, index, hint)

    def load(self, body: Body, pointer: Value, lanes: int = 1, hint: str = "x") -> Value:
        """`lanes` numbers that lie side by side, ready to compute with."""
        return self.widen(body, body.load(pointer, vector(lanes, self.stored), hint), hint)

    def load_first(
        self, body: Body, pointer: Value, lanes: int, exist: int, hint: str = "x"
    ) -> Value:
        """As `load`, where only the first `exist` numbers are there; the rest become 0."""
        bits = self.bits_of_first(body, pointer, lanes, exist, hint)
        return self.widen(body, body.cast("bitcast", bits, vector(lanes, self.stored)), hint)

    def bits_of_first(
        self, body: Body, pointer: Value, lanes: int, exist: int, hint: str = "x"
    ) -> Value:
        """What lies in memory of `load_first`, half types as integers."""
        stored = "i16" if self.converts else self.stored
        picks = ", ".join(f"i1 {'true' if lane < exist else 'false'}" for lane in range(lanes))
        exists = Value(f"<{picks}>", vector(lanes, "i1"))
        align = Value(str(alignment(stored)), "i32")
        type_ = vector(lanes, stored)
        name = f"llvm.masked.load.{overload(type_)}.p0"
        return body.call(name, type_, [pointer, align, exists, body.constant(0, type_)], hint)

    def store(self, body: Body, value: Value, pointer: Value) -> None:
        """Numbers side by side, rounded to what is stored."""
        body.store(self.narrow(body, value), pointer)

    def widen(self, body: Body, bits: Value, hint: str = "x") -> Value:
        """What was loaded, as numbers to compute with: exact."""
        if self.dtype == "bfloat16":
            return _as_float(body, body.binary("shl", _as_i32(body, bits), 16), hint)
        if self.dtype != "float16":
            return bits
        if self.native:
            return body.cast("fpext", bits, vector(bits.lanes, "float"), hint)
        return _widen_float16(body, bits, hint)

    def narrow(self, body: Body, value: Value) -> Value:
        """Numbers as they are stored, rounded to the nearest, ties to even."""
        if self.dtype == "bfloat16":
            return _narrow_bfloat16(body, value)
        if self.dtype != "float16":
            return value
        if self.native:
            return body.cast("fptrunc", value, vector(value.lanes, "half"))
        return _narrow_float16(body, value)


def _as_i32(body: Body, bits: Value) -> Value:
    """16 bits as 32, zeros above."""
    if bits.element == "half":
        bits = body.cast("bitcast", bits, vector(bits.lanes, "i16"))
    return body.cast("zext", bits, vector(bits.lanes, "i32"), "bits")


def _as_float(body: Body, bits: Value, hint: str) -> Value:
    return body.cast("bitcast", bits, vector(bits.lanes, "float"), hint)


def _bits(body: Body, value: Value) -> Value:
    return body.cast("bitcast", value, vector(value.lanes, "i32"), "bits")


def _constant(body: Body, number: int, like: Value) -> Value:
    return body.constant(number, like.type)


def _narrow_bfloat16(body: Body, value: Value) -> Value:
    """Add half a unit of what is cut off, less one where the last bit kept is even; NaN quiet."""
    bits = _bits(body, value)
    last = body.binary("and", body.binary("lshr", bits, 16), 1)
    rounded = body.add(body.add(bits, 0x7FFF), last)
    quiet = body.binary("or", bits, 0x00400000)
    picked = body.select(body.compare("uno", value, value), quiet, rounded)
    return body.cast("trunc", body.binary("lshr", picked, 16), vector(value.lanes, "i16"))


def _widen_float16(body: Body, bits: Value, hint: str) -> Value:
    """The fields moved up, times 2^112 for the other bias, denormals included; 31 becomes 255."""
    wide = _as_i32(body, bits)
    sign = body.binary("shl", body.binary("and", wide, 0x8000), 16)
    fields = body.binary("shl", body.binary("and", wide, 0x7FFF), 13)
    number = _as_float(body, fields, "x")
    scaled = body.binary("fmul", number, body.constant(2.0**112, number.type))
    special = body.compare("uge", fields, _constant(body, 0x7C00 << 13, fields))
    magnitude = body.select(
        special, body.binary("or", fields, _INFINITY), _bits(body, scaled), "bits"
    )
    return _as_float(body, body.binary("or", magnitude, sign), hint)


def _narrow_float16(body: Body, value: Value) -> Value:
    """Normal numbers by integer rounding; below 2^-14 the sum with 1/2 rounds; 65520 overflows."""
    bits = _bits(body, value)
    magnitude = body.binary("and", bits, _MAGNITUDE)
    sign = body.binary("lshr", body.binary("and", bits, _SIGN), 16)
    last = body.binary("and", body.binary("lshr", magnitude, 13), 1)
    moved = body.add(body.add(magnitude, 0xFFF - (112 << 23)), last)
    normal = body.binary("lshr", moved, 13)
    absolute = _as_float(body, magnitude, "x")
    half = body.constant(0.5, absolute.type)
    small = body.sub(_bits(body, body.binary("fadd", absolute, half)), 0x3F000000)
    denormal = body.compare("ult", magnitude, _constant(body, (127 - 14) << 23, bits))
    result = body.select(denormal, small, normal)
    overflow = body.compare("uge", magnitude, _constant(body, 0x477FF000, bits))
    result = body.select(overflow, _constant(body, 0x7C00, bits), result)
    nan = body.compare("ugt", magnitude, _constant(body, _INFINITY, bits))
    payload = body.binary("or", body.binary("lshr", magnitude, 13), 0x7E00)
    result = body.select(nan, body.binary("and", payload, 0x7FFF), result)
    narrow = body.cast("trunc", body.binary("or", result, sign), vector(value.lanes, "i16"))
    return body.cast("bitcast", narrow, vector(value.lanes, "half"))
