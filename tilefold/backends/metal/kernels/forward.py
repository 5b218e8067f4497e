"""The forward pass: o and lse of one block of queries, 8 rows to a simdgroup.

FlashAttention-2 (Dao, 2023) in the form of Metal FlashAttention (Turner, 2024), with public
instructions alone: a row's statistics live in the lanes that hold the row, P goes from one product
to the next in registers.
"""

from __future__ import annotations

from tilefold.backends.metal.kernels import dropout, frame, softmax
from tilefold.backends.metal.kernels.msl import Text
from tilefold.backends.metal.kernels.products import Products
from tilefold.backends.metal.spec import SIDE, MetalSpec

ALGORITHM = """
for each tile of keys that the mask lets the block of queries see:
    s = q k^T scale, masked            outer product
    m' = max(m, rowmax s)
    p = exp(s - m')
    l = l exp(m - m') + rowsum p
    o = o exp(m - m') + p v            accumulate
o = o / l
lse = m + log l                        0 and -inf where no key is seen
""".strip().split("\n")


def emit(spec: MetalSpec) -> str:
    """The source of a forward kernel."""
    text = Text()
    products = Products(text, spec)
    queries(text, spec, "q", "o")
    products.spills(("o",), "row")
    text("")
    attend(text, spec, products, "h")
    text(f"const float inverse = {softmax.inverse(text, spec)};")
    products.finish("o", dropout.scaled(spec, "inverse"))
    with text.block("if (inside && fragment_column == 0)"):
        softmax.write_statistics(text, spec, "row")
    title = "Attention, forward: o = softmax(scale q k^T) v and lse = log rowsum exp(scale q k^T)."
    return frame.written(spec, title, ALGORITHM, text)


def queries(text: Text, spec: MetalSpec, *names: str) -> None:
    """A block of queries of one head: where the lane's row begins in `names`, and its keys."""
    text("const int h = int(place.y);", "const int b = int(place.z);")
    text("const int block = int(order[place.x]);", "")
    query_rows(text, spec, *names)


def query_rows(text: Text, spec: MetalSpec, *names: str) -> None:
    """The rows of a block of queries of a head, which the source knows as `block`, `h` and `b`."""
    row(text, spec, "query", "len_q")
    for name in names:
        frame.row_of(text, spec, name, "h", "query_inside")
    for name in ("k", "v"):
        frame.head_of(text, spec, name, "(h / group)")
    text("const long row = (long(b) * heads_q + h) * len_q + query_inside;")


def attend(text: Text, spec: MetalSpec, products: Products, head: str) -> None:
    """The walk of the lane's query over the tiles of keys: leaves m, l, any and the sum o.

    `head` is the one whose block rows are visited.
    """
    products.hold("q")
    products.begin("o")
    softmax.begin(text, spec)
    with frame.tiles(text, spec, head):
        products.tiles.begin("k", "v")
        products.outer("s", "q", "k")
        frame.scored(text, spec)
        softmax.fold(text, spec, products.weight_type, "query_inside")
        products.accumulate("o", "p", "v", products.weight_type, correction="correction")
        products.end_tile("o")
    text("")
    softmax.end(text)


def row(text: Text, spec: MetalSpec, parallel: str, length: str) -> None:
    """The row of this lane: lanes past the end read the last row and write nothing."""
    text.note("The row of this lane. Lanes past the end read the last one and write nothing.")
    first = f"block * {spec.blocks.parallel}"
    if spec.simdgroups > 1:
        first += f" + simdgroup * {SIDE}"
    text(f"const int {parallel} = {first} + fragment_row;")
    text(f"const bool inside = {parallel} < {length};")
    text(f"const int {parallel}_inside = min({parallel}, {length} - 1);")
