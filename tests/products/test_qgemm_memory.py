"""Products with quantised matrices touch their arrays and nothing else: see test_memory_safety."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from guarded import SIDES, GuardedMemory
from paths import finding

import tilefold
from tilefold.products.quantized_calls import Rows, product
from tilefold.products.schemes import SCHEMES

SIZES = [(1, 48, 33), (1, 40, 1025), (3, 37, 32), (10, 64, 65), (20, 37, 33)]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mprotect")


def ways(scheme: str, k: int) -> list[tuple[str, bool]]:
    """Pages after arrays and before them; x as it is, and rounded where it may be."""
    rounded = [False, True] if scheme == "int8" and k % 16 == 0 else [False]
    return [(side, dynamic) for side in SIDES for dynamic in rounded]


def attempt(isa: str, short: bool = False) -> None:
    """All schemes, arrays flush with the page after them, then before; codes may end too early."""
    os.environ["TILEFOLD_CPU_ISA"] = isa
    draw = np.random.default_rng(0)
    for scheme in SCHEMES:
        for number, (m, k, n) in enumerate(SIZES):
            w = tilefold.quantize(draw.standard_normal((k, n)), scheme)
            x, bias = draw.standard_normal((m, k), np.float32), np.ones(n, np.float16)
            for side, dynamic in ways(scheme, k):
                print(scheme, m, k, n, side, dynamic, flush=True)
                memory = GuardedMemory(side, "codes" if short else None)
                held = {
                    name: memory.copy(name, array).reshape(array.shape)
                    for name, array in w.arrays.items()
                }
                if short:
                    lies = memory.address("codes", held["codes"])
                    view = np.ctypeslib.as_array(
                        (np.ctypeslib.as_ctypes_type(w.codes.dtype) * w.codes.size).from_address(
                            lies
                        )
                    )
                    held["codes"] = view.reshape(w.codes.shape)
                given = [memory.copy("x", x).reshape(x.shape), memory.copy("bias", bias)]
                out = memory.allocate("out", m * n, "float16")
                product(
                    given[0],
                    replace(w, **held),
                    Rows("float16", given[1].ctypes.data, 0, 1),
                    "silu" if number else None,
                    Rows("float16", out.ctypes.data, n, 1),
                    dynamic,
                )
                want = tilefold.qgemm(
                    x,
                    w,
                    bias=bias,
                    activation="silu" if number else None,
                    out_dtype="float16",
                    dynamic=dynamic,
                )
                np.testing.assert_array_equal(out.reshape(m, n), want)
                memory.close()
    print("done")


def child(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that has imported this file."""
    return subprocess.run(
        [sys.executable, "-c", f"from test_qgemm_memory import *\n{code}"],
        capture_output=True,
        text=True,
        timeout=300,
        env=finding(__file__),
    )


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx512", "avx2", "sse2", "neon"])
def test_nothing_outside_is_touched(isa: str) -> None:
    done = child(f"attempt({isa!r})")
    if "TILEFOLD_CPU_ISA must be one of" in done.stderr:
        pytest.skip(f"no {isa} here")
    said = done.stdout.splitlines()
    assert done.returncode != -signal.SIGSEGV, f"an access outside of the arrays: {said[-1]}"
    assert done.returncode == 0, done.stderr
    assert said[-1] == "done" and len(said) == 1 + sum(
        len(ways(scheme, k)) for scheme in SCHEMES for _, k, _ in SIZES
    )


@pytest.mark.slow
def test_the_pages_do_their_work() -> None:
    assert child("attempt(tilefold.backends.cpu.device.host().isa, True)").returncode == -11
