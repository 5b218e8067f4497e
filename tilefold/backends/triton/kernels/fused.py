"""The backward pass in its fused form: five products, dQ summed beside dK and dV.

A key head has several *owners*. Each walks over its own blocks of keys, one after the other, and
adds what they give dQ to a part of dQ of its own, which no other program touches; a second kernel
adds the parts in a fixed order. So there are no atomics and no locks here either, and results are
the same from run to run. The price is a float32 dQ for each owner, and reading and writing it once
for every tile. (FlashAttention-2's kernel adds to one dQ by atomics instead: Dao, 2023,
arXiv:2307.08691, section 3.1.)
"""

from __future__ import annotations

from collections.abc import Sequence

from tilefold.backends.triton.kernels import scores
from tilefold.backends.triton.kernels.backward import keys_block
from tilefold.backends.triton.kernels.frame import (
    RECOMPUTED,
    USUAL,
    Walk,
    add_product,
    chosen,
    column,
    take,
    write,
    written,
    zeros,
)
from tilefold.backends.triton.kernels.frame import parallel as rows_parallel
from tilefold.backends.triton.kernels.storage import storage
from tilefold.backends.triton.kernels.text import Text
from tilefold.backends.triton.spec import Piece, TritonSpec

FUSED = (
    "for each block of keys of the owner:",
    "    dk, dv = 0, 0",
    "    for each query head of the key head:",
    "        for each tile of queries that sees the block of keys:",
    "            p = exp (k q^T - lse)",
    "            dv = dv + p do",
    "            ds = p * (v do^T - delta)",
    "            dk = dk + ds q",
    "            dq of the owner = dq of the owner + ds^T k",
    "    dk = dk scale",
)

REDUCE = ("dq = scale (dq of the first owner + dq of the second + ...)",)


def emit(spec: TritonSpec) -> str:
    """The module of the kernel that writes dk and dv, and adds to the parts of dq."""
    text = Text()
    text("odd = 0")
    heads = "(b.to(tl.int64) * heads * group + h * group)"
    text(f"part = dq_parts + (owner.to(tl.int64) * parts_stride + {heads} * len_q) * {spec.dim}")
    _blocks(text, spec, USUAL)
    with text.block("if odd != 0"):
        _forget(text, spec)
        _blocks(text, spec, RECOMPUTED)
    return written(spec, "Attention, backward, fused.", FUSED, text)


def _blocks(text: Text, spec: TritonSpec, walks: Sequence[Walk]) -> None:
    """All blocks of keys of the owner. Threads may read elements of the part that others wrote in
    the block before: they wait for each other.
    """
    with text.block("for turn in tl.range(owner, block_rows, splits, num_stages=1)"):
        text("block = tl.load(order + turn)  # the heaviest first, dealt in turn")
        keys_block(text, spec, walks, _add_to_part)
        text("tl.debug_barrier()")


def _forget(text: Text, spec: TritonSpec) -> None:
    """The owner's part begins anew: all queries of the key head."""
    text("tl.debug_barrier()")
    with text.block("for start in tl.range(0, group * len_q, TRAVERSE, num_stages=1)"):
        text("row_n = (start + row_traverse).to(tl.int64)[:, None]")
        text("there = row_n < group * len_q")
        for piece in spec.pieces("q"):
            where = " & ".join(["there", *_columns(piece)])
            zero = zeros(spec, "TRAVERSE", piece.width)
            text(f"tl.store({_of_part(spec, piece)}, {zero}, mask={where})")
    text("tl.debug_barrier()")


def _of_part(spec: TritonSpec, piece: Piece) -> str:
    """The addresses of rows `row_n` of a part."""
    return f"part + row_n * {spec.dim} + {column(piece)}[None, :]"


def _columns(piece: Piece) -> list[str]:
    """Which columns are there, where some are not."""
    return [f"({column(piece)}[None, :] < {piece.stop})"] if piece.padded else []


def _add_to_part(text: Text, spec: TritonSpec, walk: Walk) -> None:
    """Read the owner's rows of dq, add ds^T k, write them back."""
    text("row_n = (tl.cast(member, tl.int64) * len_q + start + row_traverse)[:, None]")
    text("turned = tl.trans(ds)")
    rows = [] if walk is Walk.WHOLE else ["within_traverse[:, None]"]
    pairs = ("tl.trans(seen)", "row_parallel", "PARALLEL")
    for i, piece in enumerate(spec.pieces("q")):
        where = " & ".join([*rows, *_columns(piece)])
        text(f"at = {_of_part(spec, piece)}")
        text(f"sum_{i} = tl.load(at{f', mask={where}, other=0.0' if where else ''})")
        take(text, spec, "k", i, "within_parallel")
        key = (
            storage(spec.dtype).negated(f"k_{i}") if spec.negative and spec.preloaded else f"k_{i}"
        )
        if walk is not Walk.CAREFUL and chosen(
            spec, walk
        ):  # keys are in the block's registers as they are, for its whole tiles
            text(f"odd |= is_odd(k_{i})")
        add_product(text, spec, f"sum_{i}", "turned", key, walk, pairs)
        text(f"tl.store(at, sum_{i}{f', mask={where}' if where else ''})")


def emit_reduce(spec: TritonSpec) -> str:
    """The module of the kernel that adds the parts of dq in the order of the owners."""
    text = Text()
    rows_parallel(text, spec)
    text("row_n = ((b.to(tl.int64) * heads + h) * len_q + q_at)[:, None]")
    for i, piece in enumerate(spec.pieces("q")):
        text(f"dq_{i} = {zeros(spec, 'PARALLEL', piece.width)}")
    with text.block("for owner in tl.range(0, splits)"):
        text(f"part = dq_parts + tl.cast(owner, tl.int64) * parts_stride * {spec.dim}")
        for i, piece in enumerate(spec.pieces("q")):
            where = " & ".join(["within_parallel[:, None]", *_columns(piece)])
            text(f"dq_{i} += tl.load({_of_part(spec, piece)}, mask={where}, other=0.0)")
    values = [scores.gradient(f"dq_{i}") for i in range(len(spec.pieces("q")))]
    write(text, spec, "dq", "h", "first_q", values)
    return written(spec, "Attention, backward: the parts of dq, added.", REDUCE, text)
