"""The gradient of an array that a score reads: what all pairs add to its entries.

Programs own parts of the gradient. A program walks over its *units*, blocks of queries of a head,
and adds to its part what their pairs give, one unit after the other: no atomics, and the same bits
from run to run. Units whose entries differ share a part; the others are dealt to programs in turn.
The parts are added when all is done. How a tile is added follows from the indices of the entry:

    the key does not matter, q is an index or does not matter    sums of rows, once for each unit
    the query does not matter, k is an index                     sums of columns
    q and k are indices                                          the tile as it is
    else (buckets of distances)                                  entry by entry, from the first one
                                                                 in the tile to the last
"""

from __future__ import annotations

from tilefold.backends.triton.kernels import dropout, scores
from tilefold.backends.triton.kernels.backward import STATISTIC, weights
from tilefold.backends.triton.kernels.frame import (
    USUAL,
    Walk,
    fetch,
    multiply,
    parallel,
    seen,
    tiles,
    within,
    written,
)
from tilefold.backends.triton.kernels.text import Text
from tilefold.backends.triton.spec import TritonSpec
from tilefold.planning.entries import Read, reads_of

ALGORITHM = (
    "for each unit of the program:",
    "    for each tile of keys that the block of queries sees:",
    "        p = exp (q k^T - lse)",
    "        ds = p * (do v^T - delta)",
    "        for each entry of the array that the score reads:",
    "            gradient of the entry = gradient of the entry + ds (change of the score with it)",
)


def emit(spec: TritonSpec) -> str:
    """The module of the kernel that adds to the parts of the gradient of an array."""
    text = Text()
    assert spec.score is not None
    reads = reads_of(spec.score, spec.entries)
    text("part = input_parts + (place % splits).to(tl.int64) * part_size")
    with text.block("for turn in tl.range(place % splits, shared, splits, num_stages=1)"):
        text("unit = tl.load(order + place // splits * shared + turn)")
        text("block, h = unit % block_rows, unit // block_rows % heads")
        text("b = unit // block_rows // heads")
        _unit(text, spec, reads)
    return written(spec, "Attention, backward: the gradient of an array.", ALGORITHM, text)


def _unit(text: Text, spec: TritonSpec, reads: list[Read]) -> None:
    """Add what a block of queries gives to the part of the program."""
    parallel(text, spec)
    text("h_k = h // group")
    scores.factor(text, spec)
    for operand in ("q", "do"):
        fetch(text, spec, operand, "parallel", "h", "first_q", "within_parallel")
    text(f"sums = tl.load(delta + {STATISTIC}, mask=within_parallel, other=0.0)")
    scores.ratio(text, spec, "ratio", natural=False)
    scores.base_of_lse(text, f"tl.load(lse + {STATISTIC}, mask=within_parallel, other=0.0)")
    rows = [read for read in reads if read.way == "rows"]
    zero = f"tl.full([PARALLEL], 0.0, tl.{spec.statistics})"
    text(*(f"row_{read.number} = {zero}" for read in rows))
    for walk in USUAL:
        with tiles(text, spec, "h", walk):
            _tile(text, spec, reads, walk)
    if rows:  # once more where the entries of the rows are, by a key that does not matter
        text("k_safe = tl.zeros([1], tl.int32)")
        text(f"s = tl.full([PARALLEL, 1], 0.0, tl.{spec.statistics})")
        scores.modify(text, spec, "s", "h", _values(reads))
    for read in rows:
        if read.by_query:
            total, where = f"row_{read.number}[:, None]", "within_parallel[:, None]"
        else:
            total, where = f"tl.sum(row_{read.number}, 0)", ""
        _add(text, read, total, where)
    text("tl.debug_barrier()  # threads may read what others wrote in the unit before")


def _tile(text: Text, spec: TritonSpec, reads: list[Read], walk: Walk) -> None:
    """Add what a tile gives to the sums of rows, or to the part."""
    fetch(text, spec, "k", "traverse", "h_k", "start", within(walk))
    multiply(text, spec, "s", "q", "k", walk)
    if walk is not Walk.WHOLE:
        seen(text, spec, "h")
    scores.score(text, spec, walk, "h", _values(reads))
    weights(text, spec, walk, f"{scores.exponent('s', 'base[:, None]')} - rest[:, None]")
    fetch(text, spec, "v", "traverse", "h_k", "start", within(walk))
    multiply(text, spec, "dp", "do", "v", walk)
    dropout.kept(text, spec, "h")
    dropout.scale_dp(text, spec)
    text("ds = p * (dp - sums[:, None])")
    pairs = "seen" if walk is not Walk.WHOLE else "within_parallel[:, None]"
    if walk is Walk.WHOLE and spec.hides:
        pairs = f"seen & {pairs}"
    for read in reads:
        text(f"given = tl.where({pairs}, ds * slope_{read.number}, 0.0)")
        match read.way:
            case "rows":
                text(f"row_{read.number} += tl.sum(given, 1)")
            case "columns":
                there = "" if walk is Walk.WHOLE else "within_traverse[None, :]"
                _add(text, read, "tl.sum(given, 0)[None, :]", there)
            case "tile":
                _add(text, read, "given", pairs)
            case _:
                _scatter(text, read, pairs)
        if len(reads) > 1:
            text("tl.debug_barrier()")


def _scatter(text: Text, read: Read, pairs: str) -> None:
    """Add each entry that a tile reads, from the first to the last."""
    text(
        f"offset = tl.broadcast_to({_offset(read)}, [PARALLEL, TRAVERSE])",
        f"low = tl.min(tl.min(tl.where({pairs}, offset, part_size), 1), 0)",
        f"high = tl.max(tl.max(tl.where({pairs}, offset, -1), 1), 0)",
    )
    with text.block("for entry in tl.range(low, high + 1, num_stages=1)"):
        text("total = tl.sum(tl.sum(tl.where(offset == entry, given, 0.0), 1), 0)")
        text("tl.store(part + entry, tl.load(part + entry) + total)")


def _values(reads: list[Read]) -> list[str]:
    """The names of the values beside the score: of each look-up its derivative, and its indices."""
    return [name for read in reads for name in (f"slope_{read.number}", *_indices(read))]


def _indices(read: Read) -> list[str]:
    return [f"at_{read.number}_{axis}" for axis in range(read.rank)]


def _offset(read: Read) -> str:
    """The place of the entries in a part."""
    steps = [f"tl.cast({at}, tl.int64) * part_{axis}" for axis, at in enumerate(_indices(read))]
    return " + ".join(steps) or "tl.cast(0, tl.int64)"


def _add(text: Text, read: Read, total: str, where: str) -> None:
    """Add numbers to entries that differ from each other."""
    text(f"place_at = part + ({_offset(read)})")
    given = f", mask={where}" if where else ""
    loaded = f"tl.load(place_at{given}{', other=0.0' if where else ''})"
    text(f"tl.store(place_at, {loaded} + {total}{given})")
