"""The ladder for learners: every rung is right in the interpreter, and compiles for the GPUs.

What the rungs say of their machine code is what a compiler makes of them; what they predict of time
nobody has measured.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from interpreted import needs
from paths import ROOT
from triton_ahead import compiled

LADDER = ROOT / "examples" / "ladder"
RUNGS = sorted(path.stem for path in LADDER.glob("*_[0-9]_*.py"))

SOFTMAX = {"x": "*fp32", "p": "*fp32", "rows": "i32", "width": "i32"}
MATMUL = {"a": "*fp16", "b": "*fp16", "c": "*fp16", "m": "i32", "n": "i32", "k": "i32"}
TILES = {"M": 128, "N": 128, "K": 64}
DESCRIPTORS = {
    "a": "tensordesc<fp16[128, 64]>",
    "b": "tensordesc<fp16[64, 128]>",
    "c": "tensordesc<fp16[128, 128]>",
}

KERNELS: dict[str, dict[str, Any]] = {
    "softmax_1_naive": {"constants": {"BLOCK": 128}},
    "softmax_2_one_pass": {"constants": {"BLOCK": 1024}},
    "softmax_3_warps": {"constants": {"BLOCK": 1024, "ROWS": 2}, "options": {"num_warps": 1}},
    "softmax_4_vectors": {"constants": {"BLOCK": 1024, "WARPS": 4}, "aligned": ["width"]},
    "softmax_5_online": {
        "constants": {"BLOCK": 4096},
        "options": {"num_warps": 8},
        "aligned": ["width"],
    },
    "matmul_1_naive": {"constants": {"SIDE": 32}, "options": {"num_warps": 4}},
    "matmul_2_tiles": {"options": {"num_warps": 8, "num_stages": 1}},
    "matmul_3_shared": {},
    "matmul_4_pipelined": {},
    "matmul_5_grouped": {"constants": {**TILES, "BAND": 8}},
    "matmul_6_descriptors": {
        "constants": {**TILES, "BAND": 8},
        "signature": {**MATMUL, **DESCRIPTORS},
    },
}
"""How each rung is compiled for rows of 1024 and matrices whose sides are multiples of 16."""


def task(rung: str, target: str) -> dict[str, Any]:
    """A rung's kernel for a compiler."""
    matmul, given = rung.startswith("matmul"), KERNELS[rung]
    usual = {
        "entry": rung,
        "signature": MATMUL if matmul else SOFTMAX,
        "constants": TILES if matmul else {},
        "aligned": ["m", "n", "k"] if matmul else [],
        "options": {"num_warps": 8, "num_stages": 3} if matmul else {"num_warps": 4},
        "target": target,
    }
    return {**usual, **given, "file": str(LADDER / f"{rung}.py")}


def test_every_rung_says_what_it_changes_and_what_it_should_gain() -> None:
    assert set(RUNGS) == KERNELS.keys()
    for rung in RUNGS:
        text = (LADDER / f"{rung}.py").read_text(encoding="utf-8")
        head = ast.get_docstring(ast.parse(text))
        assert head and "Prediction (not measured): " in head, rung
        assert f"def {rung}(" in text, "a profiler asks for a kernel by its name"
        first = rung.split("_")[1] == "1"
        assert "Why it is slow: " in head if first else "What changes: " in head, rung
        assert first or rung == "matmul_3_shared" or "Why it should gain: " in head, rung


@pytest.mark.slow
@pytest.mark.feature("S01", "S02", "S07")
def test_every_rung_is_right_in_the_interpreter() -> None:
    needs()
    done = subprocess.run(
        [sys.executable, str(LADDER / "ladder.py"), "--interpret"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for rung in RUNGS:
        assert done.stdout.count(rung) in (3, 4), rung
    assert done.stdout.count("needs a GPU") == 7


@pytest.mark.slow
def test_without_a_gpu_it_says_so() -> None:
    torch = pytest.importorskip("torch")
    needs()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, str(LADDER / "ladder.py")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "--interpret checks the ladder on a CPU" in done.stderr


TIMED = """
import os, sys, time, warnings
os.environ["TRITON_INTERPRET"] = "1"
warnings.simplefilter("ignore", RuntimeWarning)
sys.path.insert(0, sys.argv[1])
import ladder
from rich.console import Console

def seconds(run):
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin

ladder.seconds, ladder.captured = seconds, lambda run, launches: run
ladder.TURNS, ladder.peak = 1, lambda unit: 1e-3
for case in ladder.cases("cpu", ([(5, 300)], [(33, 40, 24)])):
    ladder.show(case, Console(width=150), timed=True)
"""
"""The measuring half of the ladder, with the clock of the CPU in place of a GPU's."""


@pytest.mark.slow
@pytest.mark.feature("S03")
def test_rungs_are_timed_in_turn_and_compared() -> None:
    needs()
    done = subprocess.run(
        [sys.executable, "-c", TIMED, str(LADDER)], capture_output=True, text=True, check=True
    )
    rows = [line.replace(" ", "").split("│")[1:-1] for line in done.stdout.splitlines()]
    found = {row[0]: row for row in rows if row}
    assert len(found["torch"]) == 7 and found["torch"][5] == "1.00" and found["torch"][6] == "-"
    assert found["softmax_1_naive"][6] == "-" and float(found["softmax_2_one_pass"][6]) > 0
    assert all(row[4].endswith("%") for name, row in found.items() if name == "matmul_2_tiles")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_every_rung_compiles(target: str, tmp_path: Path) -> None:
    """With the instructions that its header speaks of."""
    needs()
    answers = compiled([task(rung, target) for rung in RUNGS], tmp_path)
    found = dict(zip(RUNGS, answers, strict=True))
    assert not {rung: each for rung, each in found.items() if "failure" in each}
    code = {rung: each["assembly"] for rung, each in found.items()}
    for rung in ("softmax_1_naive", "softmax_2_one_pass", "softmax_3_warps"):
        assert "ld.global.v4" not in code[rung], rung
    assert found["softmax_2_one_pass"]["shared"] > 0 == found["softmax_3_warps"]["shared"]
    assert "shfl.sync" in code["softmax_3_warps"]
    assert (
        "ld.global.v4" in code["softmax_4_vectors"] and "ld.global.v4" in code["softmax_5_online"]
    )
    assert found["softmax_4_vectors"]["shared"] == 0
    products = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}.get(target, "mma.sync")
    assert not {"mma.sync", products} & code["matmul_1_naive"].keys()
    for rung in (
        f"matmul_{each}" for each in ("2_tiles", "4_pipelined", "5_grouped", "6_descriptors")
    ):
        assert products in code[rung], rung
    assert "mma.sync" in code["matmul_3_shared"]
    for rung, pipelined in (("matmul_2_tiles", False), ("matmul_4_pipelined", True)):
        assert ("cp.async.cg" in code[rung]) == pipelined, rung
    pairs = found["matmul_4_pipelined"]["shared"] / 2 / (128 * 64 + 64 * 128)
    assert 2 <= pairs < 3.1, pairs
    assert ("cp.async.bulk.tensor" in code["matmul_6_descriptors"]) == (target != "sm_80")
