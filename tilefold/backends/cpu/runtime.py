"""LLVM at run time: text of a kernel -> object code -> an address to call.

The emitted text is already vectorised and shaped by hand, so LLVM is asked for cleaning and good
registers, not for loop transformations: no vectoriser and no unrolling run, which also keeps
compiling short.
"""

from __future__ import annotations

import functools
import re
import threading
from dataclasses import dataclass

import llvmlite.binding as llvm

from tilefold.device import Device, host

_lock = threading.RLock()


class CompileError(RuntimeError):
    """LLVM rejected the text of a kernel; the message shows the emitted line."""


@dataclass(frozen=True)
class Loaded:
    """Machine code in memory. The code lives as long as this object does."""

    address: int
    symbol: str
    engine: llvm.ExecutionEngine


def compile(text: str, device: Device) -> bytes:
    """Compile LLVM IR text to object code for a device. Raises `CompileError`."""
    with _lock:
        machine = _machine(device.triple, device.features)
        object_code: bytes = machine.emit_object(_optimised(text, device))
        return object_code


def assembly(text: str, device: Device) -> str:
    """Compile LLVM IR text to readable assembly for a device. Raises `CompileError`."""
    with _lock:
        machine = _machine(device.triple, device.features)
        listing: str = machine.emit_assembly(_optimised(text, device))
        return listing


def load(binary: bytes, symbol: str) -> Loaded:
    """Link object code into this process and return the address of one symbol."""
    device = host()
    with _lock:
        engine = llvm.create_mcjit_compiler(
            llvm.parse_assembly("", llvm.create_context()), _machine_owned(device)
        )
        engine.add_object_file(llvm.ObjectFileRef.from_data(binary))
        engine.finalize_object()
        address = engine.get_function_address(symbol)
    if not address:
        raise CompileError(f"the object code holds no symbol {symbol!r}")
    return Loaded(address, symbol, engine)


def kernel(text: str, symbol: str, device: Device) -> Loaded:
    """Return the loaded kernel of a text."""
    return load(compile(text, device), symbol)


def _optimised(text: str, device: Device) -> llvm.ModuleRef:
    try:
        module = llvm.parse_assembly(text, llvm.create_context())
        module.verify()
    except RuntimeError as error:
        raise CompileError(_explain(text, str(error))) from None
    _run_passes(module, _machine(device.triple, device.features))
    return module


def _run_passes(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """Clean the module: the one place where the pipeline is chosen.

    LLVM's function simplification (sroa, early-cse, instcombine, licm, gvn, dead code) at level 2,
    without loop unrolling; the vectorisers are no part of it.
    """
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = False
    options.slp_vectorization = False
    options.loop_unrolling = False
    options.loop_interleaving = False
    builder = llvm.create_pass_builder(machine, options)
    passes = builder.getFunctionPassManager()
    for function in module.functions:
        if not function.is_declaration:
            passes.run(function, builder)


@functools.lru_cache(maxsize=16)
def _machine(triple: str, features: str) -> llvm.TargetMachine:
    return _new_machine(triple, features)


def _machine_owned(device: Device) -> llvm.TargetMachine:
    """A target machine of its own for an engine, which takes it over."""
    return _new_machine(device.triple, device.features)


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
