"""Calls on arrays as they come: what their addresses tell is looked at before a record runs.

How arrays lie is known when a call is prepared. Where they lie is not: an operand may be
misaligned, and a result may share memory with what is read. One function in LLVM looks at both and
runs the record, so a small call of Python takes microseconds.

    guard   [runner, record, operands, place of the result or -1]
    operand [low, end, mask, role]      the bytes that it takes, from its address on; the bits that
                                        are 0 in an aligned address
    role    0: not read, 1: apart from the result, 2: the same array as the result, or apart

Arrays of NumPy are taken as objects: their address is the first field behind the head of the
object, a part of NumPy's interface for C that does not change. To ask an array for it takes 0.8 us.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tilefold.backends.cpu import native, runtime
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.native import words
from tilefold.backends.cpu.records import MESSAGE, Recorded
from tilefold.common.first_use import undisturbed
from tilefold.common.single_flight import once

OPERANDS = 6
"""Operands of every guarded call. One in the role `ABSENT` is not read."""

ABSENT, APART, SAME_OR_APART = 0, 1, 2


class Operand(NamedTuple):
    """What is known of an operand before its address is: see the head of this file."""

    low: int = 0
    end: int = 0
    mask: int = 0
    role: int = ABSENT


@dataclass(frozen=True, eq=False)
class Guard:
    """A guarded record at an address, which is there as long as this value."""

    address: int
    _on_addresses: Callable[[int, bytes], int] = field(repr=False)
    _on_objects: Callable[[int, bytes], int] = field(repr=False)
    _kept: tuple[object, ...] = field(repr=False)

    @classmethod
    def of(cls, recorded: Recorded, operands: Sequence[Operand], result: int) -> Guard:
        """The guard of a record. `result`: the place of the operand that is compared, or -1."""
        assert len(operands) == OPERANDS
        head = [native.runner(), recorded.call.address, len(operands), result]
        block = words([*head, *(number for operand in operands for number in operand)])
        on_addresses, on_objects = (_function(recorded.alone, each) for each in (False, True))
        return cls(block.ctypes.data, on_addresses, on_objects, (block, recorded))

    def run(self, *addresses: int) -> bool:
        """Run the record, or nothing where an address is not as it should be; True if it ran."""
        status = self._on_addresses(self.address, _pack(*addresses))
        return status == 0 or _refused(status)

    def run_objects(self, *objects: int) -> bool:
        """The same on the objects of arrays of NumPy, by their ids, where `OBJECTS` are taken."""
        status = self._on_objects(self.address, _pack(*objects))
        return status == 0 or _refused(status)


def _refused(status: int) -> bool:
    """False. Raises MemoryError where that is the reason."""
    if status == native.NO_MEMORY:
        raise MemoryError(MESSAGE)
    return False


def _data_offset() -> int | None:
    """Where an array object has its address; None where this interpreter has other objects."""
    if sys.implementation.name != "cpython":
        return None
    offset, probe = object.__basicsize__, np.empty(3)
    seen = ctypes.c_size_t.from_address(id(probe) + offset).value
    return offset if seen == probe.__array_interface__["data"][0] else None


_DATA = _data_offset()

OBJECTS = _DATA is not None
"""Whether arrays of NumPy are taken as objects here."""

_pack = struct.Struct(f"{OPERANDS}q").pack


@once(most=1)
def _loaded() -> tuple[runtime.Loaded, ...]:
    source = _SOURCE.replace("DATA", str(_DATA or 0)).replace("OPERANDS", str(OPERANDS))
    names = "tilefold_guarded", "tilefold_guarded_objects"
    return undisturbed(lambda: tuple(runtime.kernel(source, name, host()) for name in names))


@once(most=4)
def _function(alone: bool, objects: bool) -> Callable[[int, bytes], int]:
    """One of the two functions. `alone`: with the interpreter's lock, for microseconds."""
    kind: Any = ctypes.PYFUNCTYPE if alone else ctypes.CFUNCTYPE
    function = kind(ctypes.c_int32, ctypes.c_void_p, ctypes.c_char_p)
    made: Callable[[int, bytes], int] = function(_loaded()[objects].address)
    return made


_SOURCE = """\
; int32 tilefold_guarded(guard, addresses): see the head of guard.py
define i32 @tilefold_guarded(ptr %guard, ptr %addresses) {
entry:
  %count_at = getelementptr i64, ptr %guard, i64 2
  %count = load i64, ptr %count_at
  %result_at = getelementptr i64, ptr %guard, i64 3
  %result = load i64, ptr %result_at
  %table = getelementptr i64, ptr %guard, i64 4
  %compared = icmp sge i64 %result, 0
  br i1 %compared, label %measure, label %start
measure:
  %address_of_result_at = getelementptr i64, ptr %addresses, i64 %result
  %address_of_result = load i64, ptr %address_of_result_at
  %fourth = mul i64 %result, 4
  %row_of_result = getelementptr i64, ptr %table, i64 %fourth
  %low_of_result = load i64, ptr %row_of_result
  %end_of_result_at = getelementptr i64, ptr %row_of_result, i64 1
  %end_of_result = load i64, ptr %end_of_result_at
  %first_written = add i64 %address_of_result, %low_of_result
  %past_written = add i64 %address_of_result, %end_of_result
  br label %start
start:
  %written_at = phi i64 [0, %entry], [%address_of_result, %measure]
  %written = phi i64 [0, %entry], [%first_written, %measure]
  %written_end = phi i64 [0, %entry], [%past_written, %measure]
  br label %operand

operand:
  %i = phi i64 [0, %start], [%next, %good]
  %more = icmp ult i64 %i, %count
  br i1 %more, label %look, label %run
look:
  %address_at = getelementptr i64, ptr %addresses, i64 %i
  %address = load i64, ptr %address_at
  %rows = mul i64 %i, 4
  %low_at = getelementptr i64, ptr %table, i64 %rows
  %end_at = getelementptr i64, ptr %low_at, i64 1
  %mask_at = getelementptr i64, ptr %low_at, i64 2
  %role_at = getelementptr i64, ptr %low_at, i64 3
  %low = load i64, ptr %low_at
  %end = load i64, ptr %end_at
  %mask = load i64, ptr %mask_at
  %role = load i64, ptr %role_at
  %absent = icmp eq i64 %role, 0
  br i1 %absent, label %good, label %aligned
aligned:
  %odd = and i64 %address, %mask
  %straight = icmp eq i64 %odd, 0
  br i1 %straight, label %place, label %bad
place:
  %own = icmp eq i64 %i, %result
  %free = xor i1 %compared, true
  %skipped = or i1 %own, %free
  br i1 %skipped, label %good, label %same
same:
  %may = icmp eq i64 %role, 2
  %equal = icmp eq i64 %address, %written_at
  %is_result = and i1 %may, %equal
  br i1 %is_result, label %good, label %apart
apart:
  %first = add i64 %address, %low
  %past = add i64 %address, %end
  %before = icmp ule i64 %past, %written
  %behind = icmp uge i64 %first, %written_end
  %clear = or i1 %before, %behind
  br i1 %clear, label %good, label %bad
good:
  %next = add i64 %i, 1
  br label %operand
bad:
  ret i32 2

run:
  %runner = load ptr, ptr %guard
  %record_at = getelementptr i64, ptr %guard, i64 1
  %record = load ptr, ptr %record_at
  %status = call i32 %runner(ptr %record, ptr %addresses)
  ret i32 %status
}

define i32 @tilefold_guarded_objects(ptr %guard, ptr %objects) {
entry:
  %addresses = alloca [OPERANDS x i64]
  br label %operand
operand:
  %i = phi i64 [0, %entry], [%next, %noted]
  %more = icmp ult i64 %i, OPERANDS
  br i1 %more, label %look, label %run
look:
  %rows = mul i64 %i, 4
  %role_place = add i64 %rows, 7
  %role_at = getelementptr i64, ptr %guard, i64 %role_place
  %role = load i64, ptr %role_at
  %absent = icmp eq i64 %role, 0
  br i1 %absent, label %noted, label %read
read:
  %object_at = getelementptr ptr, ptr %objects, i64 %i
  %object = load ptr, ptr %object_at
  %data_at = getelementptr i8, ptr %object, i64 DATA
  %data = load i64, ptr %data_at
  br label %noted
noted:
  %address = phi i64 [0, %look], [%data, %read]
  %to = getelementptr i64, ptr %addresses, i64 %i
  store i64 %address, ptr %to
  %next = add i64 %i, 1
  br label %operand
run:
  %status = call i32 @tilefold_guarded(ptr %guard, ptr %addresses)
  ret i32 %status
}
"""
