"""What a compiler made of a kernel, read from its machine code: loops, spills and instructions.

A kernel has three walks (`frame.Walk`), of which only the first is hot, so the stack that a
compiler reports says little: a walk that is never taken may spill as it likes. What counts is
spilled in the loops over tiles, walk by walk. A loop is found as a jump backwards; whose it is, by
the lines of the text that its products come from, which both compilers write down.
"""

from __future__ import annotations

import re
from bisect import bisect, bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from tilefold.backends.triton.kernels.frame import Walk

KINDS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05.mma": r"tcgen05\.mma",
    "mma.sync": r"mma\.sync",
    "mfma": r"\bv_mfma_",
    "fma": r"\bfma\.rn\.(?:f32|f64)|\bv_(?:pk_)?fma(?:c|_)\w*f(?:32|64)",
    "cp.async": r"cp\.async\.c[ag]\.",
    "bulk copies": r"cp\.async\.bulk\.tensor",
}
"""Instructions that are counted, as PTX and amdgcn name them."""

_UNITS = re.compile(r"\b(?:HGMMA|QGMMA|HMMA|DMMA|UTC\w*MMA|v_mfma_\w+)")
_LANES = re.compile(r"\b(?:FFMA2?|DFMA|v_(?:pk_)?fma(?:c|_)\w*)\b")
_SPILL = re.compile(r"\b(?:LDL|STL)\b|\bscratch_(?:load|store)_")
_LINE = re.compile(r'//## File ".*", line (\d+)|^\s*\.loc\s+\d+ (\d+) ')
_LABEL = re.compile(r"^(\.L[\w$]*):")
_JUMP = re.compile(r"\b(?:BRA|s_cbranch_\w+|s_branch)\b.*?(\.L[\w$]+)")
_CODE = re.compile(r"^\s*(?:/\*[0-9a-f]{4,}\*/\s*)?(?:@!?U?P\w+\s+)?([A-Za-z][\w.]+)")

_PIECES = "for first_d in"
"""How loops over pieces begin in a text."""

_LEAST = 32
"""Multiply-adds of single lanes in a loop that multiplies tiles by them."""


@dataclass(frozen=True)
class _Instruction:
    text: str
    line: int


def walks(text: str) -> list[Walk | None]:
    """The walk of each line of a kernel's text, by line numbers from 1; None before the first.

    Walks stand in the text in the order of `Walk`, and each begins where runs are looked up.
    """
    begins = accumulate(int(line.lstrip().startswith("visited = ")) for line in text.splitlines())
    return [None, *([*Walk][min(n, len(Walk)) - 1] if n else None for n in begins)]


def spills(code: str, text: str) -> dict[str, int]:
    """Loads and stores of spilled registers in the loops over tiles, by walk.

    `code` is SASS with line information or amdgcn. A kernel without walks has one, "body". Those
    loops are the innermost ones that multiply: of a pipelined one, products of the first tiles
    stand before it. Where operands are streamed, loops over pieces lie within, unless the compiler
    unrolled them, and nothing is pipelined: there it is the smallest loop that holds half of a
    walk's products.
    """
    instructions, jumps = _read(code)
    owner = walks(text)
    walk_of = [owner[each.line] if each.line < len(owner) else None for each in instructions]
    units = [bool(_UNITS.search(each.text)) for each in instructions]
    least = 1
    if not any(units):
        units, least = [bool(_LANES.search(each.text)) for each in instructions], _LEAST
    loops = _loops(units, least, jumps)
    chosen: list[tuple[str, tuple[int, int]]] = []
    if _PIECES in text:
        for walk in Walk:
            places = [i for i, unit in enumerate(units) if unit and walk_of[i] is walk]
            if len(places) >= least:
                chosen.append((walk.name.lower(), _smallest(loops, places)))
    else:
        products = [walk if unit else None for unit, walk in zip(units, walk_of, strict=True)]
        for loop in loops:
            if not any(_holds(loop, other) for other in loops):
                counts = Counter(walk for walk in products[loop[0] : loop[1] + 1] if walk)
                name = counts.most_common(1)[0][0].name.lower() if counts else "body"
                chosen.append((name, loop))
    found: dict[str, int] = {}
    for name, (first, last) in chosen:
        inside = instructions[first : last + 1]
        found[name] = found.get(name, 0) + sum(bool(_SPILL.search(each.text)) for each in inside)
    return found


def instructions(code: str) -> dict[str, int]:
    """How many instructions of each kind PTX or amdgcn has; kinds that it has."""
    counts = {kind: len(re.findall(pattern, code)) for kind, pattern in KINDS.items()}
    return {kind: count for kind, count in counts.items() if count}


def _read(code: str) -> tuple[list[_Instruction], list[tuple[int, int]]]:
    """The instructions with the lines they come from, and the jumps backwards, by their places."""
    found: list[_Instruction] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, int]] = []
    line = 0
    for each in code.splitlines():
        if at := _LINE.search(each):
            line = int(at[1] or at[2]) or line
        elif label := _LABEL.match(each):
            labels[label[1]] = len(found)
        elif _CODE.match(each):
            if (jump := _JUMP.search(each)) and jump[1] in labels:
                jumps.append((labels[jump[1]], len(found)))
            found.append(_Instruction(each, line))
    return found, jumps


def _loops(
    units: Sequence[bool], least: int, jumps: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The loops with so many instructions that multiply."""
    before = [0, *accumulate(map(int, units))]
    latest: dict[int, int] = {}
    for first, last in jumps:  # several jumps to one place are one loop
        latest[first] = max(last, latest.get(first, 0))
    return [
        (first, last) for first, last in latest.items() if before[last + 1] - before[first] >= least
    ]


def _holds(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether another loop lies within a loop."""
    return loop != other and loop[0] <= other[0] and other[1] <= loop[1]


def _smallest(loops: Sequence[tuple[int, int]], places: Sequence[int]) -> tuple[int, int]:
    """The smallest loop that holds half of the places; what holds all of them, where none does."""
    holding = [
        (last - first, first, last)
        for first, last in loops
        if 2 * (bisect(places, last) - bisect_left(places, first)) >= len(places)
    ]
    _, first, last = min(holding, default=(0, places[0], places[-1]))
    return first, last
