"""The kernels of products at every level of instructions: values, bits, and memory.

Each level runs in a process of its own, where arrays lie between forbidden pages.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from gemm_cases import CASES, Case, arrays, assert_right, laid_out
from guarded import SIDES, GuardedMemory
from numpy.typing import NDArray
from paths import finding

import tilefold
from tilefold.backends.cpu.matmul import calls

Array = NDArray[Any]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mprotect")


def attempt(isa: str, short: str | None = None) -> None:
    """All cases on one thread and on three; an array may end too early."""
    os.environ["TILEFOLD_CPU_ISA"] = isa
    for number, case in enumerate(CASES):
        given = arrays(case)
        side = SIDES[number % 2]
        print(case, side, flush=True)
        found = [multiplied(case, given, side, threads, short) for threads in (1, 3)]
        np.testing.assert_array_equal(*[x.view(np.uint8) for x in found])
        assert_right(case, given, found[0])
    print("done")


def multiplied(
    case: Case, given: dict[str, Array], side: str, threads: int, short: str | None
) -> Array:
    """The product by arrays between forbidden pages."""
    tilefold.set_num_threads(threads)
    memory = GuardedMemory(side, short)
    held = {name: memory.copy(name, array).reshape(array.shape) for name, array in given.items()}

    def empty(shape: tuple[int, ...], dtype: str) -> Array:
        return memory.allocate("out", math.prod(shape), dtype).reshape(shape)

    product, lies, out, result = laid_out(case, held, empty)
    prepared = calls.prepare(product, lies)
    names = ("a", "b", "out", "c", "bias", "gate")
    at = {**held, "out": out}
    prepared.run(*[memory.address(name, at[name]) if name in at else 0 for name in names])
    made = np.array(result, order="C")
    memory.close()
    return made


def child(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that has imported this file."""
    return subprocess.run(
        [sys.executable, "-c", f"from test_gemm_kernels import *\n{code}"],
        capture_output=True,
        text=True,
        timeout=300,
        env=finding(__file__),
    )


@pytest.mark.slow
@pytest.mark.feature("M11", "A12", "J06")
@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "sse2", "neon"])
def test_products_are_right_and_touch_nothing_else(isa: str) -> None:
    done = child(f"attempt({isa!r})")
    if "TILEFOLD_CPU_ISA must be one of" in done.stderr:
        pytest.skip(f"no {isa} here")
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2000:]
    assert done.stdout.endswith("done\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a", "b", "out"])
def test_an_array_that_ends_too_early_is_noticed(name: str) -> None:
    done = child(f"attempt('sse2' if sys.platform != 'darwin' else 'neon', {name!r})")
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS), done.stderr[-500:]
