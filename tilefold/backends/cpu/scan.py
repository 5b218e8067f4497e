"""Masks in memory whose every query sees one interval of keys: found by reading them once.

Causal masks, windows, padding on either side, blocks, and what joins them by "and" are such masks.
For each row of a mask the scan reads elements as long as they hide, then as long as they show, then
as long as they hide. If the row does not end there, the mask is none of these, and the scan ends.

    block   [next row, rows, rows of a plane, keys, bytes between rows, address of planes,
             address of first, address of end, patterns that show, that hide, that hide whole rows,
             whether a row failed]

Elements are compared by their bits, 64 at a time. 8192 rows and keys of float32 take 25 ms on two
cores, which is the time of reading 256 MiB.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilefold.backends.cpu import runtime, threads
from tilefold.backends.cpu.device import host
from tilefold.common.first_use import undisturbed
from tilefold.common.single_flight import once

_ALONE_BYTES = 2**18
"""Smaller masks are read by one thread, as in `dispatch`."""


class Bits(NamedTuple):
    """The bits of elements: the two that show a key, and the two that hide one.

    Where a row hides every key, only `hides_rows` do: it is -inf. Other numbers are added to all
    scores of the row alike, so its keys are seen.
    """

    item: int
    shows: tuple[int, int]
    hides: tuple[int, int]
    hides_rows: int


class Plane(NamedTuple):
    """Where a matrix of elements lies, and its sizes; the elements of a row lie side by side."""

    rows: int
    keys: int
    row_bytes: int


def intervals(
    bits: Bits, plane: Plane, addresses: Sequence[int]
) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    """The first key that each query sees and the one past the last, (planes, rows); or None.

    `addresses` are those of planes that lie alike. A row without any key has 0 and 0.
    """
    first, end = np.empty((2, len(addresses), plane.rows), np.int32)
    table = np.array(addresses, np.int64)
    rows = len(addresses) * plane.rows
    at = [array.ctypes.data for array in (table, first, end)]
    words = [0, rows, plane.rows, plane.keys, plane.row_bytes, *at]
    words += [*bits.shows, *bits.hides, bits.hides_rows, 0]
    block = (ctypes.c_int64 * len(words))(*words)
    size = rows * plane.keys * bits.item
    workers = 1 if size < _ALONE_BYTES else min(rows, threads.number())
    threads.run(_loaded(bits.item).address, ctypes.addressof(block), workers)
    return None if block[len(words) - 1] else (first, end)


@once(most=4)
def _loaded(item: int) -> runtime.Loaded:
    cast = "bitcast" if item == 8 else "trunc"
    source = _SOURCE.format(kind=f"i{8 * item}", cast=cast)
    return undisturbed(lambda: runtime.kernel(source, "tilefold_scan", host()))


_SOURCE = """\
; void scan(block): see the head of scan.py
declare i64 @llvm.cttz.i64(i64, i1)

; the first place from j on whose element is neither a nor b
define internal i64 @past(ptr %row, i64 %j, i64 %keys, {kind} %a, {kind} %b) {{
entry:
  %a1 = insertelement <64 x {kind}> poison, {kind} %a, i64 0
  %as = shufflevector <64 x {kind}> %a1, <64 x {kind}> poison, <64 x i32> zeroinitializer
  %b1 = insertelement <64 x {kind}> poison, {kind} %b, i64 0
  %bs = shufflevector <64 x {kind}> %b1, <64 x {kind}> poison, <64 x i32> zeroinitializer
  br label %many
many:
  %m = phi i64 [%j, %entry], [%m_next, %like]
  %m_next = add i64 %m, 64
  %whole = icmp sle i64 %m_next, %keys
  br i1 %whole, label %compare, label %few
compare:
  %at = getelementptr {kind}, ptr %row, i64 %m
  %x = load <64 x {kind}>, ptr %at, align 1
  %is_a = icmp eq <64 x {kind}> %x, %as
  %is_b = icmp eq <64 x {kind}> %x, %bs
  %is = or <64 x i1> %is_a, %is_b
  %flags = bitcast <64 x i1> %is to i64
  %others = xor i64 %flags, -1
  %none = icmp eq i64 %others, 0
  br i1 %none, label %like, label %found
like:
  br label %many
found:
  %skip = call i64 @llvm.cttz.i64(i64 %others, i1 true)
  %place = add i64 %m, %skip
  ret i64 %place
few:
  %f = phi i64 [%m, %many], [%f_next, %same]
  %more = icmp slt i64 %f, %keys
  br i1 %more, label %one, label %over
one:
  %one_at = getelementptr {kind}, ptr %row, i64 %f
  %y = load {kind}, ptr %one_at, align 1
  %y_a = icmp eq {kind} %y, %a
  %y_b = icmp eq {kind} %y, %b
  %y_is = or i1 %y_a, %y_b
  br i1 %y_is, label %same, label %over
same:
  %f_next = add i64 %f, 1
  br label %few
over:
  ret i64 %f
}}

define void @tilefold_scan(ptr %block) {{
entry:
  %words = load <14 x i64>, ptr %block, align 8
  %total = extractelement <14 x i64> %words, i64 1
  %rows = extractelement <14 x i64> %words, i64 2
  %keys = extractelement <14 x i64> %words, i64 3
  %bytes = extractelement <14 x i64> %words, i64 4
  %planes_word = extractelement <14 x i64> %words, i64 5
  %first_word = extractelement <14 x i64> %words, i64 6
  %end_word = extractelement <14 x i64> %words, i64 7
  %planes = inttoptr i64 %planes_word to ptr
  %first = inttoptr i64 %first_word to ptr
  %end = inttoptr i64 %end_word to ptr
  %s0_word = extractelement <14 x i64> %words, i64 8
  %s1_word = extractelement <14 x i64> %words, i64 9
  %h0_word = extractelement <14 x i64> %words, i64 10
  %h1_word = extractelement <14 x i64> %words, i64 11
  %r_word = extractelement <14 x i64> %words, i64 12
  %s0 = {cast} i64 %s0_word to {kind}
  %s1 = {cast} i64 %s1_word to {kind}
  %h0 = {cast} i64 %h0_word to {kind}
  %h1 = {cast} i64 %h1_word to {kind}
  %r = {cast} i64 %r_word to {kind}
  %failed_at = getelementptr i64, ptr %block, i64 13
  br label %take
take:
  %begin = atomicrmw add ptr %block, i64 16 monotonic, align 8
  %left = icmp slt i64 %begin, %total
  %failed = load atomic i64, ptr %failed_at monotonic, align 8
  %fine = icmp eq i64 %failed, 0
  %goes = and i1 %left, %fine
  br i1 %goes, label %work, label %leave
leave:
  ret void
work:
  %stop_far = add i64 %begin, 16
  %far = icmp sgt i64 %stop_far, %total
  %stop = select i1 %far, i64 %total, i64 %stop_far
  br label %each
each:
  %n = phi i64 [%begin, %work], [%n_next, %write]
  %inside = icmp slt i64 %n, %stop
  br i1 %inside, label %read, label %take
read:
  %p = udiv i64 %n, %rows
  %i = urem i64 %n, %rows
  %plane_at = getelementptr i64, ptr %planes, i64 %p
  %plane = load i64, ptr %plane_at
  %down = mul i64 %i, %bytes
  %address = add i64 %plane, %down
  %row = inttoptr i64 %address to ptr
  %lo = call i64 @past(ptr %row, i64 0, i64 %keys, {kind} %h0, {kind} %h1)
  %hi = call i64 @past(ptr %row, i64 %lo, i64 %keys, {kind} %s0, {kind} %s1)
  %last = call i64 @past(ptr %row, i64 %hi, i64 %keys, {kind} %h0, {kind} %h1)
  %ends = icmp eq i64 %last, %keys
  br i1 %ends, label %look, label %fail
look:
  %hidden = icmp eq i64 %lo, %keys
  br i1 %hidden, label %whole_row, label %write
whole_row:
  %strict = call i64 @past(ptr %row, i64 0, i64 %keys, {kind} %r, {kind} %r)
  %nothing = icmp eq i64 %strict, %keys
  br i1 %nothing, label %write, label %fail
fail:
  store atomic i64 1, ptr %failed_at monotonic, align 8
  ret void
write:
  %a = phi i64 [%lo, %look], [0, %whole_row]
  %b = phi i64 [%hi, %look], [0, %whole_row]
  %a32 = trunc i64 %a to i32
  %b32 = trunc i64 %b to i32
  %first_at = getelementptr i32, ptr %first, i64 %n
  store i32 %a32, ptr %first_at
  %end_at = getelementptr i32, ptr %end, i64 %n
  store i32 %b32, ptr %end_at
  %n_next = add i64 %n, 1
  br label %each
}}
"""
