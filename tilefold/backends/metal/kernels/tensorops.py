"""The forward pass on Metal 4's tensor operations: the same arguments and grid as `forward`.

Each simdgroup multiplies by itself, 16 rows of queries: S goes from its cooperative tensor to
threadgroup memory, where two lanes fold each row into the running softmax and leave P; the second
product reads P back from there as its left operand. O stays in cooperative tensors. So no word
depends on which lane holds which element, which differs between GPUs and versions of macOS and has
scrambled P V elsewhere. (Milakov and Gimelshein, 2018; Dao, 2023; the work is split as in
liuliu/ccv, which measured it.)

The backward pass stays with fragments. Nothing here has run on hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

from tilefold.backends.metal.kernels import frame
from tilefold.backends.metal.kernels.frame import LOWEST
from tilefold.backends.metal.kernels.matmul2d import HEADERS, Matmul2d, elements, fill
from tilefold.backends.metal.kernels.msl import Text, kernel_head
from tilefold.backends.metal.kernels.scores import factor, modified, score, weight
from tilefold.backends.metal.kernels.softmax import inverse, write_statistics
from tilefold.backends.metal.kernels.storage import storage
from tilefold.backends.metal.spec import SIMD, TENSOR_ROWS, Blocks, MetalSpec

ALGORITHM = """
for each tile of keys that the mask lets the block of queries see:
    s = q k^T scale, masked            matmul2d, then through threadgroup memory
    m' = max(m, rowmax s)
    p = exp(s - m')
    l = l exp(m - m') + rowsum p
    o = o exp(m - m') + p v            matmul2d, p from threadgroup memory
o = o / l
lse = m + log l                        0 and -inf where no key is seen
""".strip().split("\n")

SIMDGROUPS = 4
"""Simdgroups of a threadgroup. Not tuned: no GPU here."""

HEAD = 64
"""Columns of O in one cooperative tensor, 32 floats of each lane. Not tuned."""

PANEL = 256
"""Columns of O that a pass over the keys makes, 128 floats of each lane. Values with more take
several passes, each with its own S, instead of spilling O. Not tuned."""

MOST_BYTES = 32768
"""Threadgroup memory of every Apple GPU."""

_SCORE_PAD = 2  # floats behind each row of scores: then 32 lanes in 16 rows read 32 banks

PROBE = "tilefold_probe"
"""The kernel of the test compile."""

OLDEST_OS = (26, 2)
"""macOS before it lays cooperative tensors out in another way, and lacks types."""

OLDEST_GENERATION = 17
"""Apple's number of the GPU in M5 and A19, the first with matrix units behind these operations."""


def blocks(dtype: str, dim_v: int) -> Blocks:
    """The block sizes: what fits into threadgroup memory.

    >>> print(blocks("float16", 128), blocks("float32", 40))
    64 x 64 x 64 64 x 32 x 48
    """
    traverse = 32 if dtype == "float32" else 64
    return Blocks(SIMDGROUPS * TENSOR_ROWS, traverse, min(HEAD, -(-dim_v // 16) * 16))


def variant(spec: MetalSpec) -> MetalSpec:
    """A forward spec as one of this variant, with its block sizes.

    Raises NotImplementedError for what tensor operations do not serve.
    """
    _check(spec)
    return replace(
        spec,
        blocks=blocks(spec.dtype, spec.dim_v),
        cached=("o",),
        staged=False,
        tensor_ops=True,
    )


def registers(spec: MetalSpec) -> tuple[tuple[str, int], ...]:
    """Bytes of each thread that the cooperative tensors take if they are spread evenly."""
    columns = min(-(-spec.dim_v // spec.blocks.head) * spec.blocks.head, PANEL)
    bytes_per_column = TENSOR_ROWS * 4 // SIMD
    return ("o", columns * bytes_per_column), ("tiles", spec.blocks.traverse * bytes_per_column)


def threadgroup_bytes(spec: MetalSpec) -> int:
    """Threadgroup memory: scores, weights, and a factor for each row."""
    weight_bytes = storage(spec.dtype, spec.bfloat).compute_bytes
    rows, step = spec.blocks.parallel, spec.blocks.traverse
    return rows * (4 * (step + _SCORE_PAD) + weight_bytes * step + 4)


def gate(
    os_version: tuple[int, int], generation: int, test_compile: Callable[[str], object]
) -> str | None:
    """Why a machine cannot run this variant, or None.

    Arguments:
        os_version: of macOS, as (major, minor).
        generation: of the GPU as Apple counts: 13 is M1's, 17 M5's.
        test_compile: compiles a text into an object whose attributes are its kernels; either may
            raise, since the back end of Metal's compiler runs when a kernel is asked for.

    >>> gate((15, 4), 16, str)
    'tensor operations need macOS 26.2 or later, this is 15.4'
    """
    if os_version < OLDEST_OS:
        need = ".".join(map(str, OLDEST_OS))
        return (
            f"tensor operations need macOS {need} or later, this is {os_version[0]}.{os_version[1]}"
        )
    if generation < OLDEST_GENERATION:
        return (
            f"tensor operations need a GPU of generation {OLDEST_GENERATION} (M5, A19) or later, "
            f"this is of {generation}"
        )
    try:
        getattr(test_compile(probe()), PROBE)
    except Exception as error:  # whatever the front end or the back end raises
        line = str(error).strip().split("\n")[0]
        return f"a small kernel with tensor operations does not compile: {line}"
    return None


def probe() -> str:
    """A small kernel that uses what the variant uses of the headers: for a test compile."""
    text = Text()
    product = Matmul2d(16, 32, None, "float16", "float16", "float32", left_space="threadgroup")
    text(HEADERS)
    text(kernel_head(PROBE, SIMD))
    text("    device const half* a [[buffer(0)]],", "    device float* c [[buffer(1)]],")
    with text.block("    ushort lane [[thread_index_in_simdgroup]])"):
        text("threadgroup half stage[16 * 32];")
        with text.block("for (ushort i = lane; i < 16 * 32; i += 32)"):
            text("stage[i] = a[i];")
        text("simdgroup_barrier(mem_flags::mem_threadgroup);")
        text(product.left_tile.declare("left", "stage + 0", (32, 16), stride=32))
        given = "const_cast<device half*>(a)"
        text(product.right_tile.declare("right", given, (32, 32), stride=32))
        text(product.declare("product"), product.destination("sum", "product", "left", "right"))
        fill(text, "sum")
        text(product.run("product", "left", "right", "sum"))
        with elements(text, "sum"):
            text("c[row * 32 + column] = sum[i];")
    return f"{text}\n"


def emit(spec: MetalSpec) -> str:
    """The source of a forward kernel on tensor operations.

    Raises NotImplementedError for what they do not serve.
    """
    _check(spec)
    assert spec.tensor_ops, spec
    assert threadgroup_bytes(spec) <= MOST_BYTES, spec
    text = Text()
    scores, values = _products(spec)
    _place(text, spec)
    text("", scores.declare("qk"), values.declare("pv"))
    text.note("Tensors take no pointer to const, but the operands are only read.")
    queries = _read(spec, "q_row")
    text(scores.left_tile.declare("queries", queries, (spec.dim, "rows"), stride="q_n"))
    step, head = spec.blocks.traverse, spec.blocks.head
    text.note("Views of a tile of p and of v, for their types: the tensors of o are made for them.")
    for tile, name, start, extents, stride in (
        (values.left_tile, "weights_tile", _weights(spec), (step, TENSOR_ROWS), str(step)),
        (values.right_tile, "values_tile", _read(spec, "v_head"), (head, step), "v_n"),
    ):
        text(tile.declare(name, start, extents, stride=stride))
    text(factor(spec))
    panels = spec.dim_v > PANEL
    if panels:
        text.note("Columns of o and v that do not fit at once: as many passes over the keys.")
        with text.block(f"for (int panel = 0; panel < {spec.dim_v}; panel += {PANEL})"):
            _pass(text, spec, scores, values, "panel")
    else:
        _pass(text, spec, scores, values, "")
    title = "Attention, forward, on tensor operations: o = softmax(scale q k^T) v and lse."
    return frame.written(spec, title, ALGORITHM, text, headers=HEADERS)


def _products(spec: MetalSpec) -> tuple[Matmul2d, Matmul2d]:
    """S = Q K^T and O += P V."""
    kind, step = spec.dtype, spec.blocks.traverse
    scores = Matmul2d(TENSOR_ROWS, step, None, kind, kind, "float32", transpose_right=True)
    values = Matmul2d(TENSOR_ROWS, spec.blocks.head, None, kind, kind, "float32")
    return scores, replace(values, left_space="threadgroup")


def _place(text: Text, spec: MetalSpec) -> None:
    """Which rows this simdgroup makes, and where its share of threadgroup memory begins."""
    kind = storage(spec.dtype, spec.bfloat).compute
    rows, step = spec.blocks.parallel, spec.blocks.traverse
    text(
        f"threadgroup float scores[{rows * (step + _SCORE_PAD)}];",
        f"threadgroup {kind} weights[{rows * step}];",
        f"threadgroup float factors[{rows}];",
        "",
        "const int h = int(place.y);",
        "const int b = int(place.z);",
        "const int block = int(order[place.x]);",
    )
    text.note("The rows of this simdgroup. One without any is done: only simdgroups wait below.")
    text(
        f"const int first_query = block * {rows} + simdgroup * {TENSOR_ROWS};",
        f"const int rows = min({TENSOR_ROWS}, len_q - first_query);",
    )
    with text.block("if (rows <= 0)"):
        text("return;")
    text.note("In the softmax this lane folds every other column of one row.")
    text(
        "const ushort lane_row = lane / 2;",
        "const ushort side = lane % 2;",
        f"const ushort tile_row = simdgroup * {TENSOR_ROWS} + lane_row;",
        "const bool inside = lane_row < rows;",
        "const int query = min(first_query + lane_row, len_q - 1);",
        "",
    )
    for name in ("q", "o"):
        frame.row_of(text, spec, name, "h", "first_query")
    for name in ("k", "v"):
        frame.head_of(text, spec, name, "(h / group)")


def _pass(text: Text, spec: MetalSpec, scores: Matmul2d, values: Matmul2d, panel: str) -> None:
    """One pass over the keys: the running softmax, and the columns of O from `panel` on."""
    sums = [f"o_{i}" for i in range(-(-min(spec.dim_v, PANEL) // spec.blocks.head))]
    for i, name in enumerate(sums):
        text(f"const int width_{i} = {_width(spec, panel, i)};")
        text(values.destination(name, "pv", "weights_tile", "values_tile"))
        fill(text, name)
    text(f"float m = {LOWEST};", "float l = 0.0f;", "ushort any = 0;")
    with frame.tiles(text, spec):
        text(f"const int keys = min({spec.blocks.traverse}, last - start);")
        _scores(text, spec, scores)
        frame.scored(text, spec)
        _softmax(text, spec)
        _values(text, spec, values, sums, panel)
    text("l += simd_shuffle_xor(l, 1);", "any |= simd_shuffle_xor(any, 1);")
    text("simdgroup_barrier(mem_flags::mem_threadgroup);")
    _share(text, inverse(text, spec))
    own = storage(spec.dtype, spec.bfloat)
    for i, name in enumerate(sums):
        with elements(text, name), text.block(f"if (row < rows && column < width_{i})"):
            offset = f"row * o_n{_columns(spec, panel, i)} + column"
            mean = f"{name}[i] * factors[simdgroup * {TENSOR_ROWS} + row]"
            text(f"o_row[{offset}] = {own.write(mean)};")
    with text.block("if (inside && side == 0)"):
        text("const long at = (long(b) * heads_q + h) * len_q + query;")
        write_statistics(text, spec, "at")


def _scores(text: Text, spec: MetalSpec, scores: Matmul2d) -> None:
    """S of one tile, in threadgroup memory."""
    stride = spec.blocks.traverse + _SCORE_PAD
    text.note("s = q k^T")
    text(f"device const {scores.right_tile.element}* k_rows = k_head + long(start) * k_n;")
    extents = (spec.dim, "keys")
    text(scores.right_tile.declare("k_tile", _read(spec, "k_rows"), extents, stride="k_n"))
    text(scores.destination("s", "qk", "queries", "k_tile"))
    fill(text, "s")
    text(scores.run("qk", "queries", "k_tile", "s"))
    with elements(text, "s"):
        text(f"scores[(simdgroup * {TENSOR_ROWS} + row) * {stride} + column] = s[i];")
    text("simdgroup_barrier(mem_flags::mem_threadgroup);")


def _softmax(text: Text, spec: MetalSpec) -> None:
    """Fold S into m and l of the lane's row; leaves P, and what O must be scaled by."""
    step = spec.blocks.traverse
    kind = storage(spec.dtype, spec.bfloat).compute
    place = f"scores[tile_row * {step + _SCORE_PAD} + j]"
    text.note("m' = max(m, rowmax s)")
    text("float m_new = m;")
    columns = f"for (ushort j = side; j < {step}; j += 2)"
    with text.block(columns):
        text("const int key = start + j;")
        meets, made = frame.seen(spec, "query", "key"), score(place, spec.negative)
        if spec.score is not None:
            text("const int key_inside = min(key, last - 1);")
            text(f"const float made = {modified(spec, place, 'query', 'key_inside')};")
            meets, made = meets + (" && !hides(made)" if spec.hides else ""), "made"
        text(
            f"const bool seen = inside && (!edge || ({meets}));",
            "any |= seen;",
            f"const float x = seen ? {made} : {LOWEST};",
            f"{place} = x;",
            "m_new = max(m_new, x);",
        )
    text("m_new = max(m_new, simd_shuffle_xor(m_new, 1));")
    text.note("p = exp(s - m'), l = l correction + rowsum p")
    text(f"const float correction = {weight('m', 'm_new')};", "m = m_new;", "l *= correction;")
    rest = [f"weights[tile_row * {step} + j] = {_as(kind, 'weight')};", "l += weight;"]
    with text.either("edge") as otherwise:
        with text.block(columns):
            hidden = f"const float weight = x == {LOWEST} ? 0.0f : {weight('x', 'm')};"
            text(f"const float x = {place};", hidden, *rest)
        otherwise()
        with text.block(columns):
            text(f"const float weight = {weight(place, 'm')};", *rest)
    _share(text, "correction")


def _share(text: Text, value: str) -> None:
    """Give a value of the lane's row to the lanes that hold the row of O."""
    with text.block("if (side == 0)"):
        text(f"factors[tile_row] = {value};")
    text("simdgroup_barrier(mem_flags::mem_threadgroup);")


def _values(text: Text, spec: MetalSpec, values: Matmul2d, sums: list[str], panel: str) -> None:
    """O = O correction + P V, with P read back as the left operand."""
    step = spec.blocks.traverse
    text.note("o = o correction + p v")
    text(values.left_tile.declare("p", _weights(spec), ("keys", TENSOR_ROWS), stride=step))
    for i, name in enumerate(sums):
        rows, tile = f"v_rows_{i}", f"v_tile_{i}"
        with text.block(f"if (width_{i} > 0)") if panel and i else nullcontext():
            with elements(text, name):
                text(f"{name}[i] *= factors[simdgroup * {TENSOR_ROWS} + row];")
            start = f"v_head + long(start) * v_n{_columns(spec, panel, i)}"
            text(f"device const {values.right_tile.element}* {rows} = {start};")
            extents = (f"width_{i}", "keys")
            text(values.right_tile.declare(tile, _read(spec, rows), extents, stride="v_n"))
            run = values.run("pv", "p", tile, name)
            if not (frame.masks(spec) or spec.hides):
                text(run)
                continue
            _watch(text, spec, values.right_tile.element, i)
            with text.either(f"wild_{i}") as otherwise:
                _add_wild(text, spec, name, i)
                otherwise()
                text(run)


def _watch(text: Text, spec: MetalSpec, number: str, i: int) -> None:
    """True if a masked tile of V holds NaN or infinities, which a weight of 0 does not hide."""
    text(f"bool wild_{i} = false;")
    with text.block("if (edge)" if spec.hides else "if (masked)"):
        with text.block(f"for (int j = lane; j < keys * width_{i}; j += 32)"):
            value = f"v_rows_{i}[j / width_{i} * v_n + j % width_{i}]"
            text(f"const float x = {value if number == 'float' else f'float({value})'};")
            # By its bits: fast mathematics take isfinite for true.
            text(f"wild_{i} |= (as_type<uint>(x) & 0x7f800000u) == 0x7f800000u;")
        text(f"wild_{i} = simd_any(wild_{i});")


def _add_wild(text: Text, spec: MetalSpec, name: str, i: int) -> None:
    """Add the pairs of a wild tile that may meet, one by one."""
    step, tile_row = spec.blocks.traverse, f"(simdgroup * {TENSOR_ROWS} + row)"
    weight = f"weights[{tile_row} * {step} + j]"
    within = f"row < rows && column < width_{i}"
    with elements(text, name), text.block(f"for (int j = 0; {within} && j < keys; ++j)"):
        if spec.hides:
            meets = f"!({frame.hidden(spec, f'scores[{tile_row} * {step + _SCORE_PAD} + j]')})"
        else:
            text("const int key = start + j;")
            meets = frame.seen(spec, "first_query + row", "key")
        with text.block(f"if ({meets})"):
            text(f"{name}[i] += float({weight}) * float(v_rows_{i}[j * v_n + column]);")


def _as(kind: str, value: str) -> str:
    return value if kind == "float" else f"{kind}({value})"


def _read(spec: MetalSpec, pointer: str) -> str:
    """A pointer to an operand as a tensor takes it."""
    return f"const_cast<device {storage(spec.dtype, spec.bfloat).memory}*>({pointer})"


def _weights(spec: MetalSpec) -> str:
    """Where the P of this simdgroup begins."""
    return f"weights + simdgroup * {TENSOR_ROWS * spec.blocks.traverse}"


def _columns(spec: MetalSpec, panel: str, i: int) -> str:
    """The offset of the first column of a cooperative tensor of O."""
    first = [*panel.split(), str(i * spec.blocks.head)]
    return "".join(f" + {term}" for term in first if term not in ("+", "0"))


def _width(spec: MetalSpec, panel: str, i: int) -> str:
    """Columns of a cooperative tensor of O that there are."""
    head = spec.blocks.head
    if panel:
        return f"min({head}, {spec.dim_v - i * head} - panel)"
    return str(min(head, spec.dim_v - i * head))


def _check(spec: MetalSpec) -> None:
    reason = ""
    if spec.kernel != "forward":
        reason = f"tensor operations make the forward pass alone, not {spec.kernel}"
    elif storage(spec.dtype, spec.bfloat).converts:
        reason = "tensor operations take bfloat16 only where the GPU multiplies it itself"
    elif not spec.unit:
        reason = "tensor operations need rows whose elements lie side by side"
    elif spec.wide:
        reason = "tensor operations count strides in 31 bits"
    elif spec.dropout:
        reason = "tensor operations drop no pairs"
    if reason:
        raise NotImplementedError(f"{reason}; use the kernels on fragments")
