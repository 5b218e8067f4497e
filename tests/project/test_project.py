"""The project's outside: what is shipped, what the targets do, what the pages say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import venv
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

import tilefold

USE = """
import numpy as np, sys, tilefold
q = np.random.default_rng(0).standard_normal((1, 2, 33, 16), dtype=np.float32)
o = tilefold.attention(q, q, q, mask=tilefold.causal())
assert np.array_equal(o[:, :, 0], q[:, :, 0]), o
print(tilefold.__file__)
"""


def call(*command: str | Path, cwd: Path = ROOT) -> str:
    """The output of a program; its failure is the test's failure, with what it said."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def installed(folder: Path, *what: str) -> Path:
    """The Python of a new environment with only these and what they ask for."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    call(python, "-m", "pip", "install", "--quiet", *what)
    return python


@pytest.mark.slow
@pytest.mark.feature("T13")
def test_a_wheel_holds_the_package_and_runs_with_its_dependencies_alone(tmp_path: Path) -> None:
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("tilefold-*.whl")
    assert wheel.name == f"tilefold-{tilefold.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "tilefold"
    sources = {f"tilefold/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    emulator = package / "backends" / "metal" / "emulator"
    stand_ins = {path for path in emulator.rglob("*") if path.is_file()}
    sources |= {
        f"tilefold/{path.relative_to(package).as_posix()}"
        for path in stand_ins
        if "__pycache__" not in path.parts
    }
    sources.add("tilefold/py.typed")  # type checkers read the annotations of a package with it
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert any(name.endswith("licenses/LICENSE") for name in names)

    python = installed(tmp_path / "env", str(wheel))
    assert str(tmp_path / "env") in call(python, "-c", USE, cwd=tmp_path)
    said = call(python.with_name("tilefold"), "--version", cwd=tmp_path)
    assert said == f"tilefold {tilefold.__version__}\n"
    drawn = call(python.with_name("tilefold"), "mask", "causal()", "--len-q", "4", cwd=tmp_path)
    assert drawn.splitlines()[1:5] == ["██······", "████····", "██████··", "████████"]
    frozen = call(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path)
    assert "torch" not in frozen and "matplotlib" not in frozen


@pytest.mark.slow
@pytest.mark.feature("T13", "M14")
def test_an_editable_install_follows_the_source(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "tilefold"):
        call("cp", "-r", ROOT / name, copy)
    python = installed(tmp_path / "env", "--editable", str(copy))
    assert str(copy) in call(python, "-c", USE, cwd=tmp_path)
    gemm = copy / "tilefold" / "backends" / "cpu" / "kernels" / "microkernel.py"
    before = gemm.read_text(encoding="utf-8")
    assert "body.multiply_add(left" in before
    edited = before.replace("body.multiply_add(left", "body.multiply_ad(left")
    gemm.write_text(edited, encoding="utf-8")
    done = subprocess.run([str(python), "-c", USE], cwd=tmp_path, capture_output=True, text=True)
    assert "multiply_ad" in done.stderr
    gemm.write_text(before, encoding="utf-8")
    call(python, "-c", USE, cwd=tmp_path)


def test_the_targets_are_there_and_make_knows_what_to_do() -> None:
    for target in ("run", "test", "quick", "check", "peers", "bench", "docs"):
        assert call("make", "--dry-run", "--always-make", target)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search("^make test", script, re.MULTILINE)
    assert re.search("^nice .* make check", script, re.MULTILINE)
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_hard_dependencies_are_four() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = re.findall(r"^dependencies = \[(.*)\]$", text, re.MULTILINE)
    names = [re.match(r'"([a-z]+)', part.strip())[1] for part in line.split(",")]
    assert names == ["numpy", "llvmlite", "platformdirs", "rich"]
    assert '"torch==2.13.0"' in text
    assert f'version = "{tilefold.__version__}"' in text


def test_pages_have_their_form() -> None:
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 50
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "keepachangelog.com" in changes and "## [Unreleased]" in changes
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def blocks(page: str) -> list[str]:
    """The Python of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", ["README.md", "docs/index.md", "docs/products.md", "docs/quantized.md"]
)
def test_python_in_the_pages_runs(page: str) -> None:
    assert blocks(page)
    names: dict[str, Any] = {}  # later blocks go on from earlier ones
    for block in blocks(page):
        if "import torch" in block:
            pytest.importorskip("torch")
        exec(compile(block.replace("2048", "128"), page, "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/index.md", "docs/triton.md", "docs/metal.md"])
def test_gradients_in_the_pages_reach_the_arrays(page: str) -> None:
    """Parts of an unpacked leaf are no leaves, and autograd keeps no gradients of them."""
    pytest.importorskip("torch")
    block = next(block for block in blocks(page) if ".backward()" in block)
    for large, small in (("2048", "9"), ("16384", "9"), ('"cuda"', '"cpu"'), ('"mps"', '"cpu"')):
        block = block.replace(large, small)
    names: dict[str, Any] = {}
    exec(compile(block, page, "exec"), names)
    for name in "qkv":
        assert names[name].is_leaf and names[name].grad.abs().sum() > 0


def test_commands_in_the_pages_parse() -> None:
    from tilefold.cli import parser

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text += (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    fenced = "\n".join(re.split(r"^```.*$", text, flags=re.MULTILINE)[1::2])
    commands = re.findall(r"^tilefold (.+)$", fenced, re.MULTILINE)
    import shlex

    parsed = [shlex.split(line, comments=True) for line in commands]
    assert len(parsed) > 15
    for arguments in parsed:
        assert parser().parse_args(arguments).command == arguments[0]


def test_files_are_rooms_of_a_size() -> None:
    for path in (ROOT / "tilefold").rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 420, f"{path}: {lines} lines"


def test_every_object_that_a_page_shows_is_where_the_page_looks() -> None:
    shown = [
        name
        for page in (ROOT / "docs").glob("*.md")
        for name in re.findall(r"^::: ([\w.]+)", page.read_text(), re.MULTILINE)
    ]
    assert len(shown) > 20
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert attribute in made_in(module), name


@cache
def made_in(module: str) -> set[str]:
    """What a module defines itself, as its text says: nothing is imported, frameworks neither."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found
