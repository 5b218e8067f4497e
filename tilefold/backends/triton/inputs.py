"""The gradients of the arrays that a score reads: how many programs share the entries of an array.

Programs own parts of the gradient, and are dealt the units that share entries: see
`planning.entries`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tilefold.backends.triton.heuristics import Heuristics
from tilefold.backends.triton.launch import Launch
from tilefold.masks.expression import Lookup, RealLookup, names
from tilefold.masks.graph import ordered
from tilefold.planning.entries import Added, apart, entries_of, parts_of, units
from tilefold.planning.masked import Scored
from tilefold.problems.attention import ITEM_BYTES, Problem


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
        enough = -(-heuristics.enough_programs // max(1, groups))
        parts = parts_of(given, shared, enough, heuristics)
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
