"""The scale of a call inside a kernel, and what is computed with it once for each query.

The scale is `power * rest` (`arguments.factors`). `power` is a power of two, with the sign of the
scale: it is multiplied into the operand of the parallel axis when that is packed (Q^T in forward,
decode and dQ, K^T in dK/dV), and rounds nothing. So scores are as exact as the product is, and
nearly on the natural scale: `natural = rest * score`, and `rest` is in [1, 2) unless the scale is
extreme. `rest` and log2(e) belong to the exponential, where the maximum is already subtracted: a
difference of scores that are near each other is exact. If scores were multiplied by a rounded
factor, the error of a weight would grow as its score.

A modified score is natural: then `rest` is a factor of the products (`scores.py`) and of the
gradients, `wide` is 1, and `factor` is log2(e).

    P <- 2^((S - m) c)            c = rest log2(e)                       `rate`
    lse <- rest m + ln l          and what its rounding took away        `log_sum`
    P <- 2^((S - m) c + r)        lse = rest m - r ln 2, in the backward pass: `shift`
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tilefold.backends.cpu.kernels.arguments import Arguments
from tilefold.backends.cpu.kernels.ir import Body, Value, vector
from tilefold.backends.cpu.kernels.softmax import FORMATS, LN_2, LOG2_E, Rate, log2

_LARGEST = {"float": math.ldexp(1 - 2.0**-24, 128), "double": math.ldexp(1 - 2.0**-53, 1024)}


@dataclass(frozen=True)
class Scale:
    """The two factors of the scale, where the body is written.

    `power` and `rest` have the type of the kernel, `wide` is `rest` as a double, and `factor` is
    rest log2(e), rounded once. None of them exceeds the largest finite number, and `factor` is
    never so small that the weight of -inf would not be 0.
    """

    body: Body
    lanes: int
    power: Value
    rest: Value
    wide: Value
    factor: Value
    modified: bool = False

    def rate(self) -> Rate:
        """The rate of differences of scores; a modification often makes them very low."""
        least = FORMATS[self.factor.type].bias - self.modified
        lowest = self.difference(-least)
        return Rate(self._splat(self.factor, "rate"), lowest, self.modified)

    def difference(self, exponent: float) -> Value:
        """The difference of scores that makes a weight 2^exponent times as large, in all lanes."""
        number = self.body.constant(exponent, self.factor.type)
        return self._splat(self.body.binary("fdiv", number, self.factor), "difference")

    def log_sum(self, m: Value, total: Value) -> tuple[Value, Value]:
        """lse = rest m + ln total in each lane, and what its rounding took away.

        The latter is 0 where lse is not finite. float is summed in double. double relies on a
        machine that multiplies and adds in one step: elsewhere what was lost is not found again.
        """
        body = self.body
        natural = body.binary("fmul", log2(body, total), body.constant(LN_2, total.type), "log")
        log, rest = self._widened(natural), self._wide_rest()
        lse = body.multiply_add(self._widened(m), rest, log, "lse")
        lse = body.cast("fptrunc", lse, m.type, "lse")
        low = body.multiply_add(self._widened(m), rest, self._negative(self._widened(lse)), "low")
        low = body.cast("fptrunc", body.binary("fadd", low, log, "low"), m.type, "low")
        return lse, body.select(self._is_finite(lse), low, body.constant(0.0, m.type), "low")

    def shift(self, lse: Value, low: Value) -> tuple[Value, Value]:
        """m and r with P = 2^((S - m) c + r): lse + low in scores, and what m lost by rounding.

        m is 0 where lse is not finite, or is no number in scores.
        """
        body, rest = self.body, self._wide_rest()
        wide = self._widened(lse)
        m = body.cast("fptrunc", body.binary("fdiv", wide, rest), lse.type, "m")
        m = body.select(self._is_finite(m), m, body.constant(0.0, lse.type), "m")
        lost = body.multiply_add(self._widened(m), rest, self._negative(wide), "lost")
        lost = body.binary("fsub", lost, self._widened(low), "lost")
        lost = body.binary("fmul", lost, body.constant(LOG2_E, lost.type), "r")
        return m, body.cast("fptrunc", lost, lse.type, "r")

    def natural(self, score: Value) -> Value:
        """Scores on the natural scale, rounded once."""
        wide = self.body.binary("fmul", self._widened(score), self._wide_rest(), "natural")
        return self.body.cast("fptrunc", wide, score.type, "natural")

    def maximum(self, m: Value, total: Value) -> Value:
        """The largest scores on the natural scale; NaN where the sum is, for another reason."""
        body, top = self.body, self.natural(m)
        infinite = body.compare("oeq", top, body.constant(float("inf"), top.type))
        number = body.compare("ord", total, total)
        known = body.binary("or", infinite, number, "known")
        return body.select(known, top, total, "max")

    def in_scores(self, natural: Value) -> Value:
        """Numbers of the natural scale as scores, rounded once."""
        wide = self.body.binary("fdiv", self._widened(natural), self._wide_rest(), "score")
        return self.body.cast("fptrunc", wide, natural.type, "score")

    def natural_difference(self, natural: Value, score: Value) -> Value:
        """Numbers of the natural scale less scores, which are multiplied exactly for float."""
        minus = self._negative(self._widened(score))
        wide = self.body.multiply_add(minus, self._wide_rest(), self._widened(natural), "less")
        return self.body.cast("fptrunc", wide, natural.type, "less")

    def _wide_rest(self) -> Value:
        return self.body.splat(self.wide, self.lanes, "rest")

    def _widened(self, value: Value) -> Value:
        return self.body.cast("fpext", value, vector(self.lanes, "double"), "wide")

    def _negative(self, value: Value) -> Value:
        return self.body.binary("fsub", self.body.constant(-0.0, value.type), value, "negative")

    def _is_finite(self, value: Value) -> Value:
        """A truth per lane: neither infinite nor NaN."""
        difference = self.body.binary("fsub", value, value)
        return self.body.compare("oeq", difference, self.body.constant(0.0, value.type), "finite")

    def _splat(self, value: Value, hint: str) -> Value:
        return self.body.splat(value, self.lanes, hint)


def scale(
    body: Body, arguments: Arguments, lanes: int, scalar: str, *, natural: bool = False
) -> Scale:
    """The scale of the call, for vectors of `lanes` elements; `natural`: scores are modified."""

    def read(name: str) -> Value:
        return body.cast("bitcast", arguments[name], "double", name)

    def narrowed(number: Value, hint: str) -> Value:
        limit = body.constant(_LARGEST[scalar], "double")
        cut = body.select(body.compare("ogt", number, limit), limit, number)
        return body.cast("fptrunc", cut, scalar, hint)

    wide = read("rest")
    factor = narrowed(body.binary("fmul", wide, body.constant(LOG2_E, "double")), "factor")
    least = body.constant(2 * FORMATS[scalar].bias / _LARGEST[scalar], scalar)
    factor = body.larger(factor, least, "factor")
    power, rest = narrowed(read("power"), "power"), narrowed(wide, "rest")
    if natural:
        wide, factor = body.constant(1.0, "double"), body.constant(LOG2_E, scalar)
    return Scale(body, lanes, power, rest, wide, factor, natural)
