"""Few queries against many keys: the keys are split among threadgroups, and their parts merged.

One simdgroup to a threadgroup, so that a single query of a few heads still reaches every core. The
8 rows of its fragments are the queries of all heads that share a key head, packed: so its keys are
read once for all of them. Each split leaves m, l and a sum that is not yet divided by l, and the
second kernel folds the splits of a row in ascending order (Dao et al. 2023, "Flash-Decoding"):
results depend on how the keys are split, and on nothing else.
"""

from __future__ import annotations

from tilefold.backends.metal.kernels import dropout, frame, scores, softmax
from tilefold.backends.metal.kernels.forward import attend
from tilefold.backends.metal.kernels.fragment import at
from tilefold.backends.metal.kernels.msl import Text
from tilefold.backends.metal.kernels.products import Products
from tilefold.backends.metal.kernels.storage import storage
from tilefold.backends.metal.kernels.tile import column_of
from tilefold.backends.metal.spec import SIDE, SIMD, MetalSpec, whole

ALGORITHM = """
rows: the queries of all heads that read a key head, 8 at a time
for each tile of keys of this split:
    s = q k^T scale, masked            outer product
    m' = max(m, rowmax s)
    p = exp(s - m')
    l = l exp(m - m') + rowsum p
    o = o exp(m - m') + p v            accumulate
leave o, m and l of the split
""".strip().split("\n")

ALGORITHM_MERGE = """
for each query, one simdgroup, its lanes along the head dimension:
    M = max of m                       over the splits that saw a key
    L = sum of exp(m - M) l            in ascending order
    o = sum of exp(m - M) o / L
    lse = M + log L                    0 and -inf where no key is seen
""".strip().split("\n")


def emit(spec: MetalSpec) -> str:
    """The source of the kernel that leaves a part for each split of the keys."""
    text = Text()
    products = Products(text, spec)
    text("const int h_kv = int(place.y);", "const int b = int(place.z);")
    text("const int item = int(order[place.x]);", "const int block = item % splits;", "")
    _row(text, spec)
    frame.row_of(text, spec, "q", "h", "query_inside")
    for name in ("k", "v"):
        frame.head_of(text, spec, name, "h_kv")
    text("const long part = ((long(b) * heads_q + h) * splits + block) * len_q + query_inside;")
    text(f"device float* o_spill_row = part_o + part * {spec.dim_v};", "")
    attend(text, spec, products, "h_kv")
    if "o" in spec.cached:
        _leave(text, spec)
    with text.block("if (inside && fragment_column == 0)"):
        text("part_m[part] = m;")
        text.note("No sum is negative: a row that saw no key says so, and leaves no o to read.")
        text("part_l[part] = any ? l : -1.0f;")
    title = "Attention of few queries: what one split of the keys adds to o and lse."
    return frame.written(spec, title, ALGORITHM, text)


def _row(text: Text, spec: MetalSpec) -> None:
    text.note("The row of this lane: a query of one of the heads that read this key head.")
    text.note("Lanes past the last row read that one and write nothing.")
    text(f"const int packed = item / splits * {spec.blocks.parallel} + fragment_row;")
    text("const bool inside = packed < group * len_q;")
    text("const int packed_inside = min(packed, group * len_q - 1);")
    text("const int h = h_kv * group + packed_inside / len_q;")
    text("const int query_inside = packed_inside % len_q;")


def _leave(text: Text, spec: MetalSpec) -> None:
    """Write the sum from the registers to the part; a spilled sum is there already."""
    width = spec.dim_v
    with text.block("if (inside)"), text.loop("d", whole(width), SIDE), text.loop("e", 2):
        text("const ushort column = d + fragment_column + e;")
        line = f"o_spill_row[column] = {at(f'o_sum[d / {SIDE}]', 'e')};"
        if width % SIDE:
            with text.block(f"if (column < {width})"):
                text(line)
        else:
            text(line)


def emit_merge(spec: MetalSpec) -> str:
    """The source of the kernel that merges the parts of the splits."""
    text = Text()
    own = storage(spec.dtype, spec.bfloat)
    text("const int query = int(place.x);")
    text("const int h = int(place.y);", "const int b = int(place.z);")
    frame.row_of(text, spec, "o", "h", "query")
    text("const long row = long(b) * heads_q + h;")
    text.note("The parts of one query lie a step of len_q apart.")
    text("const long first = row * splits * len_q + query;")
    text("const long end = first + long(splits) * len_q;", "")
    text(scores.factor(spec), f"float m = {frame.LOWEST};", "bool any = false;")
    step = f"long({SIMD}) * len_q"
    with text.block(f"for (long i = first + long(lane) * len_q; i < end; i += {step})"):
        text("const bool seen = !(part_l[i] < 0.0f);", "any |= seen;")
        text("m = seen ? max(m, part_m[i]) : m;")
    text("any = simd_any(any);", "m = simd_max(m);", "float l = 0.0f;")
    with text.block("for (long i = first; i < end; i += len_q)"):
        share = scores.weight("part_m[i]", "m")
        text(f"l += part_l[i] < 0.0f ? 0.0f : part_l[i] * {share};")
    text(f"const float inverse = {softmax.inverse(text, spec)};", "")
    with text.block(f"for (ushort d = lane; d < {spec.dim_v}; d += {SIMD})"):
        text("float sum = 0.0f;")
        with text.block("for (long i = first; i < end; i += len_q)"):
            value = f"{share} * part_o[i * {spec.dim_v} + d]"
            text(f"sum += part_l[i] < 0.0f ? 0.0f : {value};")
        mean = own.write(dropout.scaled(spec, "sum * inverse"))
        text(f"o_row[{column_of(spec, 'o', 'd')}] = {mean};")
    with text.block("if (lane == 0)"):
        softmax.write_statistics(text, spec, "row * len_q + query")
    title = "Attention of few queries: o and lse from the parts of all splits."
    return frame.written(spec, title, ALGORITHM_MERGE, text)
