"""The frame of every attention kernel: its signature, its sizes, its place, its walk over tiles.

Only what the body names is declared, so that the source stays as short as its kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from tilefold.backends.metal.kernels import dropout, mask
from tilefold.backends.metal.kernels.arguments import Argument, arrays, position, sizes, variable
from tilefold.backends.metal.kernels.fragment import PLACE, ROW_LANES, at
from tilefold.backends.metal.kernels.msl import HEADERS, Text, kernel_head, open_text
from tilefold.backends.metal.kernels.storage import storage
from tilefold.backends.metal.spec import SIDE, MetalSpec, whole
from tilefold.masks.expression import Truth

LOWEST = "-FLT_MAX"
"""Where a running maximum starts, and the score of a pair that may not meet, by which it is known.

It is finite, since Metal's fast mathematics assume so."""

HIDDEN = "-0.0f"
"""The weight of a pair that may not meet in the backward passes: no exponential is -0.0."""

POSITION = {
    "place": "uint3 place [[threadgroup_position_in_grid]]",
    "thread_index": "ushort thread_index [[thread_index_in_threadgroup]]",
    "lane": "ushort lane [[thread_index_in_simdgroup]]",
    "simdgroup": "ushort simdgroup [[simdgroup_index_in_threadgroup]]",
}
"""The places of a thread that the GPU tells it, by name."""

_WIDE = ("row_b", "row_h")
_PAD_BYTES = 16  # behind each staged row, against bank conflicts


def masks(spec: MetalSpec) -> bool:
    """True if the rule says more than that all pairs, or none, may meet."""
    return not isinstance(spec.mask.expression, Truth)


def stage_stride(spec: MetalSpec) -> int:
    """Elements from one row of the staged tile to the next."""
    width = min(spec.blocks.head, whole(max(spec.dim, spec.dim_v)))
    return width + _PAD_BYTES // storage(spec.dtype, spec.bfloat).compute_bytes


def stage_elements(spec: MetalSpec) -> int:
    """Elements of the tile of a traversed operand in threadgroup memory."""
    return spec.blocks.traverse * stage_stride(spec)


def written(
    spec: MetalSpec, title: str, algorithm: Sequence[str], body: Text, *, headers: str = HEADERS
) -> str:
    """The whole source: the kernel `spec.entry` around its body, and what it needs before it."""
    text = Text()
    own = storage(spec.dtype, spec.bfloat)
    read = [storage(slot.dtype, spec.bfloat) for slot in spec.inputs]
    open_text(text, title, algorithm, [own, *read], headers=headers)
    used = set(re.findall(r"[A-Za-z_]\w*", str(body)))
    if "visible" in used:
        text(mask.visible(spec.mask, spec.index_bits, partial(position, spec)))
    if spec.score is not None:
        sizes_of = spec.index_bits, spec.bfloat, partial(position, spec)
        text(mask.modified(spec.score, mask.values(spec), *sizes_of, str(text)))
    if "hides" in used:
        text(mask.HIDES)
    if "philox" in used:
        text(dropout.PHILOX)
    given = [argument.declaration for argument in arrays(spec)]
    given += ["constant long* sizes", "constant float& scale"]
    given = [f"{name} [[buffer({i})]]" for i, name in enumerate(given)]
    place = used | ({"lane"} if used & {"fragment_row", "fragment_column"} else set())
    given += [text_ for name, text_ in POSITION.items() if name in place]
    text(kernel_head(spec.entry, spec.threads), *(f"    {name}," for name in given[:-1]))
    with text.block(f"    {given[-1]})"):
        for i, name in enumerate(sizes(spec)):
            if name in used:
                text(_number(spec, name, i))
        if used & {"fragment_row", "fragment_column"}:
            text.note("This lane's place in a fragment of 8x8: one row, two columns.")
            text(*PLACE)
        if "stage" in used:
            text(f"threadgroup {own.compute} stage[{stage_elements(spec)}];")
        if "oddities" in used:
            text(f"threadgroup bool oddities[{spec.simdgroups}];")
        text("", str(body))
    return str(text) + "\n"


def _number(spec: MetalSpec, name: str, position: int) -> str:
    inner = name.endswith(("_n", "_d")) and not spec.wide
    if inner or (name in sizes(spec)[:7] and name not in _WIDE):
        return f"const int {name} = int(sizes[{position}]);"
    return f"const long {name} = sizes[{position}];"


def head_of(text: Text, spec: MetalSpec, name: str, head: str, *, also: str = "") -> None:
    """Where the rows of one head of an operand begin: `k_head`; `also` is added to the offset."""
    argument = _argument(spec, name)
    offset = f"b * {name}_b + {head} * {name}_h{also}"
    text(f"device {argument.const}{argument.type}* {name}_head = {variable(name)} + {offset};")


def row_of(text: Text, spec: MetalSpec, name: str, head: str, row: str) -> None:
    """Where one row of an operand begins: `q_row`."""
    argument = _argument(spec, name)
    offset = f"b * {name}_b + {head} * {name}_h + long({row}) * {name}_n"
    text(f"device {argument.const}{argument.type}* {name}_row = {variable(name)} + {offset};")


def _argument(spec: MetalSpec, name: str) -> Argument:
    return next(argument for argument in arrays(spec) if argument.name == name)


@contextmanager
def tiles(text: Text, spec: MetalSpec, head: str = "h") -> Iterator[None]:
    """The walk over the tiles that the block row visits: `start`, `last`, `masked`, `edge`.

    A tile at an `edge` has pairs that may not meet: the rule forbids them, or the run has ended.
    """
    step = spec.blocks.traverse
    text(f"const long visited = b * row_b + {head} * row_h + block;")
    with text.block("for (long run = run_rows[visited]; run < run_rows[visited + 1]; ++run)"):
        text("const int first = int(runs[3 * run]);", "const int last = int(runs[3 * run + 1]);")
        if masks(spec):
            text("const bool masked = runs[3 * run + 2] != 0;")
        with text.block(f"for (int start = first; start < last; start += {step})"):
            overhangs = f"start + {step} > last"
            kind = "bool" if spec.hides and spec.row.computed != "entries" else "const bool"
            text(f"{kind} edge = {f'masked || {overhangs}' if masks(spec) else overhangs};")
            yield


def scored(text: Text, spec: MetalSpec) -> None:
    """From here on a tile is one at an edge where its scores may hide pairs."""
    if spec.hides:
        text.note("A score may hide pairs of any tile.")
        text("edge = true;")


def columns(text: Text, spec: MetalSpec, array: str, lines: Sequence[str]) -> None:
    """Lines for each element of a tile that this lane holds: `x`, which a line may set."""
    with (
        text.loop("j", spec.blocks.traverse, SIDE),
        text.loop("e", 2),
    ):
        element = at(f"{array}[j / {SIDE}]", "e")
        if any(re.search(r"\bx\b(?! = )", line) for line in lines):
            text(f"const float x = {element};")
        text(*(re.sub(r"^x = ", f"{element} = ", line) for line in lines))


def seen(spec: MetalSpec, parallel: str, traverse: str) -> str:
    """True if a pair of a tile at an edge may meet; the rule is not asked about what is past it."""
    within = f"{traverse} < last"
    if not masks(spec):
        return within
    queries = spec.row.parallel == "q"
    q, k = (parallel, traverse) if queries else (traverse, parallel)
    return f"{within} && (!masked || {mask.call(spec.mask, b='b', h='h', q=q, k=k)})"


def hidden(spec: MetalSpec, score: str) -> str:
    """True for an element of the tile `s` whose pair may not meet: a score, or in the backward
    passes a weight.
    """
    if spec.row.score_tiles == 1:
        return f"{score} == {LOWEST}"
    return f"as_type<uint>({score}) == 0x80000000u"


def over_row(text: Text, value: str, join: str) -> None:
    """Reduce a value over the lanes of a row.

    `join` has `{x}` for the lane's value and `{y}` for the other lane's.
    """
    for lanes in ROW_LANES:
        other = f"simd_shuffle_xor({value}, {lanes})"
        text(f"{value} = {join.replace('{x}', value).replace('{y}', other)};")
