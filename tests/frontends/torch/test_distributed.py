"""DDP, FSDP and tensors in parts: two processes by gloo, which start once for all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORK = Path(__file__).with_name("distributed.py")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(WORK)]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    want = ["DDP", "FSDP", "batch", "heads", "length", "refused"]
    for process, (out, errors) in zip(started, told, strict=True):
        assert process.returncode == 0, errors
        assert out.splitlines() == want
