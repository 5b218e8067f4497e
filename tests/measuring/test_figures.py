"""The table of figures, the comparison with other implementations, and the pages they fill."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from typing import Any

import comparison
import figures
import pytest
import results
from figures import Figure, Result

from tilefold.backends.cpu import threads
from tilefold.backends.cpu.device import host
from tilefold.measuring import baselines, workload

TABLE = list(figures.figures())


def test_every_row_is_a_case_with_a_kind_and_a_peer() -> None:
    assert len({*TABLE}) == len(TABLE) == 57
    for figure in TABLE:
        assert figure.case.threads == (1 if figure.threads == "1" else host().cores)
        assert figure.kind in figures.KINDS
        assert figure.peer in (None, figures.BEST, *baselines.BASELINES)
        assert figure.operation in workload.PASSES
        assert figure.floor > 0


def test_a_decoding_row_has_one_query_and_many_keys() -> None:
    (figure, *_) = (each for each in TABLE if each.kind == "reading")
    problem = figure.case.problem
    assert (problem.len_q, problem.len_k, problem.heads_q) == (1, 32768, 8)


@pytest.mark.parametrize(
    ("kind", "value", "verdict"),
    [
        ("ratio", 1.35, "reached"),
        ("ratio", 1.34, "not reached"),
        ("compile", 1.35, "reached"),
        ("compile", 1.36, "not reached"),
    ],
)
def test_a_ratio_has_a_floor_and_a_time_a_ceiling(kind: str, value: float, verdict: str) -> None:
    figure = Figure("forward", 1.35, figures.D64, kind=kind)
    assert Result(figure, value).verdict == verdict
    assert Result(figure, value, reason="no AMX").verdict == "not measured"


def test_a_row_whose_peer_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = figures.measure(Figure("forward", 1.35, figures.D64), 0)
    assert (result.verdict, result.reason) == ("not measured", "torch is not installed")
    assert figures.cells(result)[-5:] == ["", "", "1.35", "", "not measured"]
    assert figures.reasons([result] * 2) == [
        "not measured: forward, float32: torch is not installed"
    ]


def test_the_best_of_no_peers_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "rivals", lambda: ())
    result = figures.measure(Figure("forward", 1.35, figures.D64, peer=figures.BEST), 0)
    assert result.reason == "none of its peers is installed"


def test_a_share_of_the_roofline_may_have_a_floor_too() -> None:
    figure = Figure("forward", 1.35, figures.D64, share_floor=0.9)
    assert Result(figure, 1.4, share=0.9).verdict == "reached"
    assert Result(figure, 1.4, share=0.89).verdict == "not reached"
    assert Result(figure, 1.3, share=0.95).verdict == "not reached"
    assert figures.cells(Result(figure, 1.4, share=0.89))[-2] == "89% of 90"
    assert figures.shown(Result(figure, 1.4, share=0.9))[0] == "* forward, float32 1,8,2048,64"


def small(kind: str, **changes: Any) -> Figure:
    figure = Figure("small", 1e-9, "1,2,64,16", kind=kind, mask="causal()")
    return replace(figure, **changes)


SMALL = [
    small("ratio", peer=figures.BEST),
    small("ratio", operation=workload.BOTH, mask="local(9)", dtype="bfloat16"),
    small("reading", shape="1,1,1,64", keys=2048, mask="full()", dtype="float16"),
    small("call NumPy"),
    small("call torch"),
    small("scaling", peer=None),
]


@pytest.mark.slow
@pytest.mark.feature("M10")
@pytest.mark.parametrize("figure", SMALL, ids=lambda figure: f"{figure.kind} {figure.dtype}")
def test_a_row_has_value_times_and_share(figure: Figure) -> None:
    pytest.importorskip("torch")
    before = threads.get_num_threads()
    result = figures.measure(figure, 0)
    assert threads.get_num_threads() == before
    assert result.value and result.seconds and result.other_seconds
    assert result.share and result.binding in ("arithmetic", "exponentials", "bytes")
    if figure.peer == figures.BEST:
        assert result.other in figures.RIVALS and result.cold_value
    if figure.kind != "reading":
        assert math.isclose(result.value, result.other_seconds / result.seconds)
    if figure.kind == "scaling" and host().cores < 4:
        assert result.reason == f"there are {host().cores} cores"
    else:
        assert result.verdict == "reached"
    assert all(isinstance(cell, str) for cell in figures.cells(result))
    json.dumps(figures.record(result), allow_nan=False)


@pytest.mark.slow
def test_a_floor_of_another_instruction_set_is_measured_and_not_judged() -> None:
    pytest.importorskip("torch")
    result = figures.measure(small("ratio", needs="no-such-feature"), 0)
    assert result.value
    assert str(result.reason).startswith("the floor is one of no-such-feature, here ")


@pytest.mark.slow
def test_a_peer_that_cannot_is_the_reason() -> None:
    pytest.importorskip("torch")
    result = figures.measure(small("ratio", peer="flex", operation="backward"), 0)
    assert result.reason == "FlexAttention has no backward on the CPU"
    assert result.seconds and result.value is None


@pytest.mark.slow
@pytest.mark.feature("S09")
def test_the_first_compile_is_that_of_the_slowest_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [small("ratio"), small("ratio", operation="backward", mask="full()")]
    monkeypatch.setattr(figures, "figures", lambda: iter(two))
    result = figures.measure(Figure("compile", 60, "1,2,64,16", peer=None, kind="compile"), 0)
    assert result.verdict == "reached"
    assert result.notes["kernels"] >= 3
    assert result.value and result.value > 0.01


# The comparison --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[comparison.Row]:
    pytest.importorskip("torch")
    return comparison.measure(host().cores, 0, 48, ["torch", "flex"])


@pytest.mark.slow
@pytest.mark.feature("S04")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the peers' own
def test_every_implementation_has_a_cell_per_case(rows: list[comparison.Row]) -> None:
    labels = comparison.cases(rows)
    assert len(labels) == len(comparison.KINDS) * len(workload.OPERATIONS)
    assert len(rows) == 3 * len(labels)
    backward = [r for r in rows if r["operation"] == "backward" and r["name"] == "flex"]
    assert all("no backward" in r["reason"] and comparison.cell(r) == "-" for r in backward)
    others = [r for r in rows if r not in backward]
    assert all(r["reason"] is None and r["gflops"] > 0 for r in others)
    json.dumps(rows, allow_nan=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the peers' own
def test_the_plot_is_a_picture(rows: list[comparison.Row]) -> None:
    pytest.importorskip("matplotlib")
    assert comparison.plot(rows, "a test").startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_bound_process_has_the_cores_that_it_is_given() -> None:
    pytest.importorskip("torch")
    found = comparison.bound(1, 0, 16, ["torch"])
    assert {row["threads"] for row in found} == {1}
    assert {row["name"] for row in found} == {"tilefold", "torch"}


# The pages -------------------------------------------------------------------------------------

CIRCUMSTANCES = {
    "date": "2026-11-21T03:15:01+00:00",
    "machine": {"name": "A processor", "isa": "avx2", "cores": 3},
    "versions": {"torch": "2.13.0"},
    "commit": "0123456789ab",
}


def test_the_pages_say_what_the_files_say() -> None:
    for name, block in results.blocks().items():
        page = (results.ROOT / name).read_text(encoding="utf-8")
        assert results.replaced(page, block) == page, f"{name}: python tools/results.py"
    picture = results.ROOT / "docs" / "images" / results.PICTURE.name
    assert picture.exists() == results.PICTURE.exists()
    assert not picture.exists() or picture.read_bytes() == results.PICTURE.read_bytes()


def test_a_page_without_marks_is_refused() -> None:
    page = "a\n<!-- RESULTS BEGIN: x -->\nold\n<!-- RESULTS END -->\nb"
    assert results.replaced(page, "new") == f"a\n{results.BEGIN}\nnew\n{results.END}\nb"
    for broken in ("a", page + page):
        with pytest.raises(ValueError, match="one block of results"):
            results.replaced(broken, "new")


def test_verdicts_are_counted_over_what_could_be_judged() -> None:
    figure = Figure("forward", 1.5, figures.D64, dtype="bfloat16")
    found = [
        Result(figure, 2.0, 0.5, 1.0, 0.75, "arithmetic"),
        Result(figure, 1.0, 1.0, 1.0, 0.5, "arithmetic"),
        Result(figure, 9.0, 0.1, 0.9, 0.5, "bytes", reason="no AMX"),
    ]
    rows = json.loads(json.dumps([figures.record(result) for result in found]))
    assert [Result.of(row) for row in rows] == found
    text = "\n".join(results.floors(CIRCUMSTANCES | {"rows": rows}))
    assert "1 of the 2 figures" in " ".join(text.split())
    assert "1 could not be judged" in " ".join(text.split())
    assert "| forward, bfloat16 | 1,8,2048,64 | all | 500 ms | 1.00 s torch | 2.00 |" in text
    assert "|  | 1.50 | 75% | reached |" in text
    assert "| not measured |" in text
    assert "- not measured: forward, bfloat16: no AMX" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the peers' own
def test_the_comparison_says_what_a_peer_cannot(rows: list[comparison.Row]) -> None:
    lines = results.others(CIRCUMSTANCES | {"rows": rows})
    assert "| | tilefold | torch | flex |" in "\n".join(lines).replace("|  |", "| |")
    assert "- `-`: FlexAttention has no backward on the CPU" in lines
    assert "Versions: torch 2.13.0." in "\n".join(lines)
