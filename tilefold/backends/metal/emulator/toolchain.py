"""The C++ compilers: they compile kernel sources, and the results stay in the kernel cache.

A kernel becomes a shared object of its own, compiled at -O0 without any header of the C++ library.
This takes 0.1 s on this project's two-core machines, and a run takes milliseconds. The runtime that
loads a kernel is compiled once for each check.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tilefold.backends.metal.emulator.signature import Entry
from tilefold.common import disk_cache

FOLDER = Path(__file__).parent
SECTION = "tilefold_threadgroup"
"""The section of threadgroup arrays in a compiled kernel. Some checks put a dot before it; without
the dot AddressSanitizer would not check such variables."""

LINES = ("-g1", "-gdwarf-4")
"""The options for tracing addresses to lines. addr2line of binutils 2.40 misreads Clang's DWARF 5.
"""


@dataclass(frozen=True)
class Check:
    """A check: the options that it adds for the compilers."""

    clang: bool
    kernel: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    section: str = SECTION
    environment: tuple[tuple[str, str], ...] = ()
    library: str = ""
    """The part of Clang's runtime that the check needs."""


CHECKS = {
    "fast": Check(clang=False),
    "address": Check(
        clang=True,
        kernel=("-fsanitize=address", "-DTILEFOLD_BEFORE", *LINES),
        runtime=("-DTILEFOLD_ADDRESS",),
        link=("-fsanitize=address",),
        section=f".{SECTION}",
        environment=(
            (
                "ASAN_OPTIONS",
                "detect_leaks=0:detect_stack_use_after_return=0"
                ":handle_segv=0:handle_sigbus=0:handle_sigfpe=0",
            ),
        ),
        library="asan",
    ),
    "memory": Check(
        clang=True,
        kernel=("-fsanitize=memory", "-fno-sanitize-memory-param-retval", *LINES),
        runtime=("-DTILEFOLD_MEMORY", "-fsanitize=memory", "-fno-sanitize-memory-param-retval"),
        link=("-fsanitize=memory",),
        environment=(("MSAN_OPTIONS", "symbolize=0:handle_segv=0:handle_sigfpe=0"),),
        library="msan",
    ),
    "count": Check(
        clang=True,
        kernel=("-fsanitize-coverage=func,trace-loads,trace-stores",),
        runtime=("-DTILEFOLD_COUNT",),
    ),
    "thread": Check(
        clang=True,
        kernel=("-fsanitize=thread", *LINES),
        runtime=("-DTILEFOLD_THREAD",),
        link=("-fsanitize=thread",),
        environment=(
            (
                "TSAN_OPTIONS",
                "symbolize=0:handle_segv=0:handle_sigfpe=0:history_size=4:report_signal_unsafe=0",
            ),
        ),
        library="tsan",
    ),
}
"""The checks by name."""

_COMMON = (
    "-std=c++20",
    "-w",
    "-fPIC",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-threadsafe-statics",
    "-ffp-contract=off",
)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its command, its identity in cache keys, and its options for linking a
    kernel, see `_alone`.
    """

    command: tuple[str, ...]
    identity: str
    alone: tuple[str, ...] = ()


def reason(check: str) -> str | None:
    """The reason why a check cannot be made here; None if it can."""
    if not sys.platform.startswith("linux"):
        return "kernels are emulated on Linux only"
    try:
        _compiler(CHECKS[check].clang, CHECKS[check].library)
    except FileNotFoundError as error:
        return str(error)
    return None


def built(text: str, entries: Sequence[Entry], check: str, *, lines: bool = False) -> Path:
    """The shared object of a source. Raises SyntaxError with the compiler's message.

    With `lines`, its addresses can be traced back to source lines.
    """
    options = CHECKS[check]
    enter = '#include "kernel.metal"\n' + "".join(entry.enter() for entry in entries)
    flags = [
        *_COMMON,
        "-O0",
        "-shared",
        *options.kernel,
        *_machine(),
        "-I",
        str(FOLDER / "include"),
    ]
    flags += [f'-DTILEFOLD_SECTION="{options.section}"', *(LINES if lines else [])]
    compiler = _compiler(options.clang, options.library)
    files = {"kernel.metal": text, "enter.cpp": enter}
    return _made(files, compiler, [[*flags, *compiler.alone]], text)


def mistaken_space(text: str) -> tuple[int, str] | None:
    """The first line that confuses kinds of memory, and Clang's message; None if there is none.

    Raises FileNotFoundError without Clang.
    """
    compiler = _compiler(True, "")
    flags = ("-std=c++20", "-x", "c++", "-w", "-fsyntax-only", "-I", str(FOLDER / "spaces"))
    question = f"{compiler.identity} address spaces {_headers()}\n{text}"
    store = disk_cache.default()
    if store.note(question) is not None:
        return None
    with tempfile.TemporaryDirectory(prefix="tilefold-") as name:
        path = Path(name) / "kernel.metal"
        path.write_text(text, encoding="ascii")
        command = [*compiler.command, *flags, path.name]
        done = subprocess.run(command, cwd=name, capture_output=True, text=True, timeout=600)
    if done.returncode == 0:
        store.put_note(question, b"right")
        return None
    found = re.search(r"kernel\.metal:(\d+):\d+: error: (.*)", done.stderr)
    return (int(found[1]), found[2]) if found else (0, done.stderr)


def runner(check: str) -> Path:
    """The program that loads a kernel and runs it."""
    options = CHECKS[check]
    flags = [*_COMMON, "-O2", *options.runtime, *_machine(), "-I", str(FOLDER)]
    return _made(
        {"runtime.cpp": (FOLDER / "runtime.cpp").read_text(encoding="ascii")},
        _compiler(options.clang, options.library),
        [[*flags, "-c"], [*options.link, "-rdynamic", "-lm", "-ldl"]],
        "",
    )


def symbols(library: Path) -> tuple[tuple[str, int, int], ...]:
    """The variables in threadgroup memory: name, address and bytes; the section comes first."""
    content = library.read_bytes()
    sections = _sections(content)
    held = [n for n, each in enumerate(sections) if each.name.lstrip(".") == SECTION]
    if not held:
        return (("", 0, 0),)
    section = sections[held[0]]
    found = [("", section.address, section.size)]
    for table in (each for each in sections if each.name == ".symtab"):
        strings = sections[table.link]
        for at in range(table.offset, table.offset + table.size, 24):
            name, _info, _other, index, value, size = struct.unpack_from("<IBBHQQ", content, at)
            if index == held[0] and size:
                found.append((_string(content, strings.offset + name), value, size))
    return tuple(found)


def line_of(library: Path, address: int) -> int:
    """The source line at an address of the compiled kernel; 0 if it is unknown."""
    tool = shutil.which("addr2line") or shutil.which("llvm-addr2line")
    if tool is None:
        return 0
    # A sanitizer names the place after its check, which may have no line; the place before has one.
    command = [tool, "-i", "-e", str(library), hex(address), hex(address - 1)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    for place in done.stdout.splitlines():
        file, _, line = place.partition(" ")[0].rpartition(":")
        if Path(file).name == "kernel.metal" and line.isdigit():
            return int(line)
    return 0


@dataclass(frozen=True)
class _Section:
    name: str
    address: int
    offset: int
    size: int
    link: int


def _sections(content: bytes) -> list[_Section]:
    """The table of sections of a 64-bit ELF file."""
    (start,) = struct.unpack_from("<Q", content, 0x28)
    width, count, names = struct.unpack_from("<HHH", content, 0x3A)
    rows = [struct.unpack_from("<IIQQQQII", content, start + n * width) for n in range(count)]
    return [
        _Section(_string(content, rows[names][4] + row[0]), row[3], row[4], row[5], row[6])
        for row in rows
    ]


def _string(content: bytes, start: int) -> str:
    return content[start : content.index(b"\0", start)].decode()


def _made(files: dict[str, str], compiler: Compiler, steps: list[list[str]], kept: str) -> Path:
    """The compiler's output for files, in one or two steps, or from the cache if it is there."""
    plain = [[flag.replace(str(FOLDER), "") for flag in step] for step in steps]
    toolchain = f"{compiler.identity} {plain} {_headers()} {sorted(files.items())}"
    store = disk_cache.default()
    name = disk_cache.key(kept, toolchain)
    target = _folder() / name
    if target.exists():
        return target
    binary = store.get(kept, toolchain)
    if binary is None:
        binary = _compiled(files, compiler, steps)
        store.put(kept, toolchain, binary, suffix=".metal")
    target.write_bytes(binary)
    target.chmod(0o700)
    return target


def _compiled(files: dict[str, str], compiler: Compiler, steps: list[list[str]]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="tilefold-") as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).write_text(content, encoding="ascii")
        made = list(files)[-1]
        for number, step in enumerate(steps):
            target = f"made{number}.o"
            command = [*compiler.command, *step[:1], made, "-o", target, *step[1:]]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
            if done.returncode:
                raise SyntaxError(f"{' '.join(compiler.command)}:\n{done.stderr}")
            made = target
        return (folder / made).read_bytes()


@functools.cache
def _folder() -> Path:
    """A folder for programs that are loaded from files; it is removed when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="tilefold-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def _headers() -> str:
    """The hash of all C++ files of the emulator."""
    files = sorted(path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".py")
    texts = (f"{path.name}\n{path.read_text(encoding='ascii')}" for path in files
             if path.suffix != ".pyc")  # fmt: skip
    return disk_cache.key("\n".join(texts), "")


@functools.cache
def _machine() -> tuple[str, ...]:
    """The options for this processor; with F16C, a conversion of half is one instruction."""
    try:
        known = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return ()
    return ("-mavx2", "-mf16c", "-mfma") if {"avx2", "f16c", "fma"} <= set(known) else ()


@functools.cache
def _compiler(clang: bool, library: str) -> Compiler:
    """The first usable compiler. Raises FileNotFoundError with the names that were tried."""
    names = [f"clang++-{n}" for n in range(22, 15, -1)]
    names = ["clang++", *names] if clang else [os.environ.get("CXX", ""), "clang++", *names, "g++"]
    for name in filter(None, names):
        found = shutil.which(name)
        if found and (not library or _has(found, library)):
            path = Path(found).resolve()
            status = path.stat()
            identity = f"{path} {status.st_size} {status.st_mtime_ns}"
            return Compiler((found,), identity, _alone(found))
    if not clang and importlib.util.find_spec("ziglang"):
        command = (sys.executable, "-m", "ziglang", "c++", "-nostdlib++", "-fno-sanitize=undefined")
        return Compiler(command, f"ziglang {importlib.metadata.version('ziglang')}")
    wanted = "Clang with its sanitizers (clang-19, libclang-rt-19-dev)" if library else "a compiler"
    raise FileNotFoundError(f"{wanted} is not here: looked for {', '.join(filter(None, names))}")


@functools.cache
def _alone(compiler: str) -> tuple[str, ...]:
    """Options for linking with nothing but the compiler's own library.

    The runtime has the others anyway, and without them linking takes half of the time.
    """
    command = [compiler, "-print-libgcc-file-name"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    return ("-nostdlib", found) if Path(found).is_file() else ()


def _has(compiler: str, library: str) -> bool:
    """True if a Clang finds a part of its runtime."""
    machine = os.uname().machine
    names = (f"libclang_rt.{library}-{machine}.a", f"libclang_rt.{library}.a")
    for name in names:
        command = [compiler, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
        if Path(found).is_absolute() and Path(found).exists():
            return True
    return False
