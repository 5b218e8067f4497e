"""The running softmax of one tile of scores, and the weights that the backward passes recompute.

Scores, and the maximum m, are products without the scale, which comes in with the exponential; or
they are modified, and have it (see `scores`). A lane holds two columns of a row, so a row's maximum
takes two shuffles; the sum l stays apart in each lane until the last tile, since all lanes of a row
scale it by the same factor. (Milakov and Gimelshein, 2018; Dao, 2023.)
"""

from __future__ import annotations

from collections.abc import Sequence

from tilefold.backends.metal.kernels import dropout, mask, scores, sinks
from tilefold.backends.metal.kernels.fragment import at
from tilefold.backends.metal.kernels.frame import HIDDEN, LOWEST, columns, hidden, over_row, seen
from tilefold.backends.metal.kernels.msl import Text
from tilefold.backends.metal.kernels.tile import fragment
from tilefold.backends.metal.spec import SIDE, MetalSpec

COLUMN = "start + j + fragment_column + e"
"""The row of the traversed operand that is a column of the tile."""


INSIDE = "min({}, last - 1)"
"""A column of the tile that is there."""


def begin(text: Text, spec: MetalSpec) -> None:
    """The running maximum, this lane's part of the sum, and whether it saw any pair."""
    text(scores.factor(spec), f"float m = {LOWEST};", "float l = 0.0f;", "ushort any = 0;")


def fold(text: Text, spec: MetalSpec, weight_type: str, row: str) -> None:
    """Fold the tile `s` into m and l; leaves its weights `p` and the `correction` of what was.

    `row` is the query of this lane, inside the sequence.
    """
    if spec.score is not None:
        text.note("s = modified(s)")
        key = f"const int key = {INSIDE.format(COLUMN)};"
        columns(text, spec, "s", [key, f"x = {scores.modified(spec, 'x', row, 'key')};"])
    text.note("m' = max(m, rowmax s)")
    text("float m_new = m;")
    if spec.negative:
        columns(text, spec, "s", [f"x = {scores.score('x', spec.negative)};"])
    with text.either("edge") as otherwise:
        meets = seen(spec, row, "key") + (" && !hides(x)" if spec.hides else "")
        lines = [f"const int key = {COLUMN};", f"const bool seen = {meets};"]
        columns(text, spec, "s", [*lines, "any |= seen;", f"x = seen ? x : {LOWEST};"])
        otherwise()
        text("any = 1;")
    columns(text, spec, "s", ["m_new = max(m_new, x);"])
    over_row(text, "m_new", "max({x}, {y})")
    text.note("p = exp(s - m'), l = l correction + rowsum p")
    text(f"const float correction = {scores.weight('m', 'm_new')};")
    text("m = m_new;", "l *= correction;")
    dropout.bits(text, spec, row, COLUMN)
    count = spec.blocks.traverse // SIDE
    text(fragment(weight_type).declare("p", count))
    kept = f"({dropout.stays('weight')})" if spec.dropout else "weight"
    value = kept if weight_type == "float" else f"{weight_type}({kept})"
    rest = [f"{at(f'p[j / {SIDE}]', 'e')} = {value};", "l += weight;"]
    seen_weight = scores.weight("x", "m")
    with text.either("edge") as otherwise:
        hidden = f"const float weight = x == {LOWEST} ? 0.0f : {seen_weight};"
        columns(text, spec, "s", [hidden, *rest])
        otherwise()
        columns(text, spec, "s", [f"const float weight = {seen_weight};", *rest])


def end(text: Text) -> None:
    """The whole sum of the row; a row without a visible key is empty.

    A row of scores of -inf alone is none: its o and lse are NaN, as 0 / 0 is.
    """
    over_row(text, "l", "{x} + {y}")
    over_row(text, "any", "{x} | {y}")


def inverse(text: Text, spec: MetalSpec) -> str:
    """The factor of the finished sum of a row; sinks come into l here."""
    if "sinks" in spec.extra:
        sinks.fold(text, spec)
        return "any ? share / l : 0.0f"
    return "any ? 1.0f / l : 0.0f"


def write_statistics(text: Text, spec: MetalSpec, place: str) -> None:
    """The logarithm of a row's sum, after `inverse`, and the maximum if it is asked for."""
    if "max" in spec.extra:
        text(f"row_max[{place}] = any ? {scores.natural(spec, 'm')} : -INFINITY;")
    if "sinks" in spec.extra:
        text("const float sum = l > 0.0f ? top + log(l) : l / l;")
        text(f"lse[{place}] = any || l != 0.0f ? sum : -INFINITY;")
    else:
        text(f"const float sum = l > 0.0f ? {scores.lse(spec, 'm', 'l')} : l / l;")
        text(f"lse[{place}] = any ? sum : -INFINITY;")


def weights(text: Text, spec: MetalSpec, parallel: str, before: Sequence[str] = ()) -> None:
    """The weights of the tile `s` in place, by the finished statistics.

    The source knows `base`, an element's lse, after the lines `before`. `parallel` is "query" or
    "key". Hidden pairs weigh 0 by their mask: exp(0 - lse) of a padded score may be
    infinite. They weigh -0.0, which no exponential is, so that `ds` knows them.
    """
    text.note("p = exp(s - lse)")
    other = "key" if parallel == "query" else "query"
    raised = scores.weight_from_lse(spec, "x", "base")
    truth = f"const bool seen = {seen(spec, f'{parallel}_inside', other)};"
    with text.either("edge") as otherwise:
        lines = [f"const int {other} = {COLUMN};", truth, f"x = seen ? {raised} : {HIDDEN};"]
        columns(text, spec, "s", [*before, *lines])
        otherwise()
        columns(text, spec, "s", [*before, f"x = {raised};"])


def ds(text: Text, spec: MetalSpec, before: Sequence[str] = ()) -> None:
    """dS = P (dP - delta) of a tile, in place of dP; the scale waits for the end of the sum.

    The source knows `row_delta` after the lines `before`. What is hidden is 0 even where dP is NaN
    or infinite.
    """
    text.note("ds = p (dp - delta)")
    weight = f"const float weight = {at(f's[j / {SIDE}]', 'e')};"
    gradient = scores.score_gradient("weight", kept_dp(spec), "row_delta")
    columns(text, spec, "dp", [*before, weight, f"x = {gradient};"])
    with text.block("if (edge)"):
        gone = f"const bool hidden = {hidden(spec, at(f's[j / {SIDE}]', 'e'))};"
        columns(text, spec, "dp", [gone, "x = hidden ? 0.0f : x;"])


def weights_and_ds(text: Text, spec: MetalSpec, parallel: str, before: Sequence[str] = ()) -> None:
    """The weights of the tile `s` of modified scores, and dS of the tile `dp`, both in place.

    The derivative of a score comes with the score itself, so both products are there. The source
    knows `base` and `row_delta` after the lines `before`. `parallel` is as for `weights`.
    """
    text.note("p = exp(modified(s) - lse), ds = p (dp - delta), changed by the modification")
    gradient = scores.score_gradient("weight", kept_dp(spec), "row_delta")
    gradient += " * changed.slope" if spec.slope_varies else ""
    lines = [
        *before,
        *pair(spec, parallel),
        f"const float weight = {scores.weight_from_lse(spec, 'score', 'base')};",
        f"{at(f's[j / {SIDE}]', 'e')} = seen ? weight : {HIDDEN};",
        f"x = seen ? {gradient} : 0.0f;",
    ]
    columns(text, spec, "dp", lines)


def pair(spec: MetalSpec, parallel: str) -> list[str]:
    """The modified `score` of an element of the tile `s`, whether the pair is `seen`, and what is
    `changed` beside the score.
    """
    other = "key" if parallel == "query" else "query"
    product, inside = at(f"s[j / {SIDE}]", "e"), f"{parallel}_inside"
    found = scores.modified(spec, product, inside, f"{other}_inside")
    lines = [
        f"const int {other} = {COLUMN};",
        f"const int {other}_inside = {INSIDE.format(other)};",
    ]
    if len(mask.values(spec)) > 1:
        lines += [f"const Modified changed = {found};", "const float score = changed.score;"]
    else:
        lines.append(f"const float score = {found};")
    meets = seen(spec, inside, other)
    meets = f"{meets} && !hides(score)" if spec.hides else f"!edge || ({meets})"
    return [*lines, f"const bool seen = {meets};"]


def kept_dp(spec: MetalSpec) -> str:
    """dP of an element, which the factor of dropout multiplies."""
    return f"({dropout.stays(f'x * {dropout.FACTOR}')})" if spec.dropout else "x"


def convert(
    text: Text, spec: MetalSpec, name: str, source: str, kind: str, *, kept: bool = False
) -> str:
    """A tile of floats as fragments of another type, and the name of what holds it now.

    `kept`: with dropout, without what falls out.
    """
    kept = kept and spec.dropout
    if kind == "float" and not kept:
        return source
    text(fragment(kind).declare(name, spec.blocks.traverse // SIDE))
    value = dropout.stays("x") if kept else "x"
    value = value if kind == "float" else f"{kind}({value})"
    columns(text, spec, source, [f"{at(f'{name}[j / {SIDE}]', 'e')} = {value};"])
    return name
