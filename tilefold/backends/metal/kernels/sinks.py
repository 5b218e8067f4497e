"""Sinks: logits of a head that take a share of the weights and give nothing (Xiao et al., 2024).

They are on the natural scale, and come in when the sum of a row is finished: in `forward`, in the
merge of `decode`, and in `tensorops`. lse has them, so the other backward kernels know nothing of
them. Their own gradient is a kernel of its own.
"""

from __future__ import annotations

from tilefold.backends.metal.kernels import frame, scores
from tilefold.backends.metal.kernels.msl import Text
from tilefold.backends.metal.spec import SIMD, MetalSpec

ALGORITHM = """
for each sink of a head, one simdgroup, its lanes along the rows of all batch entries:
    dsink = -sum of exp(sink - lse) delta
""".strip().split("\n")

_EACH = "for (int j = 0; j < int(sinks_count); ++j)"
_SINK = "sinks[h * sinks_h + j * sinks_n]"

BASE = "isinf(lse[row]) ? 0.0f : lse[row]"
"""lse. A row that sees no key has -inf, and no visible pair that would use it."""


def fold(text: Text, spec: MetalSpec) -> None:
    """Add the sinks of head h to l, whose maximum is `top` then: a number on the natural scale.

    `share` is the factor of what the pairs have summed.
    """
    text.note("Sinks are in the denominator alone.")
    text(f"const float highest = any ? {scores.natural(spec, 'm')} : {frame.LOWEST};")
    text("float top = highest;")
    with text.block(_EACH):
        text(f"top = max(top, {_SINK});")
    text(f"const float share = any ? {_exp('highest - top')} : 0.0f;", "l *= share;")
    with text.block(_EACH):
        text(f"l += {_exp(f'{_SINK} - top')};")


def emit(spec: MetalSpec) -> str:
    """The source of the kernel that gives the gradient of sinks."""
    text = Text()
    text("const int j = int(place.x);", "const int h = int(place.y);")
    text(f"const float sink = {_SINK};", "float sum = 0.0f;")
    with text.block(f"for (long i = lane; i < batch * len_q; i += {SIMD})"):
        text("const long row = (i / len_q * heads_q + h) * len_q + i % len_q;")
        text(f"const float base = {BASE};")
        text(f"sum -= {_exp('sink - base')} * delta[row];")
    text("sum = simd_sum(sum);")
    with text.block("if (lane == 0)"):
        text("dsinks[h * sinks_count + j] = sum;")
    return frame.written(spec, "Attention, backward: the gradient of sinks.", ALGORITHM, text)


def _exp(x: str) -> str:
    return f"fast::exp2(({x}) * M_LOG2E_F)"
