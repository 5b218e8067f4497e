"""The loops, spills and instructions of a compiled kernel, read from its machine code.

A kernel has three walks (`frame.Walk`), and only the first one is hot. So the compiler's stack size
says little: spills in a walk that is never taken do no harm. Only spills in the loops over tiles
count, walk by walk. A loop is found as a jump backwards. Its walk is found by the source lines of
its products, which both compilers record.
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
"""The instructions that are counted, by their names in PTX and amdgcn."""

_UNITS = re.compile(r"\b(?:HGMMA|QGMMA|HMMA|DMMA|UTC\w*MMA|v_mfma_\w+)")
_LANES = re.compile(r"\b(?:FFMA2?|DFMA|v_(?:pk_)?fma(?:c|_)\w*)\b")
_SPILL = re.compile(r"\b(?:LDL|STL)\b|\bscratch_(?:load|store)_")
_LINE = re.compile(r'//## File ".*", line (\d+)|^\s*\.loc\s+\d+ (\d+) ')
_LABEL = re.compile(r"^(\.L[\w$]*):")
_JUMP = re.compile(r"\b(?:BRA|s_cbranch_\w+|s_branch)\b.*?(\.L[\w$]+)")
_CODE = re.compile(r"^\s*(?:/\*[0-9a-f]{4,}\*/\s*)?(?:@!?U?P\w+\s+)?([A-Za-z][\w.]+)")

_PIECES = "for first_d in"
"""The beginning of a loop over pieces of dim in a kernel source."""

_LEAST = 32
"""The least number of multiply-adds in a loop that multiplies tiles without matrix units."""


@dataclass(frozen=True)
class _Instruction:
    text: str
    line: int


def walks(text: str) -> list[Walk | None]:
    """The walk of each line of a kernel source, by line numbers from 1; None before the first walk.

    Walks follow each other in the source in the order of `Walk`, and each begins with a look-up of
    runs.
    """
    begins = accumulate(int(line.lstrip().startswith("visited = ")) for line in text.splitlines())
    return [None, *([*Walk][min(n, len(Walk)) - 1] if n else None for n in begins)]


def spills(code: str, text: str) -> dict[str, int]:
    """The number of loads and stores of spilled registers in the loops over tiles, by walk.

    `code` is SASS with line information, or amdgcn. A kernel without walks has one entry, "body".
    The loops over tiles are the innermost loops that multiply. Before a pipelined loop stand the
    products of the first tiles. A kernel that streams its operands has loops over pieces inside,
    unless the compiler unrolled them, and no pipeline: there the loop over tiles is the smallest
    loop that holds half of a walk's products.
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
    """The number of instructions of each kind in PTX or amdgcn, without absent kinds."""
    counts = {kind: len(re.findall(pattern, code)) for kind, pattern in KINDS.items()}
    return {kind: count for kind, count in counts.items() if count}


def _read(code: str) -> tuple[list[_Instruction], list[tuple[int, int]]]:
    """The instructions with their source lines, and the jumps backwards by their places."""
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
    """The loops that contain enough multiplying instructions."""
    before = [0, *accumulate(map(int, units))]
    latest: dict[int, int] = {}
    for first, last in jumps:  # several jumps to one place are one loop
        latest[first] = max(last, latest.get(first, 0))
    return [
        (first, last) for first, last in latest.items() if before[last + 1] - before[first] >= least
    ]


def _holds(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    """True if the loop `other` lies within `loop`."""
    return loop != other and loop[0] <= other[0] and other[1] <= loop[1]


def _smallest(loops: Sequence[tuple[int, int]], places: Sequence[int]) -> tuple[int, int]:
    """The smallest loop that holds half of the places, else the range that holds all of them."""
    holding = [
        (last - first, first, last)
        for first, last in loops
        if 2 * (bisect(places, last) - bisect_left(places, first)) >= len(places)
    ]
    _, first, last = min(holding, default=(0, places[0], places[-1]))
    return first, last
