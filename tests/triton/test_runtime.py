"""Which GPU is which, and what streams and graphs ask for; torch's answers are played here."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tilefold.backends.triton import module, runtime

torch = pytest.importorskip("torch", reason="GPUs are met through torch")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch says of a GPU that is not there."""
    said = SimpleNamespace(
        properties=SimpleNamespace(major=9, minor=0, name="NVIDIA H100", multi_processor_count=132),
        stream="default",
        capturing=False,
    )
    fake = SimpleNamespace(
        is_available=lambda: True,
        get_device_properties=lambda index: said.properties,
        current_stream=lambda device: said.stream,
        default_stream=lambda device: "default",
        is_current_stream_capturing=lambda: said.capturing,
    )
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(module, "missing", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    runtime.gpu.cache_clear()
    yield said
    runtime.gpu.cache_clear()


@pytest.mark.parametrize(
    ("major", "minor", "expected"),
    [(8, 0, "sm_80"), (8, 6, "sm_86"), (8, 9, "sm_89"), (9, 0, "sm_90"), (10, 3, "sm_100")],
)
def test_capabilities_name_an_architecture(
    cuda: Any, major: int, minor: int, expected: str
) -> None:
    cuda.properties = SimpleNamespace(
        major=major, minor=minor, name="some", multi_processor_count=7
    )
    assert runtime.architecture_of(0) == expected
    found = runtime.gpu(0)
    assert found.multiprocessors == 7
    assert found.architecture == expected and str(found.device) == "cuda:0"
    assert runtime.gpu(0) is found


def test_an_amd_gpu_by_its_own_name(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    cuda.properties = SimpleNamespace(
        name="MI300X", gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304
    )
    assert runtime.architecture_of(0) == "gfx942"
    cuda.properties.gcnArchName = "gfx1100"
    with pytest.raises(NotImplementedError, match="MI300X is of architecture gfx1100, and kernels"):
        runtime.gpu(0)


@pytest.mark.feature("T15", "J13")
def test_a_gpu_that_is_too_old_is_named(cuda: Any) -> None:
    cuda.properties = SimpleNamespace(major=7, minor=5, name="Tesla T4", multi_processor_count=40)
    with pytest.raises(NotImplementedError, match="the GPU Tesla T4 is of architecture sm_75"):
        runtime.gpu(0)


@pytest.mark.feature("J13")
def test_what_is_missing(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.missing() is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset it" in str(runtime.missing())
    monkeypatch.setattr(module, "missing", lambda: "no Triton")
    assert runtime.missing() == "no Triton"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no GPU" in str(runtime.missing())
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "PyTorch, which is not installed" in str(runtime.missing())
    assert "TRITON_INTERPRET" in os.environ


def test_other_streams_and_graphs_keep_what_they_read(cuda: Any) -> None:
    machine = runtime.gpu(0)
    recorded: list[str] = []
    held = SimpleNamespace(record_stream=recorded.append)
    machine.launched([held])
    assert not recorded, "memory of the default stream is freed in its order"
    cuda.stream = "side"
    machine.launched([held])
    assert recorded == ["side"]
    cuda.capturing = True
    machine.launched([held])
    assert recorded == ["side"] and machine.pinned == [held]
    with pytest.raises(RuntimeError, match="make the same call once before the graph is captured"):
        machine.upload(np.zeros(3, np.int32))


def test_tensors_elsewhere_are_refused(cuda: Any) -> None:
    def tensor_on(index: int) -> Any:
        kind = type("There", (torch.Tensor,), {"device": torch.device("cuda", index)})
        return torch.zeros(1).as_subclass(kind)

    machine = runtime.gpu(0)
    there = tensor_on(0)
    machine.check(q=there)
    with pytest.raises(ValueError, match="k must be on cuda:0, got cuda:1"):
        machine.check(q=there, k=tensor_on(1))
    with pytest.raises(TypeError, match="q must be a tensor, got a ndarray"):
        machine.check(q=np.zeros(3))
