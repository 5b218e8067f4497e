"""`tilefold doctor --metal`, as far as a machine without a GPU of Apple's can show it.

The kernels' tests run on the emulator. What is timed on a Mac is launched here on a machine that
computes nothing, so no figure of these tests means anything.
"""

from __future__ import annotations

import json
import platform
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows the name "bfloat16" from it
import numpy as np
import pytest
import torch
from metal import Edited, machine
from metal_recorder import Recorder
from metal_rules import Compiler

import tilefold
from tilefold import cli
from tilefold.backends.arrays.torch import tensor_of
from tilefold.backends.metal import emulate, gated, runtime
from tilefold.backends.metal.kernels import tensorops
from tilefold.backends.metal.runtime import Mps
from tilefold.backends.metal.spec import KERNELS as METAL_KERNELS
from tilefold.commands import metal
from tilefold.implementations import torch as ways
from tilefold.measuring import baselines, metal_selftest, metal_utilisation
from tilefold.measuring.metal_selftest import Place, Trial
from tilefold.planning import roofline
from tilefold.problems.attention import Problem
from tilefold.problems.request import Request

KERNELS = {
    "forward",
    "backward_dq",
    "backward_dkv",
    "backward_sinks",
    "backward_inputs",
    "decode, merge",
    "gemm",
    "softmax",
}
MAC = {
    "name": "Apple M4",
    "family": "apple9",
    "emulated": False,
    "cores": 10,
    "peak_ginstrs": 1790.0,
}


def compiler() -> Compiler:
    """Torch's compiler of shaders, played by the emulator; skips where that cannot run."""
    machine("apple9")
    return Compiler()


# The self-test ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.feature("M11", "J13")
def test_every_kernel_is_tested_on_the_emulator(tmp_path: Path, capsys: Any) -> None:
    machine("apple9")
    file = tmp_path / "mac.json"
    assert cli.main(["doctor", "--metal", "--emulate", "--save", str(file)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Metal kernels on the emulator on the CPU (apple9) against dense")
    assert "emulated: nothing was timed, and nothing here ran on hardware" in said
    document = json.loads(file.read_text(encoding="utf-8"))
    tried = document["self_test"]
    assert {each["kernel"] for each in tried} == KERNELS | {"tensorops"}
    assert all(each["passed"] and each["error"] < 5e-3 for each in tried)
    assert document["gpu"] == {"name": None, "family": "apple9", "emulated": True}
    assert document["benchmark"] == []
    assert {"date", "machine", "versions", "commit", "system", "macos"} <= document.keys()
    assert document["versions"]["torch"] == torch.__version__
    assert document["system"] == platform.platform()


@pytest.mark.slow
def test_the_same_trials_run_on_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Mac, but that the device is the CPU."""
    gpu = Mps(torch.device("cpu"), compiler(), "apple7")
    place = Place(tensor_of, lambda tensor: baselines.results(tensor)[0])
    monkeypatch.setattr(metal_selftest, "SMALL", [("bfloat16", (9, 8, 20, 33, "chunks"))])
    tried = list(metal_selftest.trials(gpu, place, "no tensor operations here", few=True))
    assert [trial.kernel for trial in tried if trial.passed] == [
        *("forward", "backward_dq", "backward_dkv"),
        *("decode, merge", "gemm", "softmax"),
        *("forward", "backward_dq", "backward_dkv", "backward_sinks", *["backward_inputs"] * 2),
    ]
    assert tried[-1].absent and tried[-1].reason == "no tensor operations here"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (Place(back=lambda found: 1.001 * np.asarray(found, np.float64)), None),
        (Place(back=lambda found: np.full(np.shape(found), np.nan)), None),
        (Place(there=lambda array: array.tolist()), "AttributeError: "),
    ],
)
def test_what_is_wrong_fails(
    place: Place, reason: str | None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = machine("apple9")
    monkeypatch.setattr(metal_selftest, "SMALL", metal_selftest.SMALL[:1])
    gpu = {"name": None, "family": "apple9", "emulated": True}
    monkeypatch.setattr(metal, "_emulated", lambda: (on, place, gpu))
    assert cli.main(["doctor", "--metal", "--emulate", "--json"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("tilefold doctor: ") and "tests of Metal kernels failed" in said.err
    first = json.loads(said.out)["self_test"][0]
    assert not first["passed"] and not first["absent"]
    assert (first["reason"] or "").startswith(reason or "")


@pytest.mark.slow
def test_what_adds_wild_tiles_pair_by_pair_is_tested() -> None:
    """Every kernel of the two problems, without it, fails one of its trials with hidden NaN."""
    machine("apple9")
    on = Edited("apple9", edit=lambda text: text.replace("] += weight * float(", "] += 0 * float("))
    tried = [*metal_selftest.trials(on, Place(), "none here", few=True)]
    failed = [trial for trial in tried if not (trial.passed or trial.absent)]
    assert {trial.kernel for trial in failed} == {"forward", "backward_dq", "backward_dkv"}
    assert all(trial.case.endswith(", NaN where hidden") for trial in failed)


def test_without_ml_dtypes_bfloat16_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    monkeypatch.setattr(metal_selftest, "SMALL", metal_selftest.SMALL[1:])
    tried = metal_selftest.trials(Recorder(), Place(), "none here", few=True)
    first = next(tried)
    assert (first.kernel, first.dtype, first.absent) == ("all kernels", "bfloat16", True)
    assert "pip install ml_dtypes" in str(first.reason)
    assert {trial.dtype for trial in tried} == {"float16"}


def test_a_machine_without_metal_says_so(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    monkeypatch.setattr(emulate, "available", lambda: None)
    assert cli.main(["doctor", "--metal"]) == 2
    assert capsys.readouterr().err == (
        "tilefold doctor: Metal is there on macOS alone, and this is linux;"
        " `tilefold doctor --metal --emulate` tests the kernels on the CPU\n"
    )
    monkeypatch.setattr(emulate, "available", lambda: "there is no C++ compiler")
    assert cli.main(["doctor", "--metal", "--emulate"]) == 2
    said = capsys.readouterr().err
    assert "Metal kernels cannot be emulated here: there is no C++ compiler" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--emulate"], "--emulate and --save go with --metal"),
        (["--save", "x.json"], "--emulate and --save go with --metal"),
        (["--metal", "--save", "no/such/x.json"], "no/such: there is no such folder"),
    ],
)
def test_bad_options(words: list[str], message: str, capsys: Any) -> None:
    assert cli.main(["doctor", *words]) == 2
    assert capsys.readouterr().err == f"tilefold doctor: {message}\n"


# The benchmark ---------------------------------------------------------------------------------


def small(dtype: str = "float16", dim: int = 24) -> Problem:
    return Problem.of((1, 2, 40, dim), dtype=dtype)


@pytest.mark.feature("M10")
def test_each_pass_is_launched_and_counted() -> None:
    recorder, waits = Recorder(), []
    problem = small()
    shape, lse = (1, 2, 40, 24), np.zeros((1, 2, 40), np.float32)
    names = ("q", "k", "v", "do", "o", "dq", "dk", "dv")
    operands = {name: np.zeros(shape, np.float16) for name in names} | {"lse": lse}
    native = {"forward": lambda: None, "backward": lambda: None}
    measured = metal_utilisation.measure(
        recorder, problem, operands, lambda: waits.append(1), native, seconds=0
    )
    pairs = 2 * 40 * 40
    assert {each.name: each.instructions for each in measured} == {
        "forward": (2 * 24 + 5) * pairs,
        "backward_dq": (3 * 24 + 5) * pairs,
        "backward_dkv": (4 * 24 + 5) * pairs,
        "native forward": (2 * 24 + 5) * pairs,
        "native backward": (5 * 24 + 5) * pairs,
    }
    assert all(len(each.seconds) == 3 for each in measured)
    assert len(waits) == 5 * (2 + 3), "two turns to begin with, then three rounds"
    launched = [name for name, _, _ in recorder.launched]
    kernels = [f"tilefold_{name}" for name in ("forward", "backward_dq", "backward_dkv")]
    assert set(launched) == set(kernels)
    delta = {
        name: [id(array) for array in args if getattr(array, "shape", ()) == (1, 2, 40)]
        for name, args, _ in recorder.launched
    }
    assert delta[kernels[1]] == delta[kernels[2]], "lse and delta are the same arrays in both"


@pytest.mark.feature("M10")
def test_figures_follow_from_seconds_and_counts() -> None:
    row = metal_utilisation.Measured("forward", small(), (3e-6, 1e-6, 2e-6), instructions=3_580_000)
    record = row.record(1790.0)
    assert (record["median_seconds"], record["best_seconds"]) == (2e-6, 1e-6)
    assert record["ginstrs"] == pytest.approx(1790)
    assert record["utilisation"] == pytest.approx(1.0)
    assert row.record(None)["utilisation"] is None


def test_peaks_are_those_published() -> None:
    assert metal_utilisation.peak("Apple M1 Max", 32) == 5308
    assert metal_utilisation.peak("Apple M1 Max", 24) == pytest.approx(5308 * 24 / 32)
    assert metal_utilisation.peak("Apple M4", 10) == 1790
    assert metal_utilisation.peak("Apple M4 Max", 40) is None
    assert metal_utilisation.peak("Apple M4", 0) is None


@pytest.mark.slow
@pytest.mark.parametrize("peak", [1790.0, None])
def test_on_a_mac_all_is_measured_shown_and_written(
    peak: float | None, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the kernels and the clock: a machine that computes nothing, tensors on the CPU."""
    recorder, real = Recorder(), metal.measure

    def measure(machine: Any, problem: Problem, device: str) -> Any:
        assert (machine, device, problem.len_q) == (recorder, "mps", 4096)
        if problem.dim == 256:
            raise RuntimeError("out of memory:\n8 GiB")
        return real(machine, small(problem.dtype, problem.dim), "cpu", 0)

    passed = Trial("forward", "a case", "float16", 1e-5, 0.1)
    absent = Trial("tensorops", "a case", "float16", reason="too old", absent=True)
    monkeypatch.setattr(metal, "_real", lambda: (recorder, Place(), MAC | {"peak_ginstrs": peak}))
    monkeypatch.setattr(gated, "missing", lambda: "too old")
    monkeypatch.setattr(metal_selftest, "trials", lambda *_, few: iter([passed, absent]))
    monkeypatch.setattr(metal, "measure", measure)
    monkeypatch.setattr(metal_utilisation, "TURN_SECONDS", 0)
    file = tmp_path / "mac.json"
    assert cli.main(["doctor", "--metal", "--save", str(file)]) == 0
    said = capsys.readouterr().out
    assert "Metal kernels on Apple M4 (apple9) against dense float64" in said
    assert "tensorops: too old" in said
    assert "Apple M4, 10 cores: 8 heads of 4096 x 4096" in said
    assert "not measured: float32 d256: out of memory: 8 GiB" in said
    assert ("no utilisation: the peak of Apple M4 is not known here" in said) == (peak is None)
    document = json.loads(file.read_text(encoding="utf-8"))
    rows = document["benchmark"]
    assert len(rows) == 2 * 2 * 5
    assert all((row["utilisation"] is None) == (peak is None) for row in rows)
    assert {row["name"] for row in rows} == {
        *("forward", "backward_dq", "backward_dkv"),
        *("native forward", "native backward"),
    }
    count = roofline.instruction_count(METAL_KERNELS["backward_dkv"], 2 * 40 * 40, 128)
    assert count in [row["instructions"] for row in rows]
    assert len(document["notes"]) == 2
    assert document["gpu"]["name"] == "Apple M4"


def test_what_came_before_a_gpu_that_dies_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trials(*_: Any, few: bool) -> Iterator[Trial]:
        yield Trial("forward", "a case", "float16", 1e-5, 0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr(metal, "_real", lambda: (Recorder(), Place(), MAC))
    monkeypatch.setattr(gated, "missing", lambda: "too old")
    monkeypatch.setattr(metal_selftest, "trials", trials)
    file = tmp_path / "mac.json"
    with pytest.raises(KeyboardInterrupt):
        metal.main(Namespace(emulate=False, save=str(file), json=False))
    (kept,) = json.loads(file.read_text(encoding="utf-8"))["self_test"]
    assert kept["kernel"] == "forward" and kept["passed"]


def test_native_attention_that_finds_no_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = baselines.implementation

    def implementation(name: str, device: str, case: Any, *rest: Any, wait: bool) -> Any:
        if case.operation == "backward":
            raise RuntimeError("MPS backend out of memory")
        return real(name, device, case, *rest, wait=wait)

    monkeypatch.setattr(baselines, "implementation", implementation)
    measured, notes = metal.measure(Recorder(), small(), "cpu", 0)
    assert [each.name for each in measured][-2:] == ["backward_dkv", "native forward"]
    assert notes == ["native backward, float16 d24: MPS backend out of memory"]


# Tensor operations -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.feature("J10")
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_tensor_operations_are_one_kernel_with_gradients(layout: str) -> None:
    """On the emulator; a Mac's GPU takes the same way behind the gate."""
    on = Mps(torch.device("cpu"), compiler(), "apple10")
    shapes = [(1, 4, 20, 16), (1, 2, 33, 16), (1, 2, 33, 16)]
    if layout == "bnhd":
        shapes = [(b, n, h, d) for b, h, n, d in shapes]
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape).half().requires_grad_() for shape in shapes)
    mask = tilefold.causal() & tilefold.local(9)
    problem = Problem.of(
        *(tuple(x.shape) for x in (q, k, v)), dtype="float16", mask=mask, layout=layout
    )
    o, lse = ways._TensorOps.apply(on, problem, Request(mask, None, layout), q, k, v)
    options: dict[str, Any] = {"mask": mask, "layout": layout, "impl": "composed"}
    want, want_lse = tilefold.attention(q, k, v, **options, return_lse=True)
    torch.testing.assert_close(o, want, rtol=0, atol=4e-3)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=4e-3)
    do = torch.randn_like(o)
    for got, exact in zip(
        torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(want, (q, k, v), do), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-2)
    assert len(gated.plan(problem, "apple10").launches) == 1


@pytest.fixture
def fresh() -> Iterator[None]:
    """What is known of this machine is asked anew, here and afterwards."""
    for asked in (runtime.macos, gated.missing):
        asked.cache_clear()
    yield
    for asked in (runtime.macos, gated.missing):
        asked.cache_clear()


def calls_itself(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Python ran on a macOS of that name."""
    monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), "arm64"))


@pytest.mark.feature("J13")
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("version", ["26.2.1", "26.2", "16.2"])
def test_the_gate_is_asked_for_this_machine(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def gate(os_version: tuple[int, int], generation: int, compile_text: Any) -> str | None:
        asked.append((os_version, generation))
        return "tensor operations need more"

    monkeypatch.setattr(runtime, "missing", lambda: None)
    monkeypatch.setattr(runtime, "gpu", lambda: Recorder("apple9"))
    calls_itself(version, monkeypatch)
    monkeypatch.setattr(tensorops, "gate", gate)
    assert gated.missing() == "tensor operations need more"
    assert asked == [((26, 2), 15)]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("version", "child", "expected"),
    [
        ("26.4", "exit 1", "26.4"),
        ("15.7.1", "exit 1", "15.7.1"),
        ("16.0", 'test "$SYSTEM_VERSION_COMPAT" = 0 && echo 27.1', "27.1"),
        ("16.3", "echo 16.3", "26.3"),
        ("16.3", "exit 1", "26.3"),
        ("16.3.1", None, "26.3.1"),
        ("", "exit 1", None),
    ],
)
def test_macos_26_is_known_to_a_python_that_was_built_for_an_older_one(
    version: str,
    child: str | None,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is told 16 unless it asks for the truth, which a child process does."""
    python = tmp_path / "python"
    if child is not None:
        python.write_text(f"#!/bin/sh\n{child}\n")
        python.chmod(0o700)
    calls_itself(version, monkeypatch)
    monkeypatch.setattr(sys, "executable", str(python))
    assert runtime.macos() == expected


def test_an_empty_call_launches_nothing() -> None:
    recorder = Recorder("apple10")
    q, k = torch.ones(1, 2, 3, 8, requires_grad=True), torch.ones(1, 2, 0, 8)
    problem = Problem.of((1, 2, 3, 8), (1, 2, 0, 8))
    o, lse = ways._TensorOps.apply(recorder, problem, Request(), q, k, k)
    assert (o == 0).all() and (lse == -torch.inf).all() and not recorder.launched
    o.sum().backward()
    assert q.grad is not None and (q.grad == 0).all()
