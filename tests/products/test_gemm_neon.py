"""Kernels of products for 64-bit Arm: compiled here, run under an emulator."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from arm import Arm
from emulated import MISSING, PACKAGES
from gemm_cases import CASES, Case, arrays, assert_right, described, operand
from levels import device
from numpy.typing import NDArray

from tilefold.backends.cpu import records, threads
from tilefold.backends.cpu.matmul import calls

Array = NDArray[Any]


def multiplied(case: Case, arm: Arm) -> Array:
    """The product of a case on the other processor."""
    given = arrays(case)
    axes = 2 + len(case.batch)
    m, n, _ = case.sizes
    stored = (*case.batch, n, m) if "o" in case.turned else (*case.batch, m, n)
    kind: Any = np.uint16 if case.out == "bfloat16" else case.out
    out = np.zeros(stored, kind)
    result = np.swapaxes(out, -1, -2) if "o" in case.turned else out
    product = described(case, {name: operand(name, array, axes) for name, array in given.items()})
    shown = result.view("float16") if case.out == "bfloat16" else result
    lies = operand("out", shown, len(product.batch) + 2)
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
    if case.out == "bfloat16":
        found = (found.astype(np.uint32) << 16).view(np.float32)
    assert_right(case, arrays(case), found)
