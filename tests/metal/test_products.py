"""Products and softmax on the emulator: what it finds, and what `test_gemm.py` does not share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from compare import assert_near
from metal import needs
from product_cases import VARIANTS
from products import Products

from tilefold.backends.metal.dispatch import Emulated
from tilefold.backends.metal.emulator.fault import Fault
from tilefold.backends.metal.matmul import calls

pytestmark = pytest.mark.slow

FAMILIES = ("apple7", "apple9")
"""One that stages operands in threadgroup memory, and one whose lanes read them."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    needs()
    return str(request.param)


@pytest.fixture(scope="module")
def machine(family: str) -> Emulated:
    return Emulated(family)


@pytest.mark.parametrize(
    "edge, family", [("m", "apple7"), ("n", "apple9"), ("k", "apple7")], indirect=["family"]
)
def test_a_forgotten_edge_is_found(family: str, edge: str) -> None:
    """The emulator sees the kernel leave an array by one element: these tests can fail."""

    class Careless(Emulated):
        def compile(self, text: str) -> Any:
            number = "mnk".index(edge)
            broken = text.replace(f"= sizes[{number}];", f"= sizes[{number}] + 1;")
            assert broken != text
            return super().compile(broken)

    ones = np.ones((5, 5), "float32")
    with pytest.raises(Fault, match="out-of-bounds"):
        calls.gemm(ones, ones, machine=Careless(family))


def test_tensors_give_tensors(machine: Emulated) -> None:
    torch = pytest.importorskip("torch")
    a = torch.ones(3, 4, dtype=torch.bfloat16)
    b = torch.ones(5, 4, dtype=torch.bfloat16)
    c = calls.gemm(a, b.T, machine=machine)
    assert isinstance(c, torch.Tensor) and c.dtype == torch.bfloat16 and (c == 4).all()
    p, lse = calls.softmax(a, return_lse=True, machine=machine)
    assert p.dtype == torch.bfloat16 and lse.dtype == torch.float32 and (p == 0.25).all()


def checked(family: str, check: str) -> Emulated:
    """A machine whose emulator checks so; skips, with the reason, where it cannot."""
    needs(check)
    return Emulated(family, check)


@pytest.mark.parametrize("check", ["address", "memory", "thread"])
def test_sanitizers_find_nothing(family: str, check: str) -> None:
    machine = checked(family, check)
    Products(family).product(VARIANTS[1], (37, 50, 19), machine)
    x = np.random.default_rng(9).normal(size=(3, 1100)).astype("float32")
    for width in (70, 1100):
        p = calls.softmax(x[:, :width], machine=machine)
        assert_near("sums", p.sum(axis=1), np.ones(3), 1e-5)


@pytest.mark.parametrize("barrier", [0, 1])
def test_a_missing_barrier_is_found(barrier: int) -> None:
    """Before a block is copied over the last one, and before what was copied is read."""

    class Careless(Emulated):
        def compile(self, text: str) -> Any:
            parts = text.split("threadgroup_barrier(mem_flags::mem_threadgroup);")
            assert len(parts) == 3
            parts[barrier : barrier + 2] = ["".join(parts[barrier : barrier + 2])]
            joined = "threadgroup_barrier(mem_flags::mem_threadgroup);".join(parts)
            return super().compile(joined)

    machine = checked("apple7", "thread")
    ones = np.ones((40, 40), "float32")
    with pytest.raises(Fault) as caught:
        calls.gemm(ones, ones, machine=Careless(machine.family, machine.checks))
    assert caught.value.kind == "race"


def test_a_stage_that_is_not_filled_is_found() -> None:
    class Careless(Emulated):
        def compile(self, text: str) -> Any:
            broken = text.replace("stage_a[r * ", "if (inside) stage_a[r * ")
            assert broken != text
            return super().compile(broken)

    machine = checked("apple7", "memory")
    ones = np.ones((5, 5), "float32")
    with pytest.raises(Fault) as caught:
        calls.gemm(ones, ones, machine=Careless(machine.family, machine.checks))
    assert caught.value.kind == "unwritten memory"
