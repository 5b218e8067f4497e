"""What every test shares: a kernel cache of its own, and the collection of feature marks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from closing import QUICK_SECONDS, Closing, Measuring
from features import ROWS

if TYPE_CHECKING:
    from amx import Amx

    from tilefold.backends.metal.emulate import Library


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--amx",
        action="store_true",
        help="run every call of this process on AMX, in software where the processor has none",
    )
    parser.addoption("--features-to", help="write which test shows which feature to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Measuring())
    else:
        traced = bool(config.getoption("cov_source", None))  # coverage takes a third longer
        limit = QUICK_SECONDS * (4 / 3 if traced else 1)
        config.pluginmanager.register(Closing(limit, complete=bool(os.environ.get("CI"))))
        if not config.getoption("numprocesses", None):
            config.pluginmanager.register(Measuring())
    # NumPy's products on one thread: several test processes with teams of their own take twice as
    # long. Read when NumPy is imported, so it must be set before any test is collected.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Tests run Triton's kernels in its interpreter; those that compile do so in other processes.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # One cache for all tests, their child processes and the next session. Names of kernels are
    # hashes of their text, so none is ever stale; tests of compiling take `fresh_cache`.
    folder = config.rootpath / ".pytest_cache" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["TILEFOLD_CACHE_DIR"] = str(folder)
    # The suite compiles 2500 kernels of 0.3 MiB. In the usual 256 MiB each test would evict what
    # the next one shares with it, and most kernels would be compiled twice.
    os.environ["TILEFOLD_CACHE_MIB"] = "2048"
    # Hundreds of child processes import the package: bytecode is kept even where the environment
    # says otherwise.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shown: dict[str, set[str]] = {}
    for item in items:
        for mark in item.iter_markers("feature"):
            unknown = set(mark.args) - ROWS.keys()
            if unknown or not mark.args:
                raise pytest.UsageError(
                    f"{item.nodeid}: tools/features.py knows no feature {mark.args}"
                )
            for row in mark.args:
                shown.setdefault(row, set()).add(item.nodeid.partition("[")[0])
    if target := config.getoption("--features-to"):
        table = {row: sorted(tests) for row, tests in sorted(shown.items())}
        Path(target).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """The session's kernel cache, as TILEFOLD_CACHE_DIR names it."""
    return Path(os.environ["TILEFOLD_CACHE_DIR"])


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty kernel cache for this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TILEFOLD_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def amx_everywhere(request: pytest.FixtureRequest) -> Iterator[Amx | None]:
    """The machine that `--amx` makes of this one for the test; None without the option."""
    if not request.config.getoption("--amx"):
        yield None
        return
    import amx as tiles  # not above: it imports tilefold, and that NumPy

    with tiles.everywhere() as machine:
        yield machine


@pytest.fixture
def amx(amx_everywhere: Amx | None) -> Iterator[Amx]:
    """A machine with AMX, the processor's own or in software; fails a test that misuses tiles."""
    import amx as tiles

    if amx_everywhere:
        yield amx_everywhere
        return
    if reason := tiles.missing():
        pytest.skip(reason)
    with tiles.amx() as machine:
        yield machine


@pytest.fixture(scope="session")
def metal() -> Callable[..., Library]:
    """`compile_shader` of the emulator of Metal texts; a test without a compiler is skipped."""
    from metal import needs

    from tilefold.backends.metal import emulate

    needs()
    return emulate.compile_shader
