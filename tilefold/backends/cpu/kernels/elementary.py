"""Functions of real numbers for modified scores: exp, log, tanh, sigmoid, in each lane.

They hold for all numbers of the type, infinities and NaN among them; results below the smallest
normal number may be 0. float has a relative error below 3e-7, double below 1e-15.
"""

from __future__ import annotations

import math

from tilefold.backends.cpu.kernels.ir import Body, Value, overload, vector
from tilefold.backends.cpu.kernels.softmax import FORMATS, LN_2, LOG2_E, log2

_ROUNDING = {"float": 1.5 * 2.0**23, "double": 1.5 * 2.0**52}
"""The number whose sum with x is rounded to an integer, which stands in the low bits."""


_LN_2_LOW = 2.3190468138462996e-17
"""What ln 2 is more than `LN_2`: 1000 times as much is 100 units in the last place of a result."""


def exp(body: Body, x: Value) -> Value:
    """e**x, made of half of it where x > 0: the nearest 2**n may be infinite before e**x is."""
    positive = body.compare("ogt", x, body.constant(0.0, x.type), "positive")
    power, rest = _split(body, x, positive)
    found = body.multiply_add(power, rest, power, "e")
    one, two = (body.constant(number, x.type) for number in (1.0, 2.0))
    return body.binary("fmul", found, body.select(positive, two, one), "exp")


def expm1(body: Body, x: Value) -> Value:
    """e**x - 1, which is exact near 0 too."""
    power, rest = _split(body, x)
    less = body.binary("fsub", power, body.constant(1.0, x.type))
    return body.multiply_add(power, rest, less, "expm1")


def _split(body: Body, x: Value, halved: Value | None = None) -> tuple[Value, Value]:
    """2**n, and e**f - 1 with x = n ln 2 + f: 2**n is 0 where it is below the type.

    It is 2**(n - 1) where it is to be `halved`. Else x must be below the largest logarithm.
    """
    format_, type_ = FORMATS[x.element], x.type
    # Half of 2**n is still finite here, and twice the result is infinite.
    top = body.constant((format_.bias + 1.4) * LN_2, type_)
    low = body.constant(-format_.bias * LN_2, type_)
    x = body.select(body.compare("ogt", x, top), top, x, "e")
    x = body.select(body.compare("olt", x, low), low, x, "e")
    magic = body.constant(_ROUNDING[x.element], type_)
    rounded = body.multiply_add(x, body.constant(LOG2_E, type_), magic, "e")
    whole = body.binary("fsub", rounded, magic, "e")
    high = body.constant(_high(x.element), type_)
    fraction = body.multiply_add(_negative(body, whole), high, x, "f")
    rest = body.constant(LN_2 - _high(x.element) + _LN_2_LOW, type_)
    fraction = body.multiply_add(_negative(body, whole), rest, fraction, "f")
    integers = vector(x.lanes, format_.integer)
    field = body.add(body.cast("bitcast", rounded, integers), format_.bias)
    if halved is not None:
        field = body.add(field, body.cast("sext", halved, integers))
    field = body.binary("shl", field, format_.mantissa_bits)
    return body.cast("bitcast", field, type_, "power"), _below_one(body, fraction)


def _high(scalar: str) -> float:
    """ln 2 with few enough bits that its products with an exponent are exact."""
    bits = 16 if scalar == "float" else 40
    return math.ldexp(math.floor(math.ldexp(LN_2, bits)), -bits)


def _below_one(body: Body, f: Value) -> Value:
    """e**f - 1 for |f| <= ln 2 / 2, by Taylor's terms: their rest is below half a unit."""
    terms = {"float": 7, "double": 13}[f.element]
    factors, factorial = [], 1.0
    for n in range(1, terms + 1):
        factorial *= n
        factors.append(1 / factorial)
    return body.binary("fmul", _powers(body, f, tuple(factors)), f, "e")


_TANH_OVER = (
    0.9999999811008434,
    0.12979224235827602,
    0.002985862810288094,
    9.878667908783118e-06,
    -1.4704243737272211e-08,
    2.3508669984084272e-11,
)
_TANH_UNDER = (1.0, 0.4631254028138875, 0.024027928215064952, 0.00023720335422178804)
"""tanh x / x in powers of x**2 for |x| <= 8, as a quotient: a fit of the largest relative error,
2e-8. With float arithmetic it is 2.8e-7, and no result exceeds 1. Beyond 8 tanh is 1 - 2e-7.
"""


def tanh(body: Body, x: Value) -> Value:
    """The hyperbolic tangent.

    float: a quotient of polynomials, 12 instructions. By an exponential it takes 24, and made a
    softcap cost 18 % of causal attention instead of 12 % (head size 64).
    """
    if x.element == "double":
        return _tanh_by_exponential(body, x)
    for condition, limit in (("ogt", 8.0), ("olt", -8.0)):
        far = body.constant(limit, x.type)
        x = body.select(body.compare(condition, x, far), far, x, "near")
    square = body.binary("fmul", x, x, "square")
    over, under = (_powers(body, square, terms) for terms in (_TANH_OVER, _TANH_UNDER))
    return body.binary("fdiv", body.binary("fmul", x, over), under, "tanh")


def _powers(body: Body, x: Value, terms: tuple[float, ...]) -> Value:
    """The sum of terms[n] x**n."""
    total = body.constant(terms[-1], x.type)
    for term in terms[-2::-1]:
        total = body.multiply_add(total, x, body.constant(term, x.type), "e")
    return total


def _tanh_by_exponential(body: Body, x: Value) -> Value:
    """(e**2x - 1) / (e**2x + 1) of |x|, with the sign of x."""
    size = absolute(body, x)
    far = body.constant(20.0, x.type)
    size = body.select(body.compare("ogt", size, far), far, size)  # 1 from there on
    less = expm1(body, body.binary("fadd", size, size))
    more = body.binary("fadd", less, body.constant(2.0, x.type))
    name = f"llvm.copysign.{overload(x.type)}"
    return body.call(name, x.type, [body.binary("fdiv", less, more), x], "tanh")


def sigmoid(body: Body, x: Value) -> Value:
    """1 / (1 + e**-x)."""
    one = body.constant(1.0, x.type)
    total = body.binary("fadd", one, exp(body, _negative(body, x)))
    return body.binary("fdiv", one, total, "sigmoid")


def log(body: Body, x: Value) -> Value:
    """ln x: -inf of 0, NaN of negative numbers. Those below the smallest normal one are scaled."""
    format_, type_ = FORMATS[x.element], x.type
    zero, infinite = body.constant(0.0, type_), body.constant(float("inf"), type_)
    below = body.compare("olt", x, body.constant(2.0 ** (1 - format_.bias), type_), "below")
    scaled = body.binary("fmul", x, body.constant(2.0**64, type_))
    number = log2(body, body.select(below, scaled, x))
    less = body.select(below, body.constant(64.0, type_), zero)
    number = body.binary("fsub", number, less)
    natural = body.binary("fmul", number, body.constant(LN_2, type_), "log")
    natural = body.select(body.compare("oeq", x, infinite), infinite, natural)
    none = body.constant(float("-inf"), type_)
    natural = body.select(body.compare("oeq", x, zero), none, natural)
    wrong = body.compare("ult", x, zero)
    return body.select(wrong, body.constant(float("nan"), type_), natural, "log")


def absolute(body: Body, x: Value) -> Value:
    """|x|."""
    return body.call(f"llvm.fabs.{overload(x.type)}", x.type, [x], "abs")


def _negative(body: Body, x: Value) -> Value:
    return body.binary("fsub", body.constant(-0.0, x.type), x, "negative")
