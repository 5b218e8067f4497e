"""Which machine serves a device, and which frontend an array: rows of two tables."""

from __future__ import annotations

import numpy as np
import pytest
from metal_recorder import Recorder

from tilefold.backends import registry
from tilefold.backends.cpu.device import host
from tilefold.frontends import registry as frontends


def test_the_processor_is_a_machine() -> None:
    machine = registry.machine("cpu")
    assert machine is registry.machine("cpu") and machine.backend == "cpu"
    assert registry.backend("cpu").missing() is None
    assert machine.device is host()  # type: ignore[attr-defined]  # it is a CpuMachine


def test_a_machine_is_its_own() -> None:
    machine = Recorder()
    assert registry.machine(machine) is machine


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:3", "", 7, ["cpu"]])
def test_other_devices_are_named(device: object) -> None:
    with pytest.raises(ValueError, match=r"^device must be 'cpu', 'mps' or 'cuda', got "):
        registry.machine(device)


def test_every_row_is_a_backend() -> None:
    for name, row in registry.BACKENDS.items():
        found = registry.backend(name)
        assert registry.DEVICES[row.device] == name
        assert all(callable(getattr(found, part)) for part in ("machine", "admit", "prepare"))


def test_arrays_of_no_framework_are_for_numpy() -> None:
    found = frontends.find(q=np.zeros(1), k=[1.0])
    assert found.__name__ == "tilefold.frontends.numpy"
