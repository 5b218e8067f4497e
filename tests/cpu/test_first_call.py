"""A first call finds its kernel by what its text was written from, and never a wrong one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import pytest

import tilefold
from tilefold.backends.cpu import kernel as kernels
from tilefold.backends.cpu import runtime
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.matmul import calls, quantized_calls
from tilefold.backends.cpu.matmul.plan import pack_spec
from tilefold.backends.cpu.matmul.spec import GemmSpec, RoundingSpec
from tilefold.backends.cpu.plan import plan
from tilefold.backends.cpu.spec import KernelSpec
from tilefold.common import disk_cache
from tilefold.problems.attention import Problem

PACKAGE = Path(tilefold.__file__).parent

CALL = """
import sys
import numpy as np
import tilefold
q = np.arange(240.0).reshape(1, 2, 20, 6) % 17 / 17
o = tilefold.attention(q, q, q, mask=tilefold.causal())
print(repr(float(o.sum())), "tilefold.backends.cpu.kernels.forward" in sys.modules)
"""
"""Prints a result, and whether the generator was needed."""


class Checkout:
    """A copy of the package that may be edited, and a kernel cache."""

    def __init__(self, folder: Path) -> None:
        self.package = folder / "tilefold"
        self.cache = folder / "kernels"
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__"))

    def call(self) -> tuple[float, bool]:
        """A result from a process of its own, and whether it wrote the kernel's text."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.package.parent),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TILEFOLD_CACHE_DIR": str(self.cache),
        }
        done = subprocess.run(
            [sys.executable, "-c", CALL],
            capture_output=True,
            text=True,
            cwd=self.package.parent,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        number, wrote = done.stdout.split()
        return float(number), wrote == "True"

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.package / file
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))


@pytest.mark.slow
@pytest.mark.feature("M14", "M03", "S09")
def test_an_edited_generator_takes_effect_and_so_does_its_repair(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    first, wrote = checkout.call()
    assert wrote
    assert checkout.call() == (first, False)
    edit = (
        "backends/cpu/kernels/softmax.py",
        "LOG2_E = math.log2(math.e)",
        "LOG2_E = 1.0 + 0 * math.e",
    )
    checkout.edit(*edit)
    other, wrote = checkout.call()
    assert wrote and other != first
    assert checkout.call() == (other, False)
    checkout.edit(edit[0], edit[2], edit[1])
    assert checkout.call() == (first, False)


@pytest.mark.slow
def test_an_edit_that_changes_no_text_compiles_nothing(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    first, _ = checkout.call()
    checkout.edit("masks/nodes.py", "from __future__", "# A comment.\nfrom __future__")
    assert checkout.call() == (first, True)
    assert len(list(checkout.cache.glob("*.bin"))) == 1
    assert len(list(checkout.cache.glob("*.note"))) == 2


def spec() -> KernelSpec:
    problem = Problem(1, 2, 2, 20, 20, 6, 6, "float64", 0.5, tilefold.causal())
    return plan(problem, host(), "forward").launches[0].spec


@pytest.fixture
def emitted(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[KernelSpec]:
    """The specs whose texts are written during a test, which begins with an empty cache."""
    seen: list[KernelSpec] = []
    real = kernels.emit

    def emit(spec: KernelSpec) -> str:
        seen.append(spec)
        return real(spec)

    monkeypatch.setattr(kernels, "emit", emit)
    return seen


def load(of: KernelSpec) -> kernels.CpuKernel:
    """A kernel as a new process finds it."""
    found: kernels.CpuKernel = kernels.kernel.__wrapped__(of, host())
    return found


@pytest.mark.slow
def test_a_noted_kernel_is_the_written_one(emitted: list[KernelSpec]) -> None:
    written, noted = load(spec()), load(spec())
    assert emitted == [spec()]
    assert noted.names == written.names
    assert noted.workspace_bytes == written.workspace_bytes == kernels.workspace_bytes(spec())


def test_every_field_of_a_spec_is_part_of_the_question() -> None:
    this = spec()
    texts = {kernels._spelt(this)}
    for field in fields(KernelSpec):
        value = getattr(this, field.name)
        if field.name == "mask":
            other = replace(this, mask=replace(value, text=value.text + " "))
        elif field.name == "score":
            other = replace(this, score=replace(this.mask, text="(s,)"))
        elif isinstance(value, tuple):
            other = replace(this, **{field.name: (*value, "one more")})
        elif isinstance(value, bool) or not isinstance(value, (int, str)):
            other = replace(this, **{field.name: not value})
        else:
            other = replace(
                this, **{field.name: f"{value} more" if isinstance(value, str) else value + 1}
            )
        texts.add(kernels._spelt(other))
    assert len(texts) == 1 + len(fields(KernelSpec))


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["*.bin", "*.note"])
def test_where_half_of_it_is_lost_it_is_made_again(
    lost: str, emitted: list[KernelSpec], fresh_cache: Path
) -> None:
    load(spec())
    for path in fresh_cache.glob(lost):
        path.unlink()
    load(spec())
    assert len(emitted) == 2
    load(spec())
    assert len(emitted) == 2


@pytest.mark.slow
def test_sources_that_change_meanwhile_are_not_noted(
    emitted: list[KernelSpec], fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "sources", lambda: "of another day")
    load(spec())
    assert list(fresh_cache.glob("*.note")) == []
    load(spec())
    assert len(emitted) == 2


@pytest.mark.slow
def test_without_sources_texts_are_written(
    emitted: list[KernelSpec], fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "_SOURCES", (tmp_path / "package.zip",))
    assert kernels.sources() == ""
    monkeypatch.setattr(kernels, "_loaded_sources", lambda: "")
    load(spec())
    load(spec())
    assert len(emitted) == 2 and list(fresh_cache.glob("*.note")) == []


def test_bytecode_without_sources_counts_as_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_SOURCES", (tmp_path,))
    seen = set()
    for content in (b"one", b"two"):
        (tmp_path / "forward.pyc").write_bytes(content)
        seen.add(kernels.sources())
    assert len(seen) == 2


def test_other_sources_and_other_devices_have_other_answers(fresh_cache: Path) -> None:
    text = "define i64 @f(ptr %x) {\n  ret i64 3\n}\n"
    runtime.kernel(text, "f", host())
    runtime.note("question", text, host(), 7)
    found = runtime.recall("question", "f", host())
    assert found is not None and found[1] == 7
    assert runtime.recall("another question", "f", host()) is None
    other = replace(host(), features=host().features + ",+sse2")
    assert runtime.recall("question", "f", other) is None
    assert disk_cache.default().count() == 1


@pytest.mark.feature("M14", "A01")
def test_products_are_noted_too(fresh_cache: Path) -> None:
    packing = pack_spec("float32", "float32", host())
    rounding = RoundingSpec(2, 4, 2, False)
    for module, spec in ((calls, packing), (quantized_calls, rounding)):
        made = module.kernel.__wrapped__(spec, host())
        with mock.patch.object(module, "source", side_effect=AssertionError("written again")):
            again = module.kernel.__wrapped__(spec, host())
        assert made.symbol == again.symbol == spec.kernel and made.address != again.address
        for each in fields(spec):  # its text may leave some out
            other = replace(spec, **{each.name: "another"})
            assert kernels._spelt(other) != kernels._spelt(spec), each.name
    gemm = GemmSpec(*["float32"] * 4, packing.unit, 4, 2, 8, True, False, True)
    texts = {kernels._spelt(replace(gemm, **{each.name: "other"})) for each in fields(gemm)}
    assert len(texts | {kernels._spelt(gemm)}) == 1 + len(fields(gemm))


def test_the_checksum_covers_every_module_that_a_generator_imports() -> None:
    code = (
        "import sys\n"
        "from tilefold.backends.cpu.kernels import backward, forward, fused\n"
        "from tilefold.backends.cpu.matmul import few_rows, gemm, quantized_fours\n"
        "print(*[m.__file__ for n, m in sys.modules.items() if n.startswith('tilefold')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    files = {Path(name) for name in done.stdout.split()}
    assert PACKAGE / "backends" / "cpu" / "kernels" / "ir.py" in files
    silent = {PACKAGE / "__init__.py", PACKAGE / "backends" / "__init__.py"}  # write no source
    assert {path.parent for path in files - silent} <= set(kernels._SOURCES)
