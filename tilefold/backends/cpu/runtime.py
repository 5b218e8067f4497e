"""LLVM at run time: text of a kernel -> object code -> an address to call.

The emitted text is already vectorised and shaped by hand, so LLVM is asked for cleaning and good
registers, not for loop transformations: no vectoriser and no unrolling run, which also keeps
compiling short.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import llvmlite
import llvmlite.binding as llvm

from tilefold.backends.cpu.device import Device, host
from tilefold.common import disk_cache

# llvmlite holds one lock during every call into LLVM, so any number of threads may compile. A fork
# must wait for it: a child would inherit LLVM half way through a call, and the lock held for ever.
# There is no public name for that lock.
_llvm_lock = getattr(llvm.ffi.lib, "_lock", contextlib.nullcontext())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_llvm_lock.__enter__,
        after_in_parent=lambda: _llvm_lock.__exit__(None, None, None),
        after_in_child=lambda: _llvm_lock.__exit__(None, None, None),
    )


class CompileError(RuntimeError):
    """LLVM rejected the text of a kernel; the message shows the emitted line."""


@dataclass(frozen=True)
class Loaded:
    """Machine code in memory. The code lives as long as this object does."""

    address: int
    symbol: str
    code: llvm.ResourceTracker


def compile(text: str, device: Device) -> bytes:
    """Compile LLVM IR text to object code for a device. Raises `CompileError`."""
    machine = _machine(device.triple, device.features)
    with _optimised(text, machine) as module:
        object_code: bytes = machine.emit_object(module)
    return object_code


def assembly(text: str, device: Device) -> str:
    """Compile LLVM IR text to readable assembly for a device. Raises `CompileError`."""
    machine = _machine(device.triple, device.features)
    with _optimised(text, machine) as module:
        listing: str = machine.emit_assembly(module)
    return listing


def load(binary: bytes, symbol: str) -> Loaded:
    """Link object code for this machine into this process; return the address of one symbol."""
    library = llvm.JITLibraryBuilder().add_object_img(binary).export_symbol(symbol)
    library.add_current_process()  # for memset and its like
    try:
        code = library.link(_linker(), f"kernel {next(_numbers)}")
    except RuntimeError as error:
        raise CompileError(
            f"the object code does not link for symbol {symbol!r}: {error}"
        ) from None
    return Loaded(code[symbol], symbol, code)


@functools.lru_cache(maxsize=1)
def _linker() -> llvm.LLJIT:
    """What links kernels into this process.

    JITLink lays an object into one piece of memory. MCJIT, the older way, maps code and constants
    apart: where other libraries have filled the address space, more than 2 GiB apart, which the
    small code model cannot reach, and LLVM ended the process (seen with TensorFlow and JAX loaded).
    It is also slower: 0.7 ms a kernel against 0.2.
    """
    machine = _new_machine(host().triple, host().features)
    return llvm.create_lljit_compiler(machine, use_jit_link=True, suppress_errors=True)


_numbers = itertools.count()  # a library's name serves once


def kernel(text: str, symbol: str, device: Device) -> Loaded:
    """Return the loaded kernel of a text, from the cache on disk if it is there.

    Raises `CompileError`, and `ValueError` for a device that this process does not run on.
    """
    _check_host(device)
    store = disk_cache.default()
    binary = store.get(text, toolchain(device))
    if binary is None:
        binary = compile(text, device)
        store.put(text, toolchain(device), binary, suffix=".ll")
    return load(binary, symbol)


def recall(question: str, symbol: str, device: Device) -> tuple[Loaded, int] | None:
    """Return the kernel whose text was the answer to a question, and the number noted with it.

    None where nobody noted it, or its binary is gone: then the text must be written.
    """
    _check_host(device)
    store = disk_cache.default()
    answer = store.note(_asked(question, device))
    if answer is None:
        return None
    name, number = answer.decode().split()
    binary = store.binary(name)
    return None if binary is None else (load(binary, symbol), int(number))


def note(question: str, text: str, device: Device, number: int) -> None:
    """Keep for `recall` that a text is the answer to a question, and a number beside it."""
    answer = f"{disk_cache.key(text, toolchain(device))} {number}"
    disk_cache.default().put_note(_asked(question, device), answer.encode())


def _asked(question: str, device: Device) -> str:
    return f"{toolchain(device)}\n{question}"


def _check_host(device: Device) -> None:
    if device.triple != host().triple:
        raise ValueError(f"device must be of this machine, {host().triple}, not {device.triple}")


@functools.lru_cache(maxsize=16)
def toolchain(device: Device) -> str:
    """Return what, beside the text, decides about the object code, as one line.

    This file is part of it by its checksum: another choice of passes makes other keys.
    """
    versions = f"LLVM {llvm.llvm_version_info} llvmlite {llvmlite.__version__}"
    passes = hashlib.sha256(_source()).hexdigest()
    return f"{versions} {device.triple} {device.features} {passes}"


def _source() -> bytes:
    """This file, in a folder or an archive."""
    assert __spec__ is not None and __spec__.loader is not None
    content: bytes = __spec__.loader.get_data(__file__)  # type: ignore[attr-defined]  # it is there
    return content


@contextlib.contextmanager
def _optimised(text: str, machine: llvm.TargetMachine) -> Iterator[llvm.ModuleRef]:
    """The parsed and cleaned module of a text.

    Module and context are closed here, in this order. Left to the garbage collector, which ends
    the members of a cycle in any order, a module could outlive its context and end the process.
    """
    with llvm.create_context() as context:
        try:
            module = llvm.parse_assembly(text, context)
        except RuntimeError as error:
            raise CompileError(_explain(text, str(error))) from None
        with module:
            try:
                module.verify()
            except RuntimeError as error:
                raise CompileError(_explain(text, str(error))) from None
            _run_passes(module, machine)
            yield module


def _run_passes(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """Clean the module: the one place where the pipeline is chosen.

    LLVM's function simplification (sroa, early-cse, instcombine, licm, dead code) at level 1,
    without loop unrolling; the vectorisers are no part of it. Level 2 makes the same speed, forward
    and backward, dims 64 to 128, within noise, and takes 15 % longer; most of the time goes into
    instruction selection and registers (EPYC with AVX-512: 0.04 to 0.25 s per kernel in all).
    """
    with llvm.create_pipeline_tuning_options(speed_level=1) as options:
        options.loop_vectorization = False
        options.slp_vectorization = False
        options.loop_unrolling = False
        options.loop_interleaving = False
        with (
            llvm.create_pass_builder(machine, options) as builder,
            builder.getFunctionPassManager() as passes,
        ):
            for function in module.functions:
                if not function.is_declaration:
                    passes.run(function, builder)


@functools.lru_cache(maxsize=16)
def _machine(triple: str, features: str) -> llvm.TargetMachine:
    return _new_machine(triple, features)


def _new_machine(triple: str, features: str) -> llvm.TargetMachine:
    _initialize(native=triple == llvm.get_process_triple())
    # The small code model addresses constants relative to the instruction pointer; the JIT's
    # default, the large one, would load every constant's address into a register first.
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu="generic" if triple.startswith("aarch64") else "x86-64",
        features=features,
        opt=3,
        reloc="pic",
        codemodel="default",
    )


@functools.lru_cache(maxsize=2)
def _initialize(native: bool) -> None:
    if native:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
    else:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()


def _explain(text: str, message: str) -> str:
    """Show the emitted line beside LLVM's message."""
    found = re.search(r"<string>:(\d+):(\d+): error: (.*)", message)
    if not found:
        return f"LLVM rejected an emitted kernel: {message.strip()}"
    number = int(found[1])
    lines = text.splitlines()
    line = lines[number - 1] if number <= len(lines) else ""
    return f"LLVM rejected line {number} of an emitted kernel: {found[3]}\n    {line.strip()}"
