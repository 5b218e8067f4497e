"""Triton kernels compiled ahead of time for four architectures: they fit, and use what they should.

Compiling takes seconds for each, so the cases cover every value of every axis and the pairs that
matter, and lie in one process for each architecture. No GPU is asked.

A report follows from the source of a kernel, its blocks and the version of Triton alone. Where
`tools/triton_resources.py` has kept one for just these, it is not compiled again, except for
`WITNESSES`, whose kept reports must be what the compiler says today.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_resources
from triton_resources import Case, Row, identity, launch_of, report_of, spec_of

from tilefold import alibi, bias, causal, dense, relative_bias, softcap
from tilefold.backends.triton import ahead, module
from tilefold.backends.triton.ahead import Compiled, Compiler, reports
from tilefold.backends.triton.architectures import architecture
from tilefold.backends.triton.plan import plan
from tilefold.backends.triton.spec import TritonSpec
from tilefold.problems.attention import Problem

KEPT: dict[Case, Row] = {
    Case(*row["case"]): row for row in json.loads(triton_resources.KEPT.read_text("utf-8"))
}

CASES = (
    ("forward", "bfloat16", 64, "highest"),
    ("forward", "bfloat16", 128, "highest"),
    ("forward", "bfloat16", 512, "highest"),
    ("backward_dq", "float16", 80, "highest"),
    ("backward_dq", "bfloat16", 128, "highest"),
    ("backward_dkv", "bfloat16", 64, "highest"),
    ("backward_dkv", "bfloat16", 256, "highest"),
    ("backward", "bfloat16", 64, "highest"),
    ("decode", "bfloat16", 128, "highest"),
    ("decode", "float16", 256, "highest"),
    ("delta", "bfloat16", 128, "highest"),
    ("merge", "bfloat16", 128, "highest"),
    ("reduce_dq", "bfloat16", 128, "highest"),
    ("forward", "float32", 64, "highest"),
    ("backward_dq", "float32", 64, "highest"),
    ("forward", "float32", 128, "high"),
    ("backward_dkv", "float32", 64, "high"),
    ("forward", "float32", 64, "medium"),
    ("forward", "float64", 64, "highest"),
    ("backward_dq", "float64", 64, "highest"),
    ("backward_dkv", "float64", 512, "highest"),
    ("backward_dkv", "float32", 512, "highest"),
)
NAMES = ("sm_80", "sm_90", "sm_100", "gfx942")

WITNESSES = {
    ("sm_80", "backward_dkv", "bfloat16", 64),
    ("sm_90", "forward", "bfloat16", 64),
    ("sm_100", "delta", "bfloat16", 128),
    ("gfx942", "merge", "bfloat16", 128),
}
"""Kernels that are compiled although their reports are kept, one for each architecture."""

UNITS = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma"}
UNITS |= dict.fromkeys(("gfx90a", "gfx942", "gfx950"), "mfma")
"""What multiplies half types in a block of 64 rows or more."""


def cases(name: str) -> Iterator[Case]:
    for operation, dtype, dim, precision in CASES:
        if amd(name) and precision != "highest":
            continue  # its products of float32 are exact
        yield Case(name, operation, dtype, dim, precision)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if reason := module.missing():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def kept(case: Case, spec: TritonSpec) -> Compiled | None:
    """The report that is kept of just this kernel by this Triton; None where there is none."""
    row = KEPT.get(case)
    if row is None or row["triton"] != triton_version() or row["failure"]:
        return None
    return report_of(row) if (row["text"], row["blocks"]) == identity(spec) else None


@functools.cache
def triton_version() -> str:
    return importlib.metadata.version("triton")


def reports_of(asked: dict[Case, TritonSpec]) -> dict[Case, Compiled]:
    """The reports of kernels of one architecture: kept, compiled, or for witnesses both."""
    found = {case: kept(case, spec) for case, spec in asked.items()}
    compiled = [case for case in asked if found[case] is None or case[:4] in WITNESSES]
    tasks = [(asked[case], case.architecture) for case in compiled]
    for case, report in zip(compiled, reports(tasks, workers=1), strict=True):
        before = found[case]
        assert before is None or before == replace(report, seconds=before.seconds), case
        found[case] = report
    return found


@pytest.mark.slow
@pytest.mark.feature("M03", "M07")
@pytest.mark.parametrize("name", NAMES)
def test_kernels_compile_and_fit(name: str) -> None:
    asked = {case: spec_of(case) for case in cases(name)}
    device, found = architecture(name), reports_of(asked)
    for case, spec in asked.items():
        report = found[case]
        assert not report.failure, f"{case}: {report.failure}"
        assert report.within(device), case
        assert report.registers <= min(
            device.thread_registers, device.registers // (spec.blocks.warps * device.warp)
        )
        estimate = launch_of(case).choice.shared_bytes
        assert report.shared_bytes <= estimate <= device.shared_bytes, case
        check_instructions(case, report, spec.blocks.parallel, spec.descriptors)
        if case in KEPT:
            before = report_of(KEPT[case])
            if before.triton == report.triton:
                assert report.hot_spills <= before.hot_spills, f"{case} spills more than it did"


def check_instructions(case: Case, report: Compiled, rows: int, moved: bool) -> None:
    """The instructions that were meant are there."""
    found = report.instructions
    if case.operation in ("delta", "merge", "reduce_dq"):
        return
    if case.dtype == "bfloat16" and rows >= 64:
        assert UNITS[case.architecture] in found, case
    elif has_no_unit(case):
        assert not {*UNITS.values()} & {*found} and found["fma"], case
    else:
        assert {*UNITS.values()} & {*found}, case
    assert ("bulk copies" in found) == moved, case
    if not amd(case.architecture) and launch_of(case).spec.blocks.stages > 1:
        assert moved or "cp.async" in found, case


def has_no_unit(case: Case) -> bool:
    """Whether products are multiply-adds of single lanes."""
    if case.dtype == "float64":
        fails = amd(case.architecture) and module.version() < (3, 9)
        return fails or case.architecture == "sm_100"
    return case.dtype == "float32" and case.precision == "highest" and not amd(case.architecture)


def amd(name: str) -> bool:
    """Whether an architecture is one of AMD's."""
    return architecture(name).kind == "hip"


@pytest.mark.slow
@pytest.mark.feature("M07")
@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_kernels_compile_without_descriptors_too(name: str) -> None:
    """Operands may lie so that no descriptor can be made of them."""
    every = [
        Case(name, operation, "float16", 128, aligned=False)
        for operation in ("forward", "backward_dkv")
    ]
    for case, report in reports_of({case: spec_of(case) for case in every}).items():
        assert report.within(architecture(name)), (case, report.failure)
        assert "bulk copies" not in report.instructions and "cp.async" in report.instructions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("sm_80", ("forward",)),
        ("sm_90", ("backward_dq", "backward_dkv")),
    ],
)
def test_float64_takes_masks_of_booleans(name: str, kernels: Sequence[str]) -> None:
    """Weights that follow from bytes would be laid out as bytes are, which no product of float64
    is: such tables are 32-bit integers.
    """
    specs = []
    for kernel in kernels:
        operation, form = triton_resources.FORMS[kernel]
        queries = 1 if form == "decode" else 64
        mask = dense(np.eye(queries, 64, dtype=bool))
        problem = Problem.of((1, 2, queries, 16), (1, 2, 64, 16), dtype="float64", mask=mask)
        launches = plan(problem, name, operation, form=form).launches
        specs += [launch.spec for launch in launches if launch.spec.kernel == kernel]
    for spec, report in zip(specs, reports([(spec, name) for spec in specs]), strict=True):
        assert report.within(architecture(name)), (spec.kernel, report.failure)
        assert report.instructions["mma.sync"], spec.kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "operation", "form", "modified", "extra"),
    [
        ("sm_80", "forward", "tiled", [softcap(30.0), alibi()], ("max",)),
        ("sm_90", "backward", "split", bias(np.zeros((4, 128, 256), np.float32)), ("dlse",)),
        ("sm_100", "forward", "decode", bias(np.zeros(256, np.float32)), ("max",)),
        ("gfx942", "backward", "fused", relative_bias(np.zeros((4, 32), np.float32)), ("dinput0",)),
    ],
)
def test_kernels_of_modified_scores_compile_and_fit(
    name: str, operation: str, form: str, modified: Any, extra: tuple[str, ...]
) -> None:
    problem = Problem.of(
        (2, 4, 1 if form == "decode" else 128, 64),
        (2, 2, 256, 64),
        dtype="bfloat16",
        mask=causal(),
        score=modified,
        sinks=1,
    )
    launches = plan(problem, name, operation, form=form, extra=extra).launches
    launches = [launch for launch in launches if "delta" not in launch.spec.row.writes]
    tasks = [(launch.spec, name) for launch in launches]
    for launch, report in zip(launches, reports(tasks, workers=1), strict=True):
        assert report.within(architecture(name)), (launch.spec.kernel, report.failure)
        assert report.shared_bytes <= launch.choice.shared_bytes, launch.spec.kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [Case("gfx90a", "forward", "bfloat16", 128), Case("gfx950", "backward_dkv", "float64", 64)],
    ids=lambda case: case.architecture,
)
def test_other_gpus_of_amd_take_the_blocks_of_an_mi300(case: Case) -> None:
    (report,) = reports([(spec_of(case), case.architecture)])
    assert report.within(architecture(case.architecture)), (case, report.failure)
    check_instructions(case, report, 16 if case.dtype == "float64" else 64, False)


@pytest.mark.slow
@pytest.mark.feature("M07")
def test_estimates_of_shared_memory_are_close_to_the_reports_that_are_kept() -> None:
    """Never below; close above for what is used most, and for the rest on the safe side."""
    assert set(KEPT) == set(triton_resources.cases()), "tools/triton_resources.py"
    for case, row in KEPT.items():
        if case.operation in triton_resources.PRODUCTS:
            continue
        launch, report = launch_of(case), report_of(row)
        if row["failure"] or not launch.spec.row.visits:
            continue
        assert str(launch.spec.blocks) == row["blocks"], f"{case}: tools/triton_resources.py"
        estimate = launch.choice.shared_bytes
        usual = case.dtype == "bfloat16" and case.operation != "backward"
        usual = usual and not launch.spec.blocks.streamed
        most = 1.6 if usual and not amd(case.architecture) else 4.5
        assert report.shared_bytes <= estimate <= most * report.shared_bytes, case


@pytest.mark.feature("A02", "A12")
def test_products_that_are_kept_fit_and_use_matrix_units() -> None:
    """Of each architecture, gated and quantised ones too; sums of no loop are spilled."""
    kept = {case: row for case, row in KEPT.items() if case.operation in triton_resources.PRODUCTS}
    assert {case.architecture for case in kept} > {*NAMES}
    for case, row in kept.items():
        report, device = report_of(row), architecture(case.architecture)
        assert report.within(device) and (row["text"], row["blocks"]) == identity(spec_of(case))
        if case.dtype == "float16":
            assert {*UNITS.values()} & {*report.instructions} and not any(report.spills.values())
        assert ("bulk copies" in report.instructions) == row["descriptors"], case


def test_the_page_says_what_was_kept() -> None:
    page = triton_resources.PAGE.read_text(encoding="utf-8")
    block = triton_resources.block([*KEPT.values()])
    assert triton_resources.replaced(page, block) == page


def test_a_process_that_interprets_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(NotImplementedError, match="compile with `reports`"):
        ahead.compile(spec_of(Case("sm_80", "delta", "float16", 64)), "sm_80")


def test_without_triton_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ahead.module, "missing", lambda: "Triton is not installed")
    with pytest.raises(NotImplementedError, match="Triton is not installed"):
        ahead.compile(spec_of(Case("sm_80", "delta", "float16", 64)), "sm_80")


@pytest.mark.slow
def test_a_compiler_that_ends_or_takes_too_long_is_reported(tmp_path: Path) -> None:
    task = spec_of(Case("sm_80", "delta", "float16", 64)), "sm_80"
    late = Compiler(limit_seconds=0.05)
    assert late.ask(task).failure == "the compiler took more than 0 seconds"
    assert late.end() in (0, -9)
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexit 7\n")
    script.chmod(0o700)
    (report,) = reports([task], python=str(script))
    assert report.failure == "the compiler ended with code 7"
