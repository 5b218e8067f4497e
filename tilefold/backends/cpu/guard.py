"""Calls on arrays as they come: what their addresses tell is looked at before a record runs.

How arrays lie is known when a call is prepared. Where they lie is not: an operand may be
misaligned, and a result may share memory with what is read. One function in LLVM looks at both and
runs the record, so a small call of Python takes a microsecond.

    guard   [runner, record, operands, place of the result or -1, addresses of Python's own]
    operand [low, end, mask, role]      the bytes that it takes, from its address on; the bits that
                                        are 0 in an aligned address
    role    0: not read, 1: apart from the result, 2: the same array as the result, or apart

The function is a builtin of Python, as those of C are: to call it takes 0.2 us with a product of
8 x 8 numbers, and by ctypes 1.1 us. Arrays of NumPy are taken as objects: their address is the
first field behind the head of the object, a part of NumPy's interface for C that does not change.
To ask an array for it takes 0.8 us.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tilefold.backends.cpu import native, runtime
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.native import NativeCall, words
from tilefold.common.first_use import undisturbed
from tilefold.common.single_flight import once

MOST = 16
"""Operands of a guard at most."""

ABSENT, APART, SAME_OR_APART = 0, 1, 2

_HEAD = 9
"""Words of a guard before its operands."""


class Operand(NamedTuple):
    """What is known of an operand before its address is: see the head of this file."""

    low: int = 0
    end: int = 0
    mask: int = 0
    role: int = ABSENT


@dataclass(frozen=True, eq=False)
class Guard:
    """A guarded record as a function of its operands, in order.

    `run` takes the address of each, or an array of NumPy itself, and anything for an `ABSENT` one.
    It returns True if the record ran. It returns False where an address is not as it should be or
    no memory is left: then nothing ran.
    """

    run: Callable[..., bool]
    _call: NativeCall = field(repr=False)  # the record, kept

    @classmethod
    def of(
        cls, call: NativeCall, operands: Sequence[Operand], result: int, *, alone: bool
    ) -> Guard:
        """The guard of a record, where `HERE`.

        `result` is the place of the operand that is compared, or -1. `alone`: the calling thread
        keeps the interpreter's lock, for microseconds.
        """
        assert len(operands) <= MOST
        functions = _functions()
        lock = (0, 0) if alone else functions.lock
        head = [native.runner(), call.address, len(operands), result, *functions.values, *lock]
        assert len(head) == _HEAD
        block = words([*head, *(number for operand in operands for number in operand)])
        return cls(functions.new(ctypes.addressof(functions.method), block, None), call)


def _data_offset() -> int | None:
    """Where an array object has its address; None where this interpreter has other objects."""
    if sys.implementation.name != "cpython":
        return None
    offset, probe = object.__basicsize__, np.empty(3)
    seen = ctypes.c_size_t.from_address(id(probe) + offset).value
    return offset if seen == probe.__array_interface__["data"][0] else None


_DATA = _data_offset()

HERE = _DATA is not None
"""Whether this interpreter has such functions, and arrays of NumPy such objects."""


class _Method(ctypes.Structure):
    """PyMethodDef: how a function of C becomes one of Python."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("text", ctypes.c_char_p),
    )


_FASTCALL = 0x80
"""METH_FASTCALL: object f(self, objects, their number)."""


class _Functions(NamedTuple):
    """What makes a builtin of a method and of a block, its `self`; addresses that a block has."""

    new: Callable[..., Callable[..., bool]]
    method: _Method
    code: runtime.Loaded
    values: tuple[int, ...]
    lock: tuple[int, ...]


@once(most=1)
def _functions() -> _Functions:
    source = _SOURCE
    numbers = {"DATA": _DATA, "TYPE": object.__basicsize__ - 8, "MOST": MOST}
    for name, number in {**numbers, "ROLE": _HEAD + 3, "HEAD": _HEAD}.items():
        source = source.replace(name, str(number))
    code = undisturbed(lambda: runtime.kernel(source, "tilefold_run_guarded", host()))
    kind = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p)
    return _Functions(
        kind(("PyCFunction_NewEx", ctypes.pythonapi)),
        _Method(b"run", code.address, _FASTCALL, None),
        code,
        (_python("PyBool_FromLong"), _python("PyLong_AsVoidPtr"), id(int)),
        (_python("PyEval_SaveThread"), _python("PyEval_RestoreThread")),
    )


def _python(name: str) -> int:
    """The address of a function of Python's interface for C."""
    return ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0


_SOURCE = """\
; int32 tilefold_guarded(guard, addresses): see the head of guard.py
define internal i32 @tilefold_guarded(ptr %guard, ptr %addresses) {
entry:
  %count_at = getelementptr i64, ptr %guard, i64 2
  %count = load i64, ptr %count_at
  %result_at = getelementptr i64, ptr %guard, i64 3
  %result = load i64, ptr %result_at
  %table = getelementptr i64, ptr %guard, i64 HEAD
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

; object run(self, operands, their number): each an integer, or an array of NumPy
define ptr @tilefold_run_guarded(ptr %self, ptr %objects, i64 %given) {
entry:
  %addresses = alloca [MOST x i64]
  %guard_at = getelementptr i8, ptr %self, i64 DATA
  %guard = load ptr, ptr %guard_at
  %count_at = getelementptr i64, ptr %guard, i64 2
  %count = load i64, ptr %count_at
  %address_of_at = getelementptr ptr, ptr %guard, i64 5
  %address_of = load ptr, ptr %address_of_at
  %int_at = getelementptr ptr, ptr %guard, i64 6
  %int = load ptr, ptr %int_at
  %save_at = getelementptr ptr, ptr %guard, i64 7
  %save = load ptr, ptr %save_at
  %complete = icmp eq i64 %given, %count
  br i1 %complete, label %operand, label %done
operand:
  %i = phi i64 [0, %entry], [%next, %noted]
  %more = icmp ult i64 %i, %count
  br i1 %more, label %look, label %lock
look:
  %rows = mul i64 %i, 4
  %role_place = add i64 %rows, ROLE
  %role_at = getelementptr i64, ptr %guard, i64 %role_place
  %role = load i64, ptr %role_at
  %absent = icmp eq i64 %role, 0
  br i1 %absent, label %noted, label %kind
kind:
  %object_at = getelementptr ptr, ptr %objects, i64 %i
  %object = load ptr, ptr %object_at
  %type_at = getelementptr i8, ptr %object, i64 TYPE
  %type = load ptr, ptr %type_at
  %whole = icmp eq ptr %type, %int
  br i1 %whole, label %number, label %array
number:
  %value = call i64 %address_of(ptr %object)
  br label %noted
array:
  %data_at = getelementptr i8, ptr %object, i64 DATA
  %data = load i64, ptr %data_at
  br label %noted
noted:
  %address = phi i64 [0, %look], [%value, %number], [%data, %array]
  %to = getelementptr i64, ptr %addresses, i64 %i
  store i64 %address, ptr %to
  %next = add i64 %i, 1
  br label %operand

lock:
  %alone = icmp eq ptr %save, null
  br i1 %alone, label %keep, label %release
keep:
  %own = call i32 @tilefold_guarded(ptr %guard, ptr %addresses)
  br label %done
release:
  %restore_at = getelementptr ptr, ptr %guard, i64 8
  %restore = load ptr, ptr %restore_at
  %state = call ptr %save()
  %shared = call i32 @tilefold_guarded(ptr %guard, ptr %addresses)
  call void %restore(ptr %state)
  br label %done
done:
  %status = phi i32 [2, %entry], [%own, %keep], [%shared, %release]
  %ran = icmp eq i32 %status, 0
  %truth = zext i1 %ran to i64
  %bool_at = getelementptr ptr, ptr %guard, i64 4
  %bool = load ptr, ptr %bool_at
  %answer = call ptr %bool(i64 %truth)
  ret ptr %answer
}
"""
