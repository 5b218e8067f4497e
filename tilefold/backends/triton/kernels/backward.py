"""The backward pass in its split form: dQ by blocks of queries, then dK and dV by blocks of keys.

Seven products instead of five, and in exchange no sum is shared between programs: no atomics, the
same bits from run to run, and one element for each query as scratch (Dao, 2023, arXiv:2307.08691,
Algorithm 2, with its loop over keys split off as in Metal FlashAttention). Scores and weights are
made again from lse. With grouped queries a program of the second kernel walks over all query heads
of its key head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tilefold.backends.triton.kernels import dropout, scores
from tilefold.backends.triton.kernels.frame import (
    RECOMPUTED,
    USUAL,
    Walk,
    add_product,
    chosen,
    fetch,
    inspect,
    load,
    multiply,
    parallel,
    rows_of,
    seen,
    take,
    tiles,
    within,
    write,
    written,
    zeros,
)
from tilefold.backends.triton.kernels.storage import storage
from tilefold.backends.triton.kernels.text import Text
from tilefold.backends.triton.spec import TritonSpec

STATISTIC = "(b.to(tl.int64) * heads + h) * len_q + q_at"
"""The place of lse, or delta, of the queries of a block."""

AfterTile = Callable[[Text, TritonSpec, Walk], None]
"""Writes what is done with `ds` of a tile."""

DQ = (
    "delta = sum (do * o)",
    "dq = 0",
    "for each tile of keys that the block of queries sees:",
    "    p = exp (q k^T - lse)",
    "    ds = p * (do v^T - delta)",
    "    dq = dq + ds k",
    "dq = dq scale",
)

DKV = (
    "dk, dv = 0, 0",
    "for each query head of the key head:",
    "    for each tile of queries that sees the block of keys:",
    "        p = exp (k q^T - lse)",
    "        dv = dv + p do",
    "        ds = p * (v do^T - delta)",
    "        dk = dk + ds q",
    "dk = dk scale",
)

DELTA = ("delta = sum (do * o)",)


def emit_dq(spec: TritonSpec) -> str:
    """The module of the kernel that writes dq, and delta for the other one."""
    text = Text()
    parallel(text, spec)
    text("h_k = h // group", "odd = 0")
    scores.factor(text, spec)
    fetch(text, spec, "q", "parallel", "h", "first_q", "within_parallel")
    delta_of(text, spec)
    text(f"tl.store(delta + {STATISTIC}, sums, mask=within_parallel)")
    scores.ratio(text, spec, "ratio", natural=False)
    scores.base_of_lse(text, f"tl.load(lse + {STATISTIC}, mask=within_parallel, other=0.0)")
    text("slope = (scale * tl.exp2(-rest))[:, None]  # weights of a row lack its 2^-rest")
    _queries_block(text, spec, USUAL)
    with text.block("if odd != 0"):
        _queries_block(text, spec, RECOMPUTED)
    return written(spec, "Attention, backward: the gradient of the queries.", DQ, text)


def _queries_block(text: Text, spec: TritonSpec, walks: Sequence[Walk]) -> None:
    """dq of the block of queries, from its first tile to memory."""
    sums = [f"dq_{i}" for i in range(len(spec.pieces("q")))]
    for name, piece in zip(sums, spec.pieces("q"), strict=True):
        text(f"{name} = {zeros(spec, 'PARALLEL', piece.width)}")
    for walk in walks:
        with tiles(text, spec, "h", walk):
            fetch(text, spec, "k", "traverse", "h_k", "start", within(walk))
            multiply(text, spec, "s", "q", "k", walk, look=True)
            if walk is not Walk.WHOLE:
                seen(text, spec, "h")
            scores.score(text, spec, walk, "h")
            weights(text, spec, walk, scores.exponent("s", "base[:, None]"))
            fetch(text, spec, "v", "traverse", "h_k", "start", within(walk))
            multiply(text, spec, "dp", "do", "v", walk)
            dropout.kept(text, spec, "h")
            dropout.scale_dp(text, spec)
            scores.score_gradient(text, spec, walk, "sums[:, None]")
            for i, name in enumerate(sums):
                take(text, spec, "k", i, within(walk))
                add_product(text, spec, name, "ds", f"k_{i}", walk)
    write(text, spec, "dq", "h", "first_q", [scores.gradient(name, "slope") for name in sums])


def delta_of(text: Text, spec: TritonSpec) -> None:
    """`sums`, delta of the block of queries; and dO, loaded once or only where it lies."""
    rows_of(text, spec, "o", "h", "first_q", "parallel")
    fetch(text, spec, "do", "parallel", "h", "first_q", "within_parallel")
    own = storage(spec.dtype)
    text(f"sums = tl.full([PARALLEL], 0.0, tl.{own.compute})")
    for i, piece in enumerate(spec.pieces("v")):
        take(text, spec, "do", i, "within_parallel")
        text(f"o_{i} = {load(spec, 'o', piece, 'within_parallel')}")
        text(f"sums += tl.sum({own.read(f'o_{i}')} * {own.read(f'do_{i}')}, 1)")
    if "dlse" in spec.extra:
        text(f"sums -= tl.load(dlse + {STATISTIC}, mask=within_parallel, other=0.0)")


def emit_dkv(spec: TritonSpec) -> str:
    """The module of the kernel that writes dk and dv."""
    text = Text()
    text("odd = 0")
    keys_block(text, spec, USUAL)
    with text.block("if odd != 0"):
        keys_block(text, spec, RECOMPUTED)
    return written(spec, "Attention, backward: the gradients of keys and values.", DKV, text)


def keys_block(
    text: Text, spec: TritonSpec, walks: Sequence[Walk], also: AfterTile | None = None
) -> None:
    """dk and dv of a block of keys, from its first tile to memory.

    `also` writes what else is done with `ds` of each tile, and then the weights of keys that are
    not there are 0 in all tiles. Such keys are 0, so their weights are exp (0 - lse), which may be
    infinite: dk and dv, which are not written there, do not care, other sums do.
    """
    parallel(text, spec)
    scores.factor(text, spec)
    scores.ratio(text, spec, "ratio", natural=False)
    for operand in ("k", "v"):
        fetch(text, spec, operand, "parallel", "h", "first_k", "within_parallel")
    own, other = range(len(spec.pieces("q"))), range(len(spec.pieces("v")))
    for operand in ("dk", "dv"):
        for i, piece in enumerate(spec.pieces(operand)):
            text(f"{operand}_{i} = {zeros(spec, 'PARALLEL', piece.width)}")
    with text.block("for member in tl.range(0, group, num_stages=1)"):
        text("h_q = h * group + member")
        for walk in walks:
            with tiles(text, spec, "h_q", walk):
                _add_tile(text, spec, walk, guarded=also is not None)
                if also is not None:
                    also(text, spec, walk)
    write(text, spec, "dk", "h", "first_k", [scores.gradient(f"dk_{i}") for i in own])
    write(text, spec, "dv", "h", "first_k", [dropout.scaled(spec, f"dv_{i}") for i in other])


def _add_tile(text: Text, spec: TritonSpec, walk: Walk, *, guarded: bool) -> None:
    """Add what a tile of queries gives to dk and dv."""
    own, other = range(len(spec.pieces("q"))), range(len(spec.pieces("v")))
    fetch(text, spec, "q", "traverse", "h_q", "start", within(walk))
    multiply(text, spec, "s", "k", "q", walk, look=True)
    if walk is not Walk.WHOLE:
        seen(text, spec, "h_q")
    scores.score(text, spec, walk, "h_q")
    text("row = (b.to(tl.int64) * heads * group + h_q) * len_q + start + row_traverse")
    guard = "" if walk is Walk.WHOLE else ", mask=within_traverse, other=0.0"
    scores.base_of_lse(text, f"tl.load(lse + row{guard})")
    weights(text, spec, walk, f"{scores.exponent('s', 'base[None, :]')} - rest[None, :]")
    if guarded and walk is Walk.WHOLE:
        text("p = tl.where(within_parallel[:, None], p, 0.0)")
    dropout.kept(text, spec, "h_q")
    text(f"weights = {storage(spec.dtype).write(dropout.weights(spec))}")
    fetch(text, spec, "do", "traverse", "h_q", "start", within(walk))
    for i in other:
        take(text, spec, "do", i, within(walk))
        inspect(text, spec, f"do_{i}", walk)
        add_product(text, spec, f"dv_{i}", "weights", f"do_{i}", walk)
    multiply(text, spec, "dp", "v", "do", walk)
    dropout.scale_dp(text, spec)
    text(f"sums = tl.load(delta + row{guard})")
    scores.score_gradient(text, spec, walk, "sums[None, :]", guarded=guarded)
    for i in own:
        take(text, spec, "q", i, within(walk))
        add_product(text, spec, f"dk_{i}", "ds", f"q_{i}", walk)


def weights(text: Text, spec: TritonSpec, walk: Walk, exponent: str) -> None:
    """`p`, from scores and `base`, which is lse to base 2: of a query that sees no key it is -inf,
    so such weights are chosen, not computed.
    """
    text(f"p = tl.exp2({exponent})")
    if chosen(spec, walk):
        text("p = tl.where(seen, p, 0.0)")


def emit_delta(spec: TritonSpec) -> str:
    """The module of the kernel that writes delta alone, for the fused form."""
    text = Text()
    parallel(text, spec)
    delta_of(text, spec)
    text(f"tl.store(delta + {STATISTIC}, sums, mask=within_parallel)")
    return written(spec, "Attention, backward: delta of each query.", DELTA, text)
