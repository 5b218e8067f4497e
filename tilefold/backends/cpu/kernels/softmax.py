"""Exponentials and logarithms to base 2 on vectors, written with plain arithmetic.

The base is 2 because 2^x splits into an exponent field and a short polynomial. The factor log2(e)
is a part of the `Rate` by which differences of scores are multiplied. Everything here works on
vectors of any width of `float` or `double` and calls no library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tilefold.backends.cpu.kernels.ir import Body, Value, vector

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


@dataclass(frozen=True)
class Format:
    """The parameters of an IEEE binary format whose exponent field is written by hand."""

    integer: str
    mantissa_bits: int
    bias: int
    exp2_terms: tuple[float, ...]
    log2_terms: int


# exp2 on [-1/2, 1/2]. float: minimax of degree 6 with the first term held at 1; largest relative
# error 7.9e-8 with float arithmetic (half a unit in the last place is 6.0e-8; degree 5 gives
# 1.7e-7). double: Taylor terms to degree 13, truncation error 1.5e-17.
_EXP2_FLOAT = (
    1.0,
    0.6931471824645996,
    0.24022647738456726,
    0.055503323674201965,
    0.00961843691766262,
    0.0013398875016719103,
    0.00015353361959569156,
)
_EXP2_DOUBLE = tuple(LN_2**n / math.factorial(n) for n in range(14))

EXP2_COARSE = (
    1.0,
    0.6931241750717163,
    0.24024099111557007,
    0.055906426161527634,
    0.009582843631505966,
)
"""Minimax of degree 4, largest relative error 2.9e-6: for weights that are rounded to bfloat16
(2e-3) before anything but their sum sees them.
"""

# log2(x) = 2 / ln 2 * atanh(t), t = (x - 1) / (x + 1), |t| <= 0.172: truncation t^(2n+1) / (2n+1)
# after n terms is below 1e-8 for n = 5 and below 1e-18 for n = 12.
FORMATS = {
    "float": Format("i32", 23, 127, _EXP2_FLOAT, 5),
    "double": Format("i64", 52, 1023, _EXP2_DOUBLE, 12),
}


@dataclass(frozen=True)
class Rate:
    """The factor c > 0 of an exponent in all lanes, and the least x with which 2^(c x) is not 0.

    `normal`: no result is denormal. One that rounds to the exponent of the smallest normal number
    is 0, too.
    """

    factor: Value
    lowest: Value
    normal: bool = False


def exp2_scaled(
    body: Body, x: Value, rate: Rate, *, terms: tuple[float, ...] | None = None, hint: str = "p"
) -> Value:
    """2**(c x) in each lane for x that is not far above 0.

    The product is never rounded before its whole part is gone, and costs no instruction: both
    steps that split c x multiply and add. Nor do normal results: they are 2^(n - 1) times twice the
    polynomial, and the exponent field of n - 1 is 0 one step before.
    """
    magic = body.constant(_magic(x) - rate.normal, x.type)
    if rate.normal:
        terms = tuple(2 * term for term in terms or FORMATS[x.element].exp2_terms)
    x = body.larger(rate.lowest, x, "e")
    rounded = body.multiply_add(x, rate.factor, magic, "e")
    whole = body.binary("fsub", magic, rounded, "e")
    fraction = body.multiply_add(x, rate.factor, whole, "e")
    return _power(body, rounded, fraction, terms, hint)


LEAST = {"float": -100.0, "double": -1000.0}
"""The exponent below which a weight of modified scores is 0 in the backward kernels. Near the
smallest normal number P (dP - delta) would be denormal, and processors compute with such numbers
tens of times more slowly: a linear bias made the backward pass 2.7 times as slow (Xeon with AMX).
"""


def exp2_cut(
    body: Body,
    x: Value,
    *,
    terms: tuple[float, ...] | None = None,
    hint: str = "p",
    least: float | None = None,
) -> Value:
    """2**x in each lane, with x cut at 0: a probability made again from lse is never above 1.

    It is 0 where x is below `least`, which is the exponent of the smallest normal number if absent.
    """
    magic = body.constant(_magic(x), x.type)
    if least is not None:
        below = body.compare("olt", x, body.constant(least, x.type))
        x = body.select(below, body.constant(-FORMATS[x.element].bias, x.type), x, "e")
    x = body.larger(body.constant(-FORMATS[x.element].bias, x.type), x, "e")
    highest = body.constant(0.0, x.type)
    x = body.select(body.compare("olt", highest, x), highest, x, "e")
    rounded = body.binary("fadd", x, magic, "e")
    whole = body.binary("fsub", rounded, magic, "e")
    return _power(body, rounded, body.binary("fsub", x, whole, "e"), terms, hint)


def _magic(x: Value) -> float:
    """The number whose sum with x is rounded to an integer n and has n + bias in its low bits.

    Those bits shifted up are the number 2^n.
    """
    format_ = FORMATS[x.element]
    return 1.5 * 2.0**format_.mantissa_bits + format_.bias


def _power(
    body: Body, rounded: Value, fraction: Value, terms: tuple[float, ...] | None, hint: str
) -> Value:
    """2**(n + fraction), with n in the low bits of `rounded`; NaN stays NaN.

    What is below the smallest normal number is 0. `terms` are the coefficients of the polynomial;
    without them it has the precision of the type. The last step multiplies, so that NaN survives.
    """
    format_, type_ = FORMATS[fraction.element], fraction.type
    terms = terms or format_.exp2_terms
    power = body.constant(terms[-1], type_)
    for term in terms[-2::-1]:
        power = body.multiply_add(power, fraction, body.constant(term, type_), "e")
    field = body.cast("bitcast", rounded, vector(fraction.lanes, format_.integer), "e")
    field = body.binary("shl", field, format_.mantissa_bits, "e")
    return body.binary("fmul", power, body.cast("bitcast", field, type_, "e"), hint)


def log2(body: Body, x: Value, hint: str = "log") -> Value:
    """log2(x) of normal positive numbers; what other numbers give is not defined."""
    format_ = FORMATS[x.element]
    integers = vector(x.lanes, format_.integer)
    bits = body.cast("bitcast", x, integers)
    mask = (1 << format_.mantissa_bits) - 1
    one_bits = format_.bias << format_.mantissa_bits
    mantissa = body.binary("or", body.binary("and", bits, mask), one_bits)
    exponent = body.sub(body.binary("lshr", bits, format_.mantissa_bits), format_.bias)
    fraction = body.cast("bitcast", mantissa, x.type)
    power = body.cast("sitofp", exponent, x.type)
    one = body.constant(1.0, x.type)
    high = body.compare("ogt", fraction, body.constant(math.sqrt(2), x.type))
    halved = body.binary("fmul", fraction, body.constant(0.5, x.type))
    fraction = body.select(high, halved, fraction)
    power = body.select(high, body.binary("fadd", power, one), power)
    below, above = body.binary("fsub", fraction, one), body.binary("fadd", fraction, one)
    t = body.binary("fdiv", below, above)
    square = body.binary("fmul", t, t)
    terms = [2 * LOG2_E / (2 * n + 1) for n in range(format_.log2_terms)]
    series = body.constant(terms[-1], x.type)
    for term in terms[-2::-1]:
        series = body.multiply_add(series, square, body.constant(term, x.type))
    return body.multiply_add(series, t, power, hint)
