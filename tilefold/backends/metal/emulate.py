"""The emulator: it runs Metal kernels on the CPU, from their own source, to find their faults.

It is called like `torch.mps.compile_shader`, with arrays of NumPy or PyTorch:

    library = compile_shader(text)
    library.tilefold_softmax(x, y, [rows, columns], 0.125, threads=(128, 4), group_size=(128, 1))

The unchanged source is compiled as C++, with headers in place of `<metal_stdlib>`. A launch runs in
a process of its own: threadgroups run one after the other, each thread is a fiber, and the 32 lanes
of a simdgroup run in lockstep at each of its operations. A fault raises `Fault`. Its `kind` is one
of `KINDS`, and its message names the argument, the line and the lane. `check` chooses the faults to
look for; each check also finds the faults of "fast":

| check | finds | by |
|---|---|---|
| fast | access past a buffer; operations and barriers reached by a part | guard pages |
| address | access beside a buffer, a threadgroup array, a thread's variables | AddressSanitizer |
| memory | branches and results that depend on unwritten memory | MemorySanitizer |
| thread | missing barriers; threadgroups that meet in one address | ThreadSanitizer |
| count | nothing more, but counts loads and stores | Clang's coverage |

All bits of threadgroup memory are set (NaN) when a threadgroup starts. `check_address_spaces`
finds pointers into one kind of memory that are used for another kind, without a run.

A clean run shows that, for these arguments, the source does what it should by the written rules of
Metal. It does not show that Apple's compiler accepts the source, and says nothing about speed.
Threads run in one order, so a dependence on the order is found as a race (by "thread") or not at
all. Metal does not specify the order of sums in an 8x8 product, nor its rounding: here the sums are
float, start from C, and are rounded once. `fast::` functions are as exact as the others, and small
numbers are not flushed to zero, as a GPU may do. Each access of `simdgroup_load` or
`simdgroup_store` counts for the lane that holds the element. Not emulated are atomics, textures,
pointers to threadgroup memory, swizzles of vectors, and function constants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tilefold.backends.metal.emulator import arguments, signature, toolchain
from tilefold.backends.metal.emulator.fault import KINDS, Fault
from tilefold.backends.metal.emulator.launch import Launch
from tilefold.backends.metal.emulator.signature import Entry
from tilefold.common.check import choice

__all__ = ["KINDS", "Fault", "Library", "available", "check_address_spaces", "compile_shader"]

TIMEOUT_SECONDS = 300.0
"""The time limit of a launch, in seconds; a longer launch counts as one that never ends."""


def available(check: str = "fast") -> str | None:
    """The reason why kernels cannot run here with this check; None if they can."""
    choice("check", check, tuple(toolchain.CHECKS))
    return toolchain.reason(check)


def compile_shader(text: str, check: str = "fast", tensor_layout: int = 0) -> Library:
    """Compile the Metal source `text` for the CPU.

    `tensor_layout`, 0 or 1, chooses where the elements of a cooperative tensor lie. On a GPU this
    is not defined, so a source with such tensors must give the same results under both.

    Raises SyntaxError if the source does not compile, `Fault` if Metal would refuse it, and
    NotImplementedError if there is no compiler.
    """
    choice("tensor_layout", tensor_layout, (0, 1))
    if reason := available(check):
        raise NotImplementedError(f"kernels cannot be emulated here: {reason}")
    signature.check_text(text)
    entries = signature.entries(text)
    for each in dict.fromkeys(("fast", check)):
        library = toolchain.built(text, list(entries.values()), each)
        if each == "fast":
            _check_threadgroup_memory(toolchain.symbols(library)[1:], entries)
    return Library(text, entries, check, tensor_layout)


def check_address_spaces(text: str) -> None:
    """Raise `Fault` if a pointer into one kind of memory is used as a pointer into another kind.

    Nothing runs: Clang compiles the source `text` with headers in which each kind is a type of its
    own. Raises NotImplementedError without Clang.
    """
    signature.check_text(text)
    try:
        mistake = toolchain.mistaken_space(text)
    except FileNotFoundError as error:
        raise NotImplementedError(f"address spaces cannot be checked here: {error}") from None
    if mistake:
        line, why = mistake
        source = f"`{text.splitlines()[line - 1].strip()}`: " if line else ""
        raise Fault("address space", f"line {line}: {source}{why}")


class Library:
    """The kernels of a source, as attributes. `counters` holds the counts of the last launch."""

    def __init__(
        self, text: str, entries: Mapping[str, Entry], check: str, tensor_layout: int
    ) -> None:
        self.text = text
        self.check = check
        self.tensor_layout = tensor_layout
        self.counters: dict[str, int] = {}
        self._entries = dict(entries)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._entries]

    def __getattr__(self, name: str) -> Function:
        entries = self.__dict__.get("_entries", {})
        if name not in entries:
            raise AttributeError(f"no kernel {name!r}; there are {', '.join(entries)}")
        return Function(self, entries[name])


@dataclass(frozen=True)
class Function:
    """A kernel. A call runs it, and the results are in the arrays when the call returns."""

    library: Library
    entry: Entry

    @property
    def max_threads_per_threadgroup(self) -> int:
        """The most threads of a threadgroup: the source's promise, or the limit of every GPU."""
        return self.entry.promised or signature.MOST_THREADS

    @property
    def thread_execution_width(self) -> int:
        """The number of lanes of a simdgroup."""
        return 32

    def __call__(
        self,
        *values: Any,
        threads: int | Sequence[int] | None = None,
        group_size: int | Sequence[int] | None = None,
        arg_casts: str | Mapping[int, str] | None = None,
    ) -> None:
        """Run the kernel on a grid of `threads` threads in groups of `group_size` threads.

        The n-th value is buffer n: an array, a number (int64, float32 or as `arg_casts` says) or a
        list of numbers.
        """
        entry = self.entry
        numbers = [each.buffer for each in entry.buffers]
        if numbers != list(range(len(values))):
            raise Fault(
                "argument",
                f"{entry.name}: {len(values)} values where the buffers are {numbers}",
            )
        bound: list[arguments.View | bytes] = []
        for index, (value, parameter) in enumerate(zip(values, entry.buffers, strict=True)):
            found = arguments.view(value, parameter)
            if found is not None:
                bound.append(arguments.checked(entry, found, parameter))
            else:
                cast = arguments.cast_of(arg_casts, index)
                bound.append(arguments.scalars(entry, value, parameter, cast))
        grid, group = self._grid(threads, group_size, bound)
        library = self.library
        launch = Launch(
            library.text,
            entry,
            list(library._entries.values()),
            library.check,
            grid,
            group,
            TIMEOUT_SECONDS,
            library.tensor_layout,
        )
        library.counters = launch.run(bound)

    def _grid(
        self,
        threads: int | Sequence[int] | None,
        group_size: int | Sequence[int] | None,
        bound: Sequence[arguments.View | bytes],
    ) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """The grid and the group, each with three sizes, checked as Metal checks them."""
        if threads is None:
            arrays = [each for each in bound if isinstance(each, arguments.View)]
            if not arrays:
                raise ValueError(f"{self.entry.name}: threads must be given where no array is")
            threads = math.prod(arrays[0].shape)
        grid = _tuple("threads", threads)
        most = self.max_threads_per_threadgroup
        group = (
            _tuple("group_size", group_size)
            if group_size is not None
            else (min(most, grid[0]), *[1] * (len(grid) - 1))
        )
        if len(grid) != len(group):
            raise ValueError(f"group_size {group} must have as many numbers as threads {grid}")
        if math.prod(group) > most:
            raise Fault(
                "refused",
                f"{self.entry.name}: a group of {math.prod(group)} threads where {most} are the"
                " most",
            )
        padding = (1,) * (3 - len(grid))
        x, y, z = (*grid, *padding)
        a, b, c = (*group, *padding)
        return (x, y, z), (a, b, c)


def _tuple(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(int(each) for each in value)
    if not 1 <= len(numbers) <= 3 or min(numbers) < 1:
        raise ValueError(f"{name} must be 1 to 3 numbers of at least 1, not {value}")
    return numbers


def _check_threadgroup_memory(
    arrays: Sequence[tuple[str, int, int]], entries: Mapping[str, Entry]
) -> None:
    """Raise `Fault` if a kernel has too much threadgroup memory, or another function has any."""
    totals = dict.fromkeys(entries, 0)
    for name, _, size in arrays:
        owner = next((each for each in entries if name.startswith(f"_ZZ{len(each)}{each}")), None)
        if owner is None:
            raise Fault("refused", f"{name} is threadgroup memory outside of a kernel's body")
        totals[owner] += -(-size // 16) * 16
    for owner, total in totals.items():
        if total > signature.MOST_THREADGROUP_BYTES:
            raise Fault(
                "refused",
                f"{owner}: {total} bytes of threadgroup memory where"
                f" {signature.MOST_THREADGROUP_BYTES} are the most",
            )
