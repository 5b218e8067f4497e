"""The running softmax of a block of queries, to base 2 (Milakov and Gimelshein, 2018).

The maximum `m` is one of rounded exponents, scores times `factor`, from which the exponents of
weights are subtracted in one fused multiply-add (see `scores`). It starts at `lowest`, which is
finite, so that scores of -inf are weights of 0 and no difference is NaN. A query whose scores are
-inf alone gets m = -inf at the end (`lost`), and its results are 0 / 0.

The fused multiply-add leaves 2^(rounding of m) as a common factor of a row. It cancels, but beyond
`far` it might pass the range of numbers. Then a block is done once more, one row of values at a
time (`Walk.CAREFUL`), and there m is the maximum of scores without the factor, and the difference
is multiplied.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from tilefold.backends.triton.kernels import scores
from tilefold.backends.triton.kernels.frame import Walk, seen
from tilefold.backends.triton.kernels.storage import storage
from tilefold.backends.triton.kernels.text import Text
from tilefold.backends.triton.spec import TritonSpec

LN_2 = 0.6931471805599453

MEET = "met = tl.maximum(met, tl.max(seen.to(tl.int32), 1))"
LOSE = 'm = tl.where((met != 0) & (l == 0), float("-inf"), m)'
"""Which rows met a key in a tile, and what that means at the end."""


def begin(text: Text, spec: TritonSpec) -> None:
    """No key yet."""
    kind = f"tl.{spec.statistics}"
    text(f"m = tl.full([PARALLEL], {storage(spec.dtype).lowest}, {kind})")
    text(f"l = tl.full([PARALLEL], 0.0, {kind})")


def fold(text: Text, spec: TritonSpec, sums: list[str], walk: Walk) -> None:
    """Fold a tile of scores `s` into m and l; sums are scaled; `p` are the tile's weights."""
    lowest = storage(spec.dtype).lowest
    if walk is not Walk.WHOLE:
        text('s = tl.where(seen, s, float("-inf"))')
    text("top = tl.max(s, 1)")
    if walk is Walk.WHOLE:
        text("top = tl.maximum(m, top * factor)")
    elif walk is Walk.EDGE:  # a factor of 0 makes NaN of -inf
        text(f'top = tl.maximum(m, tl.where(top == float("-inf"), {lowest}, top * factor))')
    else:
        text("top = tl.maximum(m, top)")
    weigh(text, spec, "[:, None]", walk)
    if walk is not Walk.WHOLE:
        text("p = tl.where(seen, p, 0.0)")
    text("l = l * shrink + tl.sum(p, 1)", "m = top")
    text(*(f"{total} = {total} * shrink[:, None]" for total in sums))


def weigh(text: Text, spec: TritonSpec, axis: str, walk: Walk) -> None:
    """Weights `p` of scores `s` by the new maximum `top`, and `shrink` of what was summed up."""
    if walk is Walk.CAREFUL:
        text(f"p = tl.exp2((s - top{axis}) * factor)")
        text(f"shrink = tl.exp2(tl.maximum((m - top) * factor, {storage(spec.dtype).lowest}))")
    else:
        text(f"p = tl.exp2({scores.exponent('s', f'top{axis}')})", "shrink = tl.exp2(m - top)")


def far(spec: TritonSpec) -> str:
    """Which rows of finished usual walks have scores so large that their block is done again: from
    there on the rounding of m is more than 1.
    """
    own = storage(spec.dtype)
    return f"((tl.abs(m) > {own.far}) & (m > {own.lowest}))"


def scaled(text: Text, spec: TritonSpec) -> None:
    """The maximum of a careful walk as an exponent, like that of the others."""
    lowest = storage(spec.dtype).lowest
    text(f"m = tl.where(m > {lowest}, m * factor, m)")


def lost(
    text: Text, spec: TritonSpec, head: str, tiles: AbstractContextManager[None], zeros: str
) -> None:
    """m is -inf for queries that saw scores of -inf alone; it stays `lowest` for those that saw no
    key. `tiles` is a walk over all tiles of the block, `zeros` a number for each row.
    """
    with text.block("if tl.max(((l == 0) & within_parallel).to(tl.int32), 0) != 0"):
        text(f"met = {zeros}")
        with tiles:
            seen(text, spec, head)
            text(MEET)
        text(LOSE)


def end(text: Text, spec: TritonSpec, walk: Walk) -> None:
    """`share`, by which sums are divided, and `log`, which is lse.

    A query that saw no key has sums of 0 and lse -inf; one of scores of -inf alone has NaN.
    """
    if "sinks" in spec.extra:
        _fold_sinks(text, spec, walk)
        text(f"log = tl.log2(tl.where(l == 0, 1.0, l)) * {LN_2}")
    else:
        text('l = tl.where(m == float("-inf"), float("nan"), l)')
        text("share = tl.where(l == 0, 1.0, l)", f"log = tl.log2(share) * {LN_2}")
    if walk is Walk.CAREFUL and "sinks" not in spec.extra:
        text(f"log += m * ({scores.size(spec)})")
    else:
        scores.ratio(text, spec, "unit", natural=True)
        text("log = tl.fma(m, unit, tl.fma(m, unit_rest, log))")
    text('log = tl.where(l == 0, float("-inf"), log)')
    if "max" in spec.extra:
        _largest(text, spec, walk)


def _largest(text: Text, spec: TritonSpec, walk: Walk) -> None:
    """`largest`, the maximum of a query without sinks on the natural scale, or -inf."""
    m, lowest = "highest" if "sinks" in spec.extra else "m", storage(spec.dtype).lowest
    natural = f"tl.fma({m}, unit, {m} * unit_rest)"
    if walk is Walk.CAREFUL and m == "m":
        natural = f"m * ({scores.size(spec)})"
    text(f'largest = tl.where({m} > {lowest}, {natural}, float("-inf"))')


def _fold_sinks(text: Text, spec: TritonSpec, walk: Walk) -> None:
    """Fold the sinks of head `h` into m and l; `share` is that of the sums, which have none.

    `highest` is the maximum without sinks.
    """
    if walk is Walk.CAREFUL:
        scaled(text, spec)
    text("highest = m", f"m = tl.maximum(m, {storage(spec.dtype).lowest})", "before = m")
    text(f"log2_e = {scores.constant(spec, scores.LOG2_E)}")
    with text.block("for sink_at in tl.range(0, sinks_count)"):
        text("sink = tl.load(sinks + h * sinks_h + sink_at * sinks_n)")
        text("top = tl.maximum(m, sink * log2_e)")
        text("l = l * tl.exp2(m - top) + tl.exp2(tl.fma(sink, log2_e, -top))", "m = top")
    text('l = tl.where((highest == float("-inf")) & (l == 0), float("nan"), l)')
    text("share = tl.where(l == 0, 1.0, l / tl.exp2(before - m))")


def write_statistics(text: Text, spec: TritonSpec) -> None:
    """Write `log` as lse, and the largest score of each query where the call asks for it."""
    place = "(b.to(tl.int64) * heads + h) * len_q + q_at"
    text(f"tl.store(lse + {place}, log, mask=within_parallel)")
    if "max" in spec.extra:
        text(f"tl.store(max + {place}, largest, mask=within_parallel)")
