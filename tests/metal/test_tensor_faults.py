"""Faults planted in the text on tensor operations: the emulator's checks find each of them.

The healthy text passes the same checks under both layouts of cooperative tensors, so every barrier
in it is needed, and nothing in it rests on what nobody wrote.
"""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_near, dense, tolerances
from metal import TENSOR_LAYOUTS as LAYOUTS
from metal import Edit, Edited, instead, needs
from metal import tensor_plan as plan
from operands import inputs

from tilefold import causal
from tilefold.backends.metal import dispatch, emulate
from tilefold.backends.metal.emulator.fault import Fault
from tilefold.backends.metal.source import emit
from tilefold.problems.attention import Problem

pytestmark = pytest.mark.slow  # each launch is a process, each kernel a run of a C++ compiler

CHECKS = ("address", "memory", "thread")
BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
BARRIERS = 4


SHAPES = (1, 1, 20, 10), (1, 1, 150, 10), (1, 1, 150, 7)
PROBLEM = Problem.of(*SHAPES, dtype="float16", mask=causal())
"""Three tiles of keys for two simdgroups with rows and two without."""


def run(check: str, edit: Edit = str, layout: int = 1) -> None:
    """Attention by an edited text, compared with the definition."""
    needs(check)
    problem = PROBLEM
    operands = inputs(problem, "bhnd", "packed")
    got = {"o": np.zeros((1, 1, 20, 7), np.float16), "lse": np.zeros((1, 1, 20), np.float32)}
    given = {name: operands[name] for name in "qkv"}
    machine = Edited("apple10", check, layout, edit=edit)
    dispatch.execute(plan(problem), machine, given | got)
    want = dense(operands, problem.mask, problem.scale)
    allowed = tolerances(problem, operands, want, host_pairs=False)
    for name, array in got.items():
        assert_near(name, array, want[name], allowed[name])


@pytest.mark.slow
@pytest.mark.feature("J10")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("check", CHECKS)
def test_the_text_as_it_is_has_none(check: str, layout: int) -> None:
    run(check, layout=layout)


def without(number: int) -> Edit:
    """The text without one of its barriers."""

    def edit(text: str) -> str:
        parts = text.split(BARRIER)
        assert len(parts) == BARRIERS + 1
        return BARRIER.join(parts[:number]) + BARRIER.join(parts[number:])

    return edit


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, BARRIERS + 1))
def test_a_missing_barrier_is_found(number: int) -> None:
    with pytest.raises(Fault, match=r"race: tilefold_forward: threadgroup array (scores|factors)"):
        run("thread", without(number))


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(instead("o_0[i] = 0;", ";"), id="o is not set"),
        pytest.param(instead(" s[i] = 0;", ";"), id="s is not set"),
        pytest.param(instead("inside && (!edge ||", "(!edge || true ||"), id="what no mask hides"),
    ],
)
def test_a_result_that_nobody_wrote_is_found(edit: Edit) -> None:
    with pytest.raises(Fault, match="unwritten memory: tilefold_forward"):
        run("memory", edit)


@pytest.mark.slow
def test_a_view_past_its_array_is_found() -> None:
    with pytest.raises(Fault, match=r"out-of-bounds read: tilefold_forward: k \[\[buffer\(1\)\]\]"):
        run("address", instead("(10, keys)", "(10, 64)"))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (
            "tensor weights_tile",
            "tensor<device half, dextents<int, 2>, tensor_inline> weights_tile",
        ),
        ("const_cast<device half*>(k_rows)", "k_rows"),
        ("const_cast<device half*>(v_rows_0)", "weights"),
    ],
)
def test_a_view_of_other_memory_is_found(right: str, wrong: str) -> None:
    needs("address")
    text = emit(plan(PROBLEM).launches[0].spec)
    emulate.check_address_spaces(text)
    with pytest.raises(Fault, match=r"address space: .*no matching constructor"):
        emulate.check_address_spaces(instead(right, wrong)(text))
