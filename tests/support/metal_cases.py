"""The cases of the CPU with smaller lengths, since each lane is a fiber in the emulator."""

from __future__ import annotations

from cases import AXES, RULES, cover

SHAPES = [(1, 1), (3, 3), (64, 32), (47, 61), (31, 1), (1, 99), (40, 72), (96, 96)]
LARGE = [(47, 61), (40, 72), (60, 90)]
DIMS = [1, 2, 3, 8, 16, 40, 64, 77, 80, 95, 128, 199, 256, 384]
PAIRS = [("dim", "layout"), ("layout", "memory"), ("dim", "dim_v")]
TURNS = [*RULES][::2]
"""Every other rule; Triton's cases have the others. `test_mask_source.py` has all on both."""

CASES = list(cover({**AXES, "shape": SHAPES, "dim": DIMS, "rule": TURNS}, PAIRS, LARGE))
