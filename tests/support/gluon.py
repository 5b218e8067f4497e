"""A model GPU in Python for a warp-specialised Gluon kernel: does it end, with the right result?

Gluon has no interpreter. This model runs the source of such a kernel on NumPy arrays. Every part of
a program is a thread, and one thread runs at a time. An asynchronous operation, such as a copy of
the TMA unit or a product of the tensor cores, is done at a random time, at the latest when an
instruction waits for it. Until then its result is NaN, so a slot that is read or filled too early
spoils the result. A wait that never ends raises.

The model knows the functions that `hopper` uses, and no layouts. It does not show what a compiler
makes of layouts, nor how registers and shared memory are used.
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import math
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Tensor(np.ndarray):
    """An array that keeps its class, also as a scalar."""

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return np.asarray(array).view(Tensor)

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(np.asarray(self)[index]).view(Tensor)

    def to(self, dtype: Any) -> Tensor:
        return tensor(np.asarray(self).astype(dtype))


def tensor(value: Any) -> Tensor:
    return np.asarray(value).view(Tensor)


class Pointer:
    """A pointer to elements in memory, at an offset."""

    def __init__(self, memory: Array, offset: Any = 0) -> None:
        self.memory, self.offset = memory, tensor(offset)

    def __add__(self, steps: Any) -> Pointer:
        return Pointer(self.memory, self.offset + steps)

    def where(self, mask: Any) -> tuple[Array, Array]:
        """The offsets, and whether each may be used; asserts that these are inside the memory."""
        at, mask = np.broadcast_arrays(np.asarray(self.offset), np.asarray(mask))
        assert ((at >= 0) & (at < self.memory.size) | ~mask).all(), "outside of memory"
        return np.where(mask, at, 0), mask


class Descriptor:
    """A tensor descriptor for the TMA unit, of an array of four axes."""

    def __init__(self, array: Array, rows: int, columns: int) -> None:
        self.array, self.rows, self.columns = array, rows, columns
        self.block_type = SimpleNamespace(nbytes=rows * columns * array.itemsize)
        self.layout = None

    def tile(self, b: int, h: int, row: int, column: int) -> Array:
        assert row >= 0 and column == 0
        found = np.zeros((self.rows, self.columns), self.array.dtype)
        there = self.array[b, h, row : row + self.rows]
        found[: there.shape[0], : there.shape[1]] = there
        return found


class Shared:
    """A tensor in shared memory, or a view of one; unwritten elements are NaN."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def index(self, at: Any) -> Any:
        return Shared(self.array[int(at)])

    def reshape(self, shape: tuple[int, ...]) -> Shared:
        return Shared(self.array.reshape(shape))

    def permute(self, axes: tuple[int, ...]) -> Shared:
        return Shared(self.array.transpose(axes))


class MBarrier:
    """A barrier whose phase ends when all arrivals have come and all bytes are copied."""

    def __init__(self) -> None:
        self.count = self.left = self.bytes = self.phase = 0

    def arrive(self, count: int = 1) -> None:
        assert self.left >= count, "more arrivals than a phase has"
        self.left -= count
        self.step()

    def step(self) -> None:
        if self.left == 0 and self.bytes == 0:
            self.phase, self.left = self.phase + 1, self.count


class Named:
    """A hardware barrier: the threads that arrived, and the number of times that it was full."""

    def __init__(self) -> None:
        self.threads = self.full = 0

    def come(self, threads: int, of: int) -> int:
        """Add threads; return the number of full phases after which they may go on."""
        self.threads += threads
        assert self.threads <= of, "threads of two turns meet at one barrier"
        goal = self.full + 1
        if self.threads == of:
            self.threads, self.full = 0, goal
        return goal


class Product:
    """An asynchronous product; it is done when `value` is set."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute = compute
        self.value: Tensor | None = None


class Stopped(Exception):
    """Another part failed."""


class Program:
    """One program: its parts in threads that take turns, and its unfinished operations."""

    def __init__(self, die: random.Random) -> None:
        self.die = die
        self.copies: list[Callable[[], None]] = []
        self.products: dict[int, list[Product]] = {}
        self.named: dict[int, Named] = {}
        self.waiting: dict[int, Callable[[], bool]] = {}
        self.turn = threading.Condition()
        self.active: int | None = None
        self.failure: BaseException | None = None
        self.here = threading.local()

    def run(self, parts: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
        threads = [
            threading.Thread(target=self._part, args=(i, *part)) for i, part in enumerate(parts)
        ]
        self.waiting = dict.fromkeys(range(len(parts)), lambda: True)
        with self.turn:
            self._next()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure
        assert not self.copies and not any(self.products.values()), "left under way"
        assert not any(barrier.threads for barrier in self.named.values()), "a barrier half full"

    def _part(self, part: int, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
        self.here.part = part
        try:
            with self.turn, np.errstate(all="ignore"):
                self.turn.wait_for(lambda: self.active == part or self.failure is not None)
                if self.failure:
                    return
                function(*given)
                del self.waiting[part]
                self._next()
        except Stopped:
            pass
        except BaseException as failure:
            with self.turn:
                self.failure = self.failure or failure
                self.turn.notify_all()

    def until(self, ready: Callable[[], bool]) -> None:
        """Let other parts run, and return at some time after `ready` holds."""
        part = self.here.part
        self.waiting[part] = ready
        self._next()
        self.turn.wait_for(lambda: self.active == part or self.failure is not None)
        if self.failure:
            raise Stopped

    def _next(self) -> None:
        """Do unfinished operations until a part that can go on is drawn."""
        while self.waiting:
            parts = [part for part, ready in self.waiting.items() if ready()]
            doing = [*range(len(self.copies))], [p for p, own in self.products.items() if own]
            drawn = self.die.randrange(len(parts) + len(doing[0]) + len(doing[1]) or 1)
            if drawn < len(parts):
                self.active = parts[drawn]
                self.turn.notify_all()
                return
            drawn -= len(parts)
            if drawn < len(doing[0]):
                self.copies.pop(drawn)()
            elif doing[1]:
                product = self.products[doing[1][drawn - len(doing[0])]].pop(0)
                product.value = product.compute()
            else:
                raise AssertionError(f"parts {[*self.waiting]} wait for each other")
        self.active = None


class Device:
    """A device that runs a kernel source, one program after the other."""

    def __init__(self, text: str, entry: str, seed: int) -> None:
        self._program_id, self._programs = 0, 1
        self._die = random.Random(seed)
        self._program = Program(self._die)
        self._space: dict[str, Any] = {
            "gluon": SimpleNamespace(jit=lambda *given, **_: given[0] if given else _same),
            "tl": self._language(),
            "mbarrier": self._mbarrier(),
            "tma": SimpleNamespace(async_load=self._load_tile),
            "fence_async_shared": lambda: None,
            "warpgroup_mma": self._product,
            "warpgroup_mma_wait": self._wait_products,
            "range": _range,
        }
        exec(text[text.index("load_tile = ") :], self._space)
        self._entry = self._space[entry]

    def launch(self, programs: int, given: Sequence[Any]) -> None:
        self._programs = programs
        for self._program_id in range(programs):
            self._program = Program(self._die)
            self._entry(*given)

    def function(self, name: str) -> Callable[..., Any]:
        """A function of the source."""
        found: Callable[..., Any] = self._space[name]
        return found

    @contextlib.contextmanager
    def as_program(self, number: int, programs: int) -> Iterator[None]:
        """A context with the number of a program."""
        self._program_id, self._programs = number, programs
        yield

    def _language(self) -> SimpleNamespace:
        def reduce(of: Any) -> Callable[..., Tensor]:
            return lambda values, axis: tensor(of.reduce(np.asarray(values), axis=axis))

        def full(shape: Any, value: float, dtype: Any, layout: Any = None) -> Tensor:
            return tensor(np.full(shape, value, dtype))

        names = ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout")
        return SimpleNamespace(
            **{name: lambda *_: None for name in names},
            constexpr=_same,
            int1=np.bool_,
            int32=np.int64,
            int64=np.int64,
            float16=np.float16,
            float32=np.float32,
            program_id=lambda _: tensor(self._program_id),
            num_programs=lambda _: tensor(self._programs),
            arange=lambda first, last, layout: tensor(np.arange(first, last)),
            full=full,
            where=lambda *given: tensor(np.where(*given)),
            maximum=lambda *given: tensor(np.fmax(*given)),
            minimum=lambda *given: tensor(np.fmin(*given)),
            max=reduce(np.fmax),
            sum=reduce(np.add),
            exp2=lambda x: tensor(np.exp2(x)),
            abs=lambda x: tensor(np.abs(x)),
            fma=lambda x, y, z: tensor((np.float64(x) * y + z).astype(np.float32)),
            log2=lambda x: tensor(np.log2(x)),
            convert_layout=lambda x, layout, assert_trivial=False: x,
            static_range=builtins.range,
            load=_load,
            store=_store,
            allocate_shared_memory=_allocate,
            inline_asm_elementwise=self._instruction,
            warp_specialize=lambda parts, warps, registers: self._program.run(parts),
        )

    def _mbarrier(self) -> SimpleNamespace:
        def init(barrier: Shared, count: int) -> None:
            it = barrier.array[0]
            it.count = it.left = count

        def expect(barrier: Shared, count: int) -> None:
            barrier.array[0].bytes += count
            barrier.array[0].arrive()

        def wait(barrier: Shared, parity: Any) -> None:
            self._program.until(lambda: barrier.array[0].phase % 2 != int(parity))

        def arrive(barrier: Shared, count: int) -> None:
            barrier.array[0].arrive(count)

        return SimpleNamespace(
            MBarrierLayout=lambda: None, init=init, expect=expect, wait=wait, arrive=arrive
        )

    def _load_tile(self, tiles: Descriptor, at: Sequence[Any], full: Shared, slot: Shared) -> None:
        slot.array[...] = math.nan
        numbers = [int(number) for number in at]

        def copy() -> None:
            slot.array[...] = tiles.tile(*numbers)
            full.array[0].bytes -= tiles.block_type.nbytes
            full.array[0].step()

        self._program.copies.append(copy)

    def _product(
        self, a: Any, b: Shared, total: Any, use_acc: bool = True, is_async: bool = False
    ) -> Product:
        assert is_async

        def compute() -> Tensor:
            left = np.asarray(a.array if isinstance(a, Shared) else a, np.float32)
            made = left @ np.asarray(b.array, np.float32)
            return tensor(made + total if use_acc else made)

        product = Product(compute)
        self._program.products.setdefault(self._program.here.part, []).append(product)
        return product

    def _wait_products(self, most: int, deps: Sequence[Any]) -> Any:
        mine = self._program.products[self._program.here.part]
        self._program.until(lambda: len(mine) <= most)
        found = tuple(it.value if isinstance(it, Product) else it for it in deps)
        assert all(it is not None for it in found), "read before it is there"
        return found if len(found) > 1 else found[0]

    def _instruction(self, words: str, *_: Any, **__: Any) -> None:
        kind, barrier, of = re.match(r"bar\.(\w+) (\d+), (\d+);", words).groups()  # type: ignore[union-attr]
        named = self._program.named.setdefault(int(barrier), Named())
        goal = named.come(128, int(of))
        if kind == "sync":
            self._program.until(lambda: named.full >= goal)


def _same(value: Any) -> Any:
    return value


def _range(*bounds: Any) -> Iterator[Tensor]:
    return map(tensor, builtins.range(*(int(bound) for bound in bounds)))


def _load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Tensor:
    at, there = pointer.where(mask)
    return tensor(np.where(there, pointer.memory[at], np.asarray(other, pointer.memory.dtype)))


def _store(pointer: Pointer, values: Any, mask: Any) -> None:
    at, there = pointer.where(mask)
    pointer.memory[at[there]] = np.broadcast_to(values, at.shape)[there]


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
    if dtype is not np.int64:
        return Shared(np.full(shape, math.nan, dtype))
    found = np.empty(shape, object)
    for at in itertools.product(*map(builtins.range, shape)):
        found[at] = MBarrier()
    return Shared(found)
