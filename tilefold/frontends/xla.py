"""The functions that XLA calls: they hold no Python, and take no interpreter lock.

XLA's foreign functions are C functions of one struct, a call frame. When XLA makes an executable,
it asks for an instance of each call: Python reads the operation's text there, prepares the call,
and leaves the address of its record with XLA. When the executable runs, native code takes the
addresses of the buffers from the frame and runs the record: see `backends.cpu.native`. So an
executable holds no address, and may lie in a cache or in another process.

JAX and TensorFlow have an XLA of their own each, and each XLA numbers the types of instances anew.
So each has a `Handler` of its own.

The layouts are those of `xla/ffi/api/c_api.h`, versions 0.2 to 0.5. The handler answers the version
0.1, the oldest one that all of them take.
"""

from __future__ import annotations

import ctypes
import json
import threading
from math import prod
from typing import Any, ClassVar

from tilefold.backends.cpu import native, runtime
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.native import NativeCall
from tilefold.common.check import one_line
from tilefold.common.ending import visit
from tilefold.common.first_use import undisturbed
from tilefold.frontends.operation import Descriptions, Operation
from tilefold.problems.attention import ITEM_BYTES

TARGET = "tilefold_attention"
"""The name of the call in compiled and exported programs."""

KNOWN = tuple([(0, minor) for minor in range(2, 6)])
"""The versions of XLA's interface whose layouts are known: of TensorFlow 2.21 (0.2), and of JAX
0.10.2 (0.3) and 0.12 (0.5)."""

INVALID_ARGUMENT = 3

_Function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)

_ERROR_CREATE, _STATE_SET = 48, 104
"""The places of functions in XLA's table."""

_RUNNER, _TYPE, _DELETER = range(3)
"""The words that native code reads, and the address of the function that it has for XLA."""


def _word(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


def _half(address: int) -> int:
    return ctypes.c_int32.from_address(address).value


def _text(span: int) -> str:
    return ctypes.string_at(_word(span), _word(span + 8)).decode()


_STRING = 4
"""The kind of an attribute that is a text."""


def _attributes(frame: int) -> dict[str, str]:
    """The attributes of a call, which are texts. Raises ValueError for others."""
    kinds, names, values = (_word(frame + at) for at in (144, 152, 160))
    count = _word(frame + 136)
    if any(_half(kinds + 4 * n) != _STRING for n in range(count)):
        raise ValueError("the attributes of a call of tilefold are texts")
    places = [8 * n for n in range(count)]
    return {_text(_word(names + n)): _text(_word(values + n)) for n in places}


def version(api: int) -> tuple[int, int]:
    """The version of an XLA's table of functions."""
    return _half(api + 32), _half(api + 36)


class _TypeInfo(ctypes.Structure):
    _fields_: ClassVar = [
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("serialize", ctypes.c_void_p),
        ("deserialize", ctypes.c_void_p),
    ]


class _Error(ctypes.Structure):
    _fields_: ClassVar = [
        ("size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int32),
    ]


def _failed(frame: int, message: str) -> int:
    """An error of XLA's."""
    given = _Error(28, None, message.encode(), INVALID_ARGUMENT)
    create = _Function(_word(_word(frame + 16) + _ERROR_CREATE))
    made: int = create(ctypes.addressof(given))
    return made


class _Instance:
    """A prepared call of an executable, and words that native code reads.

    They are the address of the record; 1 when the executable is gone; the number of operands that
    are given, and of results; the address of the bytes that each operand has.
    """

    def __init__(self) -> None:
        self.call: NativeCall | None = None
        self.sizes: Any = None
        self.words = _immortal((ctypes.c_int64 * 5)())

    def take(self, call: NativeCall, given: list[int], made: list[int]) -> int:
        """Stand for a call of operands and results of so many bytes; the address of the words."""
        self.call, self.sizes = call, (ctypes.c_int64 * (len(given) + len(made)))(*given, *made)
        self.words[2], self.words[3] = len(given), len(made)
        self.words[4] = ctypes.addressof(self.sizes)
        self.words[0], self.words[1] = call.address, 0
        return ctypes.addressof(self.words)


_instances: list[_Instance] = []
_lock = threading.Lock()


def _instance(operation: Operation, given: Descriptions) -> int:
    """The address of the words of a new instance, in the place of one whose executable is gone.

    The calls of all executables that are gone are let go.
    """
    call = operation.native(given)
    sizes = [[_bytes(*each) for each in side] for side in (given, operation.results(given))]
    with _lock:
        gone = [old for old in _instances if old.words[1]]
        for old in gone:
            old.call = None
        if not gone:
            _instances.append(_Instance())
        return (gone or _instances)[-1].take(call, *sizes)


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    """The bytes of an array."""
    return prod(shape) * {"bool": 1, "int32": 4, "int64": 8, **ITEM_BYTES}[dtype]


def _immortal(value: Any) -> Any:
    """The value, which stays when the interpreter ends: XLA may let executables go later."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    return value


class Handler:
    """The functions for one XLA, by their addresses. It lives as long as the process."""

    def __init__(self) -> None:
        loaded = undisturbed(lambda: runtime.kernel(_SOURCE, "tilefold_xla", host()))
        self.execute: int = loaded.address
        """Runs an instance: for the stage "execute"."""
        self._callback = _Function(self._instantiate)
        self.instantiate = ctypes.cast(self._callback, ctypes.c_void_p).value or 0
        """Makes an instance: for the stage "instantiate"."""
        nothing = (ctypes.c_int64 * 1)(0)
        words: int = _Function(self.execute)(ctypes.addressof(nothing))
        ctypes.c_int64.from_address(words + 8 * _RUNNER).value = native.runner()
        self.type_id = words + 8 * _TYPE
        """Where XLA writes the number of the type of instances."""
        self._info = _TypeInfo(24, None, _word(words + 8 * _DELETER), None, None)
        self.type_info = ctypes.addressof(self._info)
        """What XLA knows about instances."""
        self._kept = _immortal(self), loaded

    def _instantiate(self, frame: int) -> Any:
        """Read the operation of a call, and leave its record with XLA; an error if it cannot be."""
        extension = _word(frame + 8)
        if extension and _half(extension + 8) == 1:
            return _Function(self.execute)(frame)  # the question is the same, and so the answer
        try:
            with visit():
                found = _attributes(frame)
                operation = Operation.read(found["operation"])
                given = [(tuple(shape), dtype) for shape, dtype in json.loads(found["given"])]
                state = _instance(operation, given)
        except Exception as error:
            return _failed(frame, one_line(error) or type(error).__name__)
        api = _word(frame + 16)
        words = [_word(frame + 24), 0, self.type_id, state]
        if version(api) < (0, 3):
            del words[1]  # there is no stage yet
        every = (ctypes.c_int64 * (2 + len(words)))(8 * (2 + len(words)), 0, *words)
        return _Function(_word(api + _STATE_SET))(ctypes.addressof(every))


_SOURCE = """\
; XLA_FFI_Error *handler(XLA_FFI_CallFrame *frame); a frame of size 0 asks for the words
@words = internal global [3 x i64] [i64 0, i64 0, i64 ptrtoint (ptr @gone to i64)]
@other = internal constant [57 x i8] c"the operands of this call are not those of its operation\\00"
; the bytes of an element, by XLA's number of a type
@bytes = internal constant [32 x i8] [
  i8 0, i8 1, i8 1, i8 2, i8 4, i8 8, i8 1, i8 2, i8 4, i8 8, i8 2, i8 4, i8 8, i8 0, i8 0, i8 0,
  i8 2, i8 0, i8 0, i8 0, i8 0, i8 0, i8 0, i8 0, i8 0, i8 0, i8 0, i8 0, i8 0, i8 0, i8 0, i8 0]
@message = internal constant [41 x i8] c"no memory is left for tilefold_attention\\00"

define internal void @gone(ptr %instance) {
entry:
  %flag = getelementptr i64, ptr %instance, i64 1
  store atomic i64 1, ptr %flag release, align 8
  ret void
}

define ptr @tilefold_xla(ptr %frame) {
entry:
  %size = load i64, ptr %frame
  %empty = icmp eq i64 %size, 0
  br i1 %empty, label %own, label %asked
own:
  ret ptr @words
asked:
  %type_at = getelementptr [3 x i64], ptr @words, i64 0, i64 1
  %extension_at = getelementptr i8, ptr %frame, i64 8
  %extension = load ptr, ptr %extension_at
  %none = icmp eq ptr %extension, null
  br i1 %none, label %execute, label %kind
kind:
  %kind_at = getelementptr i8, ptr %extension, i64 8
  %number = load i32, ptr %kind_at
  %is_metadata = icmp eq i32 %number, 1
  br i1 %is_metadata, label %metadata, label %execute

metadata:                                       ; version 0.1, no traits, the type of the state
  %metadata_at = getelementptr i8, ptr %extension, i64 24
  %answer = load ptr, ptr %metadata_at
  %major = getelementptr i8, ptr %answer, i64 24
  store i32 0, ptr %major
  %minor = getelementptr i8, ptr %answer, i64 28
  store i32 1, ptr %minor
  %traits = getelementptr i8, ptr %answer, i64 32
  store i32 0, ptr %traits
  %type = load i64, ptr %type_at
  %type_answer = getelementptr i8, ptr %answer, i64 40
  store i64 %type, ptr %type_answer
  ret ptr null

execute:                                        ; the instance of this call
  %api_at = getelementptr i8, ptr %frame, i64 16
  %api = load ptr, ptr %api_at
  %context_at = getelementptr i8, ptr %frame, i64 24
  %context = load ptr, ptr %context_at
  %version_at = getelementptr i8, ptr %api, i64 36
  %version = load i32, ptr %version_at
  %newer = icmp sge i32 %version, 3
  %ask = alloca [6 x i64]
  %ask_size = select i1 %newer, i64 48, i64 40
  store i64 %ask_size, ptr %ask
  %ask_extension = getelementptr i64, ptr %ask, i64 1
  store ptr null, ptr %ask_extension
  %ask_context = getelementptr i64, ptr %ask, i64 2
  store ptr %context, ptr %ask_context
  %ask_stage = getelementptr i64, ptr %ask, i64 3
  store i64 0, ptr %ask_stage                   ; the stage of instances, where there is one
  %type_place = select i1 %newer, i64 4, i64 3
  %ask_type = getelementptr i64, ptr %ask, i64 %type_place
  store ptr %type_at, ptr %ask_type
  %get_at = getelementptr i8, ptr %api, i64 112
  %get = load ptr, ptr %get_at
  %error = call ptr %get(ptr %ask)
  %wrong = icmp ne ptr %error, null
  br i1 %wrong, label %give_up, label %count
give_up:
  ret ptr %error

count:                                          ; the addresses of all buffers
  %state_place = select i1 %newer, i64 5, i64 4
  %state_at = getelementptr i64, ptr %ask, i64 %state_place
  %instance = load ptr, ptr %state_at
  %record = load ptr, ptr %instance
  %given_at = getelementptr i8, ptr %frame, i64 56
  %given = load i64, ptr %given_at
  %arguments_at = getelementptr i8, ptr %frame, i64 72
  %arguments = load ptr, ptr %arguments_at
  %made_at = getelementptr i8, ptr %frame, i64 96
  %made = load i64, ptr %made_at
  %results_at = getelementptr i8, ptr %frame, i64 112
  %results = load ptr, ptr %results_at
  %wanted_at = getelementptr i64, ptr %instance, i64 2
  %wanted = load i64, ptr %wanted_at
  %promised_at = getelementptr i64, ptr %instance, i64 3
  %promised = load i64, ptr %promised_at
  %same_given = icmp eq i64 %given, %wanted
  %same_made = icmp eq i64 %made, %promised
  %same = and i1 %same_given, %same_made
  br i1 %same, label %fitting, label %misfit
fitting:
  %sizes_at = getelementptr i64, ptr %instance, i64 4
  %sizes = load ptr, ptr %sizes_at
  %every = add i64 %given, %made
  %addresses = alloca ptr, i64 %every
  br label %next
next:
  %i = phi i64 [0, %fitting], [%following, %taken]
  %more = icmp ult i64 %i, %every
  br i1 %more, label %take, label %run
take:
  %is_given = icmp ult i64 %i, %given
  %past = sub i64 %i, %given
  %place = select i1 %is_given, i64 %i, i64 %past
  %from = select i1 %is_given, ptr %arguments, ptr %results
  %buffer_at = getelementptr ptr, ptr %from, i64 %place
  %buffer = load ptr, ptr %buffer_at
  %data_at = getelementptr i8, ptr %buffer, i64 24
  %data = load ptr, ptr %data_at
  %address_at = getelementptr ptr, ptr %addresses, i64 %i
  store ptr %data, ptr %address_at
  %type_code_at = getelementptr i8, ptr %buffer, i64 16
  %type_code = load i32, ptr %type_code_at
  %known = icmp ult i32 %type_code, 32
  %code = select i1 %known, i32 %type_code, i32 0
  %item_at = getelementptr [32 x i8], ptr @bytes, i64 0, i32 %code
  %item_8 = load i8, ptr %item_at
  %item = zext i8 %item_8 to i64
  %rank_at = getelementptr i8, ptr %buffer, i64 32
  %rank = load i64, ptr %rank_at
  %dims_at = getelementptr i8, ptr %buffer, i64 40
  %dims = load ptr, ptr %dims_at
  br label %axis
axis:
  %a = phi i64 [0, %take], [%a_next, %longer]
  %bytes = phi i64 [%item, %take], [%more_bytes, %longer]
  %axes = icmp ult i64 %a, %rank
  br i1 %axes, label %longer, label %whole
longer:
  %dim_at = getelementptr i64, ptr %dims, i64 %a
  %dim = load i64, ptr %dim_at
  %more_bytes = mul i64 %bytes, %dim
  %a_next = add i64 %a, 1
  br label %axis
whole:
  %size_at = getelementptr i64, ptr %sizes, i64 %i
  %size_wanted = load i64, ptr %size_at
  %right = icmp eq i64 %bytes, %size_wanted
  br i1 %right, label %taken, label %misfit
taken:
  %following = add i64 %i, 1
  br label %next

run:
  %runner_at = getelementptr [3 x i64], ptr @words, i64 0, i64 0
  %runner = load ptr, ptr %runner_at
  %failed = call i32 %runner(ptr %record, ptr %addresses)
  %fine = icmp eq i32 %failed, 0
  br i1 %fine, label %done, label %no_memory
done:
  ret ptr null
misfit:
  br label %report_error_of
no_memory:
  br label %report_error_of
report_error_of:
  %text = phi ptr [@other, %misfit], [@message, %no_memory]
  %reason = phi i64 [3, %misfit], [8, %no_memory] ; INVALID_ARGUMENT, RESOURCE_EXHAUSTED
  %report = alloca [4 x i64]
  store i64 28, ptr %report
  %report_extension = getelementptr i64, ptr %report, i64 1
  store ptr null, ptr %report_extension
  %report_message = getelementptr i64, ptr %report, i64 2
  store ptr %text, ptr %report_message
  %report_code = getelementptr i64, ptr %report, i64 3
  store i64 %reason, ptr %report_code
  %create_at = getelementptr i8, ptr %api, i64 48
  %create = load ptr, ptr %create_at
  %report_error = call ptr %create(ptr %report)
  ret ptr %report_error
}
"""
