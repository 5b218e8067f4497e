"""Offsets and vectors of Metal's kernels, which depend on how operands lie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import Case
from compare import assert_same
from metal import FAMILIES, backward, forward, machine
from operands import inputs

from tilefold.backends.metal import dispatch
from tilefold.backends.metal.plan import MetalPlan, plan
from tilefold.problems.attention import Problem


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
