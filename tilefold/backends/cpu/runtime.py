"""LLVM at run time: kernel source -> object code -> an address to call.

The emitted source is already vectorised and shaped by hand. So LLVM only cleans it and allocates
registers. No vectoriser and no loop unrolling run, which also keeps compiling short.
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
from tilefold.common.first_use import forks_wait

# llvmlite holds one lock during every call into LLVM, so any number of threads may compile. A fork
# must wait for the lock: a child would inherit LLVM in the middle of a call, and a lock that nobody
# releases. The lock has no public name.
_llvm_lock = getattr(llvm.ffi.lib, "_lock", contextlib.nullcontext())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_llvm_lock.__enter__,
        after_in_parent=lambda: _llvm_lock.__exit__(None, None, None),
        after_in_child=lambda: _llvm_lock.__exit__(None, None, None),
    )
    forks_wait()  # for imports first: a thread that imports may wait for the lock of LLVM


class CompileError(RuntimeError):
    """LLVM rejected the source of a kernel; the message shows the emitted line."""


@dataclass(frozen=True)
class Loaded:
    """Machine code in memory. The code lives as long as this object does."""

    address: int
    symbol: str
    code: llvm.ResourceTracker


def compile(source: str, device: Device) -> bytes:
    """Compile LLVM IR to object code for a device. Raises `CompileError`."""
    machine = _machine(device.triple, device.features)
    with _optimised(source, machine) as module:
        object_code: bytes = machine.emit_object(module)
    return object_code


def assembly(source: str, device: Device) -> str:
    """Compile LLVM IR to readable assembly for a device. Raises `CompileError`."""
    machine = _machine(device.triple, device.features)
    with _optimised(source, machine) as module:
        listing: str = machine.emit_assembly(module)
    return listing


def load(binary: bytes, symbol: str) -> Loaded:
    """Link object code for this machine into this process; return the address of one symbol."""
    library = llvm.JITLibraryBuilder().add_object_img(binary).export_symbol(symbol)
    library.add_current_process()  # for memset and its like
    try:
        number = next(_numbers)
        code = library.link(_linker(number // LINKED_TOGETHER), f"kernel {number}")
    except RuntimeError as error:
        raise CompileError(
            f"the object code does not link for symbol {symbol!r}: {error}"
        ) from None
    return Loaded(code[symbol], symbol, code)


LINKED_TOGETHER = 64
"""Kernels of one linker. A linker keeps 9 KiB of each, even after its code is gone, and goes itself
with the last of its code. A new one takes 0.7 ms, so 12 us a kernel.
"""


@functools.lru_cache(maxsize=1)
def _linker(number: int) -> llvm.LLJIT:
    """A linker of kernels into this process; the code of each keeps it alive.

    JITLink places an object in one piece of memory. MCJIT, the older linker, maps code and
    constants separately. If other libraries have filled the address space, they lie more than 2 GiB
    apart, too far for the small code model, and LLVM ended the process (seen with TensorFlow and
    JAX loaded). MCJIT is also slower: 0.7 ms for a kernel, against 0.2 ms.
    """
    machine = _new_machine(host().triple, host().features)
    return llvm.create_lljit_compiler(machine, use_jit_link=True, suppress_errors=True)


_numbers = itertools.count()  # the name of a library can be used only once


def kernel(source: str, symbol: str, device: Device) -> Loaded:
    """Return the loaded kernel of a source, from the cache on disk if it is there.

    Raises `CompileError`, and `ValueError` for a device that this process does not run on.
    """
    _check_host(device)
    store = disk_cache.default()
    binary = store.get(source, toolchain(device))
    if binary is None:
        binary = compile(source, device)
        store.put(source, toolchain(device), binary, suffix=".ll")
    return load(binary, symbol)


def recall(question: str, symbol: str, device: Device) -> tuple[Loaded, int] | None:
    """Return the kernel whose source was noted as the answer to a question, and the noted number.

    None if there is no such note or no binary; then the source must be emitted.
    """
    _check_host(device)
    store = disk_cache.default()
    answer = store.note(_asked(question, device))
    if answer is None:
        return None
    name, number = answer.decode().split()
    binary = store.binary(name)
    return None if binary is None else (load(binary, symbol), int(number))


def note(question: str, source: str, device: Device, number: int) -> None:
    """Note for `recall` that a source is the answer to a question, together with a number."""
    answer = f"{disk_cache.key(source, toolchain(device))} {number}"
    disk_cache.default().put_note(_asked(question, device), answer.encode())


def _asked(question: str, device: Device) -> str:
    return f"{toolchain(device)}\n{question}"


def _check_host(device: Device) -> None:
    if device.triple != host().triple:
        raise ValueError(f"device must be of this machine, {host().triple}, not {device.triple}")


@functools.lru_cache(maxsize=16)
def toolchain(device: Device) -> str:
    """Return one line that names everything beside the source that determines the object code.

    The checksum of this file is a part of it, so another choice of passes makes other keys.
    """
    versions = f"LLVM {llvm.llvm_version_info} llvmlite {llvmlite.__version__}"
    passes = hashlib.sha256(_source()).hexdigest()
    return f"{versions} {device.triple} {device.features} {passes}"


def _source() -> bytes:
    """The content of this file, in a folder or an archive."""
    assert __spec__ is not None and __spec__.loader is not None
    content: bytes = __spec__.loader.get_data(__file__)  # type: ignore[attr-defined]  # it is there
    return content


@contextlib.contextmanager
def _optimised(source: str, machine: llvm.TargetMachine) -> Iterator[llvm.ModuleRef]:
    """The parsed and cleaned module of a source.

    Module and context are closed here, in this order. The garbage collector ends the members of a
    cycle in any order: a module could then outlive its context and crash the process.
    """
    with llvm.create_context() as context:
        try:
            module = llvm.parse_assembly(source, context)
        except RuntimeError as error:
            raise CompileError(_explain(source, str(error))) from None
        with module:
            try:
                module.verify()
            except RuntimeError as error:
                raise CompileError(_explain(source, str(error))) from None
            _run_passes(module, machine)
            yield module


def _run_passes(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """Clean the module: the one place where the pipeline is chosen.

    It is LLVM's function simplification (sroa, early-cse, instcombine, licm, dead code) at level 1,
    without loop unrolling and without vectorisers. Level 2 gives the same speed within noise
    (forward and backward, dims 64 to 128) and takes 15 % longer. Most of the time goes into
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
    # The small code model addresses constants relative to the instruction pointer. The large model,
    # the JIT's default, would first load the address of every constant into a register.
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


def _explain(source: str, message: str) -> str:
    """A message that shows the emitted line beside LLVM's message."""
    found = re.search(r"<string>:(\d+):(\d+): error: (.*)", message)
    if not found:
        return f"LLVM rejected an emitted kernel: {message.strip()}"
    number = int(found[1])
    lines = source.splitlines()
    line = lines[number - 1] if number <= len(lines) else ""
    return f"LLVM rejected line {number} of an emitted kernel: {found[3]}\n    {line.strip()}"
