"""Metal's kernels, as emitted, against the dense definition in float64: the cases of the CPU.

Lengths are smaller: on the emulator a lane is a fiber. Types and families take turns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import metal
import numpy as np
import pytest
from cases import Case
from compare import HALVES, assert_same, dense, tolerances
from conformance import assert_conforms
from metal import FAMILIES, backward, forward, machine
from metal_cases import CASES
from operands import inputs

from tilefold.backends.cpu.device import host
from tilefold.backends.metal import dispatch
from tilefold.backends.metal.plan import MetalPlan, plan
from tilefold.problems.attention import Problem

QUICK = {
    ("apple7", "bfloat16", Case((47, 61), 16, "window-and-prefix", "bhnd", "gqa", "padded")),
    ("apple9", "float32", Case((40, 72), 13, "causal", "bhdn", "mqa", "packed", "narrower")),
}


def trials() -> list[Any]:
    """Family, type and case: float32 for every other case, half types for the rest."""
    found = [pytest.param(*trial, id="-".join(map(str, trial))) for trial in sorted(QUICK, key=str)]
    for number, case in enumerate(CASES):
        family = FAMILIES[number % 2]
        dtype = ("float32", HALVES[number // 4 % 2])[number // 2 % 2]
        trial = family, dtype, case
        mark = pytest.mark.slow
        found.append(pytest.param(*trial, id="-".join(map(str, trial)), marks=mark))
    return found


@pytest.mark.feature("M01", "M02", "M03", "M04", "M05", "M06", "M16", "J03")
@pytest.mark.parametrize(("family", "dtype", "case"), trials())
def test_attention_and_its_gradients(family: str, dtype: str, case: Case) -> None:
    assert_conforms(metal, machine(family), case.problem(dtype), case)


@pytest.mark.parametrize("dtype", HALVES)
def test_tolerances_do_not_follow_the_processor_of_the_tests(
    dtype: str,
) -> None:
    """One with AMX multiplies halves in pairs, and its kernels may be off by more than a GPU's."""
    problem = Case((47, 61), 16, "causal").problem(dtype)
    operands = inputs(problem, "bhnd", "packed")
    want = dense(operands, problem.mask, problem.scale)
    found = {True: [], False: []}
    for device in (host().lowered("avx2"), replace(host(), isa="amx")):
        for pairs, made in found.items():
            options = {"host_pairs": pairs, "device": device}
            made.append(tolerances(problem, operands, want, **options))
    plain, amx = found[True]
    assert plain["lse"] < amx["lse"]
    assert found[False] == [plain, plain]


def wide(problem: Problem, family: str, operation: str) -> MetalPlan:
    """The plan of a pass whose kernels count in 64 bits."""
    made = plan(problem, family, operation)
    launches = [replace(each, spec=replace(each.spec, wide=True)) for each in made.launches]
    return replace(made, launches=tuple(launches))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_offsets_of_64_bits(family: str) -> None:
    """The text for strides that pass 31 bits inside a tile gives the bits of the usual one."""
    case = Case((47, 61), 40, "causal", "bhdn", "gqa", "padded")
    problem = case.problem("float32")
    operands = inputs(problem, case.layout, case.memory)
    usual = machine(family)
    want = forward(problem, operands, usual)
    want |= backward(problem, {**operands, **want}, usual)
    machine_of_its_own = dispatch.Emulated(family)
    got = forward(problem, operands, machine_of_its_own, made=wide(problem, family, "forward"))
    made = wide(problem, family, "backward")
    got |= backward(problem, {**operands, **got}, machine_of_its_own, made=made)
    for name, array in got.items():
        assert_same(name, array, want[name])


def test_strides_decide_the_width_of_offsets() -> None:
    """A head dimension that lies further apart than 2**31 / 64 elements needs them."""
    problem = Problem.of((1, 1, 64, 64))
    spec = plan(problem, "apple9", "forward").launches[0].spec
    near = dict.fromkeys("qkvo", (0, 0, 1, 2**24))
    far = {**near, "v": (0, 0, 1, 2**26)}
    assert not dispatch.fitted(spec, near, 4).wide
    assert dispatch.fitted(spec, far, 4).wide


def test_neighbours_are_moved_at_once_where_they_lie_so() -> None:
    spec = plan(Problem.of((1, 1, 64, 64)), "apple9", "forward").launches[0].spec
    packed = dict.fromkeys("qkvo", (4096, 4096, 64, 1))
    assert [dispatch.fitted(spec, packed, n).vector for n in (1, 2, 4)] == [1, 2, 4]
    odd = {**packed, "k": (4096, 4096, 66, 1)}
    assert dispatch.fitted(spec, odd, 4).vector == 2
    turned = {**packed, "q": (4096, 4096, 1, 64)}
    assert dispatch.fitted(spec, turned, 4).vector == 1
    start = np.zeros(64, np.float32)
    base = start[-start.ctypes.data // 4 % 4 :]  # from a multiple of 16 bytes
    for first, expected in ((0, 4), (1, 1), (2, 2), (6, 2), (8, 4)):
        assert dispatch.alignment_of({"q": base[first:]}) == expected
