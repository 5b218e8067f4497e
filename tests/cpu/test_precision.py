"""precision: what multiplies, and how far results are from float64 then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from amx import Amx
from operands import Array, backward, forward, inputs

from tilefold import causal, full
from tilefold.backends.cpu.choice import Chooser
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.spec import FMA, Multiplier
from tilefold.masks.position_rules import Rule
from tilefold.problems import reference
from tilefold.problems.attention import Problem, default_scale

FULL = full()

LIMITS = {"highest": 4e-6, "high": 4e-5, "medium": 1.2e-2}
"""Largest error of each precision, relative to the largest number of the result.

Seen at dims 32, 64 and 128 with 512 keys: 4e-7 to 2e-6, 2e-6 to 2e-5 and 1e-3 to 6e-3.
"""


def problem(precision: str, dim: int = 64, mask: Rule = FULL) -> Problem:
    """Odd lengths, grouped queries."""
    scale = default_scale(dim)
    return Problem(1, 2, 1, 77, 131, dim, dim, "float32", scale, mask, precision)


def errors(sizes: Problem, device: Device) -> dict[str, float]:
    """Of every result, relative to its largest number."""
    operands = inputs(sizes, "bhnd", "packed")
    q, k, v, do = (operands[name].astype(np.float64) for name in ("q", "k", "v", "do"))
    options = {"mask": sizes.mask, "scale": sizes.scale}
    o, lse = reference.attention(q, k, v, **options)
    gradients = reference.attention_backward(do, q, k, v, o, lse, **options)
    want: dict[str, Array] = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    want |= {"o": o, "lse": lse}
    got = forward(sizes, operands, device=device)
    operands |= {name: got[name] for name in ("o", "lse")}
    got |= backward(sizes, operands, "split", device=device)
    return {
        name: float(abs(got[name] - array).max() / abs(array).max()) for name, array in want.items()
    }


@pytest.mark.slow
@pytest.mark.feature("T01")
@pytest.mark.parametrize("mask", [FULL, causal()], ids=str)
@pytest.mark.parametrize("dim", [33, 64, 128])
@pytest.mark.parametrize("precision", LIMITS)
def test_errors_on_tiles(precision: str, dim: int, mask: Rule, amx: Amx) -> None:
    for name, error in errors(problem(precision, dim, mask), amx.device).items():
        assert error < LIMITS[precision], name
    if amx.emulated:
        tiles = amx.counts().get("tdpbf16ps", 0)
        assert (tiles > 0) == (precision != "highest")


@pytest.mark.slow
@pytest.mark.feature("T01")
@pytest.mark.parametrize("precision", LIMITS)
def test_errors_here(precision: str) -> None:
    for name, error in errors(problem(precision), host()).items():
        assert error < LIMITS[precision], name


@pytest.mark.feature("T01")
def test_what_multiplies() -> None:
    """The planner lowers nothing by itself, and uses pairs where they are faster."""
    plain = Device("cpu", "any", "avx512", "", "+avx512f", 4)
    pairs = replace(plain, features="+avx512f,+avx512bf16")
    tiles = replace(pairs, isa="amx", features=f"{pairs.features},+amx-tile,+amx-bf16")
    want = {
        "highest": (FMA, FMA, FMA),
        "high": (FMA, FMA, Multiplier("amx", 2)),
        "medium": (FMA, Multiplier("dot"), Multiplier("amx")),
    }
    for precision, expected in want.items():
        for device, products in zip((plain, pairs, tiles), expected, strict=True):
            assert Chooser(problem(precision), device).multiplier("forward") == products
    for dtype, expected in {
        "float64": (FMA, FMA, FMA),
        "float16": (FMA, FMA, Multiplier("amx", 2)),
        "bfloat16": (FMA, Multiplier("dot"), Multiplier("amx")),
    }.items():
        sizes = replace(problem("highest"), dtype=dtype)
        for device, products in zip((plain, pairs, tiles), expected, strict=True):
            assert Chooser(sizes, device).multiplier("forward") == products
