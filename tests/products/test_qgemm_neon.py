"""Products with quantised matrices on 64-bit Arm: compiled here, run under an emulator."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from arm import Arm
from emulated import MISSING, PACKAGES
from levels import device

import tilefold
from tilefold.backends.cpu import records, threads
from tilefold.backends.cpu.matmul import quantized_calls as kernels
from tilefold.backends.cpu.matmul.quantized_calls import Matrix, Sizes
from tilefold.products.schemes import SCHEMES


@pytest.mark.slow
@pytest.mark.feature("A02")
@pytest.mark.skipif(
    bool(MISSING) and os.environ.get("CI") != "true",
    reason=f"{' and '.join(MISSING)} not found; Debian has them in {PACKAGES}",
)
@pytest.mark.parametrize("scheme", [*SCHEMES, "int8, dynamic"])
def test_products_on_arm(scheme: str, tmp_path: Path) -> None:
    scheme, _, dynamic = scheme.partition(", ")
    draw, arm, on = np.random.default_rng(0), Arm(tmp_path, kernels.source), device("neon")

    for m, k, n in ((2, 48, 33), (19, 32, 40)):
        w = tilefold.quantize(draw.standard_normal((k, n)), scheme)
        x, bias = draw.standard_normal((m, k), np.float32), np.ones(n, np.float32)
        out = np.zeros((m, n), np.float32)
        given = {"codes": w.codes, "scales": w.scales, "zeros": w.zeros, "table": w.table}
        at = {name: 0 if each is None else each.ctypes.data for name, each in given.items()}
        kind = None if w.scales is None else "float32"
        lines = ("float32", n, 1, "float32", 1, "silu", bool(dynamic))
        sizes = Sizes(scheme, m, n, k, w.group_size, kind, *lines)
        with (
            mock.patch.object(kernels, "kernel", arm.kernel),
            mock.patch.object(records, "_taken", arm.memory),
            mock.patch.object(records.Recorded, "is_native", False),
            mock.patch.object(threads, "run", arm.run),
        ):
            ready = kernels.prepare(sizes, Matrix(**at), on, 1)
            rows = ready.arranged(x)
            arm.arrays[:] = [
                rows,
                out,
                bias,
                *(each for each in given.values() if each is not None),
            ]
            ready.run(rows.ctypes.data, out.ctypes.data, bias.ctypes.data)
        want = tilefold.qgemm(x, w, bias=bias, activation="silu", dynamic=bool(dynamic))
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
