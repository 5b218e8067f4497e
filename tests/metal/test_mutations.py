"""Faults planted in the emitted attention kernels: each is found, by the check that is to find it.

What the emulator finds in small kernels is in test_metal_faults; these are the very kernels that a
GPU would be given, with one line changed.
"""

from __future__ import annotations

import pytest
from metal import Edit, Edited, forward, instead, machine
from operands import Array, inputs

from tilefold import causal
from tilefold.backends.metal.emulator.fault import Fault
from tilefold.backends.metal.spec import Blocks
from tilefold.problems.attention import Problem

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


FAULTS = {
    "read past the last key": ("fast", "out-of-bounds read", "start + r < last ?", "true ?"),
    "read past the last query": (
        "fast",
        "out-of-bounds read",
        "q_h + long(query_inside)",
        "q_h + long(query)",
    ),
    "write past the last query": (
        "fast",
        "out-of-bounds write",
        "if (inside && fragment_column == 0) {",
        "if (fragment_column == 0) { lse[query] = 0.0f;",
    ),
    "a stage that is a row short": ("address", "out-of-bounds", "stage[1536]", "stage[1500]"),
    "a row of the stage that nobody writes": (
        "memory",
        "unwritten memory",
        "stage[r * 24 + d + e] = x;",
        "if (r != 3) { stage[r * 24 + d + e] = x; }",
    ),
    "one block for all threadgroups": ("thread", "race", "int(order[place.x])", "0 * int(place.x)"),
    "a shuffle that half of the lanes reach": (
        "fast",
        "divergence",
        "l = l + simd_shuffle_xor(l, 8);",
        "if (lane < 16) { l = l + simd_shuffle_xor(l, 8); }",
    ),
    "a barrier that one simdgroup passes by": (
        "fast",
        "barrier",
        f"{BARRIER}\n",
        f"if (simdgroup != 1) {{ {BARRIER} }}\n",
    ),
}
"""By what is wrong: the check, the kind of fault that it finds, what stands in the text and what
stands there instead."""


def problem() -> tuple[Problem, dict[str, Array]]:
    """Two blocks of 16 queries, the last one short; 128 threads in all, fewer than the 256 that
    ThreadSanitizer tells apart."""
    made = Problem.of((1, 1, 30, 16), (1, 1, 61, 16), dtype="float16", mask=causal())
    return made, inputs(made, "bhnd", "packed")


def run(check: str, edit: Edit) -> None:
    machine("apple7", check)  # skips where this check cannot be done
    made, operands = problem()
    forward(made, operands, Edited("apple7", check, edit=edit), blocks=Blocks(16, 64, 16))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    check, kind, old, new = FAULTS[fault]
    with pytest.raises(Fault, match="tilefold_forward") as found:
        run(check, instead(old, new))
    assert kind in found.value.kind, found.value


@pytest.mark.slow
@pytest.mark.parametrize("check", sorted({check for check, *_ in FAULTS.values()}))
def test_without_a_fault_none_is_found(check: str) -> None:
    run(check, str)
