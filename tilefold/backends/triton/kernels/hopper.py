"""The forward pass for Hopper (sm_90), in Gluon: a warp loads, two warpgroups take turns.

FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608), section 3. One warp of a program loads tiles
by the TMA unit into rings in shared memory; two *warpgroups* of four warps fold them into half of
the queries each, 64 rows. The tensor cores work while the exponentials do, twice over:

- warpgroups take turns in issuing products, so that one's softmax runs under the other's products;
- a warpgroup asks for the scores of a tile before it adds the tile ahead of it to the sums (`q k`
  of tile j + 1, then `p v` of tile j), so it has products under way during its own softmax.

Programs are as many as multiprocessors, and each takes one block of queries in every *round*. Heads
whose keys fit the L2 cache together (`near` of them) come together, of those the heaviest blocks
first, and every other round runs backwards; so all programs get about the same work.

It departs from the plain kernel, `forward`, in this:

- Keys and values past the end of a sequence are zeros that the TMA unit fills in.
- A weight of 0 times a value that is NaN or infinite is NaN. Values are not looked at in the loop:
  sums that come out finite have met no such value. If some do not, then at its end a program does
  the blocks again that have such a value in a masked tile, slowly, one key at a time. So it does
  with blocks whose scores are too large (`softmax.far`): there lse is infinite until then.
- Head dimensions that are not a power of two are padded, not cut into pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tilefold.backends.triton.kernels import (
    arguments,
    frame,
    hopper_nonfinite,
    mask,
    scores,
    softmax,
)
from tilefold.backends.triton.kernels.frame import USUAL, Walk
from tilefold.backends.triton.kernels.gluon import HEAD, HELPERS, Function, function, listed, row_of
from tilefold.backends.triton.kernels.hopper_launch import (
    ROW_BLOCKS,
    ROWS,
    WARPGROUPS,
    fits,
    padded,
    parameters,
)
from tilefold.backends.triton.kernels.storage import storage
from tilefold.backends.triton.kernels.text import Text
from tilefold.backends.triton.spec import TritonSpec

REGISTERS = (240, 24)
"""Registers of a thread of the second warpgroup and of the loader, as published. The first
warpgroup gets what is left: 240 too."""

RINGS = ("q_ring", "k_ring", "v_ring")
"""Tiles in shared memory: one of queries for each warpgroup, and slots for keys and values."""

BARRIERS = ("q_full", "q_free", "k_full", "k_free", "v_full", "v_free")
"""For each slot: whether the TMA unit has filled it, and whether its readers are done with it."""

LOCAL = ("warpgroup", "factor", "b", "h", "h_k", "first_q", "begin", "middle", "end")
"""The values that functions of the source hand to each other, beside arguments."""

LSE = "lse + (b.to(tl.int64) * heads + h) * len_q + q_at"
"""Where lse of the rows of a warpgroup lies."""

ALGORITHM = (
    "loader: for each tile: k -> ring, v of the tile before -> ring",
    "warpgroup:   s = q k^T of the first tile; p, m, l = softmax s",
    "        for each other tile:",
    "            in turn with the other warpgroup {",
    "                s = q k^T      of this tile, not waited for",
    "                o = o + p v    of the tile before, not waited for",
    "            }",
    "            p, m, l, shrink = softmax s, m, l",
    "            o = o shrink",
    "        o = o + p v of the last tile",
    "        o, lse = o / l, m + log l",
)


def _known(spec: TritonSpec) -> tuple[str, ...]:
    """The names that functions of the source may take."""
    return (*LOCAL, *RINGS, *BARRIERS, *parameters(spec))


def emit(spec: TritonSpec) -> str:
    """The module of the kernel."""
    assert fits(spec) is None, fits(spec)
    text = Text()
    text('"""Attention, forward, for Hopper.', "", *(f"    {line}" for line in ALGORITHM), '"""')
    text("", HEAD)
    text(*(f"{name} = tl.constexpr({value})" for name, value in _constants(spec).items()))
    text("", "", HELPERS, "")
    known = _known(spec)
    functions = [hopper_nonfinite.one_by_one(spec, known)]
    if mask.masks(spec.mask):
        text(mask.visible(spec.mask, spec.index_bits, "gluon.jit"), "")
        functions.append(hopper_nonfinite.nonfinite(spec, known))
    functions.append(_recompute(spec, *functions))
    functions += [_attend(spec, functions[-1]), _load(spec)]
    text(*(f"{function.text}\n" for function in functions))
    _kernel(text, spec, *functions[-2:])
    return str(text)


def _constants(spec: TritonSpec) -> dict[str, str]:
    """Sizes of tiles, and layouts of products: of q k^T, p v, their left side p, and rows of q."""
    rows, columns = padded(spec.dim), padded(spec.dim_v)
    product = "tl.NVMMADistributedLayout([3, 0], [4, 1], [16, {}, 16])"
    return {
        "PARALLEL": str(spec.blocks.parallel),
        "TRAVERSE": str(spec.blocks.traverse),
        "STAGES": str(spec.blocks.stages),
        "ROWS": str(ROWS),
        "DIM": str(rows),
        "DIM_V": str(columns),
        "SCORES": product.format(spec.blocks.traverse),
        "SUMS": product.format(columns),
        "WEIGHTS": f"\n    tl.DotOperandLayout(0, {product.format(columns)}, 2)\n",
        "QUERIES": product.format(rows),
    }


def _attend(spec: TritonSpec, recompute: Function) -> Function:
    """The work of a warpgroup; `recompute` is called where its sums have met NaN or infinity, or
    scores that are too large for it.
    """
    text = Text()
    _rows(text, spec)
    text(
        "q_tile = q_ring.index(warpgroup).reshape((ROWS, DIM))",
        "tile, filled = 0, 0  # tiles, and blocks of queries, so far: they name slots and phases",
    )
    text("odd = 0")
    with text.block("if warpgroup == 1"):
        text("pass_turn(warpgroup)  # the other warpgroup begins")
    with _row_blocks(text):
        frame.parallel(text, spec)
        lowest = storage(spec.dtype).lowest
        text(
            f"m = tl.full([ROWS], {lowest}, tl.float32, tl.SliceLayout(1, SCORES))",
            "l = tl.full([ROWS], 0.0, tl.float32, tl.SliceLayout(1, SCORES))",
            "total = tl.full([ROWS, DIM_V], 0.0, tl.float32, SUMS)",
        )
        with text.block("if begin < end"):
            _first_tile(text, spec)
            _other_tiles(text, spec)
            _last_values(text)
        text(f"far = {softmax.far(spec)}", "odd |= tl.max(far.to(tl.int32), 0)")
        if mask.masks(spec.mask):
            text("strange = tl.sum(total - total, 1)  # NaN where a number is odd")
            text("odd |= tl.max((strange != 0).to(tl.int32), 0)")
        zeros = "tl.full([ROWS], 0, tl.int32, tl.SliceLayout(1, SCORES))"
        softmax.lost(text, spec, "h", _again(text), zeros)
        _write(text, spec, Walk.WHOLE)
    with text.block("if warpgroup == 0"):
        text("wait_turn(warpgroup)  # the other has passed once more: no barrier is left half full")
    with text.block("if odd != 0"):
        recompute.call(text)
    title = "A warpgroup: half of the queries of each block that this program has."
    return function("attend", title, text, _known(spec))


def _recompute(
    spec: TritonSpec, one_by_one: Function, nonfinite: Function | None = None
) -> Function:
    """The second walk over the row blocks of a program."""
    text = Text()
    _rows(text, spec)
    with _row_blocks(text):
        frame.parallel(text, spec)
        text(f"before = tl.load({LSE}, mask=within_parallel, other=0.0)")
        text('odd = tl.max((before == float("inf")).to(tl.int32), 0)')
        if nonfinite:
            nonfinite.call(text, "odd |= ")
        with text.block("if odd != 0"):
            one_by_one.call(text, "total, m, l = ")
            _write(text, spec, Walk.CAREFUL)
    title = "Compute anew where scores are too large, or a masked tile holds NaN or infinities."
    return function("repair", title, text, _known(spec))


def _rows(text: Text, spec: TritonSpec) -> None:
    """The rows of a warpgroup, and the scale."""
    scores.factor(text, spec)
    text(
        "row_parallel = warpgroup * ROWS + tl.arange(0, ROWS, tl.SliceLayout(1, SCORES))",
        "row_traverse = tl.arange(0, TRAVERSE, tl.SliceLayout(0, SCORES))",
    )


@contextmanager
def _row_blocks(text: Text) -> Iterator[None]:
    """The walk over the row blocks of a program, and which tiles are visited in each.

    The source calls a row block of a head a place.
    """
    with text.block("for round in range(rounds_of(places))"):
        text(
            "block, h, b = position(place_in(round), order, places, near, block_rows, heads)",
            "h_k = h // group",
            "visited = 2 * (b * row_b + h * row_h + block)",
            "begin, middle = tl.load(run_rows + visited), tl.load(run_rows + visited + 1)",
            "end = tl.load(run_rows + visited + 2)",
        )
        yield


@contextmanager
def _again(text: Text) -> Iterator[None]:
    """The walk over all tiles of a row block, without their elements."""
    with text.block("for run in range(begin, end)"):
        text("first, last = tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1)")
        with text.block("for start in range(first, last, TRAVERSE)"):
            text("within_traverse = start + row_traverse < last")
            yield


def _scores(text: Text) -> None:
    """Issue the scores of tile number `tile`, and go on."""
    text(
        "mbarrier.wait(k_full.index(tile % STAGES), tile // STAGES & 1)",
        "wait_turn(warpgroup)",
        "k_tile = k_ring.index(tile % STAGES).reshape((TRAVERSE, DIM)).permute((1, 0))",
        "none = tl.full([ROWS, TRAVERSE], 0.0, tl.float32, SCORES)",
        "s = warpgroup_mma(q_tile, k_tile, none, use_acc=False, is_async=True)",
    )


def _values(text: Text, tile: str) -> None:
    """Issue the product of the weights with the values of a tile, and go on."""
    text(
        f"slot = ({tile}) % STAGES",
        f"mbarrier.wait(v_full.index(slot), ({tile}) // STAGES & 1)",
        "v_tile = v_ring.index(slot).reshape((TRAVERSE, DIM_V))",
        "total = warpgroup_mma(weights, v_tile, total, is_async=True)",
    )


def _fold(text: Text, spec: TritonSpec, walk: Walk) -> None:
    """From scores to weights, which stay in their registers."""
    scores.turn(text, spec)
    if walk is Walk.EDGE:
        text("within_traverse = start + row_traverse < last")
        frame.seen(text, spec, "h")
    softmax.fold(text, spec, [], walk)


def _round(text: Text, spec: TritonSpec) -> None:
    """The weights as the left side of a product, in the registers where they are."""
    weights = storage(spec.dtype).write("p")
    text(f"weights = tl.convert_layout({weights}, WEIGHTS, assert_trivial=True)")


def _first_tile(text: Text, spec: TritonSpec) -> None:
    """Scores and weights of the first tile, whose kind only the runs tell."""
    text("mbarrier.wait(q_full.index(warpgroup), filled & 1)")
    _scores(text)
    text(
        "pass_turn(warpgroup)",
        "s = warpgroup_mma_wait(0, [s])",
        "release(k_free.index(tile % STAGES))",
    )
    with text.block("if begin == middle"):
        text("start, last = tl.load(runs + 2 * begin), tl.load(runs + 2 * begin + 1)")
        _fold(text, spec, Walk.EDGE)
    with text.block("else"):
        _fold(text, spec, Walk.WHOLE)
    _round(text, spec)


def _other_tiles(text: Text, spec: TritonSpec) -> None:
    """The loops over all tiles but the first."""
    text("skip = TRAVERSE  # of the first run")
    for walk in USUAL:
        begin, end = ("middle", "end") if walk is Walk.EDGE else ("begin", "middle")
        with text.block(f"for run in range({begin}, {end})"):
            text("first, last = tl.load(runs + 2 * run) + skip, tl.load(runs + 2 * run + 1)")
            text("skip = 0")
            with text.block("for start in range(first, last, TRAVERSE)"):
                text("tile += 1")
                _scores(text)
                _values(text, "tile - 1")
                text(
                    "pass_turn(warpgroup)",
                    "s = warpgroup_mma_wait(1, [s])",
                    "release(k_free.index(tile % STAGES))",
                )
                _fold(text, spec, walk)
                text.note(
                    "What was waited for already: only a loop keeps the assembler from moving the",
                    "next wait up, before the exponentials.",
                )
                text(
                    "mbarrier.wait(v_full.index(slot), (tile - 1) // STAGES & 1)",
                    "total, weights = warpgroup_mma_wait(0, [total, weights])",
                    "release(v_free.index(slot))",
                    "total = total * tl.convert_layout(shrink, tl.SliceLayout(1, SUMS))[:, None]",
                )
                _round(text, spec)


def _last_values(text: Text) -> None:
    """The product that no scores follow; the queries are read no more."""
    text("release(q_free.index(warpgroup))", "filled += 1")
    _values(text, "tile")
    text("total = warpgroup_mma_wait(0, [total])", "release(v_free.index(slot))", "tile += 1")


def _write(text: Text, spec: TritonSpec, walk: Walk) -> None:
    """Sums divided, rounded and written from registers."""
    softmax.end(text, spec, walk)
    if walk is not Walk.CAREFUL:
        text('log = tl.where(far, float("inf"), log)  # to be computed anew, which `repair` reads')
    text(f"tl.store({LSE}, log, mask=within_parallel)")
    text(
        "share = tl.convert_layout(1.0 / share, tl.SliceLayout(1, SUMS))",
        f"total = {storage(spec.dtype).write('(total * share[:, None])')}",
        "row = first_q + warpgroup * ROWS + tl.arange(0, ROWS, tl.SliceLayout(1, SUMS))",
        "column = tl.arange(0, DIM_V, tl.SliceLayout(0, SUMS))",
        f"at = {row_of('o', 'h', 'row[:, None]', 'column[None, :]')}",
        f"tl.store(at, total, mask=(row < len_q)[:, None] & (column < {spec.dim_v})[None, :])",
    )


def _load(spec: TritonSpec) -> Function:
    """The work of the loader: it is ahead of the warpgroups by the slots of the rings at most."""
    text = Text()
    text("tile, filled = 0, 0")
    with _row_blocks(text):
        text("before = -1  # where the tile before this one starts")
        with text.block("for run in range(begin, end)"):
            text("first, last = tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1)")
            with text.block("for start in range(first, last, TRAVERSE)"):
                text(
                    "slot = tile % STAGES",
                    "mbarrier.wait(k_free.index(slot), tile // STAGES & 1 ^ 1)",
                    "fill(k_tiles, b, h_k, start, k_full.index(slot), k_ring.index(slot))",
                )
                with text.block("if before < 0"):
                    for which in range(WARPGROUPS):
                        slots = f"q_full.index({which}), q_ring.index({which})"
                        text(
                            f"mbarrier.wait(q_free.index({which}), filled & 1 ^ 1)",
                            f"row = block * PARALLEL + {which} * ROWS",
                            f"fill(q_tiles, b, h, row, {slots})",
                        )
                with text.block("else"):
                    _fill_values(text, "tile - 1")
                text("before = start", "tile += 1")
        with text.block("if begin < end"):
            _fill_values(text, "tile - 1")
            text("filled += 1")
    title = (
        "The loader: a tile's keys, then the values of the tile before, as warpgroups want them."
    )
    return function("load", title, text, _known(spec))


def _fill_values(text: Text, tile: str) -> None:
    text(
        f"slot_v = ({tile}) % STAGES",
        f"mbarrier.wait(v_free.index(slot_v), ({tile}) // STAGES & 1 ^ 1)",
        "fill(v_tiles, b, h_k, before, v_full.index(slot_v), v_ring.index(slot_v))",
    )


def _kernel(text: Text, spec: TritonSpec, attend: Function, load: Function) -> None:
    """The kernel: shared memory, barriers, and the three parts."""
    alike = [f'"{name}"' for name in (*arguments.alike(spec), *ROW_BLOCKS)]
    text.listed("@gluon.jit(do_not_specialize=[", alike, "])")
    text.listed(f"def {spec.entry}(", parameters(spec), "):")
    body = Text()
    for name, (count, rows, columns) in {
        "q": (WARPGROUPS, "ROWS", "DIM"),
        "k": ("STAGES", "TRAVERSE", "DIM"),
        "v": ("STAGES", "TRAVERSE", "DIM_V"),
    }.items():
        kind, shape = f"tl.{spec.dtype}", f"[{count}, 1, 1, {rows}, {columns}]"
        body(f"{name}_ring = tl.allocate_shared_memory({kind}, {shape}, {name}_tiles.layout)")
    body("alone: tl.constexpr = mbarrier.MBarrierLayout()")
    for name in BARRIERS:
        count = WARPGROUPS if name.startswith("q") else "STAGES"
        body(f"{name} = tl.allocate_shared_memory(tl.int64, [{count}, 1], alone)")
    body.note("A slot is full when its bytes are there, and free when its readers have said so.")
    for count, names in ((WARPGROUPS, "q"), ("STAGES", "kv")):
        with body.block(f"for slot in tl.static_range({count})"):
            for name in names:
                readers = 1 if name == "q" else WARPGROUPS
                body(
                    f"mbarrier.init({name}_full.index(slot), 1)",
                    f"mbarrier.init({name}_free.index(slot), {readers})",
                )
    body("fence_async_shared()")
    for which in range(WARPGROUPS):
        given = [str(which) if name == "warpgroup" else name for name in attend.given]
        listed(body, f"warpgroup_{which} = (", given)
    listed(body, "loader = (", load.given)
    body(
        "tl.warp_specialize(",
        f"    [({attend.name}, warpgroup_0), ({attend.name}, warpgroup_1), ({load.name}, loader)],",
        f"    [4, 1], [{REGISTERS[0]}, {REGISTERS[1]}],",
        ")",
    )
    text(*(f"    {line}".rstrip() for line in str(body).splitlines()))
