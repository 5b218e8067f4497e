"""Kernels of products for AVX-512 and AMX, on any x86 processor: wide vectors are split."""

from __future__ import annotations

import numpy as np
import pytest
from gemm_cases import CASES, Case, arrays, assert_right, laid_out
from wider import PAIRS, TILES, WIDE, written_out

import tilefold
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.matmul import calls, quantized_calls
from tilefold.backends.cpu.matmul.quantized_calls import Matrix, Sizes
from tilefold.backends.cpu.matmul.spec import GemmSpec
from tilefold.measuring.timing import using_threads
from tilefold.products.schemes import SCHEMES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(host().isa == "neon", reason="no x86 here"),
]

FEW = [
    CASES[0]._replace(sizes=(m, n, k))
    for m, n, k in ((1, 131, 257), (3, 1000, 333), (8, 4100, 40), (14, 131, 257), (16, 1000, 333))
]


def multiplied(case: Case, device: Device) -> str:
    """Check the product of a case; what multiplied it."""
    given = arrays(case)
    product, lies, out, result = laid_out(case, given)
    prepared = calls.prepare(product, lies, device)
    at = {name: x.ctypes.data for name, x in {**given, "out": out}.items()}
    prepared.run(*[at.get(name, 0) for name in ("a", "b", "out", "c", "bias", "gate")])
    assert_right(case, given, result)
    spec = prepared.plan.spec
    return spec.unit.name if isinstance(spec, GemmSpec) else spec.form


@pytest.mark.feature("A01", "M11")
def test_products() -> None:
    with written_out(calls):
        units = {multiplied(case, WIDE) for case in [*CASES, *FEW]}
    assert units == {"fma", "madd", "wide", "deep"}


@pytest.mark.feature("A01", "M11")
@pytest.mark.parametrize("level", ["pairs", "tiles"])
def test_products_of_words(level: str) -> None:
    """Of bfloat16 and integers, by the instructions that take them."""
    device, wanted = {"pairs": (PAIRS, {"dot", "vnni"}), "tiles": (TILES, {"amx", "amx8"})}[level]
    words = [case for case in CASES if {case.a, case.b} <= {"bfloat16", "int8", "uint8"}]
    cases = {(case.a, case.b, case.out): case for case in reversed(words)}.values()
    with written_out(calls), using_threads(1):
        units = {multiplied(case, device) for case in cases}
    assert units == wanted


@pytest.mark.feature("A02")
@pytest.mark.parametrize("scheme", [*SCHEMES, "int8, dynamic"])
def test_quantised_products(scheme: str) -> None:
    scheme, _, dynamic = scheme.partition(", ")
    draw = np.random.default_rng(0)
    for m, k, n in ((1, 48, 33), (2, 256, 70), (5, 48, 33), (14, 256, 70), (19, 48, 33)):
        w = tilefold.quantize(draw.standard_normal((k, n)), scheme)
        x, bias = draw.standard_normal((m, k), np.float32), np.ones(n, np.float32)
        out = np.zeros((m, n), np.float32)
        given = {"codes": w.codes, "scales": w.scales, "zeros": w.zeros, "table": w.table}
        at = {name: 0 if each is None else each.ctypes.data for name, each in given.items()}
        lines = ("float32", n, 1, "float32", 1, "silu", bool(dynamic))
        kind = None if w.scales is None else "float32"
        sizes = Sizes(scheme, m, n, k, w.group_size, kind, *lines)
        with written_out(quantized_calls):
            ready = quantized_calls.prepare(sizes, Matrix(**at), WIDE, 1)
        rows = ready.arranged(x)
        ready.run(rows.ctypes.data, out.ctypes.data, bias.ctypes.data)
        want = tilefold.qgemm(x, w, bias=bias, activation="silu", dynamic=bool(dynamic))
        np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
