"""The reading order is the import order, and importing tilefold imports no framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tilefold"

# The package in reading order: a file imports only from files above it.
READING_ORDER = """
settings check files recent once
nodes expression summary fold blocks rules data coordinates mask parse picture
buffer problem reference device circumstances cache tables owners winners splits
spec choice plan visits roofline
backends backends.cpu
backends.cpu.ir backends.cpu.convert backends.cpu.gemm backends.cpu.softmax
backends.cpu.arguments backends.cpu.mask
backends.cpu.pack backends.cpu.pairs backends.cpu.tile backends.cpu.amx backends.cpu.work
backends.cpu.block backends.cpu.multiply backends.cpu.products
backends.cpu.forward backends.cpu.backward backends.cpu.fused
backends.cpu.sums backends.cpu.state backends.cpu.decode backends.cpu.merge
backends.cpu.runtime backends.cpu.kernel backends.cpu.threads backends.cpu.peak
backends.metal backends.metal.spec backends.metal.msl backends.metal.fragment
backends.metal.arguments backends.metal.mask
backends.metal.frame backends.metal.tile backends.metal.products backends.metal.softmax
backends.metal.forward backends.metal.decode backends.metal.backward
backends.metal.matmul2d backends.metal.tensorops
backends.metal.activation backends.metal.gemm backends.metal.rows
backends.metal.families backends.metal.tables backends.metal.choice
backends.metal.plan
backends.metal.source
backends.metal.emulator backends.metal.emulator.fault backends.metal.emulator.signature
backends.metal.emulator.toolchain backends.metal.emulator.arguments
backends.metal.emulator.launch backends.metal.emulate
backends.metal.dispatch backends.metal.calls backends.metal.runtime backends.metal.commands
backends.metal.standalone backends.metal.gated backends.metal.model
backends.triton backends.triton.spec backends.triton.text backends.triton.mask
backends.triton.arguments backends.triton.frame backends.triton.softmax backends.triton.forward
backends.triton.activation backends.triton.gemm backends.triton.rows
backends.triton.backward backends.triton.fused backends.triton.decode backends.triton.gluon
backends.triton.repair backends.triton.resident backends.triton.hopper
backends.triton.source
backends.triton.architectures backends.triton.resources backends.triton.tables
backends.triton.choice
backends.triton.sheets backends.triton.launch backends.triton.tuned backends.triton.plan
backends.triton.machine backends.triton.module backends.triton.interpreter backends.triton.dispatch
backends.triton.runtime backends.triton.calls
backends.triton.operands backends.triton.standalone
backends.triton.autotune
backends.triton.listing backends.triton.ahead
engine compiling
frontends frontends.numpy frontends.gpu frontends.tensors frontends.operators frontends.torch
implementations implementations.torch implementations.numpy
api metal triton
arrays workload peers agreement bench tuning minilm
selftest utilisation
commands commands.terminal commands.specification commands.text commands.emitted
commands.run commands.bench commands.tune_gpu commands.tune commands.inspect commands.mask
commands.metal commands.doctor
cli __main__
"""
ORDER = READING_ORDER.split()

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def name_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(file: str) -> set[str]:
    """The modules of tilefold that a file imports, wherever in the file it does so."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tilefold"):
            assert node.level == 0, f"{file}: write imports in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if is_module(inner) else str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("tilefold")}
    return {name.removeprefix("tilefold").removeprefix(".") for name in found}


def is_module(dotted: str) -> bool:
    path = PACKAGE.parent / dotted.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_files_above_it(file: str) -> None:
    name = name_of(file)
    if name == "__init__":
        return  # the front door names what it likes
    assert name in ORDER, f"{name} is not in the reading order"
    above = {*ORDER[: ORDER.index(name)]}
    allowed = above | (
        {""} if name in ("cli", "__main__") or name.startswith("commands") else set()
    )
    assert imports(file) <= allowed, f"{name} imports {sorted(imports(file) - allowed)} from below"


def test_importing_tilefold_imports_no_framework() -> None:
    code = (
        "import sys, tilefold, tilefold.cli;"
        "frameworks = ('torch', 'jax', 'tensorflow', 'matplotlib', 'safetensors', 'ml_dtypes');"
        "print([name for name in frameworks if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
