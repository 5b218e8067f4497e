"""Kernels for 64-bit Arm: emitted here, run under an emulator, compared with the definition."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cases import RULES, Sizes
from compare import HALVES
from emulated import MISSING, PACKAGES, emulated
from guarded import SIDES
from trial import PASSES, Trial, dropped, numbers, problem, run

from tilefold.backends.cpu.device import Device

LEVELS = {
    "baseline": "+neon,+fp-armv8",
    "newest": "+neon,+fp-armv8,+lse,+crc,+rdm,+fullfp16,+fp16fml,+dotprod,+bf16,+i8mm",
}
"""LLVM's features of the first 64-bit Arm processors, and all that tilefold lets kernels use."""

TRIALS = [
    ("full", (37, 71), (19, 7), "padded bhnd"),
    ("full", (3, 3), (1, 1), "bhnd"),
    ("full", (1, 300), (3, 5), "backwards"),
    ("window-and-prefix", (113, 203), (40, 40), "bhdn"),
    ("documents-of-batch", (37, 71), (16, 16), "bnhd"),
    ("dense-all", (70, 9), (2, 13), "no unit stride"),
    ("heads-differ", (41, 260), (8, 3), "shared heads"),
]


def trial(number: int, dtype: str) -> Trial:
    rule, (len_q, len_k), (dim, dim_v), layout = TRIALS[number]
    mask = RULES[rule](Sizes(2, 2, len_q, len_k))
    sizes = problem(len_q, len_k, dim, mask, dtype, dim_v=dim_v, batch=2)
    return Trial(sizes, layout, poisoned=number % 2 == 0)


def neon(level: str) -> Device:
    return Device("cpu", "emulated", "neon", "aarch64-linux-gnu", LEVELS[level], cores=4)


def attempt(number: int, dtype: str, level: str, folder: Path) -> None:
    check(trial(number, dtype), level, folder)


def check(this: Trial, level: str, folder: Path) -> None:
    given = numbers(this)
    with emulated(folder) as memory:
        for operation, form in PASSES:
            for memory.side in SIDES:
                run(this, given, operation, form, memory, neon(level))


needs_tools = pytest.mark.skipif(
    bool(MISSING) and os.environ.get("CI") != "true",
    reason=f"{' and '.join(MISSING)} not found; Debian has them in {PACKAGES}",
)


def test_the_tools_are_here_where_they_must_be() -> None:
    # Elsewhere the tests below are skipped, each with its reason.
    assert not MISSING or os.environ.get("CI") != "true", f"CI must install {MISSING}"


@needs_tools
@pytest.mark.slow
@pytest.mark.feature("M01", "M04", "M16", "T01")
@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        *((number, "float32") for number in range(len(TRIALS))),
        *((number, "float64") for number in range(1, len(TRIALS), 2)),
        *((number, HALVES[number % 2]) for number in range(0, len(TRIALS), 2)),
        (3, "float16"),
        (4, "bfloat16"),
    ],
    ids=lambda value: TRIALS[value][0] if isinstance(value, int) else value,
)
def test_every_pass_under_the_emulator(number: int, dtype: str, tmp_path: Path) -> None:
    attempt(number, dtype, "baseline", tmp_path)


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_the_newest_features_under_the_emulator(dtype: str, tmp_path: Path) -> None:
    attempt(3, dtype, "newest", tmp_path)


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dropout_under_the_emulator(dtype: str, tmp_path: Path) -> None:
    check(dropped(dtype)[0], "baseline", tmp_path)


@needs_tools
@pytest.mark.slow
def test_the_emulator_notices_an_overrun(tmp_path: Path) -> None:
    # Keys that are one row shorter than the kernel is told: the page after them is touched.
    this = trial(0, "float32")
    given = numbers(this)
    with emulated(tmp_path) as memory:
        memory.side = "after"
        memory.cut = "k"
        with pytest.raises(AssertionError, match=r"forward.* ended by signal 11"):
            run(this, given, "forward", "auto", memory, neon("baseline"))
