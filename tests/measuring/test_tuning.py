"""`tilefold tune`: which candidates are measured, which of them wins, what is shown and kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tilefold import cli
from tilefold.backends.cpu import peak, plan, tuned
from tilefold.backends.cpu.choice import Chooser
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.tables import FAMILIES, Blocks, RegisterTile
from tilefold.masks import parse
from tilefold.measuring import tuning, workload
from tilefold.measuring.workload import Call, Case
from tilefold.planning.roofline import Rates
from tilefold.problems.attention import ITEM_BYTES, Problem

Model = Callable[[Blocks], float]


@pytest.fixture
def cache(fresh_cache: Path) -> Iterator[Path]:
    """An empty cache, and no plan or winner remembered from before or left for later tests."""
    tuned.STORE.forget()
    yield fresh_cache
    tuned.STORE.forget()


def case(operation: str = "forward", mask: str = "full()", **changes: Any) -> Case:
    sizes: dict[str, Any] = {"batch": 1, "heads_q": 2, "heads_kv": 2, "len_q": 300, "len_k": 300}
    fields = sizes | {"dim": 16, "dim_v": 16, "dtype": "float32", "scale": 0.25} | changes
    return Case(Problem(**fields, mask=parse.parse(mask)), operation)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Model], list[list[str]]]:
    """Replaces the clock by a model of each candidate's time; returns who ran in each stage."""

    def use(model: Model) -> list[list[str]]:
        stages: list[list[str]] = []

        def turns(calls: Mapping[str, Call], **limits: Any) -> dict[str, list[float]]:
            stages.append(list(calls))
            drift = (1.0, 2.0, 8.0)[: limits.get("most", 3)]
            return {name: [model(blocks(name)) * d for d in drift] for name in calls}

        monkeypatch.setattr(tuning, "turn_by_turn", turns)
        return stages

    return use


def blocks(name: str) -> Blocks:
    rows, vectors, block = (int(number) for number in re.findall(r"\d+", name))
    return Blocks(RegisterTile(rows, vectors), block)


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """`inspect` measures the machine otherwise, which takes half a second."""
    rates = Rates("a machine", "float32", 1, 1e11, 1e10, 1e10)
    monkeypatch.setattr(peak, "rates", lambda *_, **__: rates)


# Candidates ------------------------------------------------------------------------------------


@pytest.mark.feature("M07", "S08")
@pytest.mark.parametrize("isa", FAMILIES)
def test_candidates_are_the_table_and_what_else_fits_the_registers(isa: str) -> None:
    family = FAMILIES[isa]
    found = family.candidates()
    assert set(family.tiles) < set(found)
    assert len(set(found)) == len(found) <= 16
    for tile in found:
        assert tile.registers <= family.registers
        assert 2 * tile.rows * tile.vectors >= family.registers or tile in family.tiles
    for row in family.table:
        assert (row.measured is None) == (isa == "neon")
        assert family.row(row.tile) is row


@pytest.mark.parametrize("operation", ["forward", "backward"])
@pytest.mark.parametrize("isa", FAMILIES)
def test_the_row_of_every_plan_is_in_the_table(isa: str, operation: str) -> None:
    device = host().lowered(isa) if isa in ("avx2", "sse2") else host()
    for dtype in ("float32", "float64"):
        for length in (1, 17, 100, 5000):
            asked = case(len_q=length, len_k=length, dtype=dtype).problem
            form = "tiled" if operation == "forward" else "auto"
            for launch in plan.plan(asked, device, operation, form).launches:
                found = Chooser(asked, device).table_blocks(launch.spec.kernel)
                assert FAMILIES[device.isa].row(found.tile) is not None
                assert launch.spec.block_traverse == found.block_traverse


# Choosing --------------------------------------------------------------------------------------


def test_the_fastest_candidate_wins_and_the_others_are_priced(timed: Any) -> None:
    wide = max(tile.vectors for tile in FAMILIES[host().isa].candidates())

    def model(candidate: Blocks) -> float:
        tile = candidate.tile
        return (1 + 0.2 * (wide - tile.vectors) + 0.01 * tile.rows) * (
            1 + abs(candidate.block_traverse - 64) / 1000
        )

    stages = timed(model)
    (found,) = tuning.tune(case(), seconds=1)
    table = Chooser(case().problem, host()).table_blocks("forward")
    assert found.measured.table == table
    assert all(stage[0] == str(table) for stage in stages)  # in every round, the first one too
    best = min((trial.blocks for trial in found.measured.trials), key=model)
    assert best.tile.vectors == wide and 56 <= best.block_traverse <= 64
    assert found.measured.best.blocks == best == found.measured.trials[0].blocks
    assert found.measured.best.ratio == pytest.approx(model(best) / model(table))
    kept = found.measured.tuned_blocks("1,2,300,16", 1, "today", {})
    worst = max((trial.blocks for trial in found.measured.trials), key=model)
    assert kept.worst.blocks == worst
    assert kept.worst.seconds / kept.best.seconds == pytest.approx(model(worst) / model(best))
    assert kept.table.seconds / kept.best.seconds == pytest.approx(model(table) / model(best))
    assert (
        kept.candidates
        == len(found.measured.trials)
        == len({str(t.blocks) for t in found.measured.trials})
    )


@pytest.mark.parametrize(("gain", "wins"), [(0.0, False), (0.005, False), (0.02, True)])
def test_the_table_stays_unless_others_are_clearly_faster(
    timed: Any, gain: float, wins: bool
) -> None:
    table = Chooser(case().problem, host()).table_blocks("forward")
    timed(lambda candidate: 1.0 if candidate == table else 1.0 - gain)
    (found,) = tuning.tune(case(), seconds=1)
    assert (found.measured.best.blocks != table) == wins


def test_noise_does_not_win() -> None:
    """Fast in most rounds of a stage, but not in the last; or in the median, but not surely."""
    table = Chooser(case().problem, host()).table_blocks("forward")
    noisy = [0.5, 0.5, 0.5, 1.5, 1.5]
    stages: list[int] = []

    def turns(calls: Mapping[str, Call], **limits: Any) -> dict[str, list[float]]:
        if limits.get("most") == 1:
            return {name: [1.0] for name in calls}
        stages.append(limits["least"])
        once = [0.5] * 5 if len(stages) < tuning.STAGES else noisy
        return {name: [1.0] * 5 if blocks(name) == table else once for name in calls}

    (found,) = tuning.tune(case(), seconds=1, turns=turns)
    assert found.measured.trials[0].ratio == 0.5 and found.measured.trials[0].share == 0.6
    assert found.measured.best.blocks == table
    assert stages == [tuning.LEAST_ROUNDS] * 2 + [tuning.LEAST_LAST_ROUNDS]
    noisy[3] = 0.5
    stages.clear()
    (found,) = tuning.tune(case(), seconds=1, turns=turns)
    assert found.measured.best.blocks != table


def test_only_the_last_stage_decides() -> None:
    table = Chooser(case().problem, host()).table_blocks("forward")
    stages: list[list[str]] = []

    def turns(calls: Mapping[str, Call], **limits: Any) -> dict[str, list[float]]:
        if limits.get("most") != 1:
            stages.append(list(calls))
        time = 0.9 if len(stages) < tuning.STAGES else 1.1  # the table looked slow at first
        return {name: [1.0 if blocks(name) == table else time] * 3 for name in calls}

    (found,) = tuning.tune(case(), seconds=1, turns=turns)
    assert min(trial.ratio for trial in found.measured.trials) == 0.9
    assert found.measured.best.blocks == table
    assert {str(trial.blocks) for trial in found.measured.trials if trial.last} == set(stages[-1])


def test_a_clock_that_drifts_changes_nothing() -> None:
    """Ratios are of one round; medians of each candidate alone would be those of the drift."""
    table = Chooser(case().problem, host()).table_blocks("forward")
    drift = [1.0, 10.0, 100.0, 1000.0, 1e4]

    def turns(calls: Mapping[str, Call], **limits: Any) -> dict[str, list[float]]:
        times = {}
        for number, name in enumerate(calls):
            late = drift[number % 3 :] + [1e5] * (number % 3)
            times[name] = [(1.0 if blocks(name) == table else 1.5) * d for d in late]
        times[str(table)] = drift
        return {name: times[name][:1] if limits.get("most") == 1 else drift for name in times}

    (found,) = tuning.tune(case(), seconds=1, turns=turns)
    assert {trial.ratio for trial in found.measured.trials} == {1.0}


@pytest.mark.parametrize(
    ("operation", "form", "kernels"),
    [
        ("forward", "auto", ["forward"]),
        ("backward", "fused", ["backward"]),
        ("backward", "split", ["backward_dq", "backward_dkv"]),
    ],
)
def test_every_pass_is_tuned_alone(
    timed: Any, operation: str, form: str, kernels: list[str]
) -> None:
    timed(lambda _: 1.0)
    asked, notes = case(operation, "causal()"), []
    found = tuning.tune(asked, seconds=1, form=form, note=notes.append)
    assert [tuned.key.kernel for tuned in found] == kernels == tuning.passes(asked, form)
    assert len(notes) == tuning.STAGES * len(kernels)
    assert {tuned.key.mask for tuned in found} == {"((q + p0) >= k)"}


def test_no_block_holds_the_traversed_axis_twice(timed: Any) -> None:
    stages = timed(lambda _: 1.0)
    tuning.tune(case(len_q=2000, len_k=40), seconds=1)
    assert {blocks(name).block_traverse for name in stages[3][1:]} <= set(range(20, 65))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [name for name in ITEM_BYTES if name != "bfloat16"])
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_what_is_measured_computes_the_same(operation: str, dtype: str) -> None:
    asked = case(operation, "causal()", len_q=70, len_k=90, dtype=dtype)
    inputs = workload.arrays(asked)
    names = ["o"] if operation == "forward" else ["dq", "dk", "dv"]
    tolerance = {"float16": 5e-3, "float32": 5e-6, "float64": 1e-13}[dtype]
    wanted = workload.own(asked, inputs)()
    wanted = dict(zip(names, [wanted] if operation == "forward" else wanted, strict=True))
    for kernel in tuning.passes(asked, "split"):
        race = tuning._Race(asked, "split", kernel, inputs, lambda _: None, tuning.turn_by_turn)
        outputs = {"backward_dq": ["dq"], "backward_dkv": ["dk", "dv"]}.get(kernel, names)
        tiles = race._family.candidates()
        for tile in tiles if dtype == "float32" else tiles[::5]:
            call = race._call(race._usual(tile))
            call()
            for name in outputs:
                found = race._operands[name].owner
                np.testing.assert_allclose(
                    found.astype("float64"), wanted[name].astype("float64"), atol=tolerance
                )


# The command -----------------------------------------------------------------------------------

TINY = ["tune", "--shape", "1,2,300,16", "--operation", "forward", "--threads", "1"]


@pytest.fixture
def narrow_wins(timed: Any) -> None:
    """One vector by about 64 rows is the fastest, half the table's time."""
    timed(lambda b: 1.0 + (b.tile.vectors > 1) + abs(b.block_traverse - 64) / 1e4)


def test_the_winner_is_shown_kept_and_used(
    cache: Path, narrow_wins: None, known_rates: None, capsys: Any
) -> None:
    assert cli.main(TINY) == 0
    said = capsys.readouterr().out
    assert "forward 1,2,300,16 float32 full(), 1 thread" in said
    assert re.search(r"\d+x1 by \d+ is \d+.\d% faster than the table's row", said)
    assert said.endswith(f"kept in {cache / 'tuned.json'}\n")
    (launch,) = plan.plan(case().problem, host(), "forward").launches
    assert launch.spec.vectors == 1 and 56 <= launch.spec.block_traverse <= 66

    assert cli.main(["inspect", "--shape", "1,2,300,16"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "tilefold tune, the best of" in said and "the table's row takes 10" in said

    assert cli.main(["tune", "--forget"]) == 0
    assert capsys.readouterr().out == "1 winners forgotten\n"
    assert not (cache / "tuned.json").exists()
    assert cli.main(["inspect", "--shape", "1,2,300,16"]) == 0
    assert "nothing here; to measure: tilefold tune" in capsys.readouterr().out


def test_a_dry_run_keeps_nothing(cache: Path, narrow_wins: None, capsys: Any) -> None:
    assert cli.main([*TINY, "--dry-run"]) == 0
    assert "nothing kept" in capsys.readouterr().out
    assert not tuned.STORE.load().entries
    assert not (cache / "tuned.json").exists()


@pytest.mark.slow
def test_precision_and_what_multiplies_are_said(cache: Path, timed: Any, capsys: Any) -> None:
    timed(lambda _: 1.0)
    assert cli.main([*TINY, "--precision", "medium", "--dtype", "float32", "float64"]) == 0
    said = capsys.readouterr().out
    assert "forward 1,2,300,16 float32 (medium) full()" in said
    assert "forward 1,2,300,16 float64 full()" in said  # which has one precision
    units = {key.dtype: key.unit for _, key in tuned.STORE.load().entries}
    medium = case(precision="medium").problem
    assert units == {
        "float32": Chooser(medium, host()).multiplier("forward").unit,
        "float64": "fma",
    }


def test_programs_read_json(cache: Path, narrow_wins: None, capsys: Any) -> None:
    assert cli.main([*TINY, "--mask", "full()", "causal()", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["path"] == str(cache / "tuned.json")
    assert [kernel["mask"] for kernel in answer["kernels"]] == ["full()", "causal()"]
    for kernel in answer["kernels"]:
        ratios = [candidate["ratio"] for candidate in kernel["candidates"]]
        last = [candidate["last_stage"] for candidate in kernel["candidates"]]
        assert last == sorted(last, reverse=True) and sum(last) == tuning.KEPT_BLOCKS + 1
        assert ratios[: sum(last)] == sorted(ratios[: sum(last)])
        assert ratios[sum(last) :] == sorted(ratios[sum(last) :])
        assert kernel["winner"] == kernel["candidates"][0]["blocks"]
        assert kernel["gain"] == pytest.approx(1 / ratios[0] - 1)
        assert kernel["table"] in {candidate["blocks"] for candidate in kernel["candidates"]}
    assert cli.main(["tune", "--forget", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forgotten"] == 2


def test_inspect_prices_the_rows(
    cache: Path, narrow_wins: None, known_rates: None, capsys: Any
) -> None:
    sizes = ["--shape", "1,2,300,16", "--json"]
    assert cli.main(["inspect", *sizes]) == 0
    (kernel,) = json.loads(capsys.readouterr().out)["kernels"]
    assert kernel["choice"]["source"] == "table" and kernel["choice"]["tuned"] is None
    assert kernel["choice"]["tune"] == "tilefold tune --shape 1,2,300,16 --operation forward"
    assert cli.main(TINY) == 0
    capsys.readouterr()
    assert cli.main(["inspect", *sizes]) == 0
    (kernel,) = json.loads(capsys.readouterr().out)["kernels"]
    tuned = kernel["choice"]["tuned"]
    assert kernel["choice"]["source"] == "tuned" and kernel["choice"]["tune"] is None
    assert 0.9 < tuned["cost_of_table"] < 1.1
    assert tuned["cost_of_worst"] >= tuned["cost_of_table"]
    assert tuned["threads"] == 1 and tuned["shape"] == "1,2,300,16"


@pytest.mark.parametrize(
    ("options", "command"),
    [
        (["--len-k", "50"], "tilefold tune --shape 1,2,300,16 --len-k 50 --operation forward"),
        (["--mask", "causal()"], "tune --shape 1,2,300,16 --mask 'causal()' --operation forward"),
        (["--dtype", "float64", "--operation", "backward"], "float64 --operation backward"),
        (["--precision", "high"], "--shape 1,2,300,16 --precision high --operation forward"),
        (["--heads-kv", "1", "--dim-v", "8"], "--heads-kv 1 --dim-v 8 --operation forward"),
    ],
)
def test_inspect_says_how_to_measure(
    cache: Path, known_rates: None, options: list[str], command: str, capsys: Any
) -> None:
    assert cli.main(["inspect", "--shape", "1,2,300,16", *options, "--json"]) == 0
    (*_, kernel) = json.loads(capsys.readouterr().out)["kernels"]
    assert command in kernel["choice"]["tune"]


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seconds", "0"], "--seconds must be more than 0, not 0"),
        (["--threads", "0"], "n must be an integer from 1 to"),
        (["--shape", "1,2"], "a shape is four integers"),
        (["--mask", "cusal()"], "unknown rule cusal"),
        (["--shape", "1,2,0,16"], "there is nothing to measure in shape 1,2,0,16"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    cache: Path, options: list[str], said: str, capsys: Any
) -> None:
    assert cli.main(["tune", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert said in captured.err


def test_nothing_is_measured_that_could_not_be_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("TILEFOLD_CACHE_MIB", "0")
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: pytest.fail("measured"))
    assert cli.main(TINY) == 2
    assert "winners cannot be kept: TILEFOLD_CACHE_MIB is 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.feature("S08")
def test_a_real_measurement_fits_the_terminal(
    cache: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["tune", "--shape", "1,1,40,16", "--seconds", "0.01", "--operation", "forward"]
    assert cli.main([*arguments, "--mask", "causal() & local(9)", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert max(map(len, said.out.splitlines())) <= 80
    assert "the table's row" in said.out and said.err == ""
