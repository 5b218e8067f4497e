"""The rows of `KERNELS`: each names operands that there are, and a function that writes source."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tilefold.backends.cpu import spec as cpu
from tilefold.backends.metal import spec as metal
from tilefold.backends.protocols import is_extra
from tilefold.backends.triton import spec as triton
from tilefold.planning.kernels import OPERANDS, KernelRow, emitter

TABLES: dict[str, Mapping[str, KernelRow]] = {
    "cpu": cpu.KERNELS,
    "metal": metal.KERNELS,
    "triton": triton.KERNELS,
}


@pytest.mark.parametrize("backend", TABLES)
def test_rows_name_operands_and_emitters_that_there_are(backend: str) -> None:
    for name, row in TABLES[backend].items():
        assert row.name == name and row.parallel in ("q", "k")
        usual = {name for name in row.operands if not is_extra(name.removeprefix("d"))}
        assert usual <= OPERANDS.keys()
        assert len(set(row.operands)) == len(row.operands)
        assert row.visits == (row.contractions is not None), name
        assert callable(emitter(row, f"tilefold.backends.{backend}.kernels"))


def test_operands_in_registers_are_those_of_the_row_or_a_part_of_a_result() -> None:
    for row in metal.KERNELS.values():
        assert sorted(row.resident) == sorted(row.leaving)
        assert {*row.sums} <= {*row.resident} & {*metal.SUMS}
        over = {OPERANDS[name].axis for name in row.resident}
        assert over <= {row.parallel}
    for row in triton.KERNELS.values():
        assert {OPERANDS[name].axis for name in (*row.preloaded, *row.sums)} <= {row.parallel}
        assert bool(row.preloaded) == row.visits
        assert bool(row.sums) == (row.visits and row.name != "backward_inputs")
