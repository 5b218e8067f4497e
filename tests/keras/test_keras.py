"""Keras on each of its backends: a process for each, since KERAS_BACKEND is chosen at import."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from paths import ROOT

pytestmark = pytest.mark.slow  # importing a framework takes seconds

EVERY, ONE = "every_backend.py", "one_backend.py"
BACKENDS = {"torch": [EVERY, ONE], "jax": [EVERY], "tensorflow": [EVERY]}


@pytest.mark.feature("J02", "T01", "T09", "T15")
@pytest.mark.parametrize("backend", BACKENDS)
def test_keras_runs_here_and_learns(backend: str) -> None:
    for name in ("keras", backend):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}  # teams would wait for each other
    if backend == "jax":  # its many small programs run once: compiling them less well saves a fifth
        quiet["XLA_FLAGS"] = (
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        )
    environment = {**os.environ, **quiet, "KERAS_BACKEND": backend}
    checks = [str(Path(__file__).with_name(name)) for name in BACKENDS[backend]]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, *checks], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
