"""Conversions between the half types in memory and float32 in registers.

Widening is exact, and narrowing rounds once, to the nearest, ties to even; denormals, infinities
and NaN survive both ways. bfloat16 is the upper half of a float32, so integer shifts serve on every
machine. float16 takes the machine's conversion where there is one (F16C, AVX-512, NEON), else
arithmetic on the exponent field. The AVX512-BF16 conversion is not used here: it takes denormals
for 0.
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels.ir import Body, Value, vector

_SIGN, _MAGNITUDE = 0x80000000, 0x7FFFFFFF
_INFINITY = 0x7F800000


def unchanged(body: Body, value: Value, hint: str = "") -> Value:
    """The conversion of a type that memory and registers hold alike."""
    return value


def widen_bfloat16(body: Body, bits: Value, hint: str) -> Value:
    """The 16 bits become the upper half of a float."""
    return _as_float(body, body.binary("shl", _as_i32(body, bits), 16), hint)


def extend_float16(body: Body, bits: Value, hint: str) -> Value:
    """The machine's own conversion of float16 to float."""
    return body.cast("fpext", bits, vector(bits.lanes, "float"), hint)


def truncate_float16(body: Body, value: Value) -> Value:
    """The machine's own conversion of float to float16."""
    return body.cast("fptrunc", value, vector(value.lanes, "half"))


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


def narrow_bfloat16(body: Body, value: Value) -> Value:
    """Add half a unit of what is cut off, less one where the last bit kept is even; NaN quiet."""
    bits = _bits(body, value)
    last = body.binary("and", body.binary("lshr", bits, 16), 1)
    rounded = body.add(body.add(bits, 0x7FFF), last)
    quiet = body.binary("or", bits, 0x00400000)
    picked = body.select(body.compare("uno", value, value), quiet, rounded)
    return body.cast("trunc", body.binary("lshr", picked, 16), vector(value.lanes, "i16"))


def widen_float16(body: Body, bits: Value, hint: str) -> Value:
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


def narrow_float16(body: Body, value: Value) -> Value:
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
