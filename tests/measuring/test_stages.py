"""Where the time of a call goes: kernels that count the ticks of their stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from levels import device

from tilefold import cli
from tilefold.backends.cpu import dispatch, runtime
from tilefold.backends.cpu.device import host
from tilefold.backends.cpu.kernel import emit
from tilefold.backends.cpu.kernels.stages import TICKS
from tilefold.backends.cpu.plan import plan
from tilefold.backends.cpu.spec import STAGES
from tilefold.masks import parse
from tilefold.measuring import timing, workload
from tilefold.measuring.stages import Profile, profile, ticks_per_second
from tilefold.measuring.workload import Case
from tilefold.problems.attention import Problem
from tilefold.problems.buffer import Buffer


def case(operation: str = "forward", mask: str = "causal()", **changes: Any) -> Case:
    sizes: dict[str, Any] = {"batch": 1, "heads_q": 2, "heads_kv": 1, "len_q": 150, "len_k": 150}
    fields = sizes | {"dim": 20, "dim_v": 12, "dtype": "float32", "scale": 0.25} | changes
    return Case(Problem(**fields, mask=parse.parse(mask)), operation, threads=2)


EXPECTED = {
    "forward": {"packing", "scores", "edges", "softmax", "products", "results"},
    "decode": {"packing", "scores", "softmax", "products", "results"},
    "fused": {"packing", "scores", "edges", "slopes", "products", "results"},
    "split": {"packing", "scores", "edges", "slopes", "products", "results"},
}


@pytest.mark.slow
@pytest.mark.parametrize("form", EXPECTED)
def test_a_kernel_that_counts_computes_the_same_bits(form: str) -> None:
    made = case("backward" if form in ("fused", "split") else "forward")
    if form == "decode":
        made = case(mask="full()", len_q=1, len_k=3000)
    way = "auto" if form == "forward" else form
    results = []
    ticks = np.zeros((2, len(STAGES)), np.int64)
    inputs = workload.arrays(made)
    with timing.using_threads(2):
        for extra in ((), (TICKS,)):
            buffers = timing.operands(made, inputs)
            if extra:
                buffers[TICKS] = Buffer(ticks.ctypes.data, ticks.shape, (0,) * 4, "int64", ticks)
            dispatch.run(plan(made.problem, host(), made.operation, way, extra=extra), buffers)
            results.append(buffers)
    names = ("o", "lse") if made.operation == "forward" else ("dq", "dk", "dv")
    for name in names:
        plain, counted = (np.asarray(each[name].owner) for each in results)
        assert np.array_equal(plain, counted), name
    spent = dict(zip(STAGES, ticks.sum(axis=0), strict=True))
    assert {name for name, number in spent.items() if number and name != "claims"} == EXPECTED[form]


@pytest.mark.slow
def test_stages_and_waiting_make_the_call() -> None:
    found = profile(case(len_q=600, len_k=600), host(), seconds=0)
    assert set(found.stages) == set(STAGES)
    assert min(found.stages.values()) >= 0
    assert sum(found.stages.values()) <= 1.05 * found.seconds
    assert set(found.bounds) == {"scores", "edges", "softmax", "products"}
    assert found.bounds["edges"] < found.bounds["scores"]
    back = profile(case("backward"), host(), seconds=0)
    assert set(back.bounds) == {"scores", "edges", "slopes", "products"}
    # dV, dK and dQ: 12 + 20 + 20 of a pair, S: 20
    shares = (back.bounds["scores"] + back.bounds["edges"], back.bounds["products"])
    assert shares[1] == pytest.approx(shares[0] * 52 / 20)


def test_a_profile_says_what_counting_costs_and_how_long_a_worker_waits() -> None:
    found = Profile(case(), 2.0, 1.6, {"scores": 1.0, "products": 0.75}, {"scores": 0.5})
    assert found.cost == pytest.approx(0.25)
    assert found.waiting == pytest.approx(0.25)
    assert replace(found, seconds=1.0).waiting == 0


def test_the_clock_ticks_steadily() -> None:
    rate = ticks_per_second(host())
    assert 1e6 < rate < 1e11
    assert ticks_per_second(host()) == pytest.approx(rate, rel=0.05)


def test_only_kernels_that_count_read_a_clock_and_each_processor_its_own() -> None:
    problem = case().problem
    for isa, instruction in (("neon", "cntvct_el0"), ("sse2", "rdtsc")):
        (plain,) = plan(problem, device(isa), "forward").launches
        (counting,) = plan(problem, device(isa), "forward", extra=(TICKS,)).launches
        assert "spent" not in emit(plain.spec)
        listing = runtime.assembly(emit(counting.spec), device(isa)).lower()
        assert listing.count(instruction) > len(STAGES)


@pytest.mark.slow
def test_the_command_shows_stages_and_refuses_what_it_cannot(capsys: Any) -> None:
    words = ["inspect", "--shape", "1,2,200,16", "--mask", "causal()", "--profile"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "forward 1,2,200,16 causal()" in said
    shown = {line.split()[0] for line in said.splitlines()[2:]}
    assert shown & {"edges", "softmax", "products"}  # on a busy machine waiting hides some
    assert cli.main([*words, "--json"]) == 0
    assert '"waiting"' in capsys.readouterr().out
    for more in (["--text"], ["--backend", "metal"], ["--operation", "gemm"]):
        assert cli.main([*words[:-3], *more, "--profile"]) == 2
        assert "--profile goes with attention" in capsys.readouterr().err
    assert cli.main([*words, "--score", "softcap(5)"]) == 2
    assert "stages are counted without score" in capsys.readouterr().err
