"""The kernel of the softmax of every row of a matrix.

    for each x of a row, neighbouring lanes at neighbouring x:
        l <- l exp(m - max(m, x)) + exp(x - max(m, x));  m <- max(m, x)
    m, l <- those of all lanes
    P <- exp(x - m) / l;  lse <- m + log l

A row is read twice and written once; the running sum is by Milakov and Gimelshein (2018,
arXiv:1805.02867, Algorithm 3). m, l and lse are float32 whatever the types. A row of -inf alone is
a query that sees no key, P = 0 and lse = -inf, where torch and SciPy give NaN. A row that holds NaN
or +inf is NaN, as there. m begins at the lowest finite number, so that -inf is never subtracted
from itself; infinities ask for Metal's safe mathematics: see `msl.SAFE_MATH`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.backends.metal.kernels.msl import Text, kernel_head, open_text
from tilefold.backends.metal.kernels.storage import storage
from tilefold.backends.metal.matmul.spec import DTYPES
from tilefold.backends.metal.spec import SIMD
from tilefold.common.check import choice

ENTRY = "tilefold_softmax"

SIZES = (
    *("rows", "width", "heads"),
    *("x_row", "x_column", "x_h", "x_b"),
    *("p_row", "p_column", "p_h", "p_b"),
)
"""The integers of a launch, in their order; strides by axis, in elements, h and b being the
two axes of a batch. lse is contiguous: batch, heads, rows."""

SIMDGROUPS = 4
"""Simdgroups of a threadgroup."""

WIDE = 1024
"""Elements above which a row has a whole threadgroup: 32 for each lane of a simdgroup; untuned."""


@dataclass(frozen=True)
class SoftmaxSpec:
    """All that changes the source: the type of X and P, how a row is shared, and lse.

    `rows` of a threadgroup: 4, a simdgroup for each, or 1 that all four share. `bfloat`: the GPU
    knows bfloat16 itself.
    """

    dtype: str
    rows: int
    bfloat: bool
    lse: bool

    def __post_init__(self) -> None:
        choice("dtype", self.dtype, DTYPES)
        choice("rows", self.rows, (1, SIMDGROUPS))

    @property
    def threads(self) -> int:
        """Threads of a threadgroup."""
        return SIMD * SIMDGROUPS


def emit(spec: SoftmaxSpec) -> str:
    """The source of a softmax."""
    text, own = Text(), storage(spec.dtype, spec.bfloat)
    owner = "a simdgroup" if spec.rows > 1 else "a threadgroup"
    algorithm = [
        f"{spec.rows} of the rows for a threadgroup of {spec.threads}:",
        "",
        "    for each x of a row, neighbouring lanes at neighbouring x:",
        "        l <- l exp(m - max(m, x)) + exp(x - max(m, x));  m <- max(m, x)",
        "    m, l <- those of all lanes",
        "    P <- exp(x - m) / l",
    ]
    if spec.lse:
        algorithm.append("    lse <- m + log l")
    title = f"P = softmax of every row of X, {spec.dtype}, {owner} for each row"
    open_text(text, title, algorithm, [own])
    head = kernel_head(ENTRY, spec.threads)
    with text.block(f"{head}{_parameters(spec, own.memory)})"):
        _place(text, spec)
        step = SIMD if spec.rows > 1 else spec.threads
        first = "lane" if spec.rows > 1 else "thread_index"
        text("float m = -FLT_MAX;", "float l = 0.0f;")
        walk = f"for (long e = {first}; e < width; e += {step})"
        with text.block(walk):
            text(f"const float value = {own.read('x[e * x_column]', 'float')};")
            with text.block("if (value > m)"):
                text("l *= exp(m - value);", "m = value;")
            text("l += exp(value - m);")
        text("", "float top = simd_max(m);", "l = simd_sum(l * exp(m - top));")
        if spec.rows == 1:
            _share(text)
        text("const float inverse = l == 0.0f ? 0.0f : 1.0f / l;")
        with text.block(walk):
            text(f"const float value = {own.read('x[e * x_column]', 'float')};")
            text(f"p[e * p_column] = {own.write('exp(value - top) * inverse')};")
        if spec.lse:
            with text.block(f"if ({first} == 0)"):
                at = "(group.z * heads + group.y) * rows + row"
                text(f"lse[{at}] = l == 0.0f ? -INFINITY : top + log(l);")
    return f"{text}\n"


def _parameters(spec: SoftmaxSpec, memory: str) -> str:
    declared = [f"device const {memory}* x", f"device {memory}* p"]
    if spec.lse:
        declared.append("device float* lse")
    declared.append("constant long* sizes")
    lines = [f"{each} [[buffer({n})]]" for n, each in enumerate(declared)]
    lines += [
        "uint3 group [[threadgroup_position_in_grid]]",
        "ushort simdgroup [[simdgroup_index_in_threadgroup]]",
        "ushort lane [[thread_index_in_simdgroup]]",
    ]
    if spec.rows == 1:
        lines.append("ushort thread_index [[thread_index_in_threadgroup]]")
    return "\n    " + ",\n    ".join(lines)


def _place(text: Text, spec: SoftmaxSpec) -> None:
    """The row of the simdgroup, or of the threadgroup."""
    wanted = {"width", "x_column", "p_column"}
    if spec.rows > 1 or spec.lse:
        wanted.add("rows")
    if spec.lse:
        wanted.add("heads")
    for n, name in enumerate(SIZES):
        if name in wanted:
            text(f"const long {name} = sizes[{n}];")
    if spec.rows > 1:
        text(f"const long row = {spec.rows} * long(group.x) + simdgroup;")
        with text.block("if (row >= rows)"):
            text("return;")
    else:
        text("const long row = group.x;")
    for name in "xp":
        row, h, b = (SIZES.index(f"{name}_{axis}") for axis in ("row", "h", "b"))
        text(f"{name} += row * sizes[{row}] + group.y * sizes[{h}] + group.z * sizes[{b}];")
    text("")


def _share(text: Text) -> None:
    """The maximum and the sum of the whole row, from the ones of each simdgroup."""
    text(
        "",
        "// Of all simdgroups.",
        f"threadgroup float tops[{SIMDGROUPS}];",
        f"threadgroup float sums[{SIMDGROUPS}];",
    )
    with text.block("if (lane == 0)"):
        text("tops[simdgroup] = top;", "sums[simdgroup] = l;")
    text("threadgroup_barrier(mem_flags::mem_threadgroup);")
    with text.loop("s", SIMDGROUPS, unroll=False):
        text("top = max(top, tops[s]);")
    text("l = 0.0f;")
    with text.loop("s", SIMDGROUPS, unroll=False):
        text("l += sums[s] * exp(tops[s] - top);")
