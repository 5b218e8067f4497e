"""Activations: functions of a vector of sums, before results are written.

gelu needs the normal distribution function. For x <= 0 it is exp(-x^2 / 2) times a smooth function
of t = 4 / (4 + |x| / sqrt 2): a polynomial, fitted at Chebyshev's points to math.erfc. So it is as
exact where it is tiny as elsewhere.
"""

from __future__ import annotations

import math
from functools import lru_cache

from tilefold.backends.cpu.kernels import elementary
from tilefold.backends.cpu.kernels.ir import Body, Value

_TERMS = {"float": 11, "double": 24}
"""Terms of the polynomial: float 1e-8, double 1e-15 of the largest value."""


def apply(body: Body, name: str | None, x: Value) -> Value:
    """The activation of each lane; NaN stays NaN."""
    if name is None:
        return x
    zero = body.constant(0.0, x.type)
    if name == "relu":
        return body.select(body.compare("olt", x, zero), zero, x, "relu")
    if name == "tanh":
        return elementary.tanh(body, x)
    if name == "sigmoid":
        return elementary.sigmoid(body, x)
    if name == "silu":
        return body.binary("fmul", x, elementary.sigmoid(body, x), "silu")
    if name == "gelu_tanh":
        return _gelu_tanh(body, x)
    return _gelu(body, x)


def _gelu_tanh(body: Body, x: Value) -> Value:
    """x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), which is x (1 + tanh(...)) / 2."""
    factor = 2 * math.sqrt(2 / math.pi)
    square = body.binary("fmul", x, x)
    inner = body.multiply_add(
        square, body.constant(0.044715 * factor, x.type), body.constant(factor, x.type)
    )
    inner = body.binary("fmul", x, inner)
    return body.binary("fmul", x, elementary.sigmoid(body, inner), "gelu")


def _gelu(body: Body, x: Value) -> Value:
    """x times the normal distribution function of x."""
    size = elementary.absolute(body, x)
    scaled = body.multiply_add(
        size, body.constant(math.sqrt(0.5) / 4, x.type), body.constant(1.0, x.type)
    )
    one, two = (body.constant(number, x.type) for number in (1.0, 2.0))
    t = body.binary("fdiv", one, scaled, "t")
    u = body.binary("fsub", body.binary("fmul", two, t), one, "u")
    factors = _erfcx(_TERMS[x.element])
    total = body.constant(factors[-1], x.type)
    for factor in factors[-2::-1]:
        total = body.multiply_add(total, u, body.constant(factor, x.type), "erfcx")
    half = body.constant(-0.5, x.type)
    power = elementary.exp(body, body.binary("fmul", body.binary("fmul", size, half), size))
    tail = body.binary("fmul", body.binary("fmul", total, power), t, "tail")  # of x <= 0
    below = body.compare("olt", x, body.constant(0.0, x.type))
    share = body.select(below, tail, body.binary("fsub", one, tail), "share")
    return body.binary("fmul", x, share, "gelu")


@lru_cache
def _erfcx(terms: int) -> tuple[float, ...]:
    """exp(z^2) erfc(z) / (2 t) in powers of u = 2 t - 1, where t = 4 / (4 + z)."""
    from numpy.polynomial import chebyshev

    def value(u: float) -> float:
        t = (u + 1) / 2
        z = 4 / t - 4
        if z < 20:
            return math.exp(z * z) * math.erfc(z) / (2 * t)
        series = 1 - 1 / (2 * z * z) + 3 / (4 * z**4) - 15 / (8 * z**6) + 105 / (16 * z**8)
        return series / (z * math.sqrt(math.pi)) / (2 * t)

    nodes = chebyshev.chebpts1(4 * terms)
    fitted = chebyshev.Chebyshev.fit(nodes, [value(u) for u in nodes], terms - 1, domain=[-1, 1])
    return tuple(float(x) for x in chebyshev.cheb2poly(fitted.coef))
