"""The processor as a machine, and its calls: see `protocols.Backend`."""

from __future__ import annotations

from dataclasses import dataclass

from tilefold.backends.cpu import dispatch
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.protocols import Array, Arrays, Machine, Pass, Placement
from tilefold.problems.attention import Problem


@dataclass(frozen=True, eq=False)
class CpuMachine(Machine):
    """The processor, restricted to an instruction set; frontends see to it that arrays are here."""

    device: Device
    backend = "cpu"
    keeps_low = True
    reads_dlse = True

    def check(self, **arrays: Array) -> None:
        """Nothing is elsewhere that has come here."""

    def accept(
        self, arrays: Arrays, wanted: Pass, given: tuple[Array, ...]
    ) -> tuple[tuple[Array, ...], int]:
        """The arrays themselves: kernels read lse too in any strides, from any element."""
        return given, 0


_machines: dict[int, CpuMachine] = {}
"""Machines by the identity of their devices, which is found faster than by their hash."""


def machine(index: int = 0) -> CpuMachine:
    """The processor of this process; there is one, whatever the number."""
    device = host()
    found = _machines.get(id(device))
    if found is None or found.device is not device:
        found = _machines[id(device)] = CpuMachine(device)
    return found


def missing() -> None:
    """Nothing is missing: everything runs on a processor."""


def admit(problem: Problem) -> Problem:
    """The problem itself: all types and heads are computed."""
    return problem


def prepare(
    machine: CpuMachine, problem: Problem, wanted: Pass, placement: Placement
) -> dispatch.Call:
    """Plan a problem and load its kernels."""
    return dispatch.call(problem, machine.device, wanted.operation, placement.strides)
