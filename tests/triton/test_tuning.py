"""Blocks of Triton kernels that are measured on request: who is tried, who wins, what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from interpreted import machine

import tilefold
from tilefold import causal, cli
from tilefold.backends.triton import autotune, plan, runtime, tuned
from tilefold.backends.triton.autotune import FINALISTS, ROUNDS, Trial, candidates
from tilefold.backends.triton.interpreter import Interpreted
from tilefold.backends.triton.machine import ResourceError
from tilefold.backends.triton.spec import Blocks
from tilefold.problems.attention import Problem

SMALL = Problem.of((1, 1, 20, 16), dtype="float32", mask=causal())
LARGE = Problem.of((4, 16, 4096, 128), dtype="float16", mask=causal())
SOME = [Blocks(16, 16, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1), Blocks(32, 32, 4, 1)]

Clock = Callable[[dict[Blocks, float]], list[Blocks]]


def usual(problem: Problem = SMALL, form: str = "auto") -> Blocks:
    return plan.plan(problem, "sm_90", "forward", form=form).launches[0].spec.blocks


@pytest.fixture
def on() -> Interpreted:
    return machine("sm_90")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, fresh_cache: Path) -> Iterator[Clock]:
    """Replaces the GPU's clock by seconds of blocks, of which all others are no candidates.

    Returns the blocks in the order in which they are timed. Kernels run, in the interpreter.
    """
    tuned.STORE.reread()
    measured: list[Blocks] = []

    def use(seconds: dict[Blocks, float]) -> list[Blocks]:
        prepared = autotune._Search._call

        def call(self: Any, name: str, blocks: Blocks) -> Callable[[], None]:
            made = prepared(self, name, blocks)

            def timed() -> None:
                made()
                measured.append(blocks)

            return timed

        def timer(call: Callable[[], None]) -> float:
            call()
            found = seconds[measured[-1]]
            if found < 0:
                raise ResourceError("too large")
            return found

        monkeypatch.setattr(autotune._Search, "_call", call)
        monkeypatch.setattr(autotune, "_seconds", timer)
        monkeypatch.setattr(autotune, "candidates", lambda launch, name: iter(seconds))
        return measured

    yield use
    tuned.STORE.forget()


@pytest.mark.slow
@pytest.mark.feature("S08")
def test_the_fastest_blocks_are_kept(clock: Clock, on: Interpreted) -> None:
    before = usual()
    clock({before: 3.0, SOME[1]: 1.0, SOME[0]: 2.0})
    lines: list[str] = []
    trials = tilefold.triton.tune(SMALL, "forward", on, note=lines.append)
    assert trials == [
        Trial("forward", SOME[1], 1.0, winner=True),
        Trial("forward", SOME[0], 2.0),
        Trial("forward", before, 3.0, usual=True),
    ]
    assert lines[0] == f"forward: {before}" and lines[-1] == f"forward: turn {ROUNDS} of {ROUNDS}"
    made = plan.plan(SMALL, "sm_90", "forward")
    assert made.launches[0].spec.blocks == SOME[1]
    assert "measured here" in "\n".join(made.explain())
    assert plan.plan(SMALL, "sm_80", "forward").launches[0].spec.blocks != SOME[1]
    assert tuned.STORE.forget() == 1
    assert usual() == before


@pytest.mark.slow
@pytest.mark.feature("S08")
def test_tuning_reaches_shapes_that_were_called_before(clock: Clock, on: Interpreted) -> None:
    import torch

    class Watched(Interpreted):
        """The interpreter, and the sources of the kernels it was asked for."""

        def function(self, text: str, entry: str) -> Any:
            sources.append(text)
            return super().function(text, entry)

    sources: list[str] = []
    watched = Watched("sm_90")
    q = torch.zeros(1, 1, 20, 16)
    for _ in range(2):
        tilefold.triton.attention(q, q, q, mask=causal(), machine=watched)
    clock({usual(): 3.0, SOME[1]: 1.0})
    tilefold.triton.tune(SMALL, "forward", on)
    for _ in range(2):
        tilefold.triton.attention(q, q, q, mask=causal(), machine=watched)
    before, after = sources
    assert before != after, "a call that was prepared before the tuning is prepared again"


@pytest.mark.slow
def test_the_best_are_timed_again_turn_by_turn(clock: Clock, on: Interpreted) -> None:
    measured = clock({usual(): 9.0, **dict(zip(SOME, (1.0, 2.0, 3.0, 4.0), strict=True))})
    tilefold.triton.tune(SMALL, "forward", on, keep=False)
    assert len(SOME) == FINALISTS
    assert measured[5:] == [*SOME, usual()] * ROUNDS, "the usual blocks take part"


@pytest.mark.slow
def test_a_little_faster_is_noise(clock: Clock, on: Interpreted) -> None:
    clock({usual(): 1.0, SOME[0]: 0.995})
    first, second = tilefold.triton.tune(SMALL, "forward", on)
    assert first.blocks == SOME[0] and not first.winner
    assert second.usual and second.winner


@pytest.mark.slow
def test_it_goes_on_where_blocks_do_not_fit(clock: Clock, on: Interpreted) -> None:
    clock({SOME[0]: -1.0, SOME[1]: 1.0})
    trials = tilefold.triton.tune(SMALL, "forward", on, keep=False)
    assert [trial.seconds for trial in trials] == [1.0, None]
    assert trials[1].reason == "too large" and not tuned.STORE.path.exists()


@pytest.mark.slow
def test_where_none_fits_nothing_is_kept(clock: Clock, on: Interpreted) -> None:
    clock({SOME[0]: -1.0})
    (trial,) = tilefold.triton.tune(SMALL, "forward", on)
    assert not trial.winner and not tuned.STORE.path.exists()


@pytest.mark.slow
def test_after_some_seconds_no_candidate_begins(clock: Clock, on: Interpreted) -> None:
    measured = clock({usual(): 3.0, SOME[1]: 1.0})
    (trial,) = tilefold.triton.tune(SMALL, "forward", on, seconds=0.0)
    assert trial.usual and trial.winner and set(measured) == {usual()}


@pytest.mark.slow
def test_on_hopper_the_plain_kernel_is_tuned(clock: Clock, on: Interpreted) -> None:
    """Its own kernel has the blocks that shared memory allows: the plain one cannot hold them."""
    problem = Problem.of((1, 2, 40, 128), dtype="float16")
    assert plan.plan(problem, "sm_90", "forward").launches[0].spec.gluon
    tiled = usual(problem, "tiled")
    clock({tiled: 1.0})
    (trial,) = tilefold.triton.tune(problem, "forward", on, keep=False)
    assert trial.blocks == tiled and trial.usual
    assert tilefold.triton.tune(problem, "forward", on, form="hopper", keep=False) == []


@pytest.mark.slow
@pytest.mark.parametrize("problem", [LARGE, Problem.of((1, 1, 512, 256), dtype="float64")], ids=str)
def test_candidates_begin_with_the_usual_blocks_and_fit(problem: Problem) -> None:
    (launch,) = plan.plan(problem, "sm_90", "forward", form="tiled").launches
    found = list(candidates(launch, "sm_90"))
    assert found[0] == launch.spec.blocks
    assert len(found) == len(set(found)) > 10
    distances = [autotune._distance(blocks, found[0]) for blocks in found]
    assert distances == sorted(distances), "the nearest come first"
    assert any(blocks.streamed for blocks in found)
    for blocks in found:  # raises for those that do not fit
        plan.plan(problem, "sm_90", "forward", form="tiled", blocks=blocks)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b'{"format": "other", "blocks": []}', b'{"format": 1, "blocks": 7}'],
)
def test_a_damaged_file_is_left_out(fresh_cache: Path, content: bytes) -> None:
    fresh_cache.mkdir(mode=0o700)
    (tuned.STORE.path).write_bytes(content)
    tuned.STORE.reread()
    assert tuned.STORE.load().entries == {}
    key = plan.key_of(plan.plan(SMALL, "sm_90", "forward").launches[0].spec, "sm_90")
    tuned.STORE.keep({key: Blocks(16, 16, 1, 1)})
    document = json.loads((tuned.STORE.path).read_text())
    document["blocks"] += [{"key": {}, "blocks": {}}, {"key": 3}, None]
    document["blocks"].append({**document["blocks"][0], "blocks": {"parallel": 7}})
    (tuned.STORE.path).write_text(json.dumps(document))
    tuned.STORE.reread()
    assert tuned.STORE.load().entries == {key: Blocks(16, 16, 1, 1)}
    tuned.STORE.forget()


# The command ----------------------------------------------------------------------------------

WORDS = ["tune", "--device", "cuda", "--operation", "forward", "--shape", "1,1,20,16"]
WORDS += ["--mask", "causal()"]


@pytest.mark.slow
@pytest.mark.feature("S08")
def test_the_command_shows_and_keeps(
    clock: Clock, on: Interpreted, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(runtime, "gpu", lambda: on)
    clock({usual(): 3e-3, SOME[1]: 1e-3, SOME[0]: -1.0})
    assert cli.main(WORDS) == 0
    printed = capsys.readouterr().out
    assert "forward 1,1,20,16 float32 causal()" in printed and "1.00 ms" in printed
    assert f"{SOME[1]} is 200.0% faster than the blocks of before" in printed
    assert "1 of 3 do not fit" in printed
    assert usual() == SOME[1]
    assert cli.main([*WORDS, "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["architecture"] == "sm_90" and document["path"] is None
    (kernel,) = document["kernels"]
    assert kernel["winner"] == str(SOME[1]) and len(kernel["candidates"]) == 3
    assert cli.main(["tune", "--device", "cuda", "--forget"]) == 0
    assert capsys.readouterr().out == "1 winners forgotten\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "2"], "--threads goes with --device cpu"),
        (["--seconds", "0"], "--seconds must be more than 0, not 0.0"),
        (["--shape", "1,2"], "a shape is four integers"),
    ],
)
def test_bad_words_get_one_line(
    words: list[str], message: str, on: Interpreted, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(runtime, "gpu", lambda: on)
    assert cli.main([*WORDS, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("shape", ["1,1,0,16", "1,1,20,16"])
def test_where_nothing_is_to_be_seen_nothing_is_tuned(
    shape: str, clock: Clock, on: Interpreted, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(runtime, "gpu", lambda: on)
    measured = clock({usual(): 1.0})
    words = [*WORDS, "--shape", shape, "--mask", "full()" if ",0," in shape else "~full()"]
    assert cli.main(words) == 0
    assert not measured and "there is nothing to tune" in capsys.readouterr().out


def test_what_was_measured_and_fits_no_more_gives_way(fresh_cache: Path) -> None:
    tuned.STORE.reread()
    wide = Problem.of((1, 1, 64, 512))
    before = plan.plan(wide, "sm_80", "forward").launches[0]
    tuned.STORE.keep({plan.key_of(before.spec, "sm_80"): Blocks(128, 128, 4, 3)})
    made = plan.plan(wide, "sm_80", "forward")
    assert made.launches[0].spec.blocks == before.spec.blocks
    assert "what was measured does not fit" in "\n".join(made.explain())
    tuned.STORE.forget()


def test_blocks_of_decoding_are_kept_by_their_rows(fresh_cache: Path) -> None:
    tuned.STORE.reread()
    many, few = (
        Problem.of((1, 8, queries, 64), (1, 2, 4096, 64), dtype="float16") for queries in (64, 1)
    )
    launch = plan.plan(many, "sm_80", "forward").launches[0]
    tuned.STORE.keep({plan.key_of(launch.spec, "sm_80"): Blocks(64, 16, 4, 2)})
    assert plan.plan(many, "sm_80", "forward").launches[0].spec.blocks == Blocks(64, 16, 4, 2)
    assert plan.plan(few, "sm_80", "forward").launches[0].spec.blocks.parallel == 16
    tuned.STORE.forget()


def test_without_a_gpu_the_command_says_so(capsys: Any) -> None:
    if runtime.missing() is None:
        pytest.skip("there is a GPU")
    assert cli.main(WORDS) != 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "GPU" in error
