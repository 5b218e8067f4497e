"""Find the blocks of Triton kernels by what the compiler says, for `backends/triton/tables.py`.

For each architecture, operation, kind of type and head dimension, tiles are compiled from the
largest area down, with as many pipeline stages as shared memory holds. The first is taken that
spills nothing to speak of: in the loop over whole tiles at most one number for 16 scores of a
thread, at an edge four for each. Where all spill, the one that spills least for each score; blocks
without a pipeline only where all others spill a lot, and then operands that are streamed. That is a
compiler's word about registers: nothing here was timed on a GPU.

Every report is kept in a file of JSON lines, so that a search can be stopped and taken up again:

    python tools/triton_tables.py --kept reports.jsonl          # minutes to hours
    python tools/triton_tables.py --kept reports.jsonl --print  # the tables, from what is kept
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from tilefold import causal
from tilefold.backends.triton.ahead import Compiled, Compiler
from tilefold.backends.triton.architectures import Architecture, architecture
from tilefold.backends.triton.spec import WIDEST_STREAMED, Blocks, TritonSpec
from tilefold.planning.masked import MaskedProblem
from tilefold.problems.attention import Problem

KINDS = {
    "half": ("bfloat16", "ieee"),
    "tf32": ("float32", "tf32x3"),
    "float32": ("float32", "ieee"),
    "float64": ("float64", "ieee"),
}
"""The type and products that stand for a kind: TF32 in three products takes most."""

SEARCHED = {
    "half": ("sm_90", "sm_80", "sm_100", "gfx942"),
    "tf32": ("sm_80", "sm_90", "sm_100"),
    "float32": ("sm_80", "gfx942"),
    "float64": ("sm_80", "sm_100", "gfx942"),
}
"""Architectures that are searched. What multiplies as an A100 does has its rows, where they fit."""

ALSO = {("sm_80", "half"): ("sm_120",), ("sm_80", "tf32"): ("sm_120",)}
ALSO |= {("sm_80", "float32"): ("sm_120",), ("sm_100", "float64"): ("sm_120",)}
"""Architectures whose shared memory a search serves as well."""

OPERATIONS = ("forward", "backward_dq", "backward_dkv", "backward", "decode")
TRAINING = ("forward", "backward_dq", "backward_dkv")
"""Operations that are searched for other types than the half ones. Their fused backward pass has
the blocks of dK and dV, and their decoding those of `DECODING`."""

ORDER = (128, 64, 256, 96, 192, 512)
"""Head dimensions, the most used first."""

DIMS = {
    "half": (64, 96, 128, 192, 256, 512),
    "tf32": (64, 128, 256, 512),
    "float32": (64, 128, 256, 512),
    "float64": (64, 128, 256, 512),
}
"""Head dimensions of the rows by kind."""

TILES = (
    *((128, 128), (128, 64), (64, 128), (128, 32), (64, 64), (64, 32), (32, 64), (32, 32)),
    *((64, 16), (32, 16), (16, 32), (16, 16)),
)
"""Rows along the parallel and the traverse axis, in the order in which they are tried."""

WARPS = {128: (8, 16), 64: (4, 8, 16), 32: (4, 8), 16: (4, 8)}
WARPS_AMD = {128: (4, 8), 64: (4, 8), 32: (4, 2), 16: (4, 1)}
"""Warps by rows of the parallel block; on AMD they have 64 threads."""

MOST_TRIES = 5

TOLERABLE = 0.75
"""Spilled numbers for each score, for which a pipeline is not given up."""

Cell = tuple[str, str, str, int]
"""Kind, architecture, operation, head dimension."""


class Tried(NamedTuple):
    """Blocks, and the worst of what the compiler says of them with and without descriptors."""

    blocks: Blocks
    shared_bytes: int
    whole: int
    edge: int

    def good(self, threads: int) -> bool:
        """Whether they spill nothing to speak of."""
        scores = self.blocks.parallel * self.blocks.traverse // threads
        return self.whole <= scores // 16 and self.edge <= 4 * scores


def spilled(one: Tried, warp: int) -> float:
    """Numbers spilled for each score of a whole tile; those at an edge count an eighth."""
    scores = one.blocks.parallel * one.blocks.traverse / (one.blocks.warps * warp)
    return (one.whole + one.edge / 8) / scores


def least(tried: list[Tried], limit: int, warp: int) -> Tried | None:
    """The one that spills least of those that fit."""
    fitting = [one for one in tried if one.shared_bytes <= limit]
    return min(fitting, key=lambda one: spilled(one, warp), default=None)


class Search:
    """The reports that are kept, and the search that adds to them."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        self._kept: dict[str, Compiled] = {}
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                name, report = json.loads(line)
                self._kept[name] = Compiled(**report)

    def run(self, cells: list[Cell], workers: int) -> None:
        """Compile what is not kept."""
        waiting = iter(cells)

        def work() -> None:
            compiler = Compiler(limit_seconds=45)
            while True:
                with self._lock:
                    cell = next(waiting, None)
                if cell is None:
                    break
                found = self.found(cell, compiler)
                print(*cell, *(f"{limit >> 10} KiB: {row}" for limit, row in found.items()),
                      flush=True)  # fmt: skip
            compiler.end()

        threads = [threading.Thread(target=work) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def found(self, cell: Cell, compiler: Compiler | None) -> dict[int, Tried]:
        """The best blocks of a cell by bytes of shared memory; of what is kept without compiler."""
        kind, name, _, _ = cell
        device = architecture(name)
        limits = {device.shared_bytes}
        limits |= {architecture(also).shared_bytes for also in ALSO.get((name, kind), ())}
        tried: list[Tried] = []
        done: dict[int, Tried] = {}
        for streamed, stages in ((False, (3, 2)), (False, (1,)), (True, (2,))):
            tries = 0
            for blocks in candidates(cell, stages, streamed):
                if tries == MOST_TRIES or done.keys() == limits:
                    break
                if any(same_tile(blocks, one.blocks) and fits_all(one, limits) for one in tried):
                    continue  # fewer stages take no fewer registers
                one = self._try(cell, blocks, compiler)
                tries += compiler is not None
                if one is None:
                    continue
                tried.append(one)
                for limit in limits - done.keys():
                    if one.shared_bytes <= limit and one.good(blocks.warps * device.warp):
                        done[limit] = one
            for limit in limits - done.keys():
                found = least(tried, limit, device.warp)
                if found and (streamed or spilled(found, device.warp) <= TOLERABLE):
                    done[limit] = found
            if done.keys() == limits:
                break
        return done

    def _try(self, cell: Cell, blocks: Blocks, compiler: Compiler | None) -> Tried | None:
        kind, name, operation, dim = cell
        reports = []
        for moved in (False, True) if described(cell, blocks) else (False,):
            report = self._report(spec(operation, kind, dim, blocks, moved), name, compiler)
            if report is None or report.failure or report.tensor_columns > 512:
                return None
            reports.append(report)
        worst = [max(r.spills.get(walk, 0) for r in reports) for walk in ("whole", "edge")]
        return Tried(blocks, max(r.shared_bytes for r in reports), *worst)

    def _report(self, asked: TritonSpec, name: str, compiler: Compiler | None) -> Compiled | None:
        moved = "moved" if asked.descriptors else ""
        blocks = asked.blocks
        key = f"{name} {asked.kernel} {asked.dtype} {asked.float32_mode} {asked.dim} {blocks} "
        key += moved
        if key not in self._kept and compiler is not None:
            report = compiler.ask((asked, name))
            with self._lock:
                self._kept[key] = report
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, asdict(report)]) + "\n")
        return self._kept.get(key)


def spec(operation: str, kind: str, dim: int, blocks: Blocks, moved: bool = False) -> TritonSpec:
    """The kernel of a cell, causal."""
    dtype, products = KINDS[kind]
    problem = Problem.of((1, 4, 1000, dim), (1, 2, 1000, dim), dtype="float32", mask=causal())
    skeleton = MaskedProblem.of(problem).skeleton
    return TritonSpec(
        operation, dtype, dim, dim, blocks, skeleton, 32, float32_mode=products, descriptors=moved
    )


def described(cell: Cell, blocks: Blocks) -> bool:
    """Whether tiles may be moved by descriptors."""
    kind, name, operation, _ = cell
    return (
        kind == "half"
        and name in ("sm_90", "sm_100")
        and operation != "decode"
        and blocks.parallel >= 64
    )


def same_tile(a: Blocks, b: Blocks) -> bool:
    """Whether blocks differ in their stages alone."""
    return replace(a, stages=1) == replace(b, stages=1)


def fits_all(one: Tried, limits: set[int]) -> bool:
    """Whether blocks fit everywhere."""
    return one.shared_bytes <= min(limits)


def candidates(cell: Cell, stages: tuple[int, ...], streamed: bool) -> Iterator[Blocks]:
    """Blocks that may be good, in the order in which they are tried."""
    _, name, operation, _ = cell
    device = architecture(name)
    tiles = [(16, rows) for rows in (128, 64, 32, 16)] if operation == "decode" else TILES
    for parallel, traverse in tiles:
        if operation == "forward" and traverse > parallel:
            continue
        for warps in (WARPS_AMD if device.kind == "hip" else WARPS)[parallel]:
            for count in stages:
                blocks = Blocks(parallel, traverse, warps, count, streamed)
                if promising(cell, device, blocks):
                    yield blocks


def promising(cell: Cell, device: Architecture, blocks: Blocks) -> bool:
    """Whether sums and scores leave a thread registers, and the traversed tiles fit."""
    kind, name, operation, dim = cell
    parallel, traverse = blocks.parallel, blocks.traverse
    numbers = 2 if kind == "float64" else 1
    sums = {"backward_dkv": 2, "backward": 2}.get(operation, 1) * parallel * dim
    if operation == "backward":
        sums += traverse * dim
    scores = (1 if operation in ("forward", "decode") else 2) * parallel * traverse
    taken = (sums + scores) * numbers / (blocks.warps * device.warp)
    if kind == "float64" and device.float64_rows and parallel > device.float64_rows:
        return False
    fewer = device.asynchronous and parallel < 64
    if kind == "half":
        most = {"sm_80": 160, "sm_90": 192, "sm_100": 320}.get(name, 260)
        most = 160 if fewer else most
    elif kind == "tf32":
        most = {"sm_80": 72, "sm_90": 144, "sm_100": 200}[name]
        most = 72 if fewer else most
    else:
        most = 260 if device.kind == "hip" else 96 if kind == "float32" else 150
    item = {"half": 2, "float64": 8}.get(kind, 4)
    buffers = max(1, blocks.stages - 1) if device.kind == "cuda" else 1
    if name in ("sm_90", "sm_100") and kind in ("half", "tf32") and parallel >= 64:
        buffers = blocks.stages
    held = parallel * (1 if operation in ("forward", "decode") else 2) if buffers > 1 else 0
    columns = min(dim, WIDEST_STREAMED) if blocks.streamed else dim
    shared = (2 * traverse * buffers + held) * columns * item
    each = min(device.thread_registers, device.registers // (blocks.warps * device.warp))
    return taken <= min(most, each - 40) and shared <= device.shared_bytes * 1.2


def cells() -> list[Cell]:
    """What is searched, the most used first."""
    every = [
        (kind, name, operation, dim)
        for kind, names in SEARCHED.items()
        for name in names
        for operation in (OPERATIONS if kind == "half" else TRAINING)
        for dim in DIMS[kind]
    ]
    return sorted(every, key=lambda cell: ORDER.index(cell[3]))


def tables(search: Search) -> Iterator[str]:
    """The tables as `tables.py` has them."""
    best = {cell: search.found(cell, None) for cell in cells()}
    for name in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
        limit = architecture(name).shared_bytes
        for operation in OPERATIONS:
            yield f'    ("{name}", "{operation}"): """'
            yield "        dim | half             | tf32             | float32          | float64"
            for dim in sorted({dim for dims in DIMS.values() for dim in dims}):
                row = []
                for kind in KINDS:
                    source = name if name in SEARCHED[kind] else "sm_80"
                    found = best.get((kind, source, operation, dim), {})
                    room = max((room for room in found if room <= limit), default=0)
                    row.append(written(found[room]) if room else "")
                if any(row):
                    yield f"        {dim:3} | {' | '.join(f'{cell:16}' for cell in row)}".rstrip()
            yield '    """,'


def written(one: Tried) -> str:
    """A cell: rows, warps, stages, and what is spilled for each whole tile."""
    blocks = one.blocks
    stages = f"{blocks.stages}{'s' if blocks.streamed else ' '}"
    return f"{blocks.parallel:3} {blocks.traverse:3} {blocks.warps:2} {stages} {one.whole:3}"


def main() -> None:
    """Search, or print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kept", type=Path, required=True, help="a file of JSON lines")
    parser.add_argument("--print", action="store_true", help="print the tables of what is kept")
    parser.add_argument("--name", help="no other architecture")
    parser.add_argument("--kind", choices=KINDS, help="no other types")
    parser.add_argument("--dims", type=int, nargs="*", default=ORDER, help="no other heads")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    search = Search(given.kept)
    if not given.print:
        search.run(
            [
                cell
                for cell in cells()
                if given.kind in (None, cell[0])
                and given.name in (None, cell[1])
                and cell[3] in given.dims
            ],
            given.workers,
        )
        return
    print("\n".join(tables(search)))


if __name__ == "__main__":
    main()
