"""Peak rates of GPUs by their makers' data sheets, for the lower bounds of a plan.

One chip stands for an architecture. Products are dense, with sums in float32, or in float64 for
float64. A multiprocessor computes 16 exponentials in a clock, at the boost clock (CUDA programming
guide, table of arithmetic throughput); an AMD compute unit computes a quarter of its lanes. No
figure was measured here, and none is the speed of a kernel of tilefold.
"""

from __future__ import annotations

from typing import NamedTuple

from tilefold.backends.triton.resources import kind
from tilefold.planning.roofline import Rates

TERA = 1e12


class Sheet(NamedTuple):
    """The rates of a chip: TFLOP/s by kind of type, 10**12 exponentials/s, TB/s of memory."""

    chip: str
    half: float
    tf32: float
    float32: float
    float64: float
    exponentials: float
    memory: float


SHEETS = {
    "sm_80": Sheet("A100 SXM", 312, 156, 19.5, 19.5, 2.4, 2.04),
    "sm_86": Sheet("A10", 125, 62.5, 31.2, 0.49, 2.0, 0.6),
    "sm_89": Sheet("L40S", 362, 183, 91.6, 1.4, 5.7, 0.86),
    "sm_90": Sheet("H100 SXM", 989, 495, 67, 67, 3.9, 3.35),
    "sm_100": Sheet("B200", 2250, 1125, 75, 37, 4.6, 8.0),
    "sm_120": Sheet("RTX 5090", 210, 105, 105, 1.6, 6.5, 1.79),
    "gfx90a": Sheet("MI250X (one die)", 191, 48, 48, 48, 3.0, 1.6),
    "gfx942": Sheet("MI300X", 1307, 163, 163, 163, 10.2, 5.3),
    "gfx950": Sheet("MI355X", 2517, 157, 157, 79, 9.8, 8.0),
}
"""The data sheets by architecture. Matrix units of AMD multiply float32 and float64 exactly."""


def rates(architecture: str, dtype: str, float32_mode: str) -> Rates | None:
    """The rates of the chip of an architecture; None if it has no data sheet.

    >>> found = rates("sm_90", "bfloat16", "ieee")
    >>> found.device, found.flops_per_second
    ('H100 SXM', 989000000000000.0)
    """
    sheet = SHEETS.get(architecture)
    if sheet is None:
        return None
    flops = getattr(sheet, kind(dtype, float32_mode)) / (3 if float32_mode == "tf32x3" else 1)
    return Rates(
        device=sheet.chip,
        dtype=dtype,
        workers=1,
        flops_per_second=flops * TERA,
        exponentials_per_second=sheet.exponentials * TERA,
        bytes_per_second=sheet.memory * TERA,
    )
