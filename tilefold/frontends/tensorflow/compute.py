"""The kernel of all operators, in native code: Python runs where new shapes come, and only there.

    words    = the generation, then rank and sizes of each input
    prepared = the call in the state's list with the same words, else what Python prepares for them
    allocate the results, and run the record of the call on the addresses of inputs and results

`states.py` says how a state and a prepared call lie in memory. Addresses stand in the state, so the
source is the same in every process, and its object code is kept on disk.
"""

from __future__ import annotations

import functools

from tilefold.backends.cpu import runtime
from tilefold.backends.cpu.device import host
from tilefold.common.first_use import undisturbed
from tilefold.frontends.tensorflow.library import NATIVE, RESOURCE_EXHAUSTED


def address(symbol: str) -> int:
    """The address of "tilefold_compute" or of "tilefold_delete"."""
    return _loaded(symbol).address


@functools.lru_cache(maxsize=2)
def _loaded(symbol: str) -> runtime.Loaded:
    source = _SOURCE.replace("{functions}", _functions()).replace("{code}", str(RESOURCE_EXHAUSTED))
    return undisturbed(lambda: runtime.kernel(source, symbol, host()))


def _functions() -> str:
    """Loads of the functions of the table, by their names."""
    lines = []
    for number, name in enumerate(NATIVE):
        lines.append(f"  %{name}_at = getelementptr ptr, ptr %table, i64 {number}")
        lines.append(f"  %{name} = load ptr, ptr %{name}_at")
    return "\n".join(lines)


_SOURCE = """\
; void tilefold_compute(state, context): see the head of compute.py
declare i32 @memcmp(ptr, ptr, i64)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)

@memory = internal constant [42 x i8] c"tilefold: no memory is left for this call\\00"

define void @tilefold_compute(ptr %state, ptr %context) {
entry:
  %table = load ptr, ptr %state
{functions}
  %active = getelementptr i64, ptr %state, i64 3
  %before = atomicrmw add ptr %active, i64 1 seq_cst, align 8
  %status = call ptr %NewStatus()
  %count_32 = call i32 %NumInputs(ptr %context)
  %count = sext i32 %count_32 to i64
  %inputs = alloca ptr, i64 %count
  %input_bytes = mul i64 %count, 8
  call void @llvm.memset.p0.i64(ptr %inputs, i8 0, i64 %input_bytes, i1 false)
  br label %get

get:  ; the inputs, and the number of words
  %i = phi i64 [0, %entry], [%i_next, %got]
  %words = phi i64 [1, %entry], [%words_next, %got]
  %i_more = icmp slt i64 %i, %count
  br i1 %i_more, label %get_one, label %fill
get_one:
  %input_at = getelementptr ptr, ptr %inputs, i64 %i
  %i_32 = trunc i64 %i to i32
  call void %GetInput(ptr %context, i32 %i_32, ptr %input_at, ptr %status)
  %get_code = call i32 %GetCode(ptr %status)
  %get_good = icmp eq i32 %get_code, 0
  br i1 %get_good, label %got, label %failed
got:
  %input = load ptr, ptr %input_at
  %rank_32 = call i32 %NumDims(ptr %input)
  %rank = sext i32 %rank_32 to i64
  %with_rank = add i64 %words, 1
  %words_next = add i64 %with_rank, %rank
  %i_next = add i64 %i, 1
  br label %get

fill:  ; the words
  %flat = alloca i64, i64 %words
  %generation_at = getelementptr ptr, ptr %state, i64 6
  %generation_in = load ptr, ptr %generation_at
  %generation = load atomic i64, ptr %generation_in monotonic, align 8
  store i64 %generation, ptr %flat
  br label %shape
shape:
  %s = phi i64 [0, %fill], [%s_next, %shaped]
  %place = phi i64 [1, %fill], [%place_next, %shaped]
  %s_more = icmp slt i64 %s, %count
  br i1 %s_more, label %shape_one, label %look
shape_one:
  %shape_at = getelementptr ptr, ptr %inputs, i64 %s
  %tensor = load ptr, ptr %shape_at
  %axes_32 = call i32 %NumDims(ptr %tensor)
  %axes = sext i32 %axes_32 to i64
  %axes_at = getelementptr i64, ptr %flat, i64 %place
  store i64 %axes, ptr %axes_at
  br label %size
size:
  %d = phi i64 [0, %shape_one], [%d_next, %size_one]
  %d_more = icmp slt i64 %d, %axes
  br i1 %d_more, label %size_one, label %shaped
size_one:
  %d_32 = trunc i64 %d to i32
  %length = call i64 %Dim(ptr %tensor, i32 %d_32)
  %d_next = add i64 %d, 1
  %length_at = getelementptr i64, ptr %axes_at, i64 %d_next
  store i64 %length, ptr %length_at
  br label %size
shaped:
  %past = add i64 %place, 1
  %place_next = add i64 %past, %axes
  %s_next = add i64 %s, 1
  br label %shape

look:  ; the prepared call with these words
  %head = getelementptr ptr, ptr %state, i64 1
  %newest = load atomic ptr, ptr %head seq_cst, align 8
  %flat_bytes = mul i64 %words, 8
  br label %each
each:
  %p = phi ptr [%newest, %look], [%older, %other]
  %p_none = icmp eq ptr %p, null
  br i1 %p_none, label %ask, label %compare
compare:
  %p_number_at = getelementptr i64, ptr %p, i64 1
  %p_number = load i64, ptr %p_number_at
  %as_long = icmp eq i64 %p_number, %words
  br i1 %as_long, label %compare_words, label %other
compare_words:
  %p_words_at = getelementptr ptr, ptr %p, i64 2
  %p_words = load ptr, ptr %p_words_at
  %difference = call i32 @memcmp(ptr %p_words, ptr %flat, i64 %flat_bytes)
  %same = icmp eq i32 %difference, 0
  br i1 %same, label %found, label %other
other:
  %older = load atomic ptr, ptr %p monotonic, align 8
  br label %each
ask:
  %ask_at = getelementptr ptr, ptr %state, i64 2
  %python = load ptr, ptr %ask_at
  %asked = call ptr %python(ptr %state, ptr %context, ptr %flat, i64 %words, ptr %status)
  %refused = icmp eq ptr %asked, null
  br i1 %refused, label %failed, label %found

found:  ; its results
  %call = phi ptr [%p, %compare_words], [%asked, %ask]
  %results_at = getelementptr i64, ptr %call, i64 4
  %results = load i64, ptr %results_at
  %operands_at = getelementptr i64, ptr %call, i64 5
  %operands = load i64, ptr %operands_at
  %no_operands = sub i64 %count, %operands
  %all = add i64 %count, %results
  %outputs = alloca ptr, i64 %results
  %addresses = alloca ptr, i64 %all
  %output_bytes = mul i64 %results, 8
  call void @llvm.memset.p0.i64(ptr %outputs, i8 0, i64 %output_bytes, i1 false)
  br label %allocate
allocate:
  %r = phi i64 [0, %found], [%r_next, %allocated]
  %r_more = icmp slt i64 %r, %results
  br i1 %r_more, label %allocate_one, label %data
allocate_one:
  %first = mul i64 %r, 4
  %row = add i64 %first, 6
  %type_at = getelementptr i64, ptr %call, i64 %row
  %type = load i64, ptr %type_at
  %type_32 = trunc i64 %type to i32
  %r_rank_at = getelementptr i64, ptr %type_at, i64 1
  %r_rank = load i64, ptr %r_rank_at
  %r_rank_32 = trunc i64 %r_rank to i32
  %sizes_at = getelementptr ptr, ptr %type_at, i64 2
  %sizes = load ptr, ptr %sizes_at
  %bytes_at = getelementptr i64, ptr %type_at, i64 3
  %bytes = load i64, ptr %bytes_at
  %r_32 = trunc i64 %r to i32
  %output = call ptr %AllocateOutput(ptr %context, i32 %r_32, i32 %type_32, ptr %sizes,
                                     i32 %r_rank_32, i64 %bytes, ptr %status)
  %output_at = getelementptr ptr, ptr %outputs, i64 %r
  store ptr %output, ptr %output_at
  %r_code = call i32 %GetCode(ptr %status)
  %r_good = icmp eq i32 %r_code, 0
  br i1 %r_good, label %allocated, label %failed_late
allocated:
  %r_next = add i64 %r, 1
  br label %allocate

data:  ; all addresses: those of results follow those of operands, over inputs that are none
  %a = phi i64 [0, %allocate], [%a_next, %data_one]
  %a_more = icmp slt i64 %a, %all
  br i1 %a_more, label %data_one, label %run
data_one:
  %is_input = icmp slt i64 %a, %count
  %a_output = sub i64 %a, %count
  %array = select i1 %is_input, ptr %inputs, ptr %outputs
  %index = select i1 %is_input, i64 %a, i64 %a_output
  %holder = getelementptr ptr, ptr %array, i64 %index
  %held = load ptr, ptr %holder
  %bits = call ptr %TensorData(ptr %held)
  %before_results = sub i64 %a, %no_operands
  %slot = select i1 %is_input, i64 %a, i64 %before_results
  %address_at = getelementptr ptr, ptr %addresses, i64 %slot
  store ptr %bits, ptr %address_at
  %a_next = add i64 %a, 1
  br label %data

run:
  %runner_at = getelementptr ptr, ptr %state, i64 5
  %runner = load ptr, ptr %runner_at
  %record_at = getelementptr ptr, ptr %call, i64 3
  %record = load ptr, ptr %record_at
  %ran = call i32 %runner(ptr %record, ptr %addresses)
  %no_memory = icmp ne i32 %ran, 0
  br i1 %no_memory, label %exhausted, label %release
exhausted:
  call void %SetStatus(ptr %status, i32 {code}, ptr @memory)
  br label %failed_late
failed_late:
  call void %OpKernelContext_Failure(ptr %context, ptr %status)
  br label %release
release:
  %o = phi i64 [0, %run], [0, %failed_late], [%o_next, %released]
  %o_more = icmp slt i64 %o, %results
  br i1 %o_more, label %release_one, label %close
release_one:
  %o_at = getelementptr ptr, ptr %outputs, i64 %o
  %o_tensor = load ptr, ptr %o_at
  %o_none = icmp eq ptr %o_tensor, null
  br i1 %o_none, label %released, label %release_it
release_it:
  call void %DeleteTensor(ptr %o_tensor)
  br label %released
released:
  %o_next = add i64 %o, 1
  br label %release

failed:
  call void %OpKernelContext_Failure(ptr %context, ptr %status)
  br label %close
close:
  %c = phi i64 [0, %failed], [0, %release], [%c_next, %closed]
  %c_more = icmp slt i64 %c, %count
  br i1 %c_more, label %close_one, label %done
close_one:
  %c_at = getelementptr ptr, ptr %inputs, i64 %c
  %c_tensor = load ptr, ptr %c_at
  %c_none = icmp eq ptr %c_tensor, null
  br i1 %c_none, label %closed, label %close_it
close_it:
  call void %DeleteTensor(ptr %c_tensor)
  br label %closed
closed:
  %c_next = add i64 %c, 1
  br label %close
done:
  call void %DeleteStatus(ptr %status)
  %after = atomicrmw sub ptr %active, i64 1 seq_cst, align 8
  ret void
}

; void tilefold_delete(state): Python frees the memory of a dead state when it makes the next one
define void @tilefold_delete(ptr %state) {
entry:
  %none = icmp eq ptr %state, null
  br i1 %none, label %done, label %mark
mark:
  %dead = getelementptr i64, ptr %state, i64 4
  store i64 1, ptr %dead
  br label %done
done:
  ret void
}
"""
