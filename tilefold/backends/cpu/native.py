"""Whole calls without Python: a prepared call as a record in memory, and a function that runs it.

Compiled graphs of other frameworks call from threads of their own, without the interpreter lock.
So a prepared call becomes a record of int64 words, and one function in LLVM does what
`dispatch.Call.run` does: it copies a template of each argument block, writes addresses into it, and
passes it to the threads.

    record  [machine, fixed bytes, bytes of a worker, most workers, steps, address of steps, Python,
             fills, address of fills]
    step    [kernel, items, template, its bytes, places, their number]
    place   [word, operand, offset]     operand -1: an offset in the memory of the call, which is
                                        a multiple of 64 but for words of the argument block
    fill    [operand, elements, bytes of one, its bits]     where no query meets a key
    memory  [argument block | buffers of the plan | a workspace for each worker]

The newest memory is kept for the next call. Calls of several threads at once take memory of their
own.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu import runtime, threads
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.dispatch import KEPT_BYTES, WORKSPACE, Call
from tilefold.common.ending import visit
from tilefold.common.first_use import undisturbed
from tilefold.common.single_flight import once

Words = NDArray[np.int64]

Filler = Callable[[Sequence[int]], None]
"""What fills results from other operands in Python: it takes the addresses of the operands."""

Fill = tuple[int, int, int, int]
"""An operand, how many elements it has, the bytes of one, and the bits of the number in each."""

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int64))


@dataclass(frozen=True, eq=False)
class NativeCall:
    """A prepared call as a record at an address, which is there as long as this value."""

    address: int
    _kept: tuple[object, ...] = field(repr=False)


class Step(NamedTuple):
    """A kernel of a record: its argument block without addresses, and which words take them."""

    kernel: runtime.Loaded
    items: int
    template: Words
    places: Words


class Memory:
    """The memory of a call: the argument block, then what is reserved, then all workspaces."""

    def __init__(self, *blocks: int) -> None:
        self.bytes = whole(max(blocks))

    def reserve(self, size: int) -> int:
        """The offset of `size` more bytes."""
        start = self.bytes
        self.bytes += whole(size)
        return start


def recorded(steps: Sequence[Step], fixed: int, each: int, most: int) -> NativeCall:
    """The record of steps, by `most` workers at most.

    Its memory has `fixed` bytes, and behind them `each` for every worker.
    """
    rows = [
        (kernel.address, items, _at(template), template.nbytes, _at(places), len(places))
        for kernel, items, template, places in steps
    ]
    table = words(rows)
    threads.share()
    head = [threads.shared_address(), fixed, each, most, len(steps), _at(table)]
    record = words([*head, 0, 0, 0])
    return NativeCall(_at(record), (record, table, *steps))


def native_call(call: Call, operands: int) -> NativeCall:
    """The record of a prepared call with a number of operands."""
    memory = Memory(*[len(step.template) for step in call.steps])
    buffers = [memory.reserve(scratch.bytes) for scratch in call.plan.buffers.values()]
    steps = []
    for step in call.steps:
        places = [(WORKSPACE, -1, memory.bytes)]
        for place, operand in step.places:
            own = operand - operands
            places.append((place, operand, 0) if own < 0 else (place, -1, buffers[own]))
        template = np.frombuffer(step.template, np.int64)
        steps.append(Step(step.kernel.loaded, step.items, template, words(places)))
    each = max(step.workspace_bytes for step in call.steps)
    most = 1 if call.alone else max(step.items for step in call.steps)
    found = recorded(steps, memory.bytes, each, most)
    return NativeCall(found.address, (call, found))


def filled_call(fills: Sequence[Fill]) -> NativeCall:
    """The record of a call that runs no kernel: each result is filled with one number."""
    table = words(fills)
    record = words([0, 0, 0, 0, 0, 0, 0, len(fills), _at(table)])
    return NativeCall(_at(record), (table, record))


def filled_by_python(fill: Filler, operands: int) -> NativeCall:
    """The record of a call that runs no kernel: Python fills the results, with its lock."""

    def filled(addresses: Any) -> None:
        with visit():
            fill(addresses[:operands])

    callback = _CALLBACK(filled)
    address = ctypes.cast(callback, ctypes.c_void_p).value or 0
    record = words([0, 0, 0, 0, 0, 0, address, 0, 0])
    return NativeCall(_at(record), (callback, record))


NO_MEMORY = 1
"""What `runner` returns where no memory is left; else it returns 0."""


def runner() -> int:
    """The address of `int32 run(record, addresses)`, which runs a record on operands.

    `addresses` are those of all operands, in order.
    """
    return _loaded().address


@once(most=1)  # of two that threads make at once, one would be unloaded while it runs
def _loaded() -> runtime.Loaded:
    source = _SOURCE.format(
        kept=KEPT_BYTES,
        parallel=threads.parallel_call(),
        advise=_ADVISE if sys.platform == "linux" else "",
    )
    return undisturbed(lambda: runtime.kernel(source, "tilefold_run", host()))


def words(values: Sequence[object]) -> Words:
    """Numbers as words of 64 bits."""
    return np.array(values, np.int64)


def _at(array: Words) -> int:
    address: int = array.ctypes.data
    return address


def whole(size: int) -> int:
    """The size in whole cache lines."""
    return -(-size // 64) * 64


_ADVISE = """\
  %huge = icmp uge i64 %size, 4194304
  br i1 %huge, label %advise, label %advised
advise:
  %fresh_at = ptrtoint ptr %fresh to i64
  %page = add i64 %fresh_at, 4095
  %first_page = and i64 %page, -4096
  %pages = inttoptr i64 %first_page to ptr
  %whole_pages = sub i64 %size, 4096
  %advice = call i32 @madvise(ptr %pages, i64 %whole_pages, i32 14)
  br label %advised
advised:"""
"""Pages of 2 MiB for large memory, as NumPy asks for them too: MADV_HUGEPAGE of Linux."""

_SOURCE = """\
; int32 run(record, addresses): see the head of native.py
declare ptr @malloc(i64)
declare void @free(ptr)
declare i32 @madvise(ptr, i64, i32)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define i32 @tilefold_run(ptr %record, ptr %addresses) {{
entry:
  %python_at = getelementptr i64, ptr %record, i64 6
  %python = load ptr, ptr %python_at
  %asks = icmp ne ptr %python, null
  br i1 %asks, label %ask, label %look
ask:
  call void %python(ptr %addresses)
  ret i32 0

look:
  %fills_at = getelementptr i64, ptr %record, i64 7
  %fills = load i64, ptr %fills_at
  %filled = icmp ne i64 %fills, 0
  br i1 %filled, label %all, label %sizes
all:
  %fill_table_at = getelementptr i64, ptr %record, i64 8
  %fill_table = load ptr, ptr %fill_table_at
  br label %fill
fill:
  %f = phi i64 [0, %all], [%f_next, %full]
  %unfilled = icmp ult i64 %f, %fills
  br i1 %unfilled, label %begin, label %over
over:
  ret i32 0
begin:
  %fourth = mul i64 %f, 4
  %fill_at = getelementptr i64, ptr %fill_table, i64 %fourth
  %result = load i64, ptr %fill_at
  %elements_at = getelementptr i64, ptr %fill_at, i64 1
  %elements = load i64, ptr %elements_at
  %item_at = getelementptr i64, ptr %fill_at, i64 2
  %item = load i64, ptr %item_at
  %bits_at = getelementptr i64, ptr %fill_at, i64 3
  %bits = load i64, ptr %bits_at
  %target_at = getelementptr ptr, ptr %addresses, i64 %result
  %target = load ptr, ptr %target_at
  %f_next = add i64 %f, 1
  br label %element
element:
  %e = phi i64 [0, %begin], [%e_next, %stored]
  %empty_places = icmp ult i64 %e, %elements
  br i1 %empty_places, label %store, label %full
store:
  %past_target = mul i64 %e, %item
  %element_at = getelementptr i8, ptr %target, i64 %past_target
  %e_next = add i64 %e, 1
  switch i64 %item, label %double [i64 2, label %half
                                   i64 4, label %single]
half:
  %bits_16 = trunc i64 %bits to i16
  store i16 %bits_16, ptr %element_at, align 1
  br label %stored
single:
  %bits_32 = trunc i64 %bits to i32
  store i32 %bits_32, ptr %element_at, align 1
  br label %stored
double:
  store i64 %bits, ptr %element_at, align 1
  br label %stored
stored:
  br label %element
full:
  br label %fill

sizes:
  %shared = load ptr, ptr %record
  %fixed_at = getelementptr i64, ptr %record, i64 1
  %fixed = load i64, ptr %fixed_at
  %each_at = getelementptr i64, ptr %record, i64 2
  %each = load i64, ptr %each_at
  %most_at = getelementptr i64, ptr %record, i64 3
  %most = load i64, ptr %most_at
  %number = load atomic i64, ptr %shared monotonic, align 8
  %fewer = icmp ult i64 %number, %most
  %workers = select i1 %fewer, i64 %number, i64 %most
  %scratch = mul i64 %workers, %each
  %size = add i64 %fixed, %scratch
  ; the memory that the last call left, if it is large enough; its first word is its size
  %slot = getelementptr i64, ptr %shared, i64 2
  %held = atomicrmw xchg ptr %slot, i64 0 acq_rel, align 8
  %held_ptr = inttoptr i64 %held to ptr
  %none = icmp eq i64 %held, 0
  br i1 %none, label %allocate, label %measure
measure:
  %has = load i64, ptr %held_ptr
  %fits = icmp uge i64 %has, %size
  br i1 %fits, label %ready, label %drop
drop:
  call void @free(ptr %held_ptr)
  br label %allocate
allocate:
  %bytes = add i64 %size, 128
  %fresh = call ptr @malloc(i64 %bytes)
  %failed = icmp eq ptr %fresh, null
  br i1 %failed, label %no_memory, label %note
no_memory:
  ret i32 1
note:
  {advise}
  br label %made
made:
  store i64 %size, ptr %fresh
  br label %ready
ready:
  %memory = phi ptr [%held_ptr, %measure], [%fresh, %made]
  %start = ptrtoint ptr %memory to i64
  %past = add i64 %start, 71
  %aligned = and i64 %past, -64
  %block = inttoptr i64 %aligned to ptr
  %steps_at = getelementptr i64, ptr %record, i64 4
  %steps = load i64, ptr %steps_at
  %table_at = getelementptr i64, ptr %record, i64 5
  %table = load ptr, ptr %table_at
  br label %step

step:
  %s = phi i64 [0, %ready], [%s_next, %ran]
  %more = icmp ult i64 %s, %steps
  br i1 %more, label %copy, label %finish
copy:
  %first = mul i64 %s, 6
  %row = getelementptr i64, ptr %table, i64 %first
  %kernel = load ptr, ptr %row
  %items_at = getelementptr i64, ptr %row, i64 1
  %items = load i64, ptr %items_at
  %template_at = getelementptr i64, ptr %row, i64 2
  %template = load ptr, ptr %template_at
  %length_at = getelementptr i64, ptr %row, i64 3
  %length = load i64, ptr %length_at
  %places_at = getelementptr i64, ptr %row, i64 4
  %places = load ptr, ptr %places_at
  %count_at = getelementptr i64, ptr %row, i64 5
  %count = load i64, ptr %count_at
  call void @llvm.memcpy.p0.p0.i64(ptr %block, ptr %template, i64 %length, i1 false)
  br label %place
place:
  %p = phi i64 [0, %copy], [%p_next, %write]
  %left = icmp ult i64 %p, %count
  br i1 %left, label %find, label %start_threads
find:
  %third = mul i64 %p, 3
  %entry_at = getelementptr i64, ptr %places, i64 %third
  %word = load i64, ptr %entry_at
  %operand_at = getelementptr i64, ptr %entry_at, i64 1
  %operand = load i64, ptr %operand_at
  %given = icmp sge i64 %operand, 0
  br i1 %given, label %caller, label %own
caller:
  %address_at = getelementptr i64, ptr %addresses, i64 %operand
  %address = load i64, ptr %address_at
  br label %write
own:
  %offset_at = getelementptr i64, ptr %entry_at, i64 2
  %offset = load i64, ptr %offset_at
  %buffer = add i64 %aligned, %offset
  br label %write
write:
  %pointer = phi i64 [%address, %caller], [%buffer, %own]
  %word_at = getelementptr i64, ptr %block, i64 %word
  store i64 %pointer, ptr %word_at
  %p_next = add i64 %p, 1
  br label %place
start_threads:
  %few = icmp ult i64 %items, %workers
  %team = select i1 %few, i64 %items, i64 %workers
  %alone = icmp ule i64 %team, 1
  br i1 %alone, label %one, label %several
one:
  call void %kernel(ptr %block)
  br label %ran
several:
  %entry_of_team_at = getelementptr i64, ptr %shared, i64 1
  %parallel = load ptr, ptr %entry_of_team_at
  %team_32 = trunc i64 %team to i32
  {parallel}
  br label %ran
ran:
  %s_next = add i64 %s, 1
  br label %step

finish:
  %large = icmp ugt i64 %size, {kept}
  br i1 %large, label %release, label %keep
release:
  call void @free(ptr %memory)
  ret i32 0
keep:
  %kept = ptrtoint ptr %memory to i64
  %other = atomicrmw xchg ptr %slot, i64 %kept acq_rel, align 8
  %other_ptr = inttoptr i64 %other to ptr
  call void @free(ptr %other_ptr)
  ret i32 0
}}
"""
