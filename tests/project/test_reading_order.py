"""The reading order is the import order, and importing tilefold imports no framework."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
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

PLACES = {name: place for place, name in enumerate(ORDER)}


def name_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(file: str) -> set[str]:
    """The modules of tilefold that a file imports, wherever in the file it does so."""
    found: set[str] = set()
    for node in statements(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tilefold"):
            assert node.level == 0, f"{file}: write imports in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if is_module(inner) else str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("tilefold")}
    return {name.removeprefix("tilefold").removeprefix(".") for name in found}


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module, outer before inner; not the parts of their expressions."""
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        found = getattr(node, field, [])
        for inner in found if isinstance(found, list) else []:
            yield inner
            yield from statements(inner)


@cache
def is_module(dotted: str) -> bool:
    path = PACKAGE.parent / dotted.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@pytest.mark.parametrize("room", sorted({file.split("/")[0] for file in FILES}))
def test_a_file_imports_only_from_files_above_it(room: str) -> None:
    below = {}
    for file in FILES:
        name = name_of(file)
        if file.split("/")[0] != room or name == "__init__":
            continue  # the front door names what it likes
        assert name in PLACES, f"{name} is not in the reading order"
        front = name in ("cli", "__main__") or name.startswith("commands")
        found = {
            other
            for other in imports(file)
            if PLACES.get(other, len(ORDER)) >= PLACES[name] and not (front and not other)
        }
        if found:
            below[file] = sorted(found)
    assert not below, "these files import from below"


def test_every_import_is_found() -> None:
    text = """
if a:
    import one
else:
    try:
        import two
    except E:
        def f():
            with b:
                import three
    finally:
        match c:
            case 1:
                import four
"""
    found = [node for node in statements(ast.parse(text)) if isinstance(node, ast.Import)]
    assert [node.names[0].name for node in found] == ["one", "two", "three", "four"]


@pytest.mark.slow
def test_importing_tilefold_imports_no_framework() -> None:
    code = (
        "import sys, tilefold, tilefold.cli;"
        "frameworks = ('torch', 'jax', 'tensorflow', 'matplotlib', 'safetensors', 'ml_dtypes');"
        "print([name for name in frameworks if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
