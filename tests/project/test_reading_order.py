"""The reading order is the import order, and importing tilefold imports no framework."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "tilefold"

HOUSE = """
common masks scores problems planning backends frontends implementations maps products blas api
compiling torch transformers diffusers jax tensorflow metal triton layers keras measuring commands
cli __main__
"""


def rooms(folder: Path) -> list[str]:
    """The rooms of a folder in reading order, as the table in its docstring names them."""
    source = (folder / "__init__.py").read_text(encoding="utf-8")
    words = ast.get_docstring(ast.parse(source))
    assert words, f"{folder} has no docstring"
    named = re.findall(r"^ *(\w+) {2,}\S", words, re.MULTILINE)
    there = {
        path.stem for path in folder.iterdir() if path.suffix == ".py" or list(path.glob("*.py"))
    }
    assert {*named} == there - {"__init__"}, f"the table of rooms in {folder.name} is not its files"
    return named


def reading_order(folder: Path, names: list[str]) -> Iterator[str]:
    """All files below a folder, depth first: a file imports only from files above it."""
    for name in names:
        inner = folder / name
        if inner.is_dir():
            yield ".".join(inner.relative_to(PACKAGE).parts)
            yield from reading_order(inner, rooms(inner))
        else:
            yield ".".join(inner.relative_to(PACKAGE).parts)


ORDER = list(reading_order(PACKAGE, HOUSE.split()))

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
