"""What was measured here overrides the tables; a file that nobody can use overrides nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilefold
from tilefold import Rule, causal, full, lengths, local
from tilefold.backends.cpu import plan, tables, tuned
from tilefold.backends.cpu.choice import Chooser
from tilefold.backends.cpu.device import Device, host
from tilefold.backends.cpu.tables import FAMILIES, Blocks, RegisterTile
from tilefold.backends.cpu.tuned import Key, Processor, Timed, TunedBlocks
from tilefold.common.tuned_store import TunedFile, is_kept
from tilefold.measuring import workload
from tilefold.problems import reference
from tilefold.problems.attention import Problem

OTHER = Blocks(RegisterTile(3, 1), 33)
"""Blocks that no table holds."""


@pytest.fixture
def cache(fresh_cache: Path) -> Iterator[Path]:
    """An empty cache, and no plan or winner remembered from before or left for later tests."""
    tuned.STORE.forget()
    yield fresh_cache
    tuned.STORE.forget()


def problem(mask: Rule | None = None, length: int = 300, **changes: Any) -> Problem:
    sizes: dict[str, Any] = {"batch": 1, "heads_q": 2, "heads_kv": 2, "len_q": length, "len_k": 96}
    fields = sizes | {"dim": 16, "dim_v": 8, "dtype": "float32", "scale": 0.25} | changes
    return Problem(**fields, mask=full() if mask is None else mask)


def key_of(problem: Problem, kernel: str = "forward", device: Device | None = None) -> Key:
    return Chooser(problem, device or host()).key(kernel)


def winner(blocks: Blocks = OTHER, **changes: Any) -> TunedBlocks:
    worst = Timed(Blocks(RegisterTile(2, 2), 32), 3.0)
    table = Timed(Blocks(RegisterTile(4, 2), 128), 2.0)
    fields: dict[str, Any] = {"candidates": 9, "shape": "1,2,300,16", "threads": 1}
    fields |= {"date": "2026-11-21T08:00:00+00:00", "versions": {"tilefold": "0.1.0"}}
    return TunedBlocks(
        **{"best": Timed(blocks, 1.0), "table": table, "worst": worst} | fields | changes
    )


def keep(problem: Problem, kernel: str = "forward", blocks: Blocks = OTHER) -> None:
    table = Timed(Chooser(problem, host()).table_blocks(kernel), 2.0)
    found = winner(blocks, table=table)
    tuned.STORE.keep({(Processor.of(host()), key_of(problem, kernel)): found})


def planned(problem: Problem, operation: str = "forward", **options: Any) -> dict[str, Blocks]:
    launches = plan.plan(problem, host(), operation, **options).launches
    return {
        launch.spec.kernel: Blocks(
            RegisterTile(launch.spec.rows, launch.spec.vectors), launch.spec.block_traverse
        )
        for launch in launches
    }


# What the planner takes ------------------------------------------------------------------------


@pytest.mark.feature("M07")
def test_a_winner_overrides_the_table_and_is_overridden_by_the_caller(cache: Path) -> None:
    asked = problem()
    table = planned(asked)
    assert table == {"forward": Chooser(asked, host()).table_blocks("forward")}
    keep(asked)  # the plan of the line above is remembered; it must not survive this
    assert planned(asked) == {"forward": OTHER}
    tile = FAMILIES[host().isa].tiles[0]
    assert planned(asked, tile=tile)["forward"].tile == tile
    assert planned(asked, block_traverse=66)["forward"] == replace(OTHER, block_traverse=66)
    assert tuned.STORE.forget() == 1
    assert planned(asked) == table


def test_a_winner_serves_one_kernel_of_a_plan(cache: Path) -> None:
    asked = problem()
    keep(asked, "backward_dkv")
    found = planned(asked, "backward", form="split")
    assert found.pop("backward_dkv") == OTHER
    assert OTHER not in found.values() and set(found) == {"delta", "backward_dq"}


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        (problem(length=300), True),
        (problem(length=5000), True),
        (problem(length=256), False),
        (problem(length=100), False),
        (problem(batch=3, heads_q=6), True),
        (problem(dim=24), False),
        (problem(dim_v=16), False),
        (problem(dtype="float64"), False),
        (problem(lengths((50,))), True),
        (problem(causal() & local(9), len_k=300), None),
    ],
    ids=lambda value: str(value) if isinstance(value, bool) else None,
)
def test_a_winner_serves_what_it_was_measured_for(
    cache: Path, asked: Problem, served: bool | None
) -> None:
    if served is None:  # unless the table has another row for it, as it has on AVX-512
        rows = [Chooser(each, host()).table_blocks("forward") for each in (asked, problem())]
        served = rows[0] == rows[1]
    keep(problem())
    assert (planned(asked)["forward"] == OTHER) == served


def test_a_mask_with_a_winner_of_its_own_takes_it(cache: Path) -> None:
    own = Blocks(RegisterTile(2, 1), 34)
    keep(problem())
    keep(problem(local(5)), blocks=own)
    assert planned(problem(local(5)))["forward"] == own
    assert planned(problem(lengths((50,))))["forward"] == OTHER
    assert planned(problem())["forward"] == OTHER


def test_a_short_axis_has_winners_by_its_whole_vectors(cache: Path) -> None:
    lanes = FAMILIES[host().isa].lanes(4)
    keep(problem(length=2 * lanes))
    assert planned(problem(length=2 * lanes - 1))["forward"] == OTHER
    for length in (2 * lanes + 1, lanes):  # one of them may be decoded
        assert planned(problem(length=length)).get("forward") != OTHER


def test_another_machine_has_other_winners() -> None:
    here = host()
    for other in (
        replace(here, name="another"),
        replace(here, isa="neon"),
        replace(here, l1_bytes=here.l1_bytes + 1024),
        replace(here, features="+sse2"),
    ):
        assert Processor.of(other) != Processor.of(here)
    assert Processor.of(replace(here, cores=here.cores + 1)) == Processor.of(here)


@pytest.mark.slow
def test_results_with_a_winner_are_those_of_the_definition(cache: Path) -> None:
    asked = problem(causal(), length=150, len_k=170)
    for kernel in ("forward", "backward", "backward_dq", "backward_dkv"):
        keep(asked, kernel)
    a = workload.arrays(workload.Case(asked))
    o, lse = tilefold.attention(a.q, a.k, a.v, mask=causal(), return_lse=True)
    wanted = reference.attention(a.q, a.k, a.v, mask=causal())
    np.testing.assert_allclose(o, wanted[0], atol=2e-6)
    gradients = tilefold.attention_backward(a.do, a.q, a.k, a.v, o, lse, mask=causal())
    expected = reference.attention_backward(a.do, a.q, a.k, a.v, *wanted, mask=causal())
    for found, exact in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, exact, atol=2e-5)


@pytest.mark.slow
def test_a_call_that_was_made_before_takes_the_winner(cache: Path) -> None:
    """Calls are prepared once, and remember their kernels."""
    asked = problem(dim=19)
    a = workload.arrays(workload.Case(asked))
    kernels = []
    for blocks in (OTHER, Blocks(RegisterTile(2, 1), 62)):
        keep(asked, blocks=blocks)
        tilefold.attention(a.q, a.k, a.v, scale=asked.scale)
        kernels.append({path.name for path in cache.glob("*.bin")})
    assert len(kernels[0]) == 2  # the table's, of `arrays`, and the first winner's
    assert len(kernels[1] - kernels[0]) == 1


# The file --------------------------------------------------------------------------------------


def test_the_file_is_beside_the_kernels_and_is_read_once(cache: Path) -> None:
    keep(problem())
    assert tuned.STORE.path == cache / "tuned.json"
    kept = tuned.STORE.load()
    assert kept.problem is None
    assert [found.best.blocks for found in kept.entries.values()] == [OTHER]
    tuned.STORE.path.unlink()  # whoever read it again would find nothing
    for length in range(300, 310):
        assert planned(problem(length=length))["forward"] == OTHER
    assert tuned.STORE.load() is kept


def test_winners_of_others_stay(cache: Path) -> None:
    elsewhere = replace(Processor.of(host()), name="another")
    tuned.STORE.keep({(elsewhere, key_of(problem())): winner()})
    assert planned(problem())["forward"] != OTHER
    keep(problem(dim=24))
    keep(problem(dim=24), blocks=Blocks(RegisterTile(2, 1), 20))
    assert len(tuned.STORE.load().entries) == 2


@pytest.mark.slow
def test_another_process_reads_it(cache: Path) -> None:
    keep(problem(dim_v=16))
    code = (
        "from tilefold import full; from tilefold.backends.cpu import plan;"
        "from tilefold.backends.cpu.device import host;"
        "from tilefold.problems.attention import Problem;"
        "made = plan.plan(Problem(1, 2, 2, 300, 96, 16, 16, 'float32', 0.25, full()), host(),"
        " 'forward'); spec = made.launches[0].spec;"
        "print(spec.rows, spec.vectors, spec.block_traverse)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "1", "33"]


@pytest.mark.feature("T15")
def test_a_cache_that_cannot_be_looked_into_has_no_winners(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is not the owner of HOME; a long name fails for root, too."""
    monkeypatch.setenv("TILEFOLD_CACHE_DIR", "/" + "long" * 1500)
    monkeypatch.delitem(sys.modules, tuned.__name__)
    assert not is_kept(tables.TUNED, tuned.__name__)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff\xfe",
        b"{",
        b"[]",
        b"null",
        b'{"format": "tilefold winners 1"}',
        b'{"format": "tilefold winners 1", "winners": 3}',
        b'{"format": "tilefold winners 999", "winners": []}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_left_out_with_a_reason(cache: Path, content: bytes) -> None:
    asked = problem()
    keep(asked)
    damage(cache, content)
    assert planned(asked)["forward"] == Chooser(asked, host()).table_blocks("forward")
    said = tuned.STORE.load().problem
    assert said == f"{cache / 'tuned.json'} is not a file of this version's winners"
    keep(asked)  # and is replaced by the next measurement
    assert tuned.STORE.load().problem is None
    assert planned(asked)["forward"] == OTHER


def test_a_file_that_cannot_be_read_is_left_out_with_a_reason(cache: Path) -> None:
    keep(problem())
    (cache / "tuned.json").unlink()
    (cache / "tuned.json").mkdir()
    reread()
    assert "cannot be read" in str(tuned.STORE.load().problem)
    assert planned(problem())["forward"] != OTHER
    (cache / "tuned.json").rmdir()


WRONG: list[tuple[str, Any]] = [
    ("machine", None),
    ("machine.isa", "of another time"),
    ("machine.l1_bytes", "32768"),
    ("machine.colour", "red"),
    ("key.dim", 16.5),
    ("key.dim", True),
    ("key.kernel", None),
    ("best", []),
    ("best.blocks.tile.rows", 0),
    ("best.blocks.tile.rows", 30),
    ("best.blocks.tile.vectors", "1"),
    ("best.blocks.block_traverse", 34),
    ("best.blocks.block_traverse", 3 * 10**9),
    ("best.seconds", 0),
    ("table.seconds", float("nan")),
    ("worst.seconds", "a lot"),
    ("date", 20261121),
    ("threads", None),
    ("extra", 1),
]


@pytest.mark.parametrize(("place", "value"), WRONG, ids=lambda value: str(value))
def test_an_entry_that_is_wrong_is_left_out_alone(cache: Path, place: str, value: Any) -> None:
    keep(problem())
    keep(problem(dim=24))
    file = cache / "tuned.json"
    document = json.loads(file.read_bytes())
    inside = document["winners"][0]
    *path, last = place.split(".")
    for name in path:
        inside = inside[name]
    inside[last] = value
    damage(cache, json.dumps(document).encode())
    assert tuned.STORE.load().problem == f"1 of the winners in {file} cannot be used"
    assert planned(problem())["forward"] != OTHER
    assert planned(problem(dim=24))["forward"] == OTHER


def test_an_entry_without_a_field_is_left_out(cache: Path) -> None:
    keep(problem())
    document = json.loads((cache / "tuned.json").read_bytes())
    for name in [*document["winners"][0]]:
        shorter = {k: v for k, v in document["winners"][0].items() if k != name}
        damage(cache, json.dumps(document | {"winners": [shorter, 7, None]}).encode())
        assert tuned.STORE.load() == TunedFile(
            {}, f"3 of the winners in {cache / 'tuned.json'} cannot be used"
        )


def test_winners_are_not_kept_where_kernels_are_not(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILEFOLD_CACHE_MIB", "0")
    with pytest.raises(OSError, match="winners cannot be kept: TILEFOLD_CACHE_MIB is 0"):
        keep(problem())


def damage(folder: Path, content: bytes) -> None:
    (folder / "tuned.json").write_bytes(content)
    reread()


def reread() -> None:
    """As in a new process."""
    tuned.STORE.reread()
