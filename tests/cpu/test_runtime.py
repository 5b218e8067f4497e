"""From text to machine code: what LLVM is asked for, what it may not do, and what errors show."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tilefold
from tilefold.backends.cpu import runtime
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.kernel import emit, kernel
from tilefold.backends.cpu.plan import plan
from tilefold.common import disk_cache
from tilefold.common.settings import ISAS
from tilefold.problems.attention import Problem

ON_X86 = platform.machine().lower() in ("x86_64", "amd64")

# x[i] = x[i] * 3 + x[i], sixteen at a time: arguments are the address of x and its length.
SCALE = """
define void @scale(ptr %arguments) #0 {
entry:
  %address = load i64, ptr %arguments
  %x = inttoptr i64 %address to ptr
  %length_at = getelementptr i64, ptr %arguments, i64 1
  %length = load i64, ptr %length_at
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
  %place = getelementptr float, ptr %x, i64 %i
  %value = load <16 x float>, ptr %place, align 4
  %product = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %value, <16 x float> splat (float 3.0), <16 x float> %value)
  store <16 x float> %product, ptr %place, align 4
  %next = add i64 %i, 16
  %more = icmp slt i64 %next, %length
  br i1 %more, label %loop, label %done
done:
  ret void
}
declare <16 x float> @llvm.fmuladd.v16f32(<16 x float>, <16 x float>, <16 x float>)
attributes #0 = { nounwind "min-legal-vector-width"="512" "prefer-vector-width"="512" }
"""  # noqa: E501  a line of LLVM text cannot be broken


def call(loaded: runtime.Loaded, x: np.ndarray) -> None:
    arguments = np.array([x.ctypes.data, x.size], np.int64)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(loaded.address)(arguments.ctypes.data)


def constant(number: int) -> str:
    """The text of a kernel that returns a number."""
    return f"define i64 @kernel(ptr %arguments) {{\n  ret i64 {number}\n}}\n"


def result(loaded: runtime.Loaded) -> int:
    return int(ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(loaded.address)(None))


@pytest.mark.feature("M03")
@pytest.mark.parametrize("isa", ISAS)
def test_text_becomes_code_that_runs(isa: str) -> None:
    try:
        device = host().lowered(isa)
    except ValueError:
        pytest.skip(f"this machine has no {isa}")
    x = np.arange(48, dtype=np.float32)
    call(runtime.load(runtime.compile(SCALE, device), "scale"), x)
    np.testing.assert_array_equal(x, 4 * np.arange(48, dtype=np.float32))


@pytest.mark.skipif(not ON_X86, reason="names x86 registers")
@pytest.mark.parametrize(
    ("isa", "used", "unused"),
    [
        ("avx512", ["%zmm", "vfmadd"], ["%ymm"]),
        ("avx2", ["%ymm", "vfmadd"], ["%zmm"]),
        ("sse2", ["%xmm", "mulps"], ["%zmm", "%ymm", "vfmadd", "callq"]),
    ],
)
def test_a_level_uses_its_own_registers(isa: str, used: list[str], unused: list[str]) -> None:
    device = replace(
        host(),
        isa=isa,
        features={
            "avx512": "+avx2,+fma,+avx512f,+avx512bw,+avx512dq,+avx512vl",
            "avx2": "+avx2,+fma",
            "sse2": "+sse2",
        }[isa],
    )
    listing = runtime.assembly(SCALE, device)
    for text in used:
        assert text in listing
    for text in unused:
        assert text not in listing


@pytest.mark.skipif(not ON_X86, reason="names x86 registers")
def test_the_widest_vectors_are_not_split() -> None:
    widest = "+avx2,+fma,+avx512f,+avx512bw,+avx512dq,+avx512vl"
    plain = SCALE.replace('"min-legal-vector-width"="512" "prefer-vector-width"="512"', "")
    narrow = SCALE.replace('"prefer-vector-width"="512"', '"prefer-vector-width"="256"')
    narrow = narrow.replace('"min-legal-vector-width"="512"', '"min-legal-vector-width"="0"')
    device = replace(host(), isa="avx512", features=widest)
    assert "%zmm" in runtime.assembly(plain, device)
    assert "%zmm" not in runtime.assembly(narrow, device)


def test_loops_stay_as_they_were_written() -> None:
    listing = runtime.assembly(SCALE, host())
    products = re.findall(r"\bv?fn?m(?:add|la)\w*|\bv?mulps", listing)
    assert len(products) == 64 // host().vector_bytes


def test_code_for_another_architecture_can_be_made_but_not_loaded() -> None:
    other, isa = ("aarch64-linux-gnu", "neon") if ON_X86 else ("x86_64-linux-gnu", "sse2")
    device = replace(host(), triple=other, isa=isa, features=f"+{isa}")
    listing = runtime.assembly(SCALE, device)
    assert ("fmla" if ON_X86 else "mulps") in listing
    assert runtime.compile(SCALE, device)[:4] == b"\x7fELF"
    with pytest.raises(ValueError, match=rf"^device must be of this machine, .*, not {other}$"):
        runtime.kernel(SCALE, "scale", device)


@pytest.mark.feature("M14")
@pytest.mark.parametrize(
    ("right", "wrong", "number", "line", "reason"),
    [
        ("add i64 %i", "addd i64 %i", 15, "%next = addd i64 %i, 16", "expected instruction opcode"),
        ("float 3.0", "floot 3.0", 13, "%product = call ", "expected type"),
        ("ptr %place", "ptr %plase", 12, "%value = load ", "use of undefined value '%plase'"),
        ("ret void", "ret i64 0", 19, "ret i64 0", "value doesn't match function result type"),
    ],
    ids=["opcode", "type", "name", "result"],
)
def test_a_broken_token_shows_the_emitted_line(
    right: str, wrong: str, number: int, line: str, reason: str
) -> None:
    broken = SCALE.replace(right, wrong, 1)
    with pytest.raises(runtime.CompileError) as raised:
        runtime.compile(broken, host())
    message, shown = str(raised.value).split("\n")
    assert message.startswith(f"LLVM rejected line {number} of an emitted kernel: {reason}")
    assert shown.strip().startswith(line)
    assert shown.strip() in broken
    runtime.compile(SCALE, host())  # put right again


@pytest.mark.feature("M14")
def test_text_that_parses_but_makes_no_sense_is_rejected_too() -> None:
    crossed = """
define i64 @kernel(i1 %c) {
  br i1 %c, label %yes, label %no
yes:
  %a = add i64 1, 2
  br label %no
no:
  %b = add i64 %a, 1
  ret i64 %b
}
"""
    with pytest.raises(runtime.CompileError) as raised:
        runtime.compile(crossed, host())
    assert "Instruction does not dominate all uses!" in str(raised.value)
    assert "%b = add i64 %a, 1" in str(raised.value)


@pytest.mark.slow
def test_errors_in_reference_cycles_are_collected_safely() -> None:
    for _ in range(20):
        try:
            runtime.compile(SCALE.replace("ret void", "ret i64 0"), host())
        except runtime.CompileError as error:
            error.itself = error  # type: ignore[attr-defined]  # the frames live until collection
    gc.collect()
    assert result(runtime.load(runtime.compile(constant(9), host()), "kernel")) == 9


def test_a_missing_symbol_is_named() -> None:
    binary = runtime.compile(constant(1), host())
    with pytest.raises(runtime.CompileError, match=r"symbol 'colonel': Symbols not found"):
        runtime.load(binary, "colonel")


@pytest.mark.feature("M03", "S09")
def test_the_second_time_comes_from_the_cache(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert result(runtime.kernel(constant(41), "kernel", host())) == 41
    (text,) = fresh_cache.glob("*.ll")
    assert text.read_text() == constant(41)

    compiled = []
    compile = runtime.compile
    monkeypatch.setattr(runtime, "compile", lambda *a: compiled.append(a) or compile(*a))
    assert result(runtime.kernel(constant(41), "kernel", host())) == 41
    assert compiled == []

    disk_cache.default().clear()
    assert result(runtime.kernel(constant(41), "kernel", host())) == 41
    assert len(compiled) == 1


@pytest.mark.feature("M14")
def test_an_edited_text_takes_effect(fresh_cache: Path) -> None:
    assert result(runtime.kernel(constant(1), "kernel", host())) == 1
    assert result(runtime.kernel(constant(2), "kernel", host())) == 2
    with pytest.raises(runtime.CompileError):
        runtime.kernel(constant(2).replace("ret", "rat"), "kernel", host())
    assert result(runtime.kernel(constant(2), "kernel", host())) == 2


@pytest.mark.parametrize("damage", ["truncated", "world-writable", "another kernel's code"])
def test_a_damaged_entry_is_compiled_again(damage: str, fresh_cache: Path) -> None:
    runtime.kernel(constant(7), "kernel", host())
    (entry,) = fresh_cache.glob("*.bin")
    if damage == "truncated":
        entry.write_bytes(entry.read_bytes()[:-5])
    elif damage == "world-writable":
        entry.chmod(0o666)
    else:
        runtime.kernel(constant(8), "kernel", host())
        (other,) = set(fresh_cache.glob("*.bin")) - {entry}
        entry.write_bytes(other.read_bytes())
    assert result(runtime.kernel(constant(7), "kernel", host())) == 7
    store = disk_cache.default()
    assert store.get(constant(7), runtime.toolchain(host())) is not None


def test_an_unusable_cache_only_costs_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEFOLD_CACHE_DIR", str(Path(__file__) / "below-a-file"))
    assert result(runtime.kernel(constant(5), "kernel", host())) == 5


def test_levels_have_entries_of_their_own(fresh_cache: Path) -> None:
    lowest = host().lowered("sse2" if ON_X86 else "neon")
    keys = {runtime.toolchain(host()), runtime.toolchain(lowest)}
    assert len(keys) == (1 if lowest == host() else 2)


@pytest.mark.slow
def test_code_lives_as_long_as_its_kernel() -> None:
    loaded = [runtime.load(runtime.compile(constant(i), host()), "kernel") for i in range(20)]
    kept = loaded[3]
    del loaded
    gc.collect()
    assert result(kept) == 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much memory is in use")
def test_code_that_was_forgotten_leaves_nothing() -> None:
    binary = runtime.compile(constant(1), host())

    def held(loads: int) -> int:
        for _ in range(loads):
            runtime.load(binary, "kernel")
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = held(2 * runtime.LINKED_TOGETHER)
    loads = 8 * runtime.LINKED_TOGETHER
    assert held(loads) - before < 3 * 1024 * loads  # one linker for all keeps 9 KiB of each


FULL = """
import ctypes, sys
from pathlib import Path
from tilefold.backends.cpu import runtime

text, pages = Path(sys.argv[1]).read_text(), int(sys.argv[2])
binary = runtime.compile(text, runtime.host())
runtime.load(binary, "forward")  # what LLVM needs for itself is there
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PRIVATE_ANONYMOUS_WITHOUT_RESERVE = 0x4022

def reserve(size):
    return libc.mmap(None, size, 0, PRIVATE_ANONYMOUS_WITHOUT_RESERVE, -1, 0)

wide, page = 1 << 33, 4096
below, size = reserve(wide), 1 << 30
while size >= page:  # fill every gap above
    while (at := reserve(size)) > below:
        pass
    libc.munmap(at, size)
    size //= 2
libc.munmap(below + wide - pages * page, pages * page)
print(runtime.load(binary, "forward").address > 0)
"""


@pytest.mark.slow
@pytest.mark.feature("T15")
@pytest.mark.skipif(sys.platform != "linux", reason="the numbers of mmap are those of Linux")
@pytest.mark.parametrize("pages", [1, 2, 3, 4, 6])
def test_a_full_address_space_does_not_end_the_process(tmp_path: Path, pages: int) -> None:
    # The only gap nearby has room for so many pages: for code, perhaps, and not for constants.
    asked = Problem(1, 1, 1, 64, 64, 64, 64, "float32", 0.125, tilefold.full())
    (launch,) = plan(asked, host(), "forward").launches
    file = tmp_path / "text.ll"
    file.write_text(emit(launch.spec))
    command = [sys.executable, "-c", FULL, str(file), str(pages)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_threads_may_compile_at_once(fresh_cache: Path) -> None:
    barrier = threading.Barrier(4)

    def work(number: int) -> list[int]:
        barrier.wait(timeout=30)
        texts = [constant(100 * (i % 2) * number + i) for i in range(5)]
        return [result(runtime.kernel(text, "kernel", host())) for text in texts]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    assert results == [[100 * (i % 2) * number + i for i in range(5)] for number in range(4)]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an interval timer")
@pytest.mark.parametrize("entering", [True, False], ids=["taken", "to be released"])
def test_an_interrupt_while_llvms_lock_is_held_leaves_it_free(
    entering: bool, fresh_cache: Path
) -> None:
    """llvmlite calls functions of ours just after it took the lock, and before it releases it.

    An interrupt in the thread there would leave the lock held.
    """
    calls = []

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def signalling() -> None:
        calls.append(0)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGALRM)
            time.sleep(0.02)

    def ignore() -> None: ...

    spec = plan(Problem.of((1, 1, 8, 5)), host(), "forward").launches[0].spec
    kernel.cache_clear()  # type: ignore[attr-defined]  # a `Function`
    registered = (signalling, ignore) if entering else (ignore, signalling)
    before = signal.signal(signal.SIGALRM, interrupt)
    runtime._llvm_lock.register(*registered)
    try:
        with pytest.raises(KeyboardInterrupt):
            kernel(spec, host())
    finally:
        runtime._llvm_lock.unregister(*registered)
        signal.signal(signal.SIGALRM, before)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(runtime.kernel, constant(1), "kernel", host())
        assert result(other.result(30)) == 1
    assert len(calls) >= 5


@pytest.mark.slow
@pytest.mark.feature("S09")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_largest_kernel_compiles_almost_as_fast_as_a_usual_one(dtype: str) -> None:
    """A ratio, as machines differ; `benchmarks/compile_speed.py` has the seconds (0.3 on Zen 5)."""
    rules = tilefold.causal() & (tilefold.local(256) | tilefold.prefix(4))
    documents = tilefold.documents(np.arange(1000) // 90, np.arange(1200) // 100)
    usual = Problem(1, 8, 8, 1000, 1200, 64, 64, dtype, 0.1, tilefold.causal())
    largest = Problem(2, 8, 2, 1000, 1200, 199, 256, dtype, 0.1, rules & documents)

    def seconds(problem: Problem) -> float:
        launches = plan(problem, host(), "backward", "fused").launches
        text = max((emit(launch.spec) for launch in launches), key=len)
        start = time.thread_time()  # of the processor: the machine may be busy with something else
        runtime.compile(text, host())
        return time.thread_time() - start

    assert seconds(largest) < 2 * min(seconds(usual), seconds(usual))  # measured: 1.1 to 1.2


@pytest.mark.feature("S09")
def test_loading_takes_a_fraction_of_compiling(fresh_cache: Path) -> None:
    big = (
        "".join(SCALE.split("declare")[0].replace("@scale", f"@scale{i}") for i in range(40))
        + "declare"
        + SCALE.split("declare")[1]
    )
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        runtime.kernel(big, "scale7", host())
        seconds.append(time.perf_counter() - start)
    cold, warm = seconds
    assert warm < cold / 3
