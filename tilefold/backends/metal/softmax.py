"""The running softmax of one tile of scores, and the weights that the backward passes recompute.

Base 2 throughout: the scale takes log2(e) with it, once. A lane holds two columns of a row, so a
row's maximum takes two shuffles; the sum l stays apart in each lane until the last tile, since all
lanes of a row scale it by the same factor. (Milakov and Gimelshein, 2018; Dao, 2023.)

Score modifications will stand where scores are scaled: before the mask, in every pass alike.
"""

from __future__ import annotations

from tilefold.backends.metal.fragment import at
from tilefold.backends.metal.frame import LOWEST, MASKED, columns, edge, over_row, seen
from tilefold.backends.metal.msl import Text
from tilefold.backends.metal.products import fragment
from tilefold.backends.metal.spec import SIDE, MetalSpec

COLUMN = "start + j + fragment_column + e"
"""The row of the traversed operand that is a column of the tile."""

FACTOR = "const float factor = scale * M_LOG2E_F;"
"""Scores times `factor` are exponents of 2."""


def begin(text: Text) -> None:
    """The running maximum and this lane's part of the sum."""
    text(FACTOR, f"float m = {LOWEST};", "float l = 0.0f;")


def fold(text: Text, spec: MetalSpec, weight_type: str, row: str) -> None:
    """Fold the tile `s` into m and l; leaves its weights `p` and the `correction` of what was.

    `row` is the query of this lane, inside the sequence.
    """
    text.note("m' = max(m, rowmax s)")
    text("float m_new = m;")
    columns(text, spec, "s", ["x = x * factor;"])
    with text.block(f"if ({edge(spec)})"):
        lines = [f"const int key = {COLUMN};", f"const bool seen = {seen(spec, row, 'key')};"]
        columns(text, spec, "s", [*lines, f"x = seen ? x : {MASKED};"])
    columns(text, spec, "s", ["m_new = max(m_new, x);"])
    over_row(text, "m_new", "max({x}, {y})")
    text.note("p = exp2(s - m'), l = l correction + rowsum p")
    text("const float correction = fast::exp2(m - m_new);", "m = m_new;", "l *= correction;")
    count = spec.blocks.traverse // SIDE
    text(fragment(weight_type).declare("p", count))
    weight = f"const {weight_type} weight = {_as(weight_type, 'fast::exp2(x - m)')};"
    lines = [weight, f"{at(f'p[j / {SIDE}]', 'e')} = weight;", f"l += {_float(weight_type)};"]
    columns(text, spec, "s", lines)


def end(text: Text) -> None:
    """The whole sum of the row; rows without a visible key have l = 0."""
    over_row(text, "l", "{x} + {y}")


def weights(text: Text, spec: MetalSpec, parallel: str, statistic: str) -> None:
    """The weights of the tile `s` in place, by the finished statistics.

    `statistic` is the text of lse log2(e) for an element; `parallel` is "query" or "key".
    Hidden pairs weigh 0 by their mask: exp2(0 - lse) of a padded score may be infinite.
    """
    text.note("p = exp2(s - lse)")
    other = "key" if parallel == "query" else "query"
    raised = f"fast::exp2(x * factor - {statistic})"
    truth = f"const bool seen = {seen(spec, f'{parallel}_inside', other)};"
    with text.either(edge(spec)) as otherwise:
        lines = [f"const int {other} = {COLUMN};", truth, f"x = seen ? {raised} : 0.0f;"]
        columns(text, spec, "s", lines)
        otherwise()
        columns(text, spec, "s", [f"x = {raised};"])


def slopes(text: Text, spec: MetalSpec, delta: str) -> None:
    """dS = P (dP - delta) of a tile, in place of dP; the scale waits for the end of the sum."""
    text.note("ds = p (dp - delta)")
    columns(text, spec, "dp", [f"x = {at(f's[j / {SIDE}]', 'e')} * (x - {delta});"])


def convert(text: Text, spec: MetalSpec, name: str, source: str, kind: str) -> str:
    """A tile of floats as fragments of another type, and the name of what holds it now."""
    if kind == "float":
        return source
    text(fragment(kind).declare(name, spec.blocks.traverse // SIDE))
    columns(text, spec, source, [f"{at(f'{name}[j / {SIDE}]', 'e')} = {kind}(x);"])
    return name


def _as(kind: str, value: str) -> str:
    return value if kind == "float" else f"{kind}({value})"


def _float(kind: str) -> str:
    return "weight" if kind == "float" else "float(weight)"
