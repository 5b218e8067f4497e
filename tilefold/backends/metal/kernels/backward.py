"""The backward pass as two kernels: dq and delta over queries, dk and dv over keys.

Seven products instead of five, since each pass makes the scores and dP again: so both are split
over all blocks, no element is added to by two threadgroups, nothing is atomic, and two runs give
the same bits (Turner, Metal FlashAttention, 2024). Scratch is one element per row, delta.
"""

from __future__ import annotations

from tilefold.backends.metal.kernels import dropout, frame, softmax
from tilefold.backends.metal.kernels.forward import queries, row
from tilefold.backends.metal.kernels.msl import Text
from tilefold.backends.metal.kernels.products import Products
from tilefold.backends.metal.kernels.scores import GRADIENT_FACTOR, natural_factor
from tilefold.backends.metal.kernels.sinks import BASE
from tilefold.backends.metal.kernels.storage import storage
from tilefold.backends.metal.kernels.tile import column_of
from tilefold.backends.metal.spec import SIDE, MetalSpec, whole

ALGORITHM_DQ = """
delta = rowsum(do o)
for each tile of keys that the mask lets the block of queries see:
    s = q k^T scale, masked            outer product
    p = exp(s - lse)
    dp = do v^T                        outer product
    ds = p (dp - delta)
    dq = dq + ds k                     accumulate
dq = dq scale
""".strip().split("\n")

ALGORITHM_DKV = """
for each query head that reads the key head, and each tile of queries that see the block of keys:
    s = k q^T scale, masked            outer product (everything is transposed)
    p = exp(s - lse)
    dv = dv + p do                     accumulate
    dp = v do^T                        outer product
    ds = p (dp - delta)
    dk = dk + ds q                     accumulate
dk = dk scale
""".strip().split("\n")


def emit_dq(spec: MetalSpec) -> str:
    """The source of the kernel that gives dq and delta."""
    text = Text()
    products = Products(text, spec)
    queries(text, spec, "q", "o", "do", "dq")
    products.spills(("dq",), "row")
    text("")
    _delta(text, spec, products)
    text("", *natural_factor(spec))
    text(f"const float base = {BASE};", "")
    products.hold("q", "do")
    products.begin("dq")
    with frame.tiles(text, spec):
        products.tiles.begin("k", "v")
        products.outer("s", "q", "k")
        if spec.score is None:
            softmax.weights(text, spec, "query")
        products.outer("dp", "do", "v")
        dropout.bits(text, spec, "query_inside", softmax.COLUMN)
        if spec.score is None:
            softmax.ds(text, spec)
        else:
            frame.scored(text, spec)
            softmax.weights_and_ds(text, spec, "query")
        ds = softmax.convert(text, spec, "ds", "dp", products.ds_type)
        products.accumulate("dq", ds, "k", products.ds_type)
        products.end_tile("dq")
    text("")
    products.finish("dq", GRADIENT_FACTOR)
    title = "Attention, backward over queries: dq, and delta for the other kernel."
    return frame.written(spec, title, ALGORITHM_DQ, text)


def _delta(text: Text, spec: MetalSpec, products: Products) -> None:
    """delta of this lane's row, and written for the kernel of dk and dv."""
    own, width = storage(spec.dtype, spec.bfloat), spec.dim_v
    text.note("delta = rowsum(do o)")
    text("float row_delta = 0.0f;")
    with (
        text.loop("d", whole(width), SIDE, unroll=False),
        text.loop("e", 2),
    ):
        text("const ushort column = d + fragment_column + e;")
        do = own.read(f"do_row[{column_of(spec, 'do', 'column')}]", "float")
        o = own.read(f"o_row[{column_of(spec, 'o', 'column')}]", "float")
        if width % SIDE:
            text(f"row_delta += column < {width} ? {do} * {o} : 0.0f;")
        else:
            text(f"row_delta += {do} * {o};")
    frame.over_row(text, "row_delta", "{x} + {y}")
    if "dlse" in spec.extra:
        text("row_delta -= dlse[row];")
    with text.block("if (inside && fragment_column == 0)"):
        text("delta[row] = row_delta;")


def emit_dkv(spec: MetalSpec) -> str:
    """The source of the kernel that gives dk and dv."""
    text = Text()
    products = Products(text, spec)
    text("const int h_kv = int(place.y);", "const int b = int(place.z);")
    text("const int block = int(order[place.x]);", "")
    row(text, spec, "key", "len_k")
    for name in ("k", "v", "dk", "dv"):
        frame.row_of(text, spec, name, "h_kv", "key_inside")
    heads = "(long(b) * (heads_q / group) + h_kv)"
    products.spills(("dk", "dv"), f"{heads} * len_k + key_inside")
    text("", *natural_factor(spec))
    products.hold("k", "v")
    products.begin("dv", "dk")
    with text.block("for (int h = h_kv * group; h < (h_kv + 1) * group; ++h)"):
        for name in ("q", "do"):
            frame.head_of(text, spec, name, "h")
        text("const long rows = (long(b) * heads_q + h) * len_q;")
        with frame.tiles(text, spec):
            _tile(text, spec, products)
    text("")
    products.finish("dv", dropout.scaled(spec, "1.0f"))
    products.finish("dk", GRADIENT_FACTOR)
    title = "Attention, backward over keys: dk and dv."
    return frame.written(spec, title, ALGORITHM_DKV, text)


def _tile(text: Text, spec: MetalSpec, products: Products) -> None:
    products.tiles.begin("q", "do")
    # Statistics vary along a tile's columns here: read where they are used, they take no registers.
    row = f"const long row = rows + {softmax.INSIDE.format(softmax.COLUMN)};"
    base, row_delta = f"const float base = {BASE};", "const float row_delta = delta[row];"
    products.outer("s", "k", "q")
    if spec.score is None:
        softmax.weights(text, spec, "key", [row, base])
    else:
        products.outer("dp", "v", "do")
    dropout.bits(text, spec, "key_inside", softmax.COLUMN)
    if spec.score is not None:
        frame.scored(text, spec)
        softmax.weights_and_ds(text, spec, "key", [row, base, row_delta])
    p = softmax.convert(text, spec, "p", "s", products.weight_type, kept=True)
    products.accumulate("dv", p, "do", products.weight_type)
    if spec.score is None:
        products.outer("dp", "v", "do")
        softmax.ds(text, spec, [row, row_delta])
    ds = softmax.convert(text, spec, "ds", "dp", products.ds_type)
    products.accumulate("dk", ds, "q", products.ds_type)
    products.end_tile("dv", "dk")
