"""`tilefold tune --operation gemm`: what is measured, and that later products take the winner."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import assert_near
from gemms import UNITS, check, exact, normal

import tilefold
from tilefold import cli
from tilefold.backends.cpu import peak
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.matmul import tuned
from tilefold.backends.cpu.matmul.blocks import GemmBlocks
from tilefold.backends.cpu.matmul.few_rows_plan import FewRowsPlan
from tilefold.measuring import product_timing, product_tuning, tuning
from tilefold.measuring.products import ProductCase
from tilefold.measuring.workload import Call
from tilefold.planning.roofline import Rates

SIZE = (66, 130, 700)
"""Rows and columns end within a register tile of any width; terms are several blocks."""

COMMAND = ["tune", "--operation", "gemm", "--size", "x".join(map(str, SIZE))]


@pytest.fixture
def cache(fresh_cache: Path) -> Iterator[Path]:
    """An empty cache, and no winner remembered from before or left for later tests."""
    tuned.STORE.forget()
    yield fresh_cache
    tuned.STORE.forget()


def case(**changes: Any) -> ProductCase:
    return ProductCase("gemm", *SIZE, **changes)


def blocks_of(case: ProductCase, device: Device | None = None) -> GemmBlocks:
    made = case.plan(device or host())
    assert not isinstance(made, FewRowsPlan)
    sizes = made.block_m, made.block_n, made.block_k
    return GemmBlocks(made.spec.rows, made.spec.vectors, *sizes)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A clock by which the narrowest tile wins, with the fewest terms; who ran in each stage."""
    stages: list[list[str]] = []

    def turns(calls: Mapping[str, Call], **limits: Any) -> dict[str, list[float]]:
        stages.append(list(calls))
        return {name: [_model(name)] * limits.get("most", 3) for name in calls}

    monkeypatch.setattr(tuning, "turn_by_turn", turns)
    return stages


def _model(name: str) -> float:
    _, vectors, _, _, terms = (int(number) for number in re.findall(r"\d+", name))
    return vectors + terms / 1e4


@pytest.mark.slow
@pytest.mark.feature("M07")
def test_later_products_take_the_winner(cache: Path, timed: Any, capsys: Any) -> None:
    """A product that was planned before too; its bits are the same for any number of threads."""
    m, n, k = SIZE
    a, b, usual = normal(m, k), normal(k, n), blocks_of(case())
    check(a, b)
    assert cli.main(COMMAND) == 0
    said = capsys.readouterr().out
    assert re.search(r"is \d+\.\d% faster than the table's row", said)
    assert said.endswith(f"kept in {cache / 'tuned_products.json'}\n")
    found = blocks_of(case())
    assert found.block_k < usual.block_k and found.vectors == 1
    compiled, threads = {*cache.glob("*.bin")}, tilefold.get_num_threads()
    results = []
    for number in (1, 2):
        tilefold.set_num_threads(number)
        results.append(check(a, b))
    tilefold.set_num_threads(threads)
    assert {*cache.glob("*.bin")} - compiled
    np.testing.assert_array_equal(results[0], results[1])
    assert cli.main(["tune", "--operation", "gemm", "--forget"]) == 0
    assert capsys.readouterr().out == "1 winners forgotten\n"
    assert blocks_of(case()) == usual


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_what_is_measured_computes_the_same(dtype: str) -> None:
    """Every register tile, some with blocks that cut rows, columns and terms."""
    asked = case(dtype=dtype, transpose_b=dtype == "int8")
    race, given = product_tuning._Race(asked), product_timing.arrays(asked)
    b = given.b.T if asked.transpose_b else given.b
    want, terms = exact(given.a, b)
    found = [race.terms(tile.rows, tile.vectors)[:1] or [tile] for tile in race.tiles()]
    found += [race.blocks(found[-1][0])[:1]] if found else [[race.usual]]
    assert len({str(blocks) for (blocks,) in found}) > 3 or host().isa == "amx"
    for (blocks,) in found:
        given.out.fill(99)
        race.call(blocks, given)()
        allowed = 0 if dtype == "int8" else SIZE[2] * UNITS["float32"] * terms
        assert_near(str(blocks), given.out, want, allowed)


@pytest.mark.parametrize(
    ("other", "served"),
    [
        ({"activation": "relu"}, True),
        ({"threads": 2}, True),
        ({"m": SIZE[0] + 1}, False),
        ({"dtype": "float64"}, False),
        ({"transpose_a": True}, False),
        ({"transpose_b": True}, False),
        ({"gate": True}, False),
    ],
)
def test_a_winner_serves_what_it_was_measured_for(
    cache: Path, timed: Any, other: dict[str, Any], served: bool
) -> None:
    product_tuning.keep([product_tuning.tune(case(), seconds=0)])
    assert (blocks_of(replace(case(), **other)).vectors == 1) == served


def test_more_cores_share_the_rows_and_columns_alone(cache: Path, timed: Any) -> None:
    asked = replace(case(), m=2000, n=900)
    product_tuning.keep([product_tuning.tune(asked, seconds=0)])
    device = replace(host(), cores=host().cores + 300)
    here, there = blocks_of(asked), blocks_of(asked, device)
    assert asked.plan(device).items > asked.plan(host()).items
    assert (here.rows, here.vectors, here.block_k) == (there.rows, there.vectors, there.block_k)


def test_stages_narrow_the_choice(timed: list[list[str]]) -> None:
    found = product_tuning.tune(case(), seconds=0)
    stages = timed[2::3]  # the two before each are to compile, and to count repeats
    assert len(stages) == product_tuning.STAGES
    assert all(stage[0] == str(found.measured.table) for stage in stages)
    assert len({str(trial.blocks) for trial in found.measured.trials}) == len(found.measured.trials)
    assert found.measured.best.blocks.vectors == 1


def test_programs_read_json_and_a_dry_run_keeps_nothing(
    cache: Path, timed: Any, capsys: Any
) -> None:
    assert cli.main([*COMMAND, "--transpose-a", "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (kernel,) = answer["kernels"]
    assert answer["path"] is None and not tuned.STORE.path.exists()
    assert (kernel["m"], kernel["n"], kernel["k"]) == SIZE
    assert kernel["transpose_a"] and not kernel["transpose_b"]
    assert kernel["winner"] == kernel["candidates"][0]["blocks"] != kernel["table"]


def test_inspect_says_who_chose(
    cache: Path, timed: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    when = "2026-01-01T00:00:00+00:00"
    rates = Rates("a machine", "float32", 1, 1e11, 1e9, 1e10, when)
    monkeypatch.setattr(peak, "rates", lambda *_, **__: rates)
    asked = ["inspect", *COMMAND[1:]]
    assert cli.main(asked) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"to measure: tilefold tune --operation gemm --size {COMMAND[-1]}" in said
    assert cli.main(COMMAND) == 0
    capsys.readouterr()
    assert cli.main(asked) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "by tilefold tune, the best of" in said and "the table's row takes" in said
    assert cli.main([*asked, "--json"]) == 0
    choice = json.loads(capsys.readouterr().out)["plan"]["choice"]
    assert choice["source"] == "tuned" and choice["tuned"]["threads"] == 1


@pytest.mark.parametrize(("name", "value"), [("rows", 99), ("block_k", 0), ("vectors", "two")])
def test_what_kernels_cannot_have_is_ignored(
    cache: Path, timed: Any, name: str, value: object
) -> None:
    usual = blocks_of(case())
    product_tuning.keep([product_tuning.tune(case(), seconds=0)])
    document = json.loads(tuned.STORE.path.read_text(encoding="utf-8"))
    document["winners"][0]["best"]["blocks"][name] = value
    tuned.STORE.path.write_text(json.dumps(document), encoding="utf-8")
    tuned.STORE.reread()
    assert blocks_of(case()) == usual
    assert "1 of the winners in" in str(tuned.STORE.load().problem)


@pytest.mark.feature("T15")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--operation gemm forward", "--operation gemm stands alone"),
        ("--operation gemm --mask causal()", "--mask goes with attention, not with"),
        ("--operation gemm --form split", "--form goes with attention, not with"),
        ("--operation gemm --device cuda", "--device goes with attention, not with"),
        ("--operation gemm --scheme int8", "--scheme goes with --operation qgemm"),
        ("--operation gemm --size 8x8", "a size is three integers"),
        ("--operation gemm --size 4x500x600", "4x500x600 has few rows, or columns: its kernel"),
        ("--operation qgemm", "--operation qgemm is not tuned"),
        ("--size 8x8x8", "--size goes with --operation gemm or qgemm"),
        ("--dtype int8", "--dtype int8 goes with --operation gemm"),
    ],
)
def test_bad_options_are_one_line(cache: Path, options: str, said: str, capsys: Any) -> None:
    assert cli.main(["tune", *options.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert said in shown.err
