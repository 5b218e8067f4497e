"""Kernels of products for 64-bit Arm: compiled here, run under an emulator."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from arm import Arm
from emulated import MISSING, PACKAGES
from gemm_cases import CASES, Case, arrays, assert_right, laid_out
from levels import device
from numpy.typing import NDArray

from tilefold.backends.cpu import records, threads
from tilefold.backends.cpu.matmul import calls

Array = NDArray[Any]


def multiplied(case: Case, arm: Arm) -> Array:
    """The product of a case on the other processor."""
    given = arrays(case)
    product, lies, out, result = laid_out(case, given)
    prepared = calls.prepare(product, lies, device("neon"))
    arm.arrays += [*given.values(), out, *prepared.kept]
    where = {**given, "out": out}
    order = ("a", "b", "out", "c", "bias", "gate")
    prepared.run(*[where[name].ctypes.data if name in where else 0 for name in order])
    return result


@pytest.mark.slow
@pytest.mark.feature("M11")
@pytest.mark.skipif(
    bool(MISSING) and os.environ.get("CI") != "true",
    reason=f"{' and '.join(MISSING)} not found; Debian has them in {PACKAGES}",
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.sizes}-{case.a}")
def test_products_on_arm(case: Case, tmp_path: Path) -> None:
    arm = Arm(tmp_path, calls.source)
    with (
        mock.patch.object(calls, "kernel", arm.kernel),
        mock.patch.object(records, "_taken", arm.memory),
        mock.patch.object(records.Recorded, "is_native", False),
        mock.patch.object(threads, "run", arm.run),
    ):
        found = multiplied(case, arm)
    assert_right(case, arrays(case), found)
