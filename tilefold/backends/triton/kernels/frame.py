"""The frame around every kernel: the module, the signature, the place of a program, its tiles.

An operand along a block is loaded piece by piece of the head dimension (see `spec.pieces`), rows
from a pointer that has 64 bits, so that offsets inside a tile are short:

    q_block = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h + first_q.to(tl.int64) * q_n
    q_rows = q_block + row_parallel[:, None] * q_n
    q_0 = tl.load(q_rows + d0_64[None, :] * q_d, ...)

Where a device has a unit that moves whole tiles (Hopper's TMA), the same operand is a *tensor
descriptor*, one for each width of a piece, and the tile is `q_64.load([b, h, first_q, 0])`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

from tilefold.backends.triton.kernels import arguments, dropout, mask
from tilefold.backends.triton.kernels.storage import storage
from tilefold.backends.triton.kernels.text import Text
from tilefold.backends.triton.spec import Piece, TritonSpec

HEADERS = ("import triton", "import triton.language as tl")

SIDES = {"q": "q", "o": "q", "do": "q", "dq": "q", "k": "k", "v": "k", "dk": "k", "dv": "k"}
"""The sequence along which the rows of an operand lie."""

HELPERS = {
    "is_odd": '''\
@triton.jit
def is_odd(x):
    """1 where x holds NaN or infinity, else 0."""
    wide = x.to(tl.float64) if x.dtype == tl.float64 else x.to(tl.float32)
    odd = (wide - wide != 0).to(tl.int32)
    return tl.max(tl.max(odd, 1), 0)
''',
    "stays": dropout.STAYS,
    "careful": '''\
@triton.jit
def careful(weights, seen, values, total, rows, count):
    """total + weights @ values, where values of pairs that may not meet are not looked at.

    The weight of such a pair is 0, but 0 * NaN is NaN. So here one row of values is added at a
    time, to those alone that may see it.
    """
    for i in tl.range(0, count, num_stages=1):
        here = rows == i
        value = tl.sum(tl.where(here[:, None], values, 0.0).to(total.dtype), 0)
        weight = tl.sum(tl.where(here[None, :], weights, 0.0).to(total.dtype), 1)
        meets = tl.max(tl.where(here[None, :] & seen, 1, 0), 1)
        total += tl.where(meets[:, None] != 0, weight[:, None] * value[None, :], 0.0)
    return total
''',
}
"""Functions that kernels call by name; only the called ones stand in a source."""


def dot(spec: TritonSpec, left: str, right: str, total: str = "") -> str:
    """A product of two tiles, added to a sum where one is given."""
    how = storage(spec.dtype).product.format(mode=spec.float32_mode)
    return f"tl.dot({left}, {right}{f', {total}' if total else ''}{how})"


def written(spec: TritonSpec, title: str, algorithm: Sequence[str], body: Text) -> str:
    """A whole module: the kernel `spec.entry` around its body, and what it needs before it."""
    text = Text()
    text('"""' + title, "", *(f"    {line}".rstrip() for line in algorithm), '"""', "")
    text(*HEADERS, "")
    blocks = spec.blocks
    text(f"PARALLEL = tl.constexpr({blocks.parallel})")
    text(f"TRAVERSE = tl.constexpr({blocks.traverse})", "", "")
    used = _words(str(body))
    rule = mask.visible(spec.mask, spec.index_bits) if "visible" in used else ""
    if rule:
        text(rule, "")
    if "modified" in used:
        assert spec.score is not None
        sizes = spec.index_bits, spec.statistics
        text(mask.modified(spec.score, *sizes, rule, spec.values), "")
    for name, helper in HELPERS.items():
        if name in used:
            text(helper, "")
    text.listed("@triton.jit(do_not_specialize=[", [f'"{n}"' for n in arguments.alike(spec)], "])")
    text.listed(f"def {spec.entry}(", parameters(spec), "):")
    text(*(f"    {line}".rstrip() for line in _head(spec, used)))
    text(*(f"    {line}".rstrip() for line in str(body).splitlines()))
    return str(text)


def parameters(spec: TritonSpec) -> list[str]:
    """The parameters of the text: all arguments, then the descriptors."""
    return [*arguments.names(spec), *(name for name, _ in descriptors(spec))]


def descriptors(spec: TritonSpec) -> list[tuple[str, tuple[str, int, int]]]:
    """Tensor descriptors by name, and what each is of: an operand, rows and columns of a tile."""
    if not spec.descriptors:
        return []
    found = {}
    for operand in spec.row.operands:
        if operand in ("q", "k", "v", "do"):
            own = SIDES[operand] == spec.parallel
            rows = spec.blocks.parallel if own else spec.blocks.traverse
            for piece in spec.pieces(operand):
                found[f"{operand}_{piece.width}"] = (operand, rows, piece.width)
    return [*found.items()]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", text))


def _head(spec: TritonSpec, used: set[str]) -> list[str]:
    """The place of a program, and the indices that the body names."""
    lines = ["place = tl.program_id(0)"]
    if "scale" in used and storage(spec.dtype).by_bits:
        lines.append("scale = tl.cast(scale, tl.int64).to(tl.float64, bitcast=True)")
    lines += dropout.opening(spec, used)
    if spec.kernel == "backward_inputs":  # places of several units
        pass
    elif spec.kernel == "backward":  # an owner has several blocks, one after the other
        lines += ["owner = place % splits", "h = place // splits % heads"]
        lines.append("b = place // splits // heads")
    else:
        if "order" in arguments.arrays(spec):
            lines.append("block = tl.load(order + place % block_rows)  # the heaviest first")
        else:
            lines.append("block = place % block_rows")
        lines += ["h = place // block_rows % heads", "b = place // block_rows // heads"]
    for side, rows in (("parallel", "PARALLEL"), ("traverse", "TRAVERSE")):
        if f"row_{side}" in used:
            lines.append(f"row_{side} = tl.arange(0, {rows})")
    widths = {}
    for operand in ("q", "v"):
        for piece in spec.pieces(operand):
            widths[column(piece)] = piece
    for name, piece in widths.items():
        if name in used:
            first = f"{piece.first} + " if piece.first else ""
            lines.append(f"{name} = {first}tl.arange(0, {piece.width})")
    return lines


def column(piece: Piece) -> str:
    """The name of the columns of a piece."""
    return f"d{piece.first}_{piece.width}"


def rows_of(text: Text, spec: TritonSpec, operand: str, head: str, first: str, side: str) -> None:
    """Where the rows of a block of an operand begin: `q_rows`, a column of addresses."""
    wide = ".to(tl.int64)" if spec.wide else ""
    # The index of a loop is a plain integer in the interpreter.
    at = "tl.cast(start, tl.int64)" if first == "start" else f"{first}.to(tl.int64)"
    text(
        f"{operand}_block = {operand} + b.to(tl.int64) * {operand}_b"
        f" + {head}.to(tl.int64) * {operand}_h + {at} * {operand}_n",
        f"{operand}_rows = {operand}_block + row_{side}[:, None]{wide} * {operand}_n",
    )


def address(spec: TritonSpec, operand: str, columns: str) -> str:
    """The addresses of a tile of an operand, from `<operand>_rows` on; `columns` is a row."""
    wide = ".to(tl.int64)" if spec.wide else ""
    return f"{operand}_rows + {columns}{wide} * {operand}_d"


def guard(piece: Piece, rows: str) -> str:
    """Which elements of a tile exist: `rows` says which rows do, "" where all do."""
    parts = [f"{rows}[:, None]"] if rows else []
    if piece.padded:
        parts.append(f"({column(piece)}[None, :] < {piece.stop})")
    return " & ".join(parts)


def load(spec: TritonSpec, operand: str, piece: Piece, rows: str) -> str:
    """A tile of an operand from `<operand>_rows` on; what is not there is 0."""
    return _loaded(address(spec, operand, f"{column(piece)}[None, :]"), guard(piece, rows))


def _loaded(at: str, where: str) -> str:
    """The elements at addresses, and 0 where they are not there; "" says that all of them are."""
    return f"tl.load({at}, mask={where}, other=0.0)" if where else f"tl.load({at})"


def fetch(
    text: Text, spec: TritonSpec, operand: str, side: str, head: str, first: str, rows: str
) -> None:
    """Load the block of an operand that begins at row `first` of a head: `q_0`, `q_1`, ...

    `rows` says which rows are there, "" where all are. By descriptors where the spec has them.
    Where nothing is held, only say where it lies: then `take` and `multiply` load its pieces. The
    operand of scores along the parallel axis, q or k, is negated where the scale is negative.
    """
    if not spec.descriptors:
        rows_of(text, spec, operand, head, first, side)
    if not spec.preloaded:
        return
    for i, piece in enumerate(spec.pieces(operand)):
        if spec.descriptors:
            shape = f"{side.upper()}, {piece.width}"
            at = f"[b, {head}, {first}, {piece.first}]"
            tile = f"{operand}_{piece.width}.load({at}).reshape({shape})"
        else:
            tile = load(spec, operand, piece, rows)
        text(f"{operand}_{i} = {tile}")
    if spec.negative and operand == spec.parallel:
        loaded = [f"{operand}_{i}" for i in range(len(spec.pieces(operand)))]
        text(*(f"{tile} = {storage(spec.dtype).negated(tile)}" for tile in loaded))


def take(text: Text, spec: TritonSpec, operand: str, i: int, rows: str) -> None:
    """Load piece `i` of a block, right before it is used, where `fetch` did not."""
    if not spec.preloaded:
        text(f"{operand}_{i} = {load(spec, operand, spec.pieces(operand)[i], rows)}")


def multiply(
    text: Text, spec: TritonSpec, total: str, own: str, other: str, walk: Walk, look: bool = False
) -> None:
    """`total` = own other^T: a tile of scores, from a block of an operand along each axis.

    `look`: the tile of the other axis is asked for what is not finite. Where nothing is held, a
    loop takes both piece by piece. It is a loop, not a line for each piece, because the compiler
    would load `own`, which no tile changes, before all tiles, and hold it after all.
    """
    if spec.preloaded:
        for i in range(len(spec.pieces(own))):
            if look:
                inspect(text, spec, f"{other}_{i}", walk)
            text(
                f"{total} = {dot(spec, f'{own}_{i}', f'tl.trans({other}_{i})', total if i else '')}"
            )
        return
    width, columns = spec.pieces(own)[0].width, spec.width(own)
    text(f"{total} = {zeros(spec, 'PARALLEL', 'TRAVERSE')}")
    with text.block(f"for first_d in tl.range(0, {columns}, {width})"):
        text(f"d_at = (first_d + tl.arange(0, {width}))[None, :]")
        for operand, rows in ((own, "within_parallel"), (other, within(walk))):
            there = [f"{rows}[:, None]"] if rows else []
            there += [f"(d_at < {columns})"] if columns % width else []
            text(f"{operand}_part = {_loaded(address(spec, operand, 'd_at'), ' & '.join(there))}")
        if spec.negative and own == spec.parallel:
            text(f"{own}_part = {storage(spec.dtype).negated(f'{own}_part')}")
        if look:
            inspect(text, spec, f"{other}_part", walk)
        text(f"{total} = {dot(spec, f'{own}_part', f'tl.trans({other}_part)', total)}")


def write(
    text: Text, spec: TritonSpec, operand: str, head: str, first: str, values: Sequence[str]
) -> None:
    """Write the block of an operand along the parallel axis, rounded to its type, by pieces."""
    rows_of(text, spec, operand, head, first, "parallel")
    for piece, value in zip(spec.pieces(operand), values, strict=True):
        where = guard(piece, "within_parallel")
        at = address(spec, operand, f"{column(piece)}[None, :]")
        text(f"tl.store({at}, {storage(spec.dtype).write(value)}, mask={where})")


def zeros(spec: TritonSpec, rows: str, columns: int | str) -> str:
    """A sum that begins."""
    return f"tl.full([{rows}, {columns}], 0.0, tl.{spec.statistics})"


class Walk(Enum):
    """How tiles are visited.

    Most kernels visit tiles of whole pairs (`WHOLE`), then tiles at an edge (`EDGE`), where pairs
    that may not meet get weight 0. But 0 * NaN is NaN, so tiles of an edge are asked for NaN and
    infinities, and `odd` says that there were any: then, at the end, what was computed is thrown
    away, and all is done once more, slowly, with a look at each pair (`CAREFUL`). That costs the
    usual case a comparison for each element of an edge.
    """

    WHOLE = 0
    EDGE = 1
    CAREFUL = 2


USUAL = (Walk.WHOLE, Walk.EDGE)
"""The walks where all elements are finite, one after the other."""

RECOMPUTED = (Walk.CAREFUL,)
"""The walk over all tiles where some element was not finite."""


@contextmanager
def tiles(text: Text, spec: TritonSpec, head: str, walk: Walk) -> Iterator[None]:
    """The walk over the tiles of a block row: `start`, and `within_traverse` unless it is `WHOLE`.

    Tiles at an edge are few, and not pipelined: copies that are under way take shared memory.
    """
    text(f"visited = 2 * (b * row_b + {head} * row_h + block)")
    begin = "visited + 1" if walk is Walk.EDGE else "visited"
    end = "visited + 1" if walk is Walk.WHOLE else "visited + 2"
    text(f"begin, end = tl.load(run_rows + {begin}), tl.load(run_rows + {end})")
    with text.block("for run in tl.range(begin, end, num_stages=1)"):
        text("first, last = tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1)")
        stages = "" if walk is Walk.WHOLE else ", num_stages=1"
        with text.block(f"for start in tl.range(first, last, TRAVERSE{stages})"):
            if walk is not Walk.WHOLE:
                text("within_traverse = start + row_traverse < last")
            yield


def within(walk: Walk) -> str:
    """Which rows of a tile are there, as `fetch` takes it."""
    return "" if walk is Walk.WHOLE else "within_traverse"


def chosen(spec: TritonSpec, walk: Walk) -> bool:
    """True where pairs of a tile may not meet: `seen` says which do."""
    return walk is not Walk.WHOLE or spec.hides


def inspect(text: Text, spec: TritonSpec, tile: str, walk: Walk) -> None:
    """Where pairs may not meet, remember whether something was not finite.

    It is not replaced by 0: the sums are not used then, and a tile that was computed on would have
    to lie in registers whole (A100 by the compiler, bfloat16, dim 128, 128 x 64: dQ spilled 843
    numbers of a thread for each tile of an edge, and 72 now).
    """
    if walk is not Walk.CAREFUL and chosen(spec, walk):
        text(f"odd |= is_odd({tile})")


def parallel(text: Text, spec: TritonSpec) -> None:
    """The rows of the block: `first_q`, `q_at`, `within_parallel`."""
    axis = spec.parallel
    text(f"first_{axis} = block * PARALLEL", f"{axis}_at = first_{axis} + row_parallel")
    text(f"within_parallel = {axis}_at < len_{axis}")
    if mask.masks(spec.mask) or spec.score:
        text(f"{axis}_safe = tl.minimum({axis}_at, len_{axis} - 1)")


def seen(text: Text, spec: TritonSpec, head: str) -> None:
    """`seen`: which pairs of a masked tile may meet; the rule is asked about pairs that exist."""
    own, other = spec.parallel, "k" if spec.parallel == "q" else "q"
    text("seen = within_traverse[None, :] & within_parallel[:, None]")
    if mask.masks(spec.mask):
        text(f"{other}_safe = tl.minimum(start + row_traverse, len_{other} - 1)")
        given = {own: f"{own}_safe[:, None]", other: f"{other}_safe[None, :]"}
        text(f"seen = seen & {mask.call(spec.mask, b='b', h=head, q=given['q'], k=given['k'])}")


def add_product(
    text: Text,
    spec: TritonSpec,
    total: str,
    weights: str,
    values: str,
    walk: Walk,
    pairs: tuple[str, str, str] = ("seen", "row_traverse", "TRAVERSE"),
) -> None:
    """Add weights @ values to a sum.

    `pairs`, for the careful walk: which pairs may meet, and the rows of values and their number.
    """
    if walk is Walk.CAREFUL:
        may, rows, count = pairs
        text(f"{total} = careful({weights}, {may}, {values}, {total}, {rows}, {count})")
    else:
        text(f"{total} = {dot(spec, weights, values, total)}")
