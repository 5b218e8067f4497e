"""The gradients of the arrays that a score reads: who adds up what, and in which memory.

Pairs of queries and keys add to entries of an array. An index of a pair (b, h, or q) that stands
alone on an axis of every look-up keeps the entries of its values apart. Owners have boxes of batch
entries, heads and block rows of queries. Boxes that differ in an index which does not keep entries
apart add to different parts of the array, which are summed in their order afterwards.

    bias (heads, len_q, len_k)    h and q keep apart, b does not     one part, the result itself
    T5 table (heads, buckets)     h keeps apart, b and q do not      up to `MOST_PARTS` small parts

How many parts there are follows from the sizes of the problem and of blocks, never from threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu.choice import Chooser
from tilefold.backends.cpu.kernels.arguments import CHUNK
from tilefold.backends.cpu.launches import Launch, visited_work
from tilefold.backends.cpu.spec import Entry, KernelSpec, Target
from tilefold.masks.expression import Expression, Truth, names
from tilefold.masks.pairs import is_dense, kept_apart
from tilefold.masks.tables import Input
from tilefold.planning.masked import Scored
from tilefold.planning.plan import Scratch
from tilefold.planning.visited import nothing
from tilefold.problems.attention import Shape

MOST_PARTS = 32
"""Most parts of an array. They are summed by one kernel more. It is not tuned."""

PART_BYTES = 2**20
"""Most bytes of the parts of what one owner may meet; one part may be larger. It is not tuned."""

BLOCK_PART_BYTES = 2**17
"""The same where blocks of queries are apart, which are owners enough unless they are few."""

SLOT_BYTES = 2**16
"""Most bytes of the copies of entries, one for each lane, that a worker keeps. It is not tuned."""

Array = NDArray[np.int64]
Indices = tuple[Expression, ...]


@dataclass(frozen=True, eq=False)
class Sums:
    """The launches before and after the kernel "backward_inputs", itself, and their buffers."""

    launches: list[Launch]
    buffers: dict[str, Scratch]


def sums(chooser: Chooser, spec: KernelSpec, inputs: tuple[int, ...]) -> Sums:
    """The launches that write the gradients of these inputs. `spec` has blocks and no entries."""
    scored = chooser.masked.scored("entries", inputs)
    assert scored is not None
    planner = _Planner(chooser, spec, scored)
    found = [planner.array(number) for number in inputs]
    return planner.sums(found)


class _Array:
    """An input, and the indices of its look-ups."""

    def __init__(self, given: Input, reads: Sequence[Indices], extents: dict[str, int]) -> None:
        self.given, self.reads = given, reads
        self.name = f"d{given.name}"
        self.elements = math.prod(given.shape)
        apart = kept_apart(reads)
        self.conflicts = [name for name, size in extents.items() if name not in apart and size > 1]
        self.dense = "k" in apart and all(map(is_dense, reads))
        met = math.prod(size for name, size in extents.items() if name in apart)
        bytes_ = BLOCK_PART_BYTES if "q" in apart else PART_BYTES
        most = bytes_ * met // max(1, 8 * self.elements)
        self.most_parts = max(1, min(most, MOST_PARTS))
        self.once = self.dense and len(reads) == 1 and not self.conflicts


class _Planner:
    def __init__(self, chooser: Chooser, spec: KernelSpec, scored: Scored) -> None:
        self._problem, self._masked, self._chooser = chooser.problem, chooser.masked, chooser
        self._spec = replace(spec, score=scored.parts.skeleton, hides=scored.hides)
        self._scored = scored
        problem = self._problem
        rows = -(-problem.len_q // spec.block_parallel)
        self._extents = {"b": problem.batch, "h": problem.heads_q, "q": rows}
        self._reads = _indices(scored)
        self._inputs = {x.number: x for x in scored.parts.tables if isinstance(x, Input)}

    def array(self, number: int) -> _Array:
        """An input by its number."""
        given = self._inputs[number]
        reads = [
            indices
            for entry, indices in zip(self._scored.entries, self._reads, strict=True)
            if entry.number == number
        ]
        return _Array(given, reads, self._extents)

    def sums(self, arrays: list[_Array]) -> Sums:
        """All launches: targets are cleared, pairs are visited, parts are summed."""
        read = [array for array in arrays if array.reads]
        splits = self._splits(read)
        before: list[Launch] = []
        after: list[Launch] = []
        targets: list[Target] = []
        shapes: list[Shape] = []
        buffers: dict[str, Scratch] = {}
        names_of = {}
        for array in arrays:
            parts = math.prod(splits[name] for name in array.conflicts if array.reads)
            dtype, memory = self._memory(array, parts), array.name
            if dtype is not None:
                memory = f"{array.name}_parts"
                buffers[memory] = Scratch((parts, *array.given.shape), dtype)
                after.append(self._sum(array, parts, memory, dtype))
            dtype = dtype or array.given.dtype
            if array.reads:
                names_of[f"target{len(targets)}"] = memory
                targets.append(Target(dtype, len(array.given.shape) + 1))
                shapes.append((parts, *array.given.shape))
            if not self._covers(array):
                before.append(self._clear(memory, parts * array.elements, dtype))
        if not read:
            return Sums(before, buffers)
        entries, slots = self._entries(read)
        spec = replace(self._spec, entries=entries, targets=tuple(targets))
        visited = self._masked.visited_by("q", spec.block_parallel)
        owners = self._owners(read, splits, visited_work(visited, self._problem))
        launch = Launch(
            self._problem,
            spec,
            visited,
            np.arange(len(owners)),
            heads=1,
            item_rows=len(owners),
            block_rows=self._extents["q"],
            owners=owners,
            buffers=names_of,
            shapes=tuple(shapes),
            scratch_bytes=slots * spec.lanes * 8,
        )
        return Sums([*before, launch, *after], buffers)

    def _splits(self, arrays: Sequence[_Array]) -> dict[str, int]:
        """Into how many ranges each of b, h and q is cut, so that no array has too many parts."""
        parts, splits = [1] * len(arrays), {}
        for name, size in self._extents.items():
            most = size
            for array, have in zip(arrays, parts, strict=True):
                if name in array.conflicts:
                    most = min(most, array.most_parts // have)
            splits[name] = max(1, most)
            for number, array in enumerate(arrays):
                if name in array.conflicts:
                    parts[number] *= splits[name]
        return splits

    def _memory(self, array: _Array, parts: int) -> str | None:
        """The type of the memory for sums; None where they are made in the result itself."""
        wide = array.given.dtype in ("float32", "float64")
        if array.once or not array.reads or (array.dense and parts == 1 and wide):
            return None
        large = array.elements * 8 * parts > PART_BYTES
        wide = "float64" in (array.given.dtype, self._problem.dtype)
        return "float32" if array.dense and large and not wide else "float64"

    def _covers(self, array: _Array) -> bool:
        """True where every entry of the result is stored: then nothing clears it before."""
        problem, rule = self._problem, self._masked.expression
        everywhere = isinstance(rule, Truth) and rule.value
        pairs = problem.batch * problem.heads_q * problem.len_q * problem.len_k
        return array.once and everywhere and array.elements == pairs

    def _entries(self, arrays: Sequence[_Array]) -> tuple[tuple[Entry, ...], int]:
        """How each look-up is summed, and how many slots there are."""
        found, slots = [], 0
        numbers = [array.given.number for array in arrays]
        most = SLOT_BYTES // (8 * self._spec.lanes)
        for given, indices in zip(self._scored.entries, self._reads, strict=True):
            target = numbers.index(given.number)
            met: frozenset[str] = frozenset().union(*map(names, indices)) & {"q", "k"}
            if arrays[target].dense:
                way = "stored" if arrays[target].once else "added"
            elif "k" not in met:
                way = "sums"
            elif "q" not in met:
                way = "keys"
            else:
                sizes = zip(given.shape, indices, strict=True)
                wanted = math.prod(size for size, index in sizes if names(index) & {"q", "k"})
                way = "slots" if slots + wanted <= most else "scattered"
                slots += wanted if way == "slots" else 0
            found.append(Entry(target, way))
        return tuple(found), slots

    def _owners(
        self, arrays: Sequence[_Array], splits: dict[str, int], work: NDArray[np.int64]
    ) -> Array:
        """The table of owners, heaviest first: ranges of b, h and rows, and a part of each array.

        See `kernels.inputs` for the columns.
        """
        cuts = {
            name: np.arange(splits[name] + 1) * size // splits[name]
            for name, size in self._extents.items()
        }
        numbers = dict(zip("bhq", np.indices(tuple(splits.values())).reshape(3, -1), strict=True))
        columns = []
        for name in "bhq":
            columns += [cuts[name][numbers[name]], cuts[name][numbers[name] + 1]]
        for array in arrays:
            part = np.zeros_like(columns[0])
            for name in array.conflicts:
                part = part * splits[name] + numbers[name]
            columns.append(part)
        table = np.stack(columns, axis=1).astype(np.int64)
        for axis, name in enumerate("bhq"):
            work = np.add.reduceat(work, cuts[name][:-1], axis=axis)
        heaviest: Array = table[np.argsort(-work.ravel(), kind="stable")]
        return np.ascontiguousarray(heaviest)

    def _clear(self, memory: str, elements: int, dtype: str) -> Launch:
        """Sets memory to 0: the sum of no parts."""
        targets = ((Target(dtype, 1), memory, (elements,)),)
        return self._chunks(elements, targets)

    def _sum(self, array: _Array, parts: int, memory: str, dtype: str) -> Launch:
        """Sums the parts of an array."""
        targets = (
            (Target(array.given.dtype, 1), array.name, (array.elements,)),
            (Target(dtype, 2), memory, (parts, array.elements)),
        )
        return self._chunks(array.elements, targets)

    def _chunks(
        self, elements: int, targets: Sequence[tuple[Target, str, tuple[int, ...]]]
    ) -> Launch:
        spec = self._chooser.spec_of("sum_inputs", vectors=1, rows=1, block_traverse=1)
        items = -(-elements // CHUNK)
        return Launch(
            self._problem,
            replace(spec, dim=1, dim_v=1, targets=tuple(target for target, *_ in targets)),
            nothing(items),
            np.arange(items),
            heads=1,
            item_rows=items,
            block_rows=items,
            buffers={f"target{number}": memory for number, (_, memory, _) in enumerate(targets)},
            shapes=tuple(shape for *_, shape in targets),
        )


def _indices(scored: Scored) -> list[Indices]:
    """The indices of each entry, among what is computed of the score."""
    values: tuple[Expression, ...] = scored.parts.skeleton.expression.parts
    found, place = [], 2
    for entry in scored.entries:
        rank = len(entry.shape)
        found.append(values[place : place + rank])
        place += 1 + rank
    return found
