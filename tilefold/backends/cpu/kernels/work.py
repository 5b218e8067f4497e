"""How a kernel finds its work: items from a shared counter, tiles from the plan's runs.

    while (ticket = next_item++) < items:
        item = heaviest first; (batch, head, block row) = item
        for (first, last, masked) in runs of the block row:
            for tile in range(first, last, block_traverse): ...

An item owns its outputs, and its tiles come in ascending order: so results do not depend on how
many workers there are or which of them takes what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tilefold.backends.cpu.kernels import claims
from tilefold.backends.cpu.kernels.arguments import Arguments
from tilefold.backends.cpu.kernels.ir import Body, Value
from tilefold.backends.cpu.spec import KernelSpec
from tilefold.masks.expression import Truth

Tile = Callable[[Value, Value, bool], None]
"""Writes one tile: (first traversed row, how many rows, whether it needs the mask)."""


@dataclass(frozen=True)
class Item:
    """One work item: the batch entry, the head on the parallel side and the block row."""

    b: Value
    h: Value
    row: Value


@contextmanager
def items(body: Body, arguments: Arguments) -> Iterator[Item]:
    """Until the list is empty: take the next item."""
    with claims.several(body, arguments) as ticket:
        length = arguments["order_length"]
        place = body.binary("urem", ticket, length)
        picked = body.load(body.offset(arguments["order"], "i64", place), "i64", "picked")
        item = body.add(body.sub(ticket, place), picked, "item")
        row = body.binary("urem", item, arguments["item_rows"], "row")
        pair = body.binary("udiv", item, arguments["item_rows"])
        h = body.binary("urem", pair, arguments["heads"], "h")
        b = body.binary("udiv", pair, arguments["heads"], "b")
        yield Item(b, h, row)
        body.stage("claims")


@contextmanager
def runs(
    body: Body, arguments: Arguments, b: Value, h: Value, row: Value
) -> Iterator[tuple[Value, Value, Value]]:
    """Each run of a block row: its address, its first element, and one past its last one."""
    planes = body.add(body.mul(b, arguments["row_b"]), body.mul(h, arguments["row_h"]))
    entry = body.offset(arguments["rows"], "i64", body.add(planes, row))
    begin = body.load(entry, "i64", "run.first")
    end = body.load(body.offset(entry, "i64", 1), "i64", "run.last")
    with body.loop("run", begin, end) as run:
        place = body.offset(arguments["runs"], "i64", body.mul(run, 3))
        first = body.load(place, "i64", "first")
        last = body.load(body.offset(place, "i64", 1), "i64", "last")
        yield place, first, last


def tiles(
    body: Body,
    spec: KernelSpec,
    arguments: Arguments,
    b: Value,
    h: Value,
    row: Value,
    tile: Tile,
    whole: int = 1,
) -> None:
    """Write `tile` inside the loops over the runs of a block row and over the tiles of a run.

    A tile that is no multiple of `whole` counts as one that needs the mask. All do where a modified
    score may hide pairs.
    """
    with (
        runs(body, arguments, b, h, row) as (place, first, last),
        body.loop("tile", first, last, spec.block_traverse) as start,
    ):
        count = body.minimum(body.sub(last, start), spec.block_traverse, "count")
        if spec.hides:
            tile(start, count, True)
            return
        masked: Value | None = None
        if whole > 1:
            masked = body.binary("urem", count, whole, "rest")
        if not isinstance(spec.mask.expression, Truth):
            flag = body.load(body.offset(place, "i64", 2), "i64", "masked")
            masked = flag if masked is None else body.binary("or", masked, flag)
        if masked is None:
            tile(start, count, False)
        else:
            yes = body.compare("ne", masked, Value("0", "i64"))
            with body.choose(yes, "masked") as branch:
                tile(start, count, True)
                branch.otherwise()
                tile(start, count, False)
