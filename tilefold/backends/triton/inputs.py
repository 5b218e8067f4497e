"""The gradients of the arrays that a score reads: which programs share the entries of an array.

An index of a pair (b, h or q) that stands alone on an axis of every look-up keeps entries apart:
units, which are blocks of queries of a head, that differ in it never add to the same entry.

    bias (heads, len_q, len_k)    h and q keep apart; the units of all batch entries share
    T5 table (heads, buckets)     h keeps apart; the units of all batch entries and blocks share
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.triton.heuristics import Heuristics
from tilefold.backends.triton.launch import Added, Launch
from tilefold.backends.triton.spec import Entry
from tilefold.masks.expression import Lookup, RealLookup, names
from tilefold.masks.graph import ordered
from tilefold.masks.pairs import kept_apart
from tilefold.masks.tables import Input
from tilefold.planning.masked import Scored
from tilefold.problems.attention import ITEM_BYTES, Problem


def entries_of(scored: Scored, number: int) -> tuple[Input | None, tuple[Entry, ...]]:
    """An input, and where its entries stand in the values of a score; None if it has none."""
    found: list[Entry] = []
    first, of_input = 1, None
    for given in scored.entries:
        entry = Entry(first, len(given.shape))
        first += 1 + entry.rank
        if given.number == number:
            of_input = given
            found.append(entry)
    return of_input, tuple(found)


def apart(scored: Scored, entries: tuple[Entry, ...]) -> frozenset[str]:
    """The indices that keep the entries of an array apart."""
    values = scored.parts.skeleton.expression.parts
    return kept_apart([values[at + 1 : at + 1 + rank] for at, rank in entries])


def units(sizes: Mapping[str, int], apart: frozenset[str]) -> tuple[NDArray[np.int32], int]:
    """The units in order, and how many in a row share their entries.

    `sizes` counts batch entries, heads and block rows. A unit is (b heads + h) block_rows + block.

    >>> units({"b": 2, "h": 1, "q": 3}, frozenset("q"))
    (array([0, 3, 1, 4, 2, 5], dtype=int32), 2)
    """
    axes = [*sizes]
    number = np.arange(np.prod([*sizes.values()]), dtype=np.int32).reshape([*sizes.values()])
    own = [axes.index(name) for name in axes if name in apart]
    others = [axis for axis in range(len(axes)) if axis not in own]
    shared = int(np.prod([number.shape[axis] for axis in others], dtype=np.int64))
    return np.ascontiguousarray(number.transpose(own + others)).ravel(), shared


def launches(
    main: Launch, problem: Problem, numbers: Sequence[int], heuristics: Heuristics
) -> list[Launch]:
    """A launch for each of these inputs, from that of a kernel that visits all pairs."""
    scored, found = main.scored, []
    assert scored is not None
    sizes = {"b": problem.batch, "h": problem.heads_q, "q": main.block_rows}
    for number in numbers:
        given, entries = entries_of(scored, number)
        if given is None:  # its gradient is 0 everywhere
            continue
        order, shared = units(sizes, apart(scored, entries))
        groups = len(order) // shared
        most = max(1, heuristics.part_elements // max(1, math.prod(given.shape)))
        enough = -(-heuristics.enough_programs // max(1, groups))
        parts = max(1, min(shared, enough, max(most, heuristics.fixed_parts)))
        found.append(
            replace(
                main,
                spec=replace(main.spec, entries=entries),
                order=order,
                splits=parts,
                programs=parts * groups,
                added=Added(given, shared),
            )
        )
    return found


def pair_bytes(scored: Scored | None) -> int:
    """The bytes of arrays that a score reads for each pair of a query and a key."""
    if scored is None:
        return 0
    score = scored.parts.skeleton.expression.parts[0]
    reads = [node for node, _ in ordered(score) if isinstance(node, RealLookup | Lookup)]
    items = {"int32": 4, **ITEM_BYTES}
    return sum(items[node.table.dtype] for node in reads if {"q", "k"} <= names(node))
