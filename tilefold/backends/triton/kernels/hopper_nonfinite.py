"""Hopper's slow way through a block of queries, one key at a time, where values are not finite.

A weight of 0 times NaN or infinity is NaN. So where a masked tile holds such a value, sums are made
anew without products of tiles: only who may see a value touches it. Scores that are too large for
the usual way (`softmax.far`) go this way too.
"""

from __future__ import annotations

from collections.abc import Iterable

from tilefold.backends.triton.kernels import mask, scores, softmax
from tilefold.backends.triton.kernels.frame import Walk
from tilefold.backends.triton.kernels.gluon import Function, function, keys, row_of
from tilefold.backends.triton.kernels.storage import storage
from tilefold.backends.triton.kernels.text import Text
from tilefold.backends.triton.spec import TritonSpec


def nonfinite(spec: TritonSpec, known: Iterable[str]) -> Function:
    """True if a value of a masked tile is NaN or infinite."""
    text, own = Text(), storage(spec.dtype)
    text(
        "column = tl.arange(0, DIM_V, tl.SliceLayout(0, SUMS))",
        "odd = tl.full([DIM_V], 0, tl.int32, tl.SliceLayout(0, SUMS))",
    )
    with keys(text, "middle"):
        text(
            f"at = {row_of('v', 'h_k', 'key', 'column')}",
            f"value = {own.read(f'tl.load(at, mask=column < {spec.dim_v}, other=0.0)')}",
            "odd = odd | (value - value != 0).to(tl.int32)",
        )
    text("return tl.max(odd, 0)")
    title = "1 where a value of a masked tile is NaN or infinite, else 0."
    return function("holds_odd", title, text, known)


def one_by_one(spec: TritonSpec, known: Iterable[str]) -> Function:
    """The sums of a warpgroup without products of tiles."""
    text = Text()
    own, rows = storage(spec.dtype), "tl.SliceLayout(1, SUMS)"
    lowest = own.lowest
    text(
        f"m = tl.full([ROWS], {lowest}, tl.float32, {rows})",
        f"l = tl.full([ROWS], 0.0, tl.float32, {rows})",
        f"met = tl.full([ROWS], 0, tl.int32, {rows})",
        "total = tl.full([ROWS, DIM_V], 0.0, tl.float32, SUMS)",
        f"row = first_q + warpgroup * ROWS + tl.arange(0, ROWS, {rows})",
        "within = row < len_q",
        "q_safe = tl.minimum(row, len_q - 1)",
        "column_v = tl.arange(0, DIM_V, tl.SliceLayout(0, SUMS))",
        "column = tl.arange(0, DIM, tl.SliceLayout(0, QUERIES))",
        "q_at = first_q + warpgroup * ROWS + tl.arange(0, ROWS, tl.SliceLayout(1, QUERIES))",
        f"q_rows = {row_of('q', 'h', 'q_at[:, None]', 'column[None, :]')}",
        f"there = (q_at < len_q)[:, None] & (column < {spec.dim})[None, :]",
    )
    with keys(text, "begin"):
        text(
            f"query = {own.read('tl.load(q_rows, mask=there, other=0.0)')}",
            f"at = {row_of('k', 'h_k', 'key', 'column')}",
            f"value = {own.read(f'tl.load(at, mask=column < {spec.dim}, other=0.0)')}",
            f"s = tl.convert_layout(tl.sum(query * value[None, :], 1), {rows})",
        )
        scores.turn(text, spec)
        rule = mask.call(spec.mask, b="b", h="h", q="q_safe", k="key")
        text(
            f"seen = within & {rule}" if mask.masks(spec.mask) else "seen = within",
            'met |= (seen & (s == float("-inf"))).to(tl.int32)',
            's = tl.where(seen, s, float("-inf"))',
            "top = tl.maximum(m, s)",
        )
        softmax.weigh(text, spec, "", Walk.CAREFUL)
        text(
            "p = tl.where(seen, p, 0.0)",
            "m, l = top, l * shrink + p",
            f"at = {row_of('v', 'h_k', 'key', 'column_v')}",
            f"value = {own.read(f'tl.load(at, mask=column_v < {spec.dim_v}, other=0.0)')}",
            "added = tl.where(seen[:, None], p[:, None] * value[None, :], 0.0)",
            "total = total * shrink[:, None] + added",
        )
    text(
        softmax.LOSE,
        *(f"{name} = tl.convert_layout({name}, tl.SliceLayout(1, SCORES))" for name in "ml"),
        "return total, m, l",
    )
    title = "The sums of a warpgroup anew, one key at a time: only who may see a value touches it."
    return function("one_by_one", title, text, known)
