"""Activations: functions of a tile that a product applies before it writes results.

Triton's own language has an error function, which gelu needs, but no hyperbolic tangent that its
interpreter knows as well. Near 0 that is Lambert's continued fraction (1761), which loses nothing
there; elsewhere it follows from an exponential. NaN stays NaN in all of them.
"""

from __future__ import annotations

from tilefold.backends.triton.kernels.text import Text

_NEAR_ZERO = 0.5
"""Below it the fraction serves: 8 levels of it are off by less than a rounding of float64."""

_LEVELS = 8

_FORMULAS = {
    "relu": "tl.where(x < 0, 0.0, x)",
    "gelu": "x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))",
    "gelu_tanh": "x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))",
    "silu": "x / (1.0 + tl.exp(-x))",
    "sigmoid": "1.0 / (1.0 + tl.exp(-x))",
    "tanh": f"tl.where(tl.abs(x) < {_NEAR_ZERO}, near, tl.where(x < 0, -far, far))",
}


def define(text: Text, name: str) -> None:
    """The function of an activation, which `apply` calls."""
    text("@triton.jit")
    with text.block(f"def {name}(x)"):
        if name == "tanh":
            text("square = x * x", f"level = square / {2 * _LEVELS - 1}.0")
            with text.block(f"for odd in tl.static_range({2 * _LEVELS - 3}, 1, -2)"):
                text("level = square / (odd + level)")
            text("near = x / (1.0 + level)  # Lambert's continued fraction")
            text("far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)")
        text(f"return {_FORMULAS[name]}")
    text("", "")


def apply(name: str | None, value: str) -> str:
    """The expression of an activation of a value.

    >>> apply("relu", "x"), apply(None, "x")
    ('relu(x)', 'x')
    """
    return f"{name}({value})" if name else value
