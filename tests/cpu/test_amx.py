"""Tile instructions: those in software do what the manual says, and LLVM leaves ours alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import Any

import amx as tiles
import llvmlite.binding as llvm
import numpy as np
import pytest
from amx import Amx, tile_instructions
from guarded import GuardedMemory
from numpy.typing import NDArray
from paths import finding

from tilefold.backends.cpu import runtime, threads

Array = NDArray[Any]

DECLARATIONS = """
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.sttilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8 immarg)
declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)
declare void @llvm.x86.tileloaddt164(i8 immarg, ptr, i64)
declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8 immarg, i8 immarg, i8 immarg)
"""


def config(shapes: dict[int, tuple[int, int]], palette: int = 1) -> bytes:
    """The operand of ldtilecfg: of each tile its rows and the bytes of a row."""
    block = bytearray(64)
    block[0] = palette
    for tile, (rows, row_bytes) in shapes.items():
        block[16 + 2 * tile : 18 + 2 * tile] = row_bytes.to_bytes(2, "little")
        block[48 + tile] = rows
    return bytes(block)


def function(body: str, block: bytes = b"") -> str:
    """The text of `f(ptr %words)` with a configuration as `@config`."""
    written = "".join(f"\\{byte:02x}" for byte in block or config({}))
    return f"""{DECLARATIONS}
@config = private unnamed_addr constant [64 x i8] c"{written}", align 64
define void @f(ptr %words) {{
{body}
}}
"""


def words(count: int) -> str:
    """Lines that read the argument words: pointers %p0, %p1, ..."""
    return "\n".join(
        f"  %at{word} = getelementptr i64, ptr %words, i64 {word}\n"
        f"  %i{word} = load i64, ptr %at{word}, align 8\n"
        f"  %p{word} = inttoptr i64 %i{word} to ptr"
        for word in range(count)
    )


def call(machine: Amx, text: str, *arguments: Array | int, workers: int = 1) -> None:
    """Compile a text and run it with the addresses of arrays, or numbers, as its words."""
    loaded = runtime.load(runtime.compile(text, machine.device), "f")
    given = [each if isinstance(each, int) else each.ctypes.data for each in arguments]
    block = np.array(given, np.int64)
    threads.run(loaded.address, block.ctypes.data, workers)


def product_text(rows: int, pairs: int, columns: int) -> str:
    """Words: c, a, b; c += a b of one tile each, packed."""
    shapes = {0: (rows, 4 * columns), 1: (rows, 4 * pairs), 7: (pairs, 4 * columns)}
    body = f"""{words(3)}
  call void @llvm.x86.ldtilecfg(ptr @config)
  call void @llvm.x86.tileloadd64(i8 0, ptr %p0, i64 {4 * columns})
  call void @llvm.x86.tileloadd64(i8 1, ptr %p1, i64 {4 * pairs})
  call void @llvm.x86.tileloaddt164(i8 7, ptr %p2, i64 {4 * columns})
  call void @llvm.x86.tdpbf16ps(i8 0, i8 1, i8 7)
  call void @llvm.x86.tilestored64(i8 0, ptr %p0, i64 {4 * columns})
  call void @llvm.x86.tilerelease()
  ret void"""
    return function(body, config(shapes))


def bfloat16(numbers: Array) -> Array:
    """The upper halves of float32 numbers, which are bfloat16 ones."""
    return (np.ascontiguousarray(numbers, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def pairs_of(b: Array) -> Array:
    """Two rows of a matrix as one row of pairs."""
    return bfloat16(b.reshape(b.shape[0] // 2, 2, -1).transpose(0, 2, 1))


def expected(c: Array, a: Array, b: Array) -> Array:
    """c + a b as the manual adds: even and odd terms apart, each in order, from zero.

    A product of two bfloat16 has 16 bits, so that float32 holds it, and rounding after the addition
    alone is what a fused multiply-add does.
    """
    with np.errstate(all="ignore"):
        sums = np.zeros((2, *c.shape), np.float32)
        for k in range(a.shape[1]):
            sums[k % 2] += a[:, k, None] * b[k]
        total: Array = c + (sums[0] + sums[1])
    return total


def random(*shape: int, seed: int = 0) -> Array:
    """Random float32 numbers that are also bfloat16 ones."""
    numbers = np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)
    return (numbers.view(np.uint32) & 0xFFFF0000).view(np.float32)


# Arithmetic -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 7, 16])
@pytest.mark.parametrize(("pairs", "columns"), [(1, 16), (5, 3), (16, 1), (16, 16)])
def test_products_have_the_bits_of_the_definition(
    rows: int, pairs: int, columns: int, amx: Amx
) -> None:
    a, b = random(rows, 2 * pairs), random(2 * pairs, columns)
    c = random(rows, columns) / 3
    wanted = expected(c, a, b)
    call(amx, product_text(rows, pairs, columns), c, bfloat16(a), pairs_of(b))
    np.testing.assert_array_equal(c.view(np.int32), wanted.view(np.int32))


def product_of(machine: Amx, c: float, a: tuple[float, float], b: tuple[float, float]) -> Array:
    """c + a[0] b[0] + a[1] b[1] as the tile instruction makes it, denormal numbers included."""
    sums = np.array([c], np.float32)
    left, right = bfloat16(np.array(a)), bfloat16(np.array(b))
    call(machine, product_text(1, 1, 1), sums, left, right)
    return sums


DENORMAL = 2.0**-130
CASES = {
    "a factor that is denormal is zero": (0.0, (DENORMAL, 0.0), (2.0**100, 0.0), 0.0),
    "also times infinity": (0.0, (DENORMAL, 0.0), (np.inf, 0.0), np.nan),
    "a sum that was denormal is zero": (DENORMAL, (0.0, 0.0), (0.0, 0.0), 0.0),
    "a sum that gets denormal is zero": (0.0, (2.0**-65, 0.0), (2.0**-65, 0.0), 0.0),
    "of either sign": (0.0, (2.0**-65, 0.0), (-(2.0**-65), 0.0), 0.0),
    "or that gets so at last": (-1.5 * 2.0**-126, (2.0**-63, 0.0), (2.0**-63, 0.0), -0.0),
    "so is one by cancelling": (-0.0, (2.0**-63,) * 2, (-(2.0**-62), 1.75 * 2.0**-63), -0.0),
    "the smallest normal number stays": (0.0, (2.0**-63, 0.0), (2.0**-63, 0.0), 2.0**-126),
    "infinity": (1.0, (np.inf, 0.0), (-2.0, 0.0), -np.inf),
    "infinity times zero": (1.0, (np.inf, 0.0), (0.0, 0.0), np.nan),
    "opposite infinities": (1.0, (np.inf, np.inf), (1.0, -1.0), np.nan),
    "not a number": (1.0, (np.nan, 1.0), (1.0, 1.0), np.nan),
    "in the sum": (np.nan, (1.0, 1.0), (1.0, 1.0), np.nan),
    "overflow": (0.0, (2.0**127, 0.0), (2.0, 0.0), np.inf),
    "ties go to even": (1.0, (2.0**-12, 0.0), (2.0**-12, 0.0), 1.0),
    "the terms are added before the sum": (1.0, (2.0**-12,) * 2, (2.0**-12,) * 2, 1.0 + 2.0**-23),
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_at_the_edges(case: str, amx: Amx) -> None:
    c, a, b, wanted = CASES[case]
    found = product_of(amx, c, a, b)
    np.testing.assert_array_equal(found, np.array([wanted], np.float32))
    if wanted == 0:
        assert np.signbit(found[0]) == np.signbit(wanted)


def test_the_mode_of_rounding_is_the_threads_own_again(amx: Amx) -> None:
    # NumPy would lose its denormal numbers if the unit's mode stayed behind.
    block = np.zeros((3, 16, 16), np.float32)
    amx.library.amx_product(*(each.ctypes.data for each in block), 0)
    tiny = np.full(64, 1e-40, np.float32)
    assert (tiny * np.float32(1) != 0).all()


def test_the_software_agrees_with_the_processor(amx: Amx) -> None:
    # Called as a function, without any signal. Sums that get denormal and worse are among them.
    a, b = random(16, 32), random(32, 16, seed=1)
    a[3], b[:, 5] = 2.0**-64, 2.0**-64
    a[4, 7], b[9, 2] = np.inf, np.nan
    c, left, right = random(16, 16) / 3, bfloat16(a), pairs_of(b)
    alike = c.copy()
    amx.library.amx_product(alike.ctypes.data, left.ctypes.data, right.ctypes.data, 0)
    call(amx, product_text(16, 16, 16), c, left, right)
    np.testing.assert_array_equal(c, alike)
    assert np.isnan(c).any() and np.isinf(c).any()


# Memory ---------------------------------------------------------------------------------------

# Each in the assembler's words, with the registers that it needs: rcx is the address of word 0's
# array, r12 another name of it; rdx and r13 hold 80.
ADDRESSES = {
    "(%rcx,%rdx)": (0, 80),
    "(%r12,%r13)": (0, 80),
    "16(%rcx,%r13)": (16, 80),
    "-64(%rcx,%rdx)": (-64, 80),
    "-1024(%r12,%rdx)": (-1024, 80),
    "(%rcx,%rdx,4)": (0, 320),
    "256(%r12,%r13,2)": (256, 160),
    "(%rcx)": (0, 0),
    "8(%r12)": (8, 0),
}


@pytest.mark.parametrize("operand", ADDRESSES)
def test_every_form_of_an_address(operand: str, amx: Amx) -> None:
    offset, stride = ADDRESSES[operand]
    numbers = np.arange(4096, dtype=np.uint32)
    middle = numbers[1024:]
    found = np.zeros((5, 7), np.uint32)
    assembly = (
        f"movq $0, %rcx\\0Amovq %rcx, %r12\\0Amovl $$80, %edx\\0Amovl $$80, %r13d\\0A"
        f"tileloadd {operand}, %tmm6"
    )
    llvm.initialize_native_asmparser()
    touched = "r,~{rcx},~{rdx},~{r12},~{r13},~{memory}"
    body = f"""{words(2)}
  call void @llvm.x86.ldtilecfg(ptr @config)
  call void asm sideeffect "{assembly}", "{touched}"(ptr %p0)
  call void @llvm.x86.tilestored64(i8 6, ptr %p1, i64 28)
  call void @llvm.x86.tilerelease()
  ret void"""
    call(amx, function(body, config({6: (5, 28)})), middle, found)
    for row in range(5):
        start = 1024 + (offset + row * stride) // 4
        np.testing.assert_array_equal(found[row], numbers[start : start + 7])


@pytest.mark.parametrize("stride", [64, 200, -72])
def test_only_the_bytes_of_the_tile_are_touched(stride: int, amx: Amx) -> None:
    # The last byte lies before a page that no one may touch, and gaps keep their bits.
    rows, row_bytes = 9, 20
    reach = (rows - 1) * abs(stride) + row_bytes
    first = 0 if stride > 0 else (1 - rows) * stride
    memory = GuardedMemory("after")
    source, target = (memory.allocate(name, reach, "uint8") for name in ("source", "target"))
    source[...] = np.arange(reach) % 251
    body = f"""{words(2)}
  call void @llvm.x86.ldtilecfg(ptr @config)
  call void @llvm.x86.tileloadd64(i8 3, ptr %p0, i64 {stride})
  call void @llvm.x86.tilestored64(i8 3, ptr %p1, i64 {stride})
  call void @llvm.x86.tilerelease()
  ret void"""
    wanted = target.copy()
    call(amx, function(body, config({3: (rows, row_bytes)})), source[first:], target[first:])
    for start in range(first, first + rows * stride, stride):
        wanted[start : start + row_bytes] = source[start : start + row_bytes]
    np.testing.assert_array_equal(target, wanted)
    memory.close()


def test_a_configuration_can_be_read_back_and_zeroes_the_tiles(amx: Amx) -> None:
    numbers = random(16, 16) / 3
    block = config({2: (16, 64), 5: (3, 12)})
    stored, found = np.full(64, 7, np.uint8), np.ones((16, 16), np.float32)
    body = f"""{words(3)}
  call void @llvm.x86.ldtilecfg(ptr @config)
  call void @llvm.x86.tileloadd64(i8 2, ptr %p0, i64 64)
  call void @llvm.x86.sttilecfg(ptr %p1)
  call void @llvm.x86.ldtilecfg(ptr @config)
  call void @llvm.x86.tilestored64(i8 2, ptr %p2, i64 64)
  call void @llvm.x86.tilerelease()
  ret void"""
    call(amx, function(body, block), numbers, stored, found)
    assert stored.tobytes() == block
    assert (found == 0).all()


# What LLVM leaves alone -----------------------------------------------------------------------

# Words: a, b, c, steps. Scratch is written and read by vectors in between; the second tile product
# of a step must see what the first step's vectors wrote.
LOOP = """
  %scratch = alloca [1024 x i8], align 64
  call void @llvm.x86.ldtilecfg(ptr @config)
  call void @llvm.x86.tilezero(i8 0)
  br label %loop
loop:
  %step = phi i64 [0, %entry], [%next, %loop]
  %offset = shl i64 %step, 6
  %row = getelementptr i8, ptr %p0, i64 %offset
  %v = load <16 x i32>, ptr %row, align 4
  %w = xor <16 x i32> %v, splat (i32 -2147450880)
  store <16 x i32> %w, ptr %scratch, align 64
  call void @llvm.x86.tileloadd64(i8 1, ptr %scratch, i64 64)
  call void @llvm.x86.tileloadd64(i8 2, ptr %p1, i64 64)
  call void @llvm.x86.tdpbf16ps(i8 0, i8 1, i8 2)
  store <16 x i32> %v, ptr %scratch, align 64
  call void @llvm.x86.tileloadd64(i8 3, ptr %scratch, i64 64)
  call void @llvm.x86.tdpbf16ps(i8 0, i8 3, i8 2)
  call void @llvm.x86.tilestored64(i8 0, ptr %scratch, i64 64)
  %s = load <16 x float>, ptr %scratch, align 64
  %out = getelementptr i8, ptr %p2, i64 %offset
  store <16 x float> %s, ptr %out, align 4
  call void @llvm.x86.tileloadd64(i8 0, ptr %out, i64 64)
  %next = add i64 %step, 1
  %more = icmp ult i64 %next, %i3
  br i1 %more, label %loop, label %done
done:
  call void @llvm.x86.tilerelease()
  ret void"""
LOOP_CONFIG = config({0: (1, 64), 1: (1, 64), 2: (16, 64), 3: (1, 64)})


def loop_text() -> str:
    return function(f"entry:\n{words(4)}{LOOP}", LOOP_CONFIG)


def test_vectors_and_tiles_stay_in_order(amx: Amx) -> None:
    steps = 5
    a, b = random(steps, 32), random(32, 16)
    c = np.zeros((steps, 16), np.float32)
    call(amx, loop_text(), bfloat16(a), pairs_of(b), c, steps)
    wanted, total = np.zeros_like(c), np.zeros((1, 16), np.float32)
    for step in range(steps):
        for sign in (-1, 1):
            total = expected(total, sign * a[step : step + 1], b)
        wanted[step] = total[0]
    np.testing.assert_array_equal(c, wanted)
    if amx.emulated:
        assert amx.counts() == {
            "ldtilecfg": 1,
            "tilerelease": 1,
            "tilezero": 1,
            "tileloadd": 4 * steps,
            "tilestored": steps,
            "tdpbf16ps": 2 * steps,
        }


def test_llvm_adds_no_tile_instruction_and_drops_none(amx: Amx) -> None:
    listing = runtime.assembly(loop_text(), amx.device)
    kinds = [line.split()[0] for line in tile_instructions(listing)]
    asked = re.findall(r"call void @llvm\.x86\.(?:(tile\w+?|tdpbf16ps|ldtilecfg)(?:64)?)\(", LOOP)
    assert kinds == asked
    # The tiles are those that were named; the assembler's order of operands is the reverse.
    assert "tdpbf16ps\t%tmm2, %tmm1, %tmm0" in tile_instructions(listing)


# Misuse ---------------------------------------------------------------------------------------

TWO = config({0: (16, 64), 1: (16, 64), 2: (16, 64), 4: (8, 64), 5: (16, 32)})
CONFIGURE = "  call void @llvm.x86.ldtilecfg(ptr @config)\n"
RELEASE = "  call void @llvm.x86.tilerelease()\n  ret void"


def zero(tile: int) -> str:
    return f"  call void @llvm.x86.tilezero(i8 {tile})\n"


def dot(c: int, a: int, b: int) -> str:
    return f"  call void @llvm.x86.tdpbf16ps(i8 {c}, i8 {a}, i8 {b})\n"


MISUSES = {
    "tilezero: no tiles are configured on this thread": (zero(0), TWO),
    "tilezero: the tile is not configured": (CONFIGURE + zero(3), TWO),
    "tdpbf16ps: the three tiles are not different ones": (CONFIGURE + dot(0, 1, 1), TWO),
    "tdpbf16ps: the first factor has other rows than the sum": (CONFIGURE + dot(0, 4, 1), TWO),
    "tdpbf16ps: the second factor has other columns than the sum": (CONFIGURE + dot(0, 1, 5), TWO),
    "tdpbf16ps: the factors disagree about the pairs between them": (CONFIGURE + dot(0, 1, 4), TWO),
    "tdpbf16ps: the tile's rows are no multiple of 4 bytes": (
        CONFIGURE + dot(0, 1, 2),
        config({0: (16, 64), 1: (16, 62), 2: (16, 64)}),
    ),
    "ldtilecfg: the palette is neither 0 nor 1": (CONFIGURE, config({}, palette=2)),
    "ldtilecfg: a tile above 7 is configured": (CONFIGURE, config({8: (1, 4)})),
    "ldtilecfg: a tile has more than 16 rows or 64 bytes in a row": (
        CONFIGURE,
        config({0: (17, 64)}),
    ),
    "ldtilecfg: a tile has rows without bytes or bytes without rows": (
        CONFIGURE,
        config({0: (16, 0)}),
    ),
}


@pytest.mark.parametrize("fault", MISUSES)
def test_misuse_is_a_fault(fault: str, amx: Amx) -> None:
    if not amx.emulated:
        pytest.skip("the processor itself ends the process")
    body, block = MISUSES[fault]
    call(amx, function(body + RELEASE, block))
    assert amx.faults() == [fault]
    amx.reset()


def test_tiles_that_stay_configured_are_noticed(amx: Amx) -> None:
    if not amx.emulated:
        pytest.skip("a processor lets tiles stay configured")
    call(amx, function(CONFIGURE + "  ret void", TWO))
    assert amx.configured() == 1
    with pytest.raises(AssertionError, match="1 threads did not release their tiles"):
        amx.check()
    amx.reset()
    amx.check()


# Threads and signals --------------------------------------------------------------------------

# Words: the next item, items, a, b, c. An item is one product; each thread configures its own.
ITEMS = f"""entry:
{words(5)}
  call void @llvm.x86.ldtilecfg(ptr @config)
  br label %take
take:
  %item = atomicrmw add ptr %words, i64 1 monotonic
  %some = icmp slt i64 %item, %i1
  br i1 %some, label %work, label %done
work:
  %offset = shl i64 %item, 10
  %a = getelementptr i8, ptr %p2, i64 %offset
  %c = getelementptr i8, ptr %p4, i64 %offset
  call void @llvm.x86.tilezero(i8 0)
  call void @llvm.x86.tileloadd64(i8 1, ptr %a, i64 64)
  call void @llvm.x86.tileloadd64(i8 2, ptr %p3, i64 64)
  call void @llvm.x86.tdpbf16ps(i8 0, i8 1, i8 2)
  call void @llvm.x86.tilestored64(i8 0, ptr %c, i64 64)
  br label %take
done:
  call void @llvm.x86.tilerelease()
  ret void"""


@pytest.mark.parametrize("workers", [1, 4])
def test_every_thread_has_tiles_of_its_own(workers: int, amx: Amx) -> None:
    items = 200
    a, b = random(items * 16, 32), random(32, 16)
    c = np.zeros((items * 16, 16), np.float32)
    text = function(ITEMS, config({0: (16, 64), 1: (16, 64), 2: (16, 64)}))
    call(amx, text, 0, items, bfloat16(a), pairs_of(b), c, workers=workers)
    np.testing.assert_array_equal(c, expected(np.zeros_like(c), a, b))
    if amx.emulated:
        assert amx.counts()["tdpbf16ps"] == items


def in_a_fresh_process(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", f"import amx as tiles\nfrom test_amx import *\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
        env=finding(__file__),
    )


UNDEFINED = (
    "declare void @llvm.trap()\ndefine void @f(ptr %words) { call void @llvm.trap() ret void }"
)


@pytest.mark.slow
@pytest.mark.parametrize("handler", [False, True])
def test_other_illegal_instructions_are_not_ours(handler: bool, amx: Amx) -> None:
    options = ["-X", "faulthandler"] if handler else []
    code = "with tiles.amx() as machine: call(machine, UNDEFINED)"
    done = in_a_fresh_process(code, *options)
    assert done.returncode == -signal.SIGILL, done.stderr
    assert ("Fatal Python error: Illegal instruction" in done.stderr) == handler


@pytest.mark.slow
def test_the_handler_goes_with_its_block(amx: Amx) -> None:
    if not amx.emulated:
        pytest.skip("the processor needs no handler")
    code = "with tiles.amx() as machine: pass\nproduct_of(machine, 1.0, (1.0, 1.0), (1.0, 1.0))"
    assert in_a_fresh_process(code).returncode == -signal.SIGILL


def test_the_compiler_is_here_where_it_must_be() -> None:
    # Elsewhere the tests above are skipped, each with its reason.
    needed = os.environ.get("CI") == "true" and sys.platform == "linux"
    assert not needed or "compiler" not in (tiles.missing() or "")
