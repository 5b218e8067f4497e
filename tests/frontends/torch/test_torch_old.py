"""A PyTorch that is too old: a process with another version in `torch.__version__` meets it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import torch, tilefold
torch.__version__ = torch.torch_version.TorchVersion("2.9.1")
q = torch.zeros(1, 1, 2, 8)
try:
    tilefold.attention(q, q, q)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.feature("T15")
def test_one_that_is_too_old_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ImportError tensors need PyTorch 2.10 or newer, found 2.9.1; ")
