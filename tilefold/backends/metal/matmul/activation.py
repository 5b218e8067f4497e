"""Activations: functions of one element that a product applies before it writes results.

Metal has no error function, which gelu needs: x times the normal distribution function of x. So
that is computed by formula 7.1.26 of Abramowitz and Stegun ("Handbook of Mathematical Functions",
1964), whose error function is off by 1.5e-7 at most. NaN stays NaN in all of them.
"""

from __future__ import annotations

from tilefold.backends.metal.kernels.msl import Text

_FORMULAS = {
    "relu": "x < 0.0f ? 0.0f : x",
    "gelu": "x * (x < 0.0f ? tail : 1.0f - tail)",
    "gelu_tanh": "x / (1.0f + exp(-1.59576912f * x * (1.0f + 0.044715f * x * x)))",
    "silu": "x / (1.0f + exp(-x))",
    "sigmoid": "1.0f / (1.0f + exp(-x))",
    "tanh": "tanh(x)",
}
"""gelu_tanh by (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), where 1.59... is 2 sqrt(2 / pi)."""

_TAIL = """\
// The normal distribution function of -|x|: Abramowitz and Stegun, 7.1.26.
const float z = 0.70710678f * abs(x);
const float t = 1.0f / (1.0f + 0.3275911f * z);
const float low = -0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f));
const float tail = 0.5f * t * (0.254829592f + t * low) * exp(-z * z);"""


def define(text: Text, name: str) -> None:
    """The function of an activation, which `apply` calls."""
    with text.block(f"static inline float {name}_of(const float x)"):
        if name == "gelu":
            text(_TAIL)
        text(f"return {_FORMULAS[name]};")
    text("")


def apply(name: str | None, value: str) -> str:
    """The expression of an activation of a value.

    >>> apply("relu", "x"), apply(None, "x")
    ('relu_of(x)', 'x')
    """
    return f"{name}_of({value})" if name else value
