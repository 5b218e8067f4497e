"""The environment of a measurement: its date, machine, versions and commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import platform
import subprocess
from pathlib import Path
from typing import Any

from tilefold.backends.cpu.device import host

_MEASURED_WITH = (
    *("tilefold", "numpy", "llvmlite", "ml_dtypes"),
    *("torch", "onnxruntime", "openvino", "jax", "keras", "tensorflow"),
)


def environment() -> dict[str, Any]:
    """The date, machine, versions and commit, as values of a JSON document."""
    device = host()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"name": device.name, "isa": device.isa, "cores": device.cores},
        "versions": _versions(),
        "commit": _commit(),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _MEASURED_WITH:
        if importlib.util.find_spec(name):
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:  # imported from a folder on the path
                continue
    return versions


def _commit() -> str | None:
    """The commit of the checkout that holds this package, marked if the package has changes."""
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():
        return None
    try:
        commit = _git(package, "rev-parse", "--short=12", "HEAD")
        changed = _git(package, "status", "--porcelain", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *words: str) -> str:
    command = ["git", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()
