"""The gradient of an array that a score reads: what all pairs add to its entries.

Threadgroups, of one simdgroup each, own parts of the gradient. One walks over its *units*, blocks
of 8 queries of a head, and adds to its part what their pairs give, one unit after the other: no
atomics, and the same bits from run to run. Units whose entries differ share a part; the others are
dealt to threadgroups in turn. The parts are added when all is done. How a tile is added follows
from the indices of the entry: see `planning.entries`. What is scattered is added entry by entry, in
the order of the array, so that each entry of a tile is read and written once.
"""

from __future__ import annotations

from tilefold.backends.metal.kernels import dropout, frame, scores, softmax
from tilefold.backends.metal.kernels.forward import query_rows
from tilefold.backends.metal.kernels.fragment import COLUMN_LANES
from tilefold.backends.metal.kernels.msl import Text
from tilefold.backends.metal.kernels.products import Products
from tilefold.backends.metal.kernels.sinks import BASE
from tilefold.backends.metal.spec import SIDE, MetalSpec
from tilefold.planning.entries import Read, reads_of

ALGORITHM = """
for each unit of the threadgroup, a block of queries of a head:
    for each tile of keys that the mask lets the block of queries see:
        s = q k^T scale                    outer product
        dp = do v^T                        outer product
        ds = exp(modified(s) - lse) (dp - delta)
        for each entry of the array that the score reads:
            its gradient = its gradient + ds (change of the score with it)
""".strip().split("\n")

NOWHERE = "0x7fffffff"
"""The place of a pair that adds to no entry."""

_BARRIER = "simdgroup_barrier(mem_flags::mem_device);"
_ELEMENT = f"j / {SIDE // 2} + e"


def emit(spec: MetalSpec) -> str:
    """The source of the kernel that adds to the parts of the gradient of an array."""
    assert spec.score is not None and spec.simdgroups == 1, spec
    text = Text()
    reads = reads_of(spec.score, spec.entries)
    text("const int own = int(place.x) % splits;")
    text("const long first_unit = long(place.x) / splits * shared;")
    text("device float* part = input_parts + own * part_size;")
    with text.block("for (long turn = own; turn < shared; turn += splits)"):
        text("const long unit = order[first_unit + turn];")
        text("const int block = int(unit % block_rows);")
        text("const int h = int(unit / block_rows % heads_q);")
        text("const int b = int(unit / block_rows / heads_q);", "")
        _unit(text, spec, reads)
    title = "Attention, backward: the gradient of an array that the score reads."
    return frame.written(spec, title, ALGORITHM, text)


def _unit(text: Text, spec: MetalSpec, reads: list[Read]) -> None:
    """Add what a block of queries gives to the part of the threadgroup."""
    products = Products(text, spec)
    query_rows(text, spec, "q", "do")
    text(f"const float base = {BASE};", "const float row_delta = delta[row];", "")
    products.hold("q", "do")
    rows = [read for read in reads if read.way == "rows"]
    text(*(f"float row_{read.number} = 0.0f;" for read in rows))
    with frame.tiles(text, spec):
        products.tiles.begin("k", "v")
        products.outer("s", "q", "k")
        products.outer("dp", "do", "v")
        dropout.bits(text, spec, "query_inside", softmax.COLUMN)
        _give(text, spec, reads)
        for read in reads:
            if read.way != "rows":
                _add_tile(text, spec, read)
    if rows:
        text.note("The entries of the rows: the key does not matter.")
        found = scores.modified(spec, "0.0f", "query_inside", "0")
        text(f"const Modified changed = {found};")
    for read in rows:
        total, place = f"row_{read.number}", _place(read)
        if read.by_query:
            frame.over_row(text, total, "{x} + {y}")
            where = "inside && fragment_column == 0"
        else:
            text(f"{total} = simd_sum({total});")
            where = "lane == 0"
        with text.block(f"if ({where})"):
            text(f"part[{place}] += {total};")
        text(_BARRIER)
    if not rows:
        text.note("Lanes may read what others wrote in the unit before.")
        text(_BARRIER)


def _give(text: Text, spec: MetalSpec, reads: list[Read]) -> None:
    """What each pair of a tile gives to the entries of each look-up, and their places."""
    text.note("ds = p (dp - delta), times the change of the score with each entry")
    count = spec.blocks.traverse // SIDE * 2
    lines = [
        *softmax.pair(spec, "query"),
        f"const float weight = {scores.weight_from_lse(spec, 'score', 'base')};",
        f"const float ds = {scores.score_gradient('weight', softmax.kept_dp(spec), 'row_delta')};",
        "const bool counts = inside && seen;",
    ]
    for read in reads:
        n = read.number
        given = f"counts ? ds * changed.slope_{n} : 0.0f"
        if read.way == "rows":
            lines.append(f"row_{n} += {given};")
            continue
        scattered = read.way == "scattered"
        text(f"float given_{n}[{count}];", f"{'int' if scattered else 'long'} place_{n}[{count}];")
        place = f"counts ? int({_place(read)}) : {NOWHERE}" if scattered else _place(read)
        lines += [f"given_{n}[{_ELEMENT}] = {given};", f"place_{n}[{_ELEMENT}] = {place};"]
    frame.columns(text, spec, "dp", lines)


def _add_tile(text: Text, spec: MetalSpec, read: Read) -> None:
    """Add what a tile gives to the part."""
    given, place = (f"{name}_{read.number}[{_ELEMENT}]" for name in ("given", "place"))
    key = f"const int key = {softmax.COLUMN};"
    if read.way == "tile":
        add = f"if (inside && key < last) {{ part[{place}] += {given}; }}"
        frame.columns(text, spec, "s", [key, add])
    elif read.way == "columns":
        lines = [key, f"float total = {given};"]
        lines += [f"total += simd_shuffle_xor(total, {lanes});" for lanes in COLUMN_LANES]
        add = f"if (fragment_row == 0 && key < last) {{ part[{place}] += total; }}"
        frame.columns(text, spec, "s", [*lines, add])
    else:
        _scatter(text, spec, given, place)
    text(_BARRIER)


def _scatter(text: Text, spec: MetalSpec, given: str, place: str) -> None:
    """Add the entries that a tile reads, from the first one in the array to the last."""
    with text.block(""):
        text(f"int next = {NOWHERE};")
        frame.columns(text, spec, "s", [f"next = min(next, {place});"])
        with text.block(f"for (int at = simd_min(next); at != {NOWHERE}; at = simd_min(next))"):
            text("float total = 0.0f;", f"next = {NOWHERE};")
            here = f"total += {place} == at ? {given} : 0.0f;"
            beyond = f"next = {place} > at ? min(next, {place}) : next;"
            frame.columns(text, spec, "s", [here, beyond])
            text("total = simd_sum(total);")
            with text.block("if (lane == 0)"):
                text("part[at] += total;")


def _place(read: Read) -> str:
    """The place of an entry in a part."""
    steps = [f"changed.at_{read.number}_{axis} * part_{axis}" for axis in range(read.rank)]
    return " + ".join(steps) or "0"
